from __future__ import annotations

import os
import pickle
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
import pytest
from ase import Atoms
from awkward import PLAIN, RICH
from data import contents, crystals, molecules
from test_atomic_data import assert_same_atoms

from psnc import Pipeline, SourceError, run_pipeline
from psnc.testing import check_source
from psnc_atm import ASEDatabaseSource, ASELMDBSource, AtomicDataZarrSink

# ASE leaves its connections open, of which Python 3.13 warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning"),
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <sqlite3.Connection:pytest.PytestUnraisableExceptionWarning"
    ),
]

SUFFIXES = (".db", ".json")


def write(path: Path, structures: Any, **row: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with ase.db.connect(path) as database:
        for number, atoms in enumerate(structures):
            database.write(atoms, number=number, **row)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("make", [molecules, crystals])
def test_rows_become_the_same_atoms_as_with_ase(suffix: str, make, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}", make(6))
    source = ASEDatabaseSource(path)
    assert len(source) == 1
    ours = [structure.to_ase() for structure in source[0]]
    for one, row in zip(ours, ase.db.connect(path).select(), strict=True):
        assert_same_atoms(one, row.toatoms())
    assert source.atom_counts(0).tolist() == [len(atoms) for atoms in ours]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_row_is_the_same_in_every_kind_of_database(suffix: str, tmp_path: Path) -> None:
    row = {
        "label": "x",
        "gap": 0.1 + 0.2,
        "relaxed": True,
        "data": {
            **{"charge": -1, "spin": 2, "grid": np.eye(2), "sub": {"a": [1, 2.5, None]}},
            **{"wave": np.array([1 + 2j]), "text": "水", "number": "both"},
        },
    }
    read = []
    for end in (suffix, ".aselmdb"):
        path = write(tmp_path / f"rows{end}", [*molecules(3), *crystals(3)], **row)
        source = ASELMDBSource(path) if end == ".aselmdb" else ASEDatabaseSource(path)
        read.append(list(source[0]))
    assert read[0] == read[1]
    assert (read[0][0].charge, read[0][0].spin) == (-1.0, 2.0)
    assert read[0][0].info.keys() == {
        *("label", "gap", "relaxed", "grid", "sub", "wave", "text"),
        *("number", "key_value_pairs.number"),
    }


AWKWARD = [
    name
    for name, structure in {**PLAIN, **RICH}.items()
    # Not what overflows in ase.db as it writes, or what is only in info.
    if name not in ("large tags", "stress", "a stress that is infinite", "awkward numbers")
    and name not in ("a stress that is not symmetric", "velocities")
    and not structure.info
]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_rows_become_the_same_atoms_as_with_ase(
    suffix: str, name: str, tmp_path: Path
) -> None:
    atoms = {**PLAIN, **RICH}[name].to_ase()
    if atoms.calc is not None and "magmoms" in atoms.calc.results:
        atoms.calc.results.pop("magmom", None)
    path = write(tmp_path / f"rows{suffix}", [atoms])
    (structure,) = ASEDatabaseSource(path)[0]
    (row,) = ase.db.connect(path).select()
    np.testing.assert_array_equal(structure.positions, row.positions)
    for field in ("initial_magmoms", "magmoms", "forces", "momenta"):
        ours, theirs = getattr(structure, field), row.get(field)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(np.ravel(ours), np.ravel(theirs))
            assert len(ours) == len(structure)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_come_in_order_without_those_that_were_deleted(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}", molecules(150))
    database = ase.db.connect(path)
    database.delete([1, 2, 64, 65, 150])
    database.update(70, label="changed")
    left = [number for number in range(150) if number + 1 not in {1, 2, 64, 65, 150}]
    assert [s.info["number"] for s in ASEDatabaseSource(path)[0]] == left
    cut = ASEDatabaseSource(path, rows_per_index=40)
    assert [len(list(each)) for each in cut] == [40, 40, 40, 25]
    assert [s.info["number"] for each in cut for s in each] == left
    assert cut.index_name(1) == f"rows{suffix}, rows 40 to 79"
    assert [s.info["number"] for s in pickle.loads(pickle.dumps(cut))[3]] == left[120:]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_selection_is_what_ase_makes_of_it(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}", molecules(40), kind="a")
    for selection in ("H", "C>1,number<30", "kind=a,natoms>4", "energy<0", "kind=b"):
        expected = [row.number for row in ase.db.connect(path).select(selection)]
        for rows in (None, 7):
            source = ASEDatabaseSource(path, selection, rows_per_index=rows)
            got = [s.info["number"] for each in source for s in each]
            assert got == expected, selection
            counts = [n for i in range(len(source)) for n in source.atom_counts(i).tolist()]
            assert counts == [len(s) for each in source for s in each]
    with pytest.raises(SourceError, match=r"selection 'natoms<five' fails \(.*\); mend it"):
        list(ASEDatabaseSource(path, "natoms<five")[0])


def test_directories_and_patterns(tmp_path: Path) -> None:
    write(tmp_path / "b.db", molecules(2))
    write(tmp_path / "a.db", molecules(3))
    write(tmp_path / "c.json", molecules(1))
    (tmp_path / "notes.txt").write_text("x")
    assert [len(list(each)) for each in ASEDatabaseSource(tmp_path)] == [3, 2]
    assert [len(list(each)) for each in ASEDatabaseSource(tmp_path, pattern="*.json")] == [1]
    assert [len(list(each)) for each in ASEDatabaseSource(tmp_path / "?.db")] == [3, 2]
    write(tmp_path / "d.aselmdb", molecules(1))
    with pytest.raises(SourceError, match="use ASELMDBSource"):
        ASEDatabaseSource(tmp_path / "d.aselmdb")
    with pytest.raises(SourceError, match="no file matches"):
        ASEDatabaseSource(tmp_path / "nothing.db")


def test_nothing_is_written_to_a_database_that_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "in" / "rows.db", molecules(70))
    (tmp_path / "in" / "empty.db").write_bytes(b"")
    before = path.read_bytes()
    for file in tmp_path.glob("in/*"):
        file.chmod(0o444)
    source = ASEDatabaseSource(tmp_path / "in", "H>0")
    assert list(source[1])
    assert list(ASEDatabaseSource(path)[0])
    with pytest.raises(SourceError, match=r"no database of ase\.db"):
        list(source[0])
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path / "in")) == ["empty.db", "rows.db"]
    assert (tmp_path / "in" / "empty.db").stat().st_size == 0


def test_a_row_can_be_written_while_others_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.db", molecules(200))
    items = iter(ASEDatabaseSource(path)[0])
    next(items)
    ase.db.connect(path).write(next(molecules(1)))
    assert len(list(items)) == 199


def change(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize(
    "column",
    [
        *("numbers = X'00'", "numbers = NULL", "positions = X'0000'", "positions = 'text'"),
        *("cell = X'00'", "forces = X'00'", "key_value_pairs = '{'", "data = X'FF'"),
        *("tags = X'00000000'", "constraints = '{'", "energy = 'text'", "data = '['"),
    ],
)
def test_a_damaged_row_is_named(column: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.db", molecules(6), data={"x": [1]})
    change(path, f"UPDATE systems SET {column} WHERE id = 4")
    items = iter(ASEDatabaseSource(path)[0])
    assert len([next(items) for _ in range(3)]) == 3
    with pytest.raises(SourceError, match=r"rows\.db, row 4: cannot be read \(.+\)") as failed:
        next(items)
    assert "\n" not in str(failed.value)
    with pytest.raises(SourceError, match="row 4"):
        list(ASEDatabaseSource(path, rows_per_index=3)[1])


@pytest.mark.parametrize("kept", [0, 50, 100, 4096, 0.5, 0.9])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("rows", [None, 100])
def test_a_damaged_file_fails_its_own_index(
    kept: float, suffix: str, rows: int | None, tmp_path: Path
) -> None:
    for name in "abc":
        write(tmp_path / f"{name}{suffix}", molecules(60), note="x" * 100)
    path = tmp_path / f"b{suffix}"
    os.truncate(path, int(kept * path.stat().st_size) if 0 < kept < 1 else int(kept))
    source = ASEDatabaseSource(tmp_path, rows_per_index=rows, pattern=f"*{suffix}")
    assert len(source) == 3
    assert len(list(source[0])) == len(list(source[2])) == 60
    source.input_identity()
    with pytest.raises(SourceError, match=rf"b\{suffix}") as failed:
        list(source[1])
    assert "\n" not in str(failed.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    change(tmp_path / "a.db", "CREATE TABLE other (x)")
    (tmp_path / "b.json").write_text('{"energy": 1}')
    (tmp_path / "c.json").write_text("[]")
    write(tmp_path / "d.db", molecules(1))
    change(tmp_path / "d.db", "UPDATE information SET value = '12' WHERE name = 'version'")
    for name, message in (
        ("a.db", "no database of ase.db"),
        ("b.json", "no database of ase.db"),
        ("c.json", "replace it with a good copy"),
        ("d.db", "has version 12 of ase.db's format, not 6 to 9"),
    ):
        with pytest.raises(SourceError, match=message):
            list(ASEDatabaseSource(tmp_path / name)[0])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_changes_is_noticed_and_a_copy_is_the_same(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in" / f"rows{suffix}", molecules(5))

    def identity(directory: str = "in") -> dict[str, Any]:
        return ASEDatabaseSource(tmp_path / directory, pattern="*").input_identity()

    before = identity()
    shutil.copytree(tmp_path / "in", tmp_path / "copy")
    assert identity("copy") == before
    seen = [before]
    database = ase.db.connect(path)
    for act in (
        lambda: database.update(3, label="x"),
        lambda: database.write(Atoms("H")),
        lambda: database.delete([2]),
        lambda: (path.unlink(), write(path, molecules(5))),
    ):
        act()
        assert identity() not in seen
        seen.append(identity())


def test_processes_and_threads_read_at_once(tmp_path: Path) -> None:
    for name in "abcd":
        write(tmp_path / "in" / f"{name}.db", molecules(70, seed=ord(name)))
    stores = []
    for jobs in (1, 2):
        source = ASEDatabaseSource(tmp_path / "in", rows_per_index=30)
        sink = AtomicDataZarrSink(tmp_path / f"{jobs}.zarr")
        pipeline = Pipeline(source=source, sink=sink, resume=True, db_dir=tmp_path / str(jobs))
        run_pipeline(pipeline, n_jobs=jobs, progress=False)
        stores.append(contents(tmp_path / f"{jobs}.zarr"))
    assert stores[0]["meta/samples_mask"].all()
    for name in ("core/positions", "core/forces", "core/energy", "meta/atoms_ptr"):
        np.testing.assert_array_equal(stores[0][name], stores[1][name])
    expected = [list(each) for each in source]
    read: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda index=index: read.update({index: list(source[index])}))
        for index in range(len(source))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read[index] for index in range(len(source))] == expected


def test_the_source_keeps_the_rules(tmp_path: Path) -> None:
    write(tmp_path / "a.db", crystals(3))
    write(tmp_path / "b.db", molecules(4))
    write(tmp_path / "c.json", molecules(2))
    check_source(ASEDatabaseSource(tmp_path))
    check_source(ASEDatabaseSource(str(tmp_path), rows_per_index=2, pattern="*"))
    check_source(ASEDatabaseSource(tmp_path, "number<2"))


@pytest.mark.parametrize("name", ["a b", "a?b#c", "a%20b", "a@1", "[a]", "ä", "a*"])
def test_names_may_be_odd(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name / f"{name}.db", molecules(2))
    for given in (path, path.parent):
        source = ASEDatabaseSource(given)
        assert [s.info["number"] for s in source[0]] == [0, 1]
        assert source.index_name(0) == f"{name}.db"


def test_no_atoms_may_have_moments(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.db", [Atoms()])
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE systems SET initial_magmoms = x''")
    (structure,) = ASEDatabaseSource(path)[0]
    assert structure.initial_magmoms is not None
    assert len(structure) == len(structure.initial_magmoms) == 0
