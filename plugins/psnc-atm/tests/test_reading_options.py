"""ASELMDBSource with its options: what structures have, and what becomes of bad rows."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.db
import lmdb
import numpy as np
import pytest
from attrs import evolve, fields
from data import (
    assert_same_store,
    change_raw_row,
    contents,
    crystals,
    molecules,
    raw_row,
    write_database,
    write_dataset,
)
from pyarrow import parquet
from structures import Nowhere

from psnc import Pipeline, SourceError, gather_pipeline, run_pipeline
from psnc_atm import (
    ASELMDBSource,
    AtomicData,
    AtomicDataZarrSink,
    AtomicInfoFilter,
    AtomicStatsFilter,
    ConvertUnits,
    DropDuplicates,
    NeighbourList,
    SelectElements,
    SelectEnergy,
    SelectForces,
    SelectSize,
    StructureHashSink,
    UniqueStructures,
)


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """Crystals with all that a row can hold, and arrays in ``data``."""
    path = tmp_path / "rich.aselmdb"
    data = {
        "site": np.linspace(0, 1, 7),
        "whole": np.arange(3),
        "nested": {"matrix": np.full((2, 2), 0.1), "words": ["a", "b"]},
        "charge": -1,
        "gap": 0.1,
    }
    write_database(path, crystals(4), key_value_pairs={"label": "salt", "gap": 2.5}, data=data)
    return path


def rewritten(value: bytes, **changes: Any) -> bytes:
    """Return a row with other entries; what is ``None`` is taken out."""
    row = {**json.loads(zlib.decompress(value)), **changes}
    text = json.dumps({key: entry for key, entry in row.items() if entry is not None})
    return zlib.compress(text.encode())


def change_row(path: Path, row: int, **changes: Any) -> None:
    key = b"%d" % row
    change_raw_row(path, key, rewritten(raw_row(path, key), **changes))


# --- dtype --------------------------------------------------------------------------------------


def as_float32(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.astype(np.float32) if value.dtype == np.float64 else value
    if isinstance(value, dict):
        return {name: as_float32(entry) for name, entry in value.items()}
    return value


def test_float32_is_the_float64_of_the_row_rounded_once(rich: Path) -> None:
    exact, narrow = ASELMDBSource(rich)[0], ASELMDBSource(rich, dtype="float32")[0]
    for one, other in zip(exact, narrow, strict=True):
        for field in fields(AtomicData):
            expected, got = as_float32(getattr(one, field.name)), getattr(other, field.name)
            assert type(got) is type(expected), field.name
            if isinstance(got, np.ndarray):
                assert got.dtype == expected.dtype, field.name
        assert other.forces.dtype == other.momenta.dtype == other.stress.dtype == np.float32
        assert other.tags.dtype == other.atomic_numbers.dtype == np.int64
        assert other.info["site"].dtype == other.info["nested"]["matrix"].dtype == np.float32
        assert other.info["whole"].dtype == np.int64
        assert isinstance(other.energy, float)
        assert other.energy == one.energy
        for name in ("positions", "cell", "forces", "stress", "dipole", "charges", "momenta"):
            np.testing.assert_array_equal(getattr(other, name), as_float32(getattr(one, name)))
        np.testing.assert_array_equal(other.info["site"], as_float32(one.info["site"]))
        assert other.shifts is None


def test_a_number_without_room_in_float32_makes_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    write_database(path, molecules(3))
    count = ASELMDBSource(path).atom_counts(0)[1]
    change_row(path, 2, forces=[[1e39, 0.0, 0.0]] * count)
    assert len(list(ASELMDBSource(path)[0])) == 3
    narrow = ASELMDBSource(path, dtype="float32")
    with pytest.raises(SourceError, match=r"row 2: .*no room in float32"):
        list(narrow[0])
    change_row(path, 2, forces=[[float("nan"), float("inf"), 0.0]] * count)
    assert np.isinf(list(narrow[0])[1].forces[0, 1])


def test_ase_takes_structures_of_float32(rich: Path) -> None:
    for structure in ASELMDBSource(rich, dtype="float32")[0]:
        atoms = structure.to_ase()
        assert atoms.positions.dtype == np.float64
        np.testing.assert_array_equal(atoms.get_forces(apply_constraint=False), structure.forces)
        np.testing.assert_array_equal(atoms.cell, structure.cell)


def test_every_filter_works_on_float32(rich: Path, tmp_path: Path) -> None:
    pipeline: Pipeline[Any] = Pipeline(
        source=ASELMDBSource(rich, dtype="float32"),
        filters=[
            SelectElements(required=["Na"]),
            SelectSize(minimum=1),
            SelectEnergy(maximum=1e9),
            SelectForces(maximum=1e9),
            DropDuplicates(),
            NeighbourList(4.0),
            ConvertUnits(energy=("eV", "Hartree"), length=("Ang", "Bohr")),
            AtomicInfoFilter(tmp_path / "info.json"),
        ],
        sink=Nowhere(),
    )
    structures = list(pipeline.items(0))
    assert len(structures) == 4
    exact = list(NeighbourList(4.0)(ASELMDBSource(rich)[0]))
    for one, other in zip(exact, structures, strict=True):
        assert other.positions.dtype == other.forces.dtype == np.float32
        np.testing.assert_array_equal(one.edge_index, other.edge_index)
        np.testing.assert_array_equal(one.unit_shifts, other.unit_shifts)
        assert other.shifts is not None
        assert other.shifts.dtype == np.float64


def test_statistics_of_float32_are_added_up_in_full(tmp_path: Path) -> None:
    """The sum of what float32 cannot add: 2**24 and many ones."""
    path = tmp_path / "rows.aselmdb"
    write_database(path, molecules(40))
    for row, count in enumerate(ASELMDBSource(path).atom_counts(0).tolist(), 1):
        change_row(path, row, forces=[[2.0**24 if row == 1 else 1.0] * 3] * count)
    pipeline: Pipeline[Any] = Pipeline(
        source=ASELMDBSource(path, dtype="float32"),
        filters=[AtomicStatsFilter(tmp_path / "stats.parquet", ["forces"])],
        sink=Nowhere(),
        db_dir=tmp_path,
    )
    run_pipeline(pipeline, progress=False)
    gather_pipeline(pipeline)
    values = np.concatenate([s.forces[:, 0] for s in ASELMDBSource(path)[0]])
    rows = {
        row["component"]: row for row in parquet.read_table(tmp_path / "stats.parquet").to_pylist()
    }
    assert rows["x"]["mean"] == values.sum() / len(values)


def test_the_largest_force_of_float32_is_found_in_float64() -> None:
    forces = np.full((1, 3), 1e25, dtype=np.float32)  # its square has no room in float32
    one = AtomicData(atomic_numbers=np.array([1]), positions=np.zeros((1, 3)), forces=forces)
    assert list(SelectForces(maximum=1e26)(iter([one]))) == [one]


# --- constraints and data -----------------------------------------------------------------------


def test_constraints_are_dropped_and_nothing_else(rich: Path) -> None:
    for one, other in zip(
        ASELMDBSource(rich)[0], ASELMDBSource(rich, constraints="drop")[0], strict=True
    ):
        assert len(one.constraints) == 1
        assert other == evolve(one, constraints=())


def test_data_is_dropped_but_for_charge_and_spin(rich: Path) -> None:
    for structure in ASELMDBSource(rich, data="drop")[0]:
        assert structure.charge == -1.0
        assert structure.info == {"label": "salt", "key_value_pairs.gap": 2.5}
        assert len(structure.constraints) == 1


def test_what_data_holds_is_not_decoded_where_it_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    write_database(path, molecules(1))
    change_row(path, 1, data={"spin": 3, "charge": "?", "odd": {"__ase_objtype__": "unheard of"}})
    (structure,) = ASELMDBSource(path, data="drop")[0]
    assert structure.spin == 3.0
    assert structure.charge is None
    assert structure.info == {}
    with pytest.raises(SourceError, match="row 1"):
        list(ASELMDBSource(path)[0])


@pytest.mark.parametrize("where", ["key_value_pairs", "data"])
def test_charge_and_spin_come_from_pairs_or_data(tmp_path: Path, where: str) -> None:
    path = tmp_path / "rows.aselmdb"
    write_database(path, molecules(2), **{where: {"charge": 1, "spin": 2}})
    for options in ({}, {"data": "drop"}, {"dtype": "float32"}):
        for structure in ASELMDBSource(path, **options)[0]:
            assert (structure.charge, structure.spin, structure.info) == (1.0, 2.0, {})


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float16"}, {"constraints": "no"}, {"data": True}, {"on_bad_row": "ignore"}],
)
def test_an_option_of_another_kind_is_refused(dataset: Path, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(SourceError, match=rf"^{name} is {options[name]!r}; give '"):
        ASELMDBSource(dataset, **options)


def test_options_that_change_structures_are_part_of_what_the_input_is(dataset: Path) -> None:
    usual = ASELMDBSource(dataset).input_identity()
    assert usual.keys() == {"rows_per_index", "files"}
    for options in ({"dtype": "float32"}, {"data": "drop"}, {"constraints": "drop"}):
        assert ASELMDBSource(dataset, **options).input_identity() == {**usual, **options}
    assert ASELMDBSource(dataset, on_bad_row="skip").input_identity() == usual


# --- bad rows -----------------------------------------------------------------------------------

Damage = Callable[[bytes], bytes]


def wrong_rows(name: str, change: Callable[[list[Any]], list[Any]]) -> Damage:
    """Change the list of one array, and say that it has the shape that it then has."""

    def damage(value: bytes) -> bytes:
        shape, dtype, flat = json.loads(zlib.decompress(value))[name]["__ndarray__"]
        array = np.array(change(np.array(flat).reshape(shape).tolist()))
        entry = {"__ndarray__": [array.shape, dtype, array.ravel().tolist()]}
        return rewritten(value, **{name: entry})

    return damage


def marked(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {"__ndarray__": [array.shape, array.dtype.name, array.ravel().tolist()]}


OF_TWO_ATOMS = {"numbers": marked(np.array([1, 1])), "forces": None}
OF_THREE_ATOMS = {"numbers": marked(np.array([1, 1, 1])), "forces": None}


def of_two_atoms(key: str, shape: tuple[int, ...]) -> Callable[[bytes], bytes]:
    entries = {"positions": marked(np.zeros((2, 3))), key: marked(np.ones(shape, dtype=int))}
    return lambda value: rewritten(value, **OF_TWO_ATOMS, **entries)


BAD_ROWS: dict[str, tuple[Damage, str]] = {
    "half": (lambda value: value[: len(value) // 2], "incomplete"),
    "a byte": (
        lambda value: value[:-9] + bytes([value[-9] ^ 255]) + value[-8:],
        "while decompressing",
    ),
    "no zlib": (lambda value: zlib.decompress(value), "incorrect header"),
    "empty": (lambda value: b"", "incomplete"),
    "text": (lambda value: zlib.compress(b"no JSON"), "Expecting value"),
    "nested without end": (lambda value: zlib.compress(b"[" * 100_000), "recursion"),
    "an array's parts": (
        lambda value: rewritten(value, data={"x": {"__ndarray__": [[2], "float64"]}}),
        "not enough values",
    ),
    "a huge shape": (
        lambda value: rewritten(value, data={"x": {"__ndarray__": [[10**12], "float64", []]}}),
        "cannot reshape",
    ),
    "no cell": (lambda value: rewritten(value, cell=None), "no 'cell'"),
    "positions": (wrong_rows("positions", lambda rows: rows[:-1]), "positions has"),
    "forces": (wrong_rows("forces", lambda rows: [*rows, rows[0]]), "forces has"),
    "forces in two dimensions": (
        wrong_rows("forces", lambda rows: [row[:2] for row in rows]),
        "not three numbers for each atom",
    ),
    "numbers": (wrong_rows("numbers", lambda rows: rows[:-1]), "positions has"),
    "half a number": (
        wrong_rows("numbers", lambda rows: [rows[0] + 0.5, *rows[1:]]),
        "numbers has entries that are no whole numbers",
    ),
    "another shape": (
        lambda value: (
            value
            and rewritten(
                value, numbers={"__ndarray__": [[2], "int64", [1, 1, 8, 8, 8, 8, 8, 8, 8]]}
            )
        ),
        "cannot reshape",
    ),
    "stress": (lambda value: rewritten(value, stress=[1.0, 2.0]), "stress has shape"),
    "dipole": (lambda value: rewritten(value, dipole=[1.0, 2.0]), "cannot reshape"),
    "pbc": (lambda value: rewritten(value, pbc=[True]), "cannot reshape"),
    "tags": (lambda value: rewritten(value, tags=["one"]), "tags has entries"),
    "numbers in a column": (
        wrong_rows("numbers", lambda rows: [[number] for number in rows]),
        "numbers has shape",
    ),
    "positions in two dimensions": (
        lambda value: rewritten(value, **OF_THREE_ATOMS, positions=marked(np.zeros((3, 2)))),
        "positions has shape (3, 2)",
    ),
    "positions turned": (
        lambda value: rewritten(value, **OF_TWO_ATOMS, positions=marked(np.zeros((3, 2)))),
        "positions has shape (3, 2)",
    ),
    **{
        name: (of_two_atoms(name, shape), f"{field} has shape {shape}")
        for name, field, shape in (
            *(("tags", "tags", (2, 2)), ("masses", "atomic_masses", (2, 1))),
            *(("charges", "charges", (2, 3)), ("initial_charges", "initial_charges", (2, 1))),
            *(("energies", "energies", (2, 3)), ("magmoms", "magmoms", (2, 2))),
            *(("initial_magmoms", "initial_magmoms", (2, 1)), ("momenta", "momenta", (2, 2))),
        )
    },
    "pbc of texts": (lambda value: rewritten(value, pbc=["False", "", ""]), "pbc has entries"),
    "an energy that is a text": (lambda value: rewritten(value, energy="1.5"), "a text stands"),
    "forces that are texts": (
        wrong_rows("forces", lambda rows: [[str(number) for number in row] for row in rows]),
        "a text stands",
    ),
    "constraints by name": (
        lambda value: rewritten(value, constraints={"name": "FixAtoms"}),
        "constraints is no list",
    ),
    "constraints that are a text": (
        lambda value: rewritten(value, constraints="abc"),
        "constraints is no list",
    ),
    "an object that ASE refuses": (
        lambda value: rewritten(
            value, data={"c": {"__ase_objtype__": "cell", "array": [[1, 2], [3, 4]]}}
        ),
        "__ase_objtype__ makes no object",
    ),
    "more atoms than there is room for": (
        lambda value: rewritten(value, numbers={"__ndarray__": [[10**30], "int64", [1, 2]]}),
        "",
    ),
}


@pytest.fixture(params=BAD_ROWS)
def bad_row(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A directory of two files, the first of which has a bad row 3."""
    damage, cause = BAD_ROWS[request.param]
    data = write_dataset(tmp_path / "in", files=2, rows=6)
    path = data / "data0000.aselmdb"
    change_raw_row(path, b"3", damage(raw_row(path, b"3")))
    return data, cause


def test_a_bad_row_fails_its_index_with_its_cause(bad_row: tuple[Path, str]) -> None:
    data, cause = bad_row
    with pytest.raises(SourceError) as caught:
        list(ASELMDBSource(data)[0])
    assert str(caught.value).startswith(f"{data / 'data0000.aselmdb'}, row 3: ")
    assert cause in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_bad_row_is_left_out_and_said(
    bad_row: tuple[Path, str], dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    data, cause = bad_row
    path = data / "data0000.aselmdb"
    source = ASELMDBSource(data, dtype=dtype, on_bad_row="skip")
    by_row = ASELMDBSource(data, dtype=dtype, rows_per_index=1)
    assert list(source[0]) == [next(by_row[row]) for row in (0, 1, 3, 4, 5)]
    entries = [(entry.name, entry.levelname, entry.getMessage()) for entry in caplog.records]
    assert [entry[:2] for entry in entries] == [("psnc_atm", "WARNING")] * 2
    assert entries[0][2].startswith(f"{path}, row 3: left out (")
    assert cause in entries[0][2]
    assert entries[1][2] == f"{path}: left out 1 of 6 rows, which cannot be decoded"
    assert source.index_measurements(0) == {"skipped_rows": 1}
    assert len(list(source[1])) == 6
    assert source.index_measurements(1) == {"skipped_rows": 0}
    counts = source.atom_counts(0)
    assert len(counts) == 6
    assert np.delete(counts, 2).tolist() == [len(structure) for structure in source[0]]


def test_a_row_whose_size_cannot_be_told_counts_no_atoms(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=1, rows=4)
    path = data / "data0000.aselmdb"
    change_raw_row(path, b"2", b"\0")
    with pytest.raises(SourceError, match="row 2"):
        ASELMDBSource(data).atom_counts(0)
    counts = ASELMDBSource(data, on_bad_row="skip").atom_counts(0)
    assert counts[1] == 0
    assert (counts[[0, 2, 3]] > 0).all()


def measurements(directory: Path) -> dict[int, dict[str, Any]]:
    (database,) = directory.glob("*.db")
    connection = sqlite3.connect(database)
    found = connection.execute("SELECT idx, measurements FROM index_results").fetchall()
    connection.close()
    return {index: json.loads(text) for index, text in found}


@pytest.mark.parametrize("jobs", [1, 2])
def test_rows_that_are_left_out_are_masked_in_the_store_and_on_record(
    tmp_path: Path, jobs: int
) -> None:
    data = write_dataset(tmp_path / "in", files=4, rows=10)
    bad = {0: [1, 7], 1: [], 2: [*range(1, 11)], 3: [10]}
    for file, rows in bad.items():
        path = data / f"data{file:04}.aselmdb"
        for row in rows:
            value = raw_row(path, b"%d" % row)
            # Of half of them not even the number of atoms is known.
            change_raw_row(path, b"%d" % row, b"x" if row % 2 else value[:-20])
    pipeline: Pipeline[Any] = Pipeline(
        source=ASELMDBSource(data, on_bad_row="skip"),
        sink=AtomicDataZarrSink(tmp_path / "out.zarr"),
        db_dir=tmp_path,
        resume=True,
    )
    run_pipeline(pipeline, n_jobs=jobs, progress=False)
    assert pipeline.failed_indices == {}
    numbers = {index: found["skipped_rows"] for index, found in measurements(tmp_path).items()}
    assert numbers == {file: len(rows) for file, rows in bad.items()}
    store = pipeline.require_store("a test")
    for file, rows in bad.items():
        said = [
            entry["message"] for entry in store.logs(file) if entry["logger_name"] == "psnc_atm"
        ]
        path = data / f"data{file:04}.aselmdb"
        for row, message in zip(rows, said[: len(rows)], strict=True):
            assert message.startswith(f"{path}, row {row}: left out (")
        assert len(said) == len(rows) + bool(rows)
    arrays = contents(tmp_path / "out.zarr")
    good = [structure for index in range(4) for structure in pipeline.source[index]]
    assert len(good) == 27
    assert arrays["meta/samples_mask"].tolist() == [
        *([True] * 8 + [False] * 2),
        *[True] * 10,
        *[False] * 10,
        *([True] * 9 + [False]),
    ]
    assert arrays["meta/atoms_mask"].sum() == sum(map(len, good))
    np.testing.assert_array_equal(
        arrays["core/positions"][arrays["meta/atoms_mask"]],
        np.concatenate([structure.positions for structure in good]),
    )


def test_more_bad_rows_than_log_entries_are_kept_are_counted_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    write_database(path, molecules(3))
    with (
        lmdb.open(str(path), subdir=False, map_size=2**30) as environment,
        environment.begin(write=True) as transaction,
    ):
        for row in range(4, 16_004):
            transaction.put(b"%d" % row, b"x")
    pipeline: Pipeline[Any] = Pipeline(
        source=ASELMDBSource(path, on_bad_row="skip"), sink=Nowhere(), db_dir=tmp_path
    )
    run_pipeline(pipeline, progress=False)
    assert measurements(tmp_path)[0]["skipped_rows"] == 16_000
    last = pipeline.require_store("a test").logs(0)[-1]["message"]
    assert last.endswith("left out 16000 of 16003 rows, which cannot be decoded")


def test_rows_left_out_are_counted_anew_when_an_index_is_tried_again(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=1, rows=5)
    for row in (b"2", b"4"):
        change_raw_row(data / "data0000.aselmdb", row, b"x")
    source = ASELMDBSource(data, on_bad_row="skip")
    rows = source[0]
    next(rows)
    next(rows)  # given up half way, after the first bad row
    assert len(list(source[0])) == 3
    assert source.index_measurements(0) == {"skipped_rows": 2}


def test_a_file_that_cannot_be_read_fails_its_index_all_the_same(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=3, rows=20)
    os.truncate(data / "data0001.aselmdb", 20_000)
    pipeline: Pipeline[Any] = Pipeline(
        source=ASELMDBSource(data, on_bad_row="skip"),
        sink=AtomicDataZarrSink(tmp_path / "out.zarr"),
        db_dir=tmp_path,
    )
    run_pipeline(pipeline, n_jobs=2, progress=False)
    assert pipeline.failed_indices.keys() == {1}
    assert "truncated" in pipeline.failed_indices[1]
    assert pipeline.completed_indices == {0, 2}


def test_duplicates_are_found_where_rows_are_left_out(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=2, rows=6)
    shutil.copy(data / "data0000.aselmdb", data / "data0002.aselmdb")
    change_raw_row(data / "data0000.aselmdb", b"2", b"x")
    source = ASELMDBSource(data, on_bad_row="skip")
    hashing: Pipeline[Any] = Pipeline(
        source=source, sink=StructureHashSink(tmp_path / "hashes"), db_dir=tmp_path / "one"
    )
    run_pipeline(hashing, progress=False)
    unique = UniqueStructures(source, tmp_path / "hashes")
    pipeline: Pipeline[Any] = Pipeline(
        source=unique, sink=AtomicDataZarrSink(tmp_path / "out.zarr"), db_dir=tmp_path / "two"
    )
    run_pipeline(pipeline, progress=False)
    assert pipeline.failed_indices == {}
    # Of the copy the one is left whose first is the row that was left out.
    assert contents(tmp_path / "out.zarr")["meta/samples_mask"].sum() == 5 + 6 + 1
    assert measurements(tmp_path / "two")[0]["skipped_rows"] == 1


@pytest.mark.parametrize("rows_per_index", [None, 5])
def test_a_store_is_continued_when_bad_rows_are_to_be_left_out(
    tmp_path: Path, rows_per_index: int | None
) -> None:
    data = write_dataset(tmp_path / "in", files=3, rows=5)
    change_raw_row(data / "data0000.aselmdb", b"2", b"x")
    value = raw_row(data / "data0001.aselmdb", b"4")
    change_raw_row(data / "data0001.aselmdb", b"4", value[:-20])

    def convert(on_bad_row: Any, store: Path) -> Pipeline[Any]:
        pipeline: Pipeline[Any] = Pipeline(
            source=ASELMDBSource(data, rows_per_index, on_bad_row=on_bad_row),
            sink=AtomicDataZarrSink(store),
            db_dir=tmp_path,
            resume=True,
        )
        run_pipeline(pipeline, progress=False)
        return pipeline

    assert convert("fail", tmp_path / "out.zarr").failed_indices.keys() == {0, 1}
    first = convert("skip", tmp_path / "out.zarr")
    assert first.failed_indices == {}
    again = convert("skip", tmp_path / "out.zarr")
    assert [row.completed_at for row in again.metrics] == [
        row.completed_at for row in first.metrics
    ]
    convert("skip", tmp_path / "clean.zarr")
    assert_same_store(tmp_path / "clean.zarr", tmp_path / "out.zarr")


def test_a_total_moment_that_is_no_number_is_a_result(tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    write_database(path, molecules(2))
    change_row(path, 1, magmom=marked(np.array([0.5, 1.0, 2.0])))
    change_row(path, 2, magmom=1.5)
    vector, number = ASELMDBSource(path)[0]
    assert vector.magmom is None
    np.testing.assert_array_equal(vector.results["magmom"], [0.5, 1.0, 2.0])
    assert (number.magmom, dict(number.results)) == (1.5, {})


def test_keys_of_mappings_are_integers_where_ase_has_them_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    keys = {"-1": 1, "+2": 2, " 3": 3, "1_0": 4, "007": 7, "x": 8}
    write_database(path, molecules(1), data={"k": keys})
    with ase.db.connect(path) as database:
        expected = database.get(1).data["k"]
    (structure,) = ASELMDBSource(path)[0]
    assert structure.info["k"] == expected
    assert set(expected) == {-1, 2, 3, 10, 7, "x"}
