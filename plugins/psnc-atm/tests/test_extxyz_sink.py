from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest
from awkward import FLOATS, NO_ROWS, OTHER, PLAIN, RICH, water
from data import crystals, molecules
from structures import Structures
from test_atomic_data import assert_same_atoms

from psnc import Pipeline, StageError, run_pipeline
from psnc.testing import check_sink
from psnc_atm import ASESource, AtomicData, ExtxyzSink

REFUSED = {**RICH, **OTHER}
HELD = {**PLAIN, **NO_ROWS}


def there_and_back(structures: list[AtomicData], directory: Path, **options) -> list[AtomicData]:
    path = ExtxyzSink(directory, **options)(iter(structures), 0)
    assert path == directory / "00000000.extxyz"
    return list(ASESource(path)[0])


@pytest.mark.parametrize("name", HELD)
def test_what_is_read_is_what_was_written(name: str, tmp_path: Path) -> None:
    (read,) = there_and_back([HELD[name]], tmp_path)
    assert read == HELD[name]
    for field in ("positions", "cell", "forces", "momenta"):
        one, other = getattr(read, field), getattr(HELD[name], field)
        assert one is None or one.tobytes() == np.ascontiguousarray(other).tobytes()


def test_many_are_read_in_order_and_counted(tmp_path: Path) -> None:
    structures = [*HELD.values(), *map(AtomicData.from_ase, molecules(100))]
    assert there_and_back(structures, tmp_path) == structures
    for frames in (None, 1, 7):
        source = ASESource(tmp_path, frames_per_index=frames)
        counts = np.concatenate([source.atom_counts(index) for index in range(len(source))])
        assert counts.tolist() == [len(structure) for structure in structures]


def test_the_reference_reader_reads_the_same_atoms(tmp_path: Path) -> None:
    atoms = [*molecules(5), *crystals(5)]
    for each in atoms:
        each.info = {"label": "x", "virial": np.arange(9.0).reshape(3, 3), "n": 7}
    path = ExtxyzSink(tmp_path)(map(AtomicData.from_ase, atoms), 0)
    read = ase.io.read(path, index=":")
    for one, expected in zip(read, atoms, strict=True):
        assert_same_atoms(one, expected)
        assert one.info.keys() == expected.info.keys()
        np.testing.assert_array_equal(one.info["virial"], expected.info["virial"])


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_something_else_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"^index 3, structure 0: .* cannot be held") as refused:
        ExtxyzSink(tmp_path)(iter([REFUSED[name]]), 3)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_something_else_is_left_out_on_request(name: str, tmp_path: Path) -> None:
    structure = REFUSED[name]
    (read,) = there_and_back([structure], tmp_path, on_unwritable="drop")
    np.testing.assert_array_equal(read.positions, structure.positions)
    assert read.info.keys() <= structure.info.keys()
    assert all(read.info[key] == structure.info[key] for key in read.info)
    assert (read.stress, read.velocities, read.edge_index, read.results) == (None, None, None, {})


def test_a_list_of_numbers_is_read_as_an_array(tmp_path: Path) -> None:
    (read,) = there_and_back([water(info={"list": [1, 2, 3], "mixed": [1, "a"]})], tmp_path)
    np.testing.assert_array_equal(read.info["list"], [1, 2, 3])
    assert read.info["mixed"] == [1, "a"]


def test_entries_of_info_are_columns_on_request(tmp_path: Path) -> None:
    columns = {
        "REF_forces": FLOATS.reshape(3, 3),
        "site": np.array([1, 2, 3]),
        "mask": np.array([True, False, True]),
        "pair": np.arange(6.0).reshape(3, 2),
    }
    structure = water(info={**columns, "label": "x"})
    (read,) = there_and_back([structure], tmp_path, columns=list(columns))
    assert read == structure
    (atoms,) = ase.io.read(tmp_path / "00000000.extxyz", index=":")
    assert columns.keys() <= atoms.arrays.keys()
    assert atoms.info.keys() == {"label"}


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"REF_forces": np.zeros((2, 3))},
        {"REF_forces": np.zeros((3, 1))},
        {"REF_forces": np.array([2**31, 0, 0])},
        {"REF_forces": 7},
        {"REF_forces": "text"},
    ],
)
def test_a_column_that_is_none_is_refused(info, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"column 'REF_forces'.* cannot be held"):
        there_and_back([water(info=info)], tmp_path, columns=["REF_forces"])
    (read,) = there_and_back(
        [water(info=info)], tmp_path, columns=["REF_forces"], on_unwritable="drop"
    )
    assert read == water()


@pytest.mark.parametrize("name", ["forces", "positions", "Z", "move_mask", "a b", "a:b", "charge"])
def test_a_column_whose_name_means_something_else_is_refused(name: str, tmp_path: Path) -> None:
    structure = water(info={name: np.zeros((3, 3))})
    with pytest.raises(StageError, match="cannot be held"):
        there_and_back([structure], tmp_path, columns=[name])


@pytest.mark.parametrize("name", ["cutoff", "forces", "species", "numbers", "uid", "Z", "time"])
def test_an_entry_may_be_called_like_a_column(name: str, tmp_path: Path) -> None:
    structure = water(info={name: "x"})
    assert there_and_back([structure], tmp_path) == [structure]


def test_decimals_are_as_many_as_asked_for(tmp_path: Path) -> None:
    structure = AtomicData(
        atomic_numbers=np.array([8]), positions=np.array([[1 / 3, -2 / 3, 1e-9]]), energy=1 / 3
    )
    (read,) = there_and_back([structure], tmp_path, decimals=3)
    np.testing.assert_array_equal(read.positions, [[0.333, -0.667, 0.0]])
    assert read.energy == 1 / 3


def test_nothing_is_a_file_without_frames(tmp_path: Path) -> None:
    assert there_and_back([], tmp_path) == []
    assert ASESource(tmp_path).atom_counts(0).tolist() == []
    assert len(ASESource(tmp_path, frames_per_index=3)) == 0


def test_the_sink_keeps_the_rules(tmp_path: Path) -> None:
    structures = [[each] for each in HELD.values()]
    check_sink(lambda directory: ExtxyzSink(directory / "out"), structures)
    check_sink(
        lambda directory: ExtxyzSink(str(directory), on_unwritable="drop"), Structures([3, 0, 5])
    )


def test_files_are_in_the_order_of_the_indices(tmp_path: Path) -> None:
    pipeline = Pipeline(
        source=Structures([2, 0, 3]),
        sink=ExtxyzSink(tmp_path / "out", columns=["site"], on_unwritable="drop"),
        track_metrics=False,
    )
    run_pipeline(pipeline, progress=False)
    for read, written in zip(ASESource(tmp_path / "out"), pipeline.source, strict=True):
        for one, other in zip(read, written, strict=True):
            assert one.energy == other.energy
            np.testing.assert_array_equal(one.info["site"], other.info["site"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_unwritable": "skip"}, "on_unwritable is 'skip'"),
        ({"columns": "forces"}, r"give a list, \['forces'\]"),
        ({"decimals": -1}, "decimals is -1"),
        ({"decimals": 2.0}, "decimals is 2.0; give an integer"),
        ({"decimals": True}, "decimals is True; give an integer"),
    ],
)
def test_wrong_options_are_refused(options, message: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=message):
        ExtxyzSink(tmp_path, **options)


@pytest.mark.parametrize("virial", [1.5, "none", True, np.zeros(9), np.zeros(6), {"a": 1}])
def test_a_virial_that_is_no_matrix_is_refused(virial, tmp_path: Path) -> None:
    structure = water(info={"virial": virial})
    with pytest.raises(StageError, match=r"^index 0, structure 0: info 'virial'"):
        there_and_back([structure], tmp_path)
    assert there_and_back([structure], tmp_path, on_unwritable="drop") == [water()]


@pytest.mark.parametrize("number", [119, -1])
@pytest.mark.parametrize("on_unwritable", ["fail", "drop"])
def test_an_atom_without_a_symbol_is_refused(number, on_unwritable, tmp_path: Path) -> None:
    odd = AtomicData(atomic_numbers=np.array([number]), positions=np.zeros((1, 3)))
    with pytest.raises(StageError, match=rf"^index 0, structure 1: atomic number {number}, which"):
        there_and_back([water(), odd], tmp_path, on_unwritable=on_unwritable)
