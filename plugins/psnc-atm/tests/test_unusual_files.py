"""Databases without rows, with gaps, odd keys, rows of different kinds, and of other writers."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import ase.db
import lmdb
import numpy as np
import orjson
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from data import change_raw_row, contents, molecules, raw_row, write_database, write_dataset

from psnc import Pipeline, SourceError, run_pipeline
from psnc.testing import check_source
from psnc_atm import ASELMDBSource, AtomicData, AtomicDataZarrSink
from psnc_atm.lmdb_file import open_file, row_count
from psnc_atm.row_codec import RowDecoder

ROWS_PER_INDEX = pytest.mark.parametrize("rows_per_index", [None, 4])


def empty(path: Path) -> None:
    ase.db.connect(path).close()


def described_only(path: Path) -> None:
    with ase.db.connect(path) as database:
        database.metadata = {"format": "x"}


def all_deleted(path: Path) -> None:
    with ase.db.connect(path) as database:
        ids = [database.write(atoms) for atoms in molecules(7)]
        database.delete(ids)


def deleted_one_by_one(path: Path) -> None:
    for _ in range(3):
        with ase.db.connect(path) as database:
            database.delete([database.write(next(molecules(1)))])


@ROWS_PER_INDEX
@pytest.mark.parametrize("make", [empty, described_only, all_deleted, deleted_one_by_one])
def test_a_file_without_rows_is_no_error_and_moves_no_others(
    tmp_path: Path, make: Any, rows_per_index: int | None
) -> None:
    data = write_dataset(tmp_path / "in", files=2, rows=10)
    make(data / "data0000b.aselmdb")
    source = ASELMDBSource(data, rows_per_index)
    check_source(source)
    counts = [len(list(source[index])) for index in range(len(source))]
    assert counts == ([10, 0, 10] if rows_per_index is None else [4, 4, 2, 4, 4, 2])
    assert [len(source.atom_counts(index)) for index in range(len(source))] == counts
    pipeline: Pipeline[Any] = Pipeline(
        source=source, sink=AtomicDataZarrSink(tmp_path / "out.zarr"), db_dir=tmp_path
    )
    run_pipeline(pipeline, progress=False)
    assert pipeline.failed_indices == {}
    assert contents(tmp_path / "out.zarr")["meta/samples_mask"].tolist() == [True] * 20


def test_ids_deleted_and_written_again_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    for turn in range(4):
        with ase.db.connect(path) as database:
            for number, atoms in enumerate(molecules(30, seed=turn)):
                database.write(atoms, place=30 * turn + number)
            database.delete([row for row in database.ids if row % 7 == turn])
    with ase.db.connect(path) as database:
        expected = [row.place for row in database.select()]
    whole, cut = ASELMDBSource(path), ASELMDBSource(path, rows_per_index=9)
    assert [structure.info["place"] for structure in whole[0]] == expected
    in_pieces = [structure for index in range(len(cut)) for structure in cut[index]]
    assert [structure.info["place"] for structure in in_pieces] == expected
    counts = [count for index in range(len(cut)) for count in cut.atom_counts(index)]
    assert counts == [len(structure) for structure in in_pieces]


@pytest.mark.parametrize(
    "key", [b"extra", b"007", b"00", b"-1", b"1.0", b" 5", b"9" * 19, b"9" * 40, "²".encode()]
)
def test_keys_that_ase_would_not_write_are_no_rows(tmp_path: Path, key: bytes) -> None:
    data = write_dataset(tmp_path / "in", files=2, rows=10)
    path = data / "data0000.aselmdb"
    change_raw_row(path, key, raw_row(path, b"3"))
    source = ASELMDBSource(data)
    assert [len(list(source[index])) for index in range(2)] == [10, 10]
    assert len(source.atom_counts(0)) == 10
    # There they might shift rows.
    cut = ASELMDBSource(data, rows_per_index=5)
    with pytest.raises(SourceError, match=r"data0000\.aselmdb: has keys that are no row ids"):
        list(cut[0])
    assert len(list(cut[len(cut) - 1])) == 5


@pytest.mark.parametrize("numbers", [0, 300, 3000])
@pytest.mark.parametrize("rows", [1, 3, 50, 1200])
def test_rows_are_counted_without_opening_the_file(tmp_path: Path, rows: int, numbers: int) -> None:
    path = tmp_path / "rows.aselmdb"
    write_database(path, molecules(rows), data={"x": np.zeros(numbers)})
    with ase.db.connect(path) as database:
        assert row_count(path) == rows
        database.delete([1])
        database.metadata = {"a": 1}
    assert row_count(path) == rows - 1 == len(open_file(path).ids)


def mixed(path: Path) -> list[AtomicData]:
    """Rows that differ in what they have, and what they are to be read as."""
    water = molecule("H2O")
    charged = molecule("CH4")
    charged.calc = SinglePointCalculator(charged, energy=-1.5, magmom=1.0)
    salt = bulk("NaCl", "rocksalt", a=5.6)
    salt.calc = SinglePointCalculator(salt, forces=np.ones((2, 3)), stress=np.arange(6.0))
    slab = bulk("Cu", cubic=True)
    slab.pbc = (True, True, False)
    slab.set_tags([0, 0, 1, 1])
    with ase.db.connect(path) as database:
        database.write(water)
        database.write(charged, data={"charge": -1, "spin": 2})
        database.write(salt, key_value_pairs={"charge": 3})
        database.write(slab)
        database.write(ase.Atoms())
    return [AtomicData.from_ase(atoms) for atoms in (water, charged, salt, slab, ase.Atoms())]


@ROWS_PER_INDEX
def test_what_a_row_lacks_is_none_whatever_its_neighbours_have(
    tmp_path: Path, rows_per_index: int | None
) -> None:
    expected = mixed(tmp_path / "rows.aselmdb")
    source = ASELMDBSource(tmp_path, rows_per_index)
    found = [structure for index in range(len(source)) for structure in source[index]]
    for one, other in zip(expected, found, strict=True):
        for name in ("positions", "cell", "pbc", "atomic_numbers"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        for name in ("energy", "magmom", "forces", "stress", "dipole", "tags", "atomic_masses"):
            assert (getattr(one, name) is None) is (getattr(other, name) is None), name
    assert [one.charge for one in found] == [None, -1.0, 3.0, None, None]
    assert [one.spin for one in found] == [None, 2.0, None, None, None]
    assert found[2].forces is not None
    assert found[1].energy == -1.5
    assert found[4].positions.shape == (0, 3)


WRITERS = {
    "without spaces": lambda row: orjson.dumps(row),
    "with many": lambda row: json.dumps(row, indent=4).encode(),
    "keys sorted": lambda row: json.dumps(row, sort_keys=True).encode(),
    "lists, no marked arrays": lambda row: json.dumps(
        {key: _listed(entry) for key, entry in row.items()}
    ).encode(),
}


def _listed(entry: Any) -> Any:
    if isinstance(entry, dict) and "__ndarray__" in entry:
        shape, dtype, flat = entry["__ndarray__"]
        return np.array(flat, dtype).reshape(shape).tolist()
    return entry


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("level", [0, 1, 9])
def test_rows_of_other_writers_are_the_same(tmp_path: Path, writer: str, level: int) -> None:
    path = tmp_path / "rows.aselmdb"
    write_database(path, molecules(5), data={"charge": 1, "x": 0.5})
    before, counts = list(ASELMDBSource(path)[0]), ASELMDBSource(path).atom_counts(0)
    for number in range(1, 6):
        key = b"%d" % number
        row = json.loads(zlib.decompress(raw_row(path, key)))
        change_raw_row(path, key, zlib.compress(WRITERS[writer](row), level))
    source = ASELMDBSource(path)
    assert list(source[0]) == before
    np.testing.assert_array_equal(source.atom_counts(0), counts)


def test_arrays_of_every_kind_are_what_ase_makes_of_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    arrays = {
        str(dtype): np.arange(6).astype(dtype).reshape(2, 3)
        for dtype in ("bool", "int8", "int32", "uint64", "float32", "float64", "<U3")
    }
    arrays["complex128"] = np.array([[1 + 2j, -3j]])
    arrays["complex64"] = np.array([1 + 2j, 0.5], dtype=np.complex64)
    arrays["empty"] = np.zeros((0, 3))
    arrays["scalar"] = np.array(1.5)
    data = {**arrays, "nested": {"list": [{"array": np.arange(2.0)}], "complex": 1 + 2j}}
    write_database(path, molecules(1), data=data)
    with ase.db.connect(path) as database:
        expected = database.get(1).data
    (structure,) = ASELMDBSource(path)[0]
    for name in arrays:
        found = structure.info[name]
        np.testing.assert_array_equal(found, expected[name])
        assert np.asarray(found).dtype == np.asarray(expected[name]).dtype, name
        assert np.shape(found) == np.shape(expected[name]), name
    (one,) = structure.info["nested"]["list"]
    np.testing.assert_array_equal(one["array"], [0.0, 1.0])
    assert structure.info["nested"]["complex"] == 1 + 2j


def test_a_database_of_rows_alone_needs_no_other_keys(tmp_path: Path) -> None:
    path, bare = tmp_path / "rows.aselmdb", tmp_path / "bare.aselmdb"
    write_database(path, molecules(5))
    rows = {b"%d" % row: raw_row(path, b"%d" % row) for row in range(1, 6)}
    with (
        lmdb.open(str(bare), subdir=False, map_size=2**24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in rows.items():
            transaction.put(key, value)
    assert row_count(bare) == 5
    assert list(ASELMDBSource(bare, rows_per_index=5)[0]) == list(ASELMDBSource(path)[0])


# --- inflating ----------------------------------------------------------------------------------


def test_without_isal_structures_and_errors_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "rows.aselmdb"
    write_database(path, molecules(20))
    whole = raw_row(path, b"2")
    damaged = [
        *(whole[:end] for end in (0, 1, 2, 5, 60, len(whole) - 5, len(whole) - 1)),
        *(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :] for place in (0, 1)),
        *(
            whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]
            for place in range(2, len(whole), 40)
        ),
        whole[:-1] + bytes([whole[-1] ^ 1]),
        whole + b"more",
        zlib.decompress(whole),
    ]
    for row, value in enumerate(damaged, 21):
        change_raw_row(path, b"%d" % row, value)
    script = f"""
import logging, sys
if sys.argv[1] == "without":
    sys.modules["isal"] = sys.modules["isal.isal_zlib"] = None
logging.basicConfig(stream=sys.stdout, format="%(message)s")
import zlib
from psnc_atm import ASELMDBSource
from psnc_atm.inflate import inflate
if sys.argv[1] == "without":
    assert inflate is zlib.decompress
for structure in ASELMDBSource({str(path)!r}, on_bad_row="skip")[0]:
    print(structure.positions.tobytes().hex(), structure.forces.tobytes().hex())
"""
    said = [
        subprocess.run(
            [sys.executable, "-c", script, how], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        for how in ("with", "without")
    ]
    assert said[0] == said[1]
    assert said[0].count("left out (") > len(damaged) / 2


def test_numbers_are_read_to_the_last_bit() -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**64, 3000, dtype=np.uint64)
    positions = bits.view(np.float64)
    positions = np.where(np.isfinite(positions), positions, 5e-324).reshape(-1, 3)
    row = {
        "numbers": [1] * len(positions),
        "positions": positions.tolist(),
        "cell": np.zeros((3, 3)).tolist(),
        "pbc": [False] * 3,
    }
    structure = RowDecoder()(zlib.compress(json.dumps(row).encode()))
    assert structure.positions.tobytes() == positions.tobytes()


def test_memory_does_not_grow_with_the_size_of_a_file(tmp_path: Path) -> None:
    atoms = Atoms("H300", positions=np.random.default_rng(0).normal(size=(300, 3)))
    path = tmp_path / "data.aselmdb"
    write_database(path, [atoms])
    value = raw_row(path, b"1")
    with (
        lmdb.open(str(path), subdir=False, map_size=2**30) as environment,
        environment.begin(write=True) as transaction,
    ):
        for row in range(2, 60_001):
            transaction.put(b"%d" % row, value)
    assert path.stat().st_size > 600 * 2**20
    program = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from psnc_atm import ASELMDBSource\n"
        "def peak():\n"
        "    status = Path('/proc/self/status').read_text()\n"
        "    return int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) / 1024\n"
        "source = ASELMDBSource(sys.argv[1])\n"
        "before = peak()\n"
        "counted = len(source.atom_counts(0))\n"
        "print(counted, sum(1 for _ in source[0]), peak() - before)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program, str(path)], check=True, capture_output=True, text=True
    )
    counted, read, grown = said.stdout.split()
    assert (counted, read) == ("60000", "60000")
    assert float(grown) < 400


def test_a_file_that_is_replaced_while_it_is_read_fails_its_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psnc_atm.lmdb_file._MOST_MAPPED_BYTES", 1)
    for name in ("data", "other"):
        write_database(tmp_path / f"{name}.aselmdb", molecules(200))
    reading = iter(ASELMDBSource(tmp_path / "data.aselmdb")[0])
    next(reading)
    (tmp_path / "other.aselmdb").rename(tmp_path / "data.aselmdb")
    with pytest.raises(SourceError, match=r"data\.aselmdb: was replaced by another file while it"):
        list(reading)
