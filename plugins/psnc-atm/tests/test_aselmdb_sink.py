from __future__ import annotations

from pathlib import Path

import ase.db
import lmdb
import numpy as np
import pytest
from awkward import NO_ROWS, OTHER, PLAIN, RICH, water
from data import crystals, molecules
from structures import Structures
from test_atomic_data import assert_same_atoms

from psnc import Pipeline, StageError, run_pipeline
from psnc.testing import check_sink
from psnc_atm import ASELMDBSink, ASELMDBSource, AtomicData

HELD = {**PLAIN, **RICH}
REFUSED = {**NO_ROWS, **OTHER}


def there_and_back(structures: list[AtomicData], directory: Path, **options) -> list[AtomicData]:
    path = ASELMDBSink(directory, **options)(iter(structures), 0)
    assert path == directory / "00000000.aselmdb"
    return list(ASELMDBSource(path)[0])


@pytest.mark.parametrize("name", HELD)
def test_what_is_read_is_what_was_written(name: str, tmp_path: Path) -> None:
    (read,) = there_and_back([HELD[name]], tmp_path)
    assert read == HELD[name]
    for field in ("positions", "cell", "forces", "stress", "momenta"):
        one, other = getattr(read, field), getattr(HELD[name], field)
        assert one is None or field == "stress" or one.tobytes() == other.tobytes()


def test_many_are_read_in_order_and_counted(tmp_path: Path) -> None:
    structures = [*HELD.values(), *map(AtomicData.from_ase, crystals(700))]
    assert there_and_back(structures, tmp_path) == structures
    source = ASELMDBSource(tmp_path)
    assert source.atom_counts(0).tolist() == [len(structure) for structure in structures]


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_something_else_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"^index 3, structure 0: .* cannot be held") as refused:
        ASELMDBSink(tmp_path)(iter([REFUSED[name]]), 3)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_something_else_is_left_out_on_request(name: str, tmp_path: Path) -> None:
    (read,) = there_and_back([REFUSED[name]], tmp_path, on_unwritable="drop")
    assert read == water(charge=REFUSED[name].charge)


def test_the_reference_reader_reads_the_same_atoms(tmp_path: Path) -> None:
    atoms = [*molecules(5), *crystals(5)]
    for number, each in enumerate(atoms):
        each.info = {"label": f"no. {number}", "gap": number / 3, "grid": np.eye(2)}
    path = ASELMDBSink(tmp_path)(map(AtomicData.from_ase, atoms), 0)
    with ase.db.connect(path) as database:
        rows = list(database.select())
        assert [row.id for row in database.select("gap>2")] == [8, 9, 10]
    assert len({row.unique_id for row in rows}) == 10
    for number, (row, expected) in enumerate(zip(rows, atoms, strict=True)):
        assert_same_atoms(row.toatoms(), expected)
        assert row.key_value_pairs == {"label": f"no. {number}", "gap": number / 3}
        np.testing.assert_array_equal(row.data["grid"], np.eye(2))


def test_the_reference_writer_goes_on_in_it(tmp_path: Path) -> None:
    path = ASELMDBSink(tmp_path)(map(AtomicData.from_ase, molecules(3)), 0)
    with ase.db.connect(path) as database:
        assert database.write(next(crystals(1))) == 4
        database.delete([2])
    assert len(list(ASELMDBSource(path)[0])) == 3


def test_equal_structures_have_ids_of_their_own(tmp_path: Path) -> None:
    sink = ASELMDBSink(tmp_path)
    ids = set()
    for index in range(2):
        with ase.db.connect(sink(iter([water(), water()]), index)) as database:
            ids |= {row.unique_id for row in database.select()}
    assert len(ids) == 4


@pytest.mark.parametrize("count", [0, 1, 2000])
def test_a_file_is_no_larger_than_it_needs_to_be(count: int, tmp_path: Path) -> None:
    path = ASELMDBSink(tmp_path)(map(AtomicData.from_ase, molecules(count)), 0)
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False, map_size=1) as environment:
        says = environment.info()["map_size"]
    assert says <= max(2 * path.stat().st_size, 2**20)
    assert [file.name for file in tmp_path.iterdir()] == ["00000000.aselmdb"]


def test_the_sink_keeps_the_rules(tmp_path: Path) -> None:
    check_sink(lambda directory: ASELMDBSink(directory / "out"), Structures([3, 0, 5]))
    held = list(HELD.values())
    check_sink(ASELMDBSink, [held[:20], held[20:]])


def test_files_are_in_the_order_of_the_indices(tmp_path: Path) -> None:
    pipeline = Pipeline(
        source=Structures([2, 0, 3]), sink=ASELMDBSink(tmp_path / "out"), track_metrics=False
    )
    run_pipeline(pipeline, progress=False)
    source = ASELMDBSource(tmp_path / "out")
    assert [list(each) for each in source] == [list(each) for each in pipeline.source]


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="on_unwritable is 'skip'"):
        ASELMDBSink(tmp_path, on_unwritable="skip")
