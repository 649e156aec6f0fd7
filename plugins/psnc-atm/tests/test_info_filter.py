"""What a dataset is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structures import Structures, molecule, some_structures

from psnc.testing import check_filter
from psnc_atm import AtomicData, AtomicInfoFilter


def written(structures: list[AtomicData], directory: Path, parts: int = 1) -> bytes:
    shards = []
    for part, chosen in enumerate(np.array_split(np.arange(len(structures)), parts)):
        own = AtomicInfoFilter("unused")
        assert list(own(structures[i] for i in chosen)) == [structures[i] for i in chosen]
        own.flush(directory / f"{part}.json")
        shards.append(directory / f"{part}.json")
    AtomicInfoFilter("unused").merge(shards, directory / "info.json")
    return (directory / "info.json").read_bytes()


def test_the_filter_keeps_the_rules() -> None:
    check_filter(AtomicInfoFilter("info.json"), Structures([3, 0, 4, 1]), lazy=True)


def test_what_is_counted(tmp_path: Path) -> None:
    structures = [
        molecule([8, 1, 1], energy=1.0, info={"source": "a"}),
        molecule([1, 8, 1]),
        molecule([6, 1, 1, 1, 1, 17], info={"source": "b", "gap": 1.0}),
        molecule([11, 17], cell=np.eye(3) * 5, pbc=np.array([True, True, True])),
        molecule([29], cell=np.eye(3) * 3, pbc=np.array([True, False, True])),
        molecule([]),
        molecule([0, 200]),
    ]
    always = dict.fromkeys(("atomic_numbers", "cell", "pbc", "positions"), 7)
    assert json.loads(written(structures, tmp_path)) == {
        "structures": 7,
        "atoms": 17,
        "elements": {
            "C": {"atoms": 1, "structures": 1},
            "Cl": {"atoms": 2, "structures": 2},
            "Cu": {"atoms": 1, "structures": 1},
            "H": {"atoms": 8, "structures": 3},
            "Na": {"atoms": 1, "structures": 1},
            "O": {"atoms": 2, "structures": 2},
            "X": {"atoms": 1, "structures": 1},
            "Z200": {"atoms": 1, "structures": 1},
        },
        "compositions": {
            "": 1,
            "CH4Cl": 1,
            "ClNa": 1,
            "Cu": 1,
            "H2O": 2,
            "XZ200": 1,
        },
        "atom_counts": {"0": 1, "1": 1, "2": 2, "3": 2, "6": 1},
        "periodicity": {"abc": 1, "ac": 1, "none": 5},
        "fields": {**always, "energy": 1},
        "info": {"gap": 1, "source": 2},
    }


def test_numbers_of_atoms_are_in_their_order(tmp_path: Path) -> None:
    structures = [molecule([1] * n) for n in (10, 2, 1)]
    assert list(json.loads(written(structures, tmp_path))["atom_counts"]) == ["1", "2", "10"]


@settings(max_examples=30)
@given(seed=st.integers(0, 99), parts=st.integers(1, 9), order=st.randoms(use_true_random=False))
def test_division_and_order_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, seed: int, parts: int, order: Any
) -> None:
    structures = some_structures(12, seed)
    whole = written(structures, tmp_path_factory.mktemp("whole"))
    order.shuffle(structures)
    assert written(structures, tmp_path_factory.mktemp("divided"), parts) == whole
