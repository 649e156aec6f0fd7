"""Structures that are kept, and what is said of those that are dropped."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structures import Nowhere, Structures, molecule

from psnc import Pipeline, run_pipeline
from psnc.errors import ConfigurationError, StageError
from psnc.testing import check_filter
from psnc_atm import AtomicData, SelectElements, SelectEnergy, SelectForces, SelectSize

WATER, METHANE, SALT, NOTHING = [8, 1, 1], [6, 1, 1, 1, 1], [11, 17], []


def kept(filter: Any, structures: list[AtomicData]) -> list[int]:
    """Which of the structures are kept."""
    passed = list(filter(iter(structures)))
    return [i for i, one in enumerate(structures) if any(one is other for other in passed)]


def test_the_filters_keep_the_rules() -> None:
    source = Structures([5, 0, 6])
    check_filter(SelectElements(allowed=range(1, 20), excluded=["He"]), source)
    check_filter(SelectSize(1, 3), source)
    check_filter(SelectEnergy(-500, 500.0, missing="keep"), source)
    check_filter(SelectForces(maximum=2, missing="drop"), source)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"allowed": ["H", "C", "O"]}, [0, 1, 3]),
        ({"allowed": [1, 6, "O"]}, [0, 1, 3]),
        ({"allowed": []}, [3]),
        ({"required": ["H"]}, [0, 1]),
        ({"required": ["H", "C"]}, [1]),
        ({"excluded": ["O", "Cl"]}, [1, 3]),
        ({"allowed": ["H", "C", "O"], "required": ["H"], "excluded": ["C"]}, [0]),
    ],
)
def test_by_element(options: dict[str, Any], expected: list[int]) -> None:
    structures = [molecule(numbers) for numbers in (WATER, METHANE, SALT, NOTHING)]
    assert kept(SelectElements(**options), structures) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"minimum": 3}, [0, 1]),
        ({"maximum": 3}, [0, 2, 3]),
        ({"minimum": 1, "maximum": 2}, [2]),
    ],
)
def test_by_size(options: dict[str, Any], expected: list[int]) -> None:
    structures = [molecule(numbers) for numbers in (WATER, METHANE, SALT, NOTHING)]
    assert kept(SelectSize(**options), structures) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"minimum": -10.0}, [1, 2]),
        ({"maximum": -10.0}, [0, 1]),
        ({"minimum": -4.0, "per_atom": True}, [1]),
        ({"maximum": -2.0, "per_atom": True}, [0, 1]),
    ],
)
def test_by_energy(options: dict[str, Any], expected: list[int]) -> None:
    structures = [
        molecule(WATER, energy=-15.0),
        molecule(METHANE, energy=-10.0),
        molecule(NOTHING, energy=1.0),
        molecule(SALT, energy=np.nan),
    ]
    assert kept(SelectEnergy(**options, missing="drop"), structures) == expected


def test_by_another_energy() -> None:
    structures = [molecule(SALT, energy=1.0, free_energy=2.0)]
    assert kept(SelectEnergy(minimum=1.5), structures) == []
    assert kept(SelectEnergy(minimum=1.5, field="free_energy"), structures) == [0]


@pytest.mark.parametrize(
    ("options", "expected"), [({"maximum": 5.0}, [0, 2]), ({"minimum": 5.0}, [0, 1])]
)
def test_by_the_largest_force(options: dict[str, Any], expected: list[int]) -> None:
    structures = [
        molecule(SALT, forces=np.array([[3.0, 4, 0], [0, 0, 1]])),
        molecule(SALT, forces=np.array([[4.0, 4, 0], [0, 0, 1]])),
        molecule(NOTHING, forces=np.empty((0, 3))),
        molecule(SALT, forces=np.array([[np.nan, 4, 0], [0, 0, 1]])),
    ]
    assert kept(SelectForces(**options), structures) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (SelectEnergy, r"structure 1 \(CH4\) has no energy to select it by: say missing='drop'"),
        (SelectForces, r"structure 1 \(CH4\) has no forces to select it by"),
    ],
)
def test_structures_without_the_field(make: Any, message: str) -> None:
    structures = [
        molecule(SALT, energy=1.0, forces=np.zeros((2, 3))),
        molecule(METHANE),
    ]
    with pytest.raises(StageError, match=message):
        kept(make(maximum=2.0), structures)
    assert kept(make(maximum=2.0, missing="drop"), structures) == [0]
    assert kept(make(maximum=2.0, missing="keep"), structures) == [0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectElements(), "SelectElements was given no elements"),
        (lambda: SelectElements(allowed="Cl"), r"allowed is 'Cl'; give a list, \['Cl'\]"),
        (lambda: SelectElements(excluded=["Unobtainium"]), "unknown element 'Unobtainium'"),
        (lambda: SelectElements(excluded=[-1]), "unknown element -1"),
        (lambda: SelectSize(), "SelectSize was given no range: say minimum, maximum or both"),
        (lambda: SelectEnergy(2.0, 1.0), "nothing lies between minimum=2.0 and maximum=1.0"),
        (lambda: SelectForces(maximum=float("nan")), "nothing lies between"),
        (
            lambda: SelectEnergy(1.0, field="enthalpy"),
            "unknown field 'enthalpy'; choose from energy",
        ),
        (lambda: SelectForces(1.0, missing="ignore"), "unknown missing 'ignore'"),  # type: ignore[arg-type]
    ],
)
def test_what_makes_no_sense_is_refused_at_once(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_what_is_dropped_is_said_once_an_index(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="psnc_atm")
    structures = [
        *(molecule(SALT, energy=energy) for energy in (1.0, 5.0, 6.0, np.nan)),
        molecule(WATER),
    ]
    kept(SelectEnergy(0.0, 2.0, missing="drop"), structures)
    kept(SelectSize(maximum=10), structures)
    assert caplog.messages == [
        "SelectEnergy dropped 4 of 5: 2 above 2 eV, 1 with a number of eV that is NaN, "
        "1 without energy"
    ]


def test_what_is_dropped_is_in_the_database(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="psnc_atm")
    made = Pipeline(
        source=Structures([4, 4]),
        filters=[SelectSize(minimum=100)],
        sink=Nowhere(),
        db_dir=tmp_path,
    )
    run_pipeline(made, progress=False)
    [database] = tmp_path.glob("*.db")
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT idx, level, message FROM logs ORDER BY idx").fetchall()
    dropped = "SelectSize dropped 4 of 4: 4 below 100 atoms"
    assert rows == [(0, logging.INFO, dropped), (1, logging.INFO, dropped)]
