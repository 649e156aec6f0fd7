"""``metadata.npz``: numbers of atoms that need no row, and are compared with the rows."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
import pytest
from data import (
    assert_same_store,
    change_raw_row,
    contents,
    molecules,
    write_database,
    write_dataset,
)

from psnc import Pipeline, SourceError, run_pipeline
from psnc.testing import check_source
from psnc_atm import ASELMDBSource, AtomicDataZarrSink


def sizes(data: Path) -> list[int]:
    source = ASELMDBSource(data, metadata=False)
    return [int(n) for index in range(len(source)) for n in source.atom_counts(index)]


def describe(data: Path, natoms: Any = None, **others: Any) -> None:
    """Write ``metadata.npz`` as fairchem's datasets have it."""
    natoms = np.array(sizes(data) if natoms is None else natoms)
    np.savez(data / "metadata.npz", natoms=natoms, data_ids=np.array(["x"] * len(natoms)), **others)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four files of different lengths, one without rows, one with gaps, and metadata."""
    directory = write_dataset(tmp_path / "in", files=2, rows=12)
    with ase.db.connect(directory / "data0002.aselmdb") as database:
        database.metadata = {"format": "x"}
    with ase.db.connect(directory / "data0003.aselmdb") as database:
        for atoms in molecules(15, seed=3):
            database.write(atoms, data={"charge": 0})
        database.delete([1, 10, 15])
    describe(directory)
    return directory


@pytest.mark.parametrize("rows_per_index", [None, 5])
def test_numbers_of_atoms_come_without_reading_rows(data: Path, rows_per_index: int | None) -> None:
    source = ASELMDBSource(data, rows_per_index)
    plain = ASELMDBSource(data, rows_per_index, metadata=False)
    expected = [plain.atom_counts(index).tolist() for index in range(len(plain))]
    check_source(source)
    assert [list(source[index]) for index in range(len(source))] == [
        list(plain[index]) for index in range(len(plain))
    ]
    for path in data.glob("*.aselmdb"):  # nor is there anything left to read
        path.unlink()
    found = [source.atom_counts(index) for index in range(len(source))]
    assert [counts.tolist() for counts in found] == expected
    assert {counts.dtype for counts in found} == {np.dtype("int64")}


def test_other_types_of_numbers_are_as_good(data: Path) -> None:
    for dtype in ("uint8", "int32", "uint64"):
        describe(data, np.array(sizes(data), dtype))
        assert len(list(ASELMDBSource(data)[0])) == 12


def test_one_file_of_a_directory_is_read_without(data: Path) -> None:
    source = ASELMDBSource(data / "data0001.aselmdb")
    assert len(list(source[0])) == 12
    assert "natoms" not in source.input_identity()


@pytest.mark.parametrize("difference", [-1, 1])
def test_one_of_another_length_is_refused_at_once(data: Path, difference: int) -> None:
    natoms = [1] * (36 + difference)
    describe(data, natoms)
    with pytest.raises(SourceError) as caught:
        ASELMDBSource(data)
    assert str(caught.value) == (
        f"{data / 'metadata.npz'} is of {36 + difference} rows, and the files have 36; delete it, "
        "make it anew, or read without it (metadata=False)"
    )
    assert len(list(ASELMDBSource(data, metadata=False)[0])) == 12


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "cannot be read"),
        (b"no archive", r"cannot be read \(it is no \.npz archive\)"),
        ({"data_ids": np.arange(36)}, "natoms"),
        ({"natoms": np.full(36, 0.5)}, "natoms is not a list of numbers of atoms"),
        ({"natoms": np.full(36, -1)}, "natoms is not a list of numbers of atoms"),
        ({"natoms": np.full((36, 1), 1)}, "natoms is not a list of numbers of atoms"),
        ({"natoms": np.array([object()] * 36)}, "cannot be read"),
    ],
)
def test_what_is_no_such_file_is_refused_at_once(data: Path, content: Any, cause: str) -> None:
    path = data / "metadata.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(SourceError, match=rf"metadata\.npz .*{cause}.*; delete it") as caught:
        ASELMDBSource(data)
    assert "\n" not in str(caught.value)


def test_an_array_instead_of_an_archive_and_a_damaged_archive_are_refused(data: Path) -> None:
    path = data / "metadata.npz"
    with path.open("wb") as file:
        np.save(file, np.arange(36))
    with pytest.raises(SourceError, match="cannot be read"):
        ASELMDBSource(data)
    np.savez_compressed(path, natoms=np.arange(36))
    whole = path.read_bytes()
    refused = []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            ASELMDBSource(data)
        except SourceError as error:
            refused.append(str(error))
    assert len(refused) > len(whole) / 2  # not every byte matters
    assert all(text.startswith(f"{path} ") and "\n" not in text for text in refused)


@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
def test_a_wrong_number_is_found_where_its_row_is(data: Path, on_bad_row: Any) -> None:
    natoms = sizes(data)
    natoms[14], natoms[15] = natoms[15], natoms[14]
    describe(data, natoms)
    source = ASELMDBSource(data, on_bad_row=on_bad_row)
    assert len(list(source[0])) == 12
    with pytest.raises(SourceError) as caught:
        list(source[1])
    assert str(caught.value) == (
        f"{data / 'data0001.aselmdb'}, row 3: has {natoms[15]} atoms, and {natoms[14]} by "
        f"{data / 'metadata.npz'}; make that file anew, delete it, or read without it "
        "(metadata=False)"
    )
    assert len(list(source[3])) == 12


def test_rows_that_moved_from_one_file_to_another_are_noticed(data: Path) -> None:
    """The number of all rows is the same, those of the files are not."""
    source = ASELMDBSource(data)
    with ase.db.connect(data / "data0000.aselmdb") as database:
        database.delete([12])
    write_database(data / "data0001.aselmdb", molecules(1))
    for index, rows in ((0, 11), (1, 13)):
        with pytest.raises(SourceError, match=rf"has {rows} rows, and 12 by .*metadata\.npz"):
            list(source[index])


def test_one_damaged_file_leaves_the_numbers_of_the_others(data: Path) -> None:
    expected = sizes(data)
    os.truncate(data / "data0001.aselmdb", 5000)
    source = ASELMDBSource(data)
    assert source.atom_counts(0).tolist() == expected[:12]
    assert source.atom_counts(1).tolist() == expected[12:24]
    assert source.atom_counts(3).tolist() == expected[24:]
    assert len(list(source[3])) == 12
    with pytest.raises(SourceError, match="truncated"):
        list(source[1])


def test_between_two_damaged_files_rows_are_looked_at(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=5, rows=6)
    expected = sizes(data)
    describe(data, [*expected[:12], *[99] * 6, *expected[18:]])
    for number in (1, 3):
        os.truncate(data / f"data{number:04}.aselmdb", 5000)
    source = ASELMDBSource(data)
    for index in (0, 2, 4):
        assert source.atom_counts(index).tolist() == expected[6 * index : 6 * index + 6]
        assert len(list(source[index])) == 6
    for index in (1, 3):
        with pytest.raises(SourceError, match="truncated"):
            source.atom_counts(index)


def test_it_changes_nothing_for_a_row_that_is_left_out(data: Path) -> None:
    change_raw_row(data / "data0000.aselmdb", b"4", b"x")
    source = ASELMDBSource(data, on_bad_row="skip")
    assert len(list(source[0])) == 11
    assert source.atom_counts(0)[3] > 0


def test_numbers_are_not_sent_to_workers(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=1, rows=3)
    small = len(pickle.dumps(ASELMDBSource(data)))
    add = 5000
    write_database(data / "more.aselmdb", (next(molecules(1)) for _ in range(add)))
    describe(data)
    source = ASELMDBSource(data)
    assert len(pickle.dumps(source)) < small + 1000
    assert len(pickle.loads(pickle.dumps(source)).atom_counts(1)) == add


# --- with the Zarr store ------------------------------------------------------------------------


def convert(data: Path, output: Path, rows: int | None = None, jobs: int = 1) -> Pipeline[Any]:
    pipeline: Pipeline[Any] = Pipeline(
        source=ASELMDBSource(data, rows_per_index=rows),
        sink=AtomicDataZarrSink(output / "out.zarr", atoms_per_chunk=64, systems_per_chunk=8),
        db_dir=output,
        resume=True,
    )
    run_pipeline(pipeline, n_jobs=jobs, progress=False)
    return pipeline


@pytest.mark.parametrize(("rows", "jobs"), [(None, 2), (5, 1)])
def test_the_store_is_the_same_with_and_without(
    data: Path, tmp_path: Path, rows: int | None, jobs: int
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    assert convert(data, one, rows, jobs).failed_indices == {}
    (data / "metadata.npz").unlink()
    assert convert(data, other, rows, jobs).failed_indices == {}
    assert_same_store(one / "out.zarr", other / "out.zarr", apart_from=["psnc/identity"])


@pytest.mark.parametrize("mending", ["made anew", "deleted"])
@pytest.mark.parametrize("rows", [None, 12])
def test_a_store_laid_out_by_wrong_numbers_is_mended_with_them(
    data: Path, tmp_path: Path, rows: int | None, mending: str
) -> None:
    right = sizes(data)
    wrong = list(right)
    wrong[14] += 7
    describe(data, wrong)
    failed = convert(data, tmp_path, rows).failed_indices
    assert len(failed) == 1
    assert "metadata.npz" in failed[1]
    if mending == "deleted":
        (data / "metadata.npz").unlink()
    else:
        describe(data, right)
    pipeline = convert(data, tmp_path, rows)
    assert pipeline.failed_indices == {}
    clean = tmp_path / "clean"
    clean.mkdir()
    convert(data, clean, rows)
    assert_same_store(clean / "out.zarr", tmp_path / "out.zarr")


def test_adding_or_deleting_right_numbers_runs_nothing_again(data: Path, tmp_path: Path) -> None:
    whole = (data / "metadata.npz").read_bytes()
    before = [row.completed_at for row in convert(data, tmp_path, 5).metrics]
    (data / "metadata.npz").unlink()
    assert [row.completed_at for row in convert(data, tmp_path, 5).metrics] == before
    (data / "metadata.npz").write_bytes(whole)
    assert [row.completed_at for row in convert(data, tmp_path, 5).metrics] == before


def test_files_and_their_numbers_can_be_added(data: Path, tmp_path: Path) -> None:
    convert(data, tmp_path)
    write_database(data / "data0009.aselmdb", molecules(4, seed=9), data={"charge": 1})
    with pytest.raises(SourceError, match="is of 36 rows, and the files have 40"):
        ASELMDBSource(data)
    describe(data)
    pipeline = convert(data, tmp_path)
    assert pipeline.completed_indices == set(range(5))
    assert contents(tmp_path / "out.zarr")["meta/samples_mask"].tolist() == [True] * 40


def test_a_repaired_file_has_its_rows_where_they_belong(data: Path, tmp_path: Path) -> None:
    path = data / "data0001.aselmdb"
    whole = path.read_bytes()
    os.truncate(path, 5000)
    assert convert(data, tmp_path).failed_indices.keys() == {1}
    path.write_bytes(whole)
    assert convert(data, tmp_path).failed_indices == {}
    clean = tmp_path / "clean"
    clean.mkdir()
    convert(data, clean)
    assert_same_store(clean / "out.zarr", tmp_path / "out.zarr")


def test_keys_that_are_no_rows_are_not_counted(data: Path) -> None:
    natoms = [len(structure) for rows in ASELMDBSource(data) for structure in rows]
    change_raw_row(data / "data0001.aselmdb", b"extra", b"x")
    describe(data, natoms)
    source = ASELMDBSource(data)
    assert [count for index in range(len(source)) for count in source.atom_counts(index)] == natoms
    assert sum(len(list(rows)) for rows in source) == len(natoms)
