"""What others have published goes every way through, and comes out as ASE reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from data import contents
from real_structures import COLLECTIONS, FILES, UNREADABLE, collection, path_of
from test_atomic_data import assert_same_atoms

from psnc import Filter, Pipeline, Source, SourceError, gather_pipeline, run_pipeline
from psnc_atm import (
    ASEDatabaseSource,
    ASELMDBSink,
    ASELMDBSource,
    ASESource,
    AtomicData,
    AtomicDataZarrSink,
    AtomicInfoFilter,
    AtomicStatsFilter,
    ExtxyzSink,
    NeighbourList,
)
from psnc_atm.fields import FIELDS, OPTIONAL

# ASE says of some files that it leaves something out.
pytestmark = pytest.mark.filterwarnings("ignore")


def run(source: Source[Any], *stages: Any, db_dir: Path) -> Pipeline[Any]:
    *filters, sink = stages
    pipeline = Pipeline(source=source, filters=filters, sink=sink, db_dir=db_dir)
    run_pipeline(pipeline, progress=False, on_error="raise")
    return pipeline


def of_a_file(file: str) -> Callable[[Path], Source[Any]]:
    return lambda directory: ASESource(path_of(file))


def of_a_collection(name: str, suffix: str) -> Callable[[Path], Source[Any]]:
    def make(directory: Path) -> Source[Any]:
        path = directory / f"{name}{suffix}"
        if suffix in (".db", ".aselmdb"):
            with ase.db.connect(path) as database:
                for atoms in collection(name):
                    database.write(atoms)
            return ASELMDBSource(path) if suffix == ".aselmdb" else ASEDatabaseSource(path)
        ase.io.write(path, collection(name))
        return ASESource(path)

    return make


SOURCES = {
    **{file: of_a_file(file) for file in FILES},
    **{
        f"{name}{suffix}": of_a_collection(name, suffix)
        for name in COLLECTIONS
        for suffix in (".extxyz", ".traj", ".db", ".aselmdb")
    },
}
every_source = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())


def assert_comes_back(read: AtomicData, written: AtomicData) -> None:
    """Compare all but entries of info that are objects, which only memory holds."""
    assert read.info.keys() <= written.info.keys()
    kept = {name: written.info[name] for name in read.info}
    left_out = written.info.keys() - read.info.keys()
    assert left_out <= {"spacegroup", "occupancy", "labels", "magresblock_calculation", "type"}
    other = AtomicData(
        **{name: getattr(written, name) for name in written.__slots__ if name[0] != "_"}
        | {"info": kept}
    )
    assert read == other


@pytest.mark.parametrize("file", FILES)
def test_structures_are_those_that_ase_reads(file: str) -> None:
    expected: list[Atoms] = ase.io.read(path_of(file), index=":")
    source = ASESource(path_of(file))
    read = list(source[0])
    assert len(read) == len(expected) > 0
    for structure, atoms in zip(read, expected, strict=True):
        again = structure.to_ase()
        for name in again.arrays:
            np.testing.assert_array_equal(again.arrays[name], atoms.arrays[name])
        for name in atoms.arrays.keys() - again.arrays.keys():
            np.testing.assert_array_equal(structure.info[name], atoms.arrays[name])
        atoms.arrays = {name: atoms.arrays[name] for name in again.arrays}
        assert_same_atoms(again, atoms)
    assert source.atom_counts(0).tolist() == [len(atoms) for atoms in expected]


@pytest.mark.parametrize("file", UNREADABLE)
def test_what_ase_makes_nothing_of_fails_in_one_line(file: str) -> None:
    source = ASESource(path_of(file))
    with pytest.raises(SourceError) as failed:
        list(source[0])
    assert str(failed.value).startswith(str(path_of(file)))
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_collections_are_the_same_from_every_format(name: str, tmp_path: Path) -> None:
    expected = list(of_a_collection(name, ".traj")(tmp_path)[0])
    assert len(expected) == len(COLLECTIONS[name].names)
    for suffix in (".db", ".aselmdb"):
        read = list(of_a_collection(name, suffix)(tmp_path)[0])
        for one, other in zip(read, expected, strict=True):
            np.testing.assert_array_equal(one.atomic_numbers, other.atomic_numbers)
            np.testing.assert_array_equal(one.positions, other.positions)
            np.testing.assert_array_equal(one.cell, other.cell)
            np.testing.assert_array_equal(one.initial_magmoms, other.initial_magmoms)


@every_source
def test_a_store_has_what_was_read(make, tmp_path: Path) -> None:
    source = make(tmp_path)
    structures = list(source[0])
    # Of a trajectory some frames may have fields that others lack.
    common = [
        name
        for name in OPTIONAL
        if all(getattr(structure, name) is not None for structure in structures)
    ]
    sink = AtomicDataZarrSink(tmp_path / "out.zarr", fields=common)
    run(source, sink, db_dir=tmp_path / "run")
    arrays = contents(tmp_path / "out.zarr")
    assert arrays["meta/samples_mask"].tolist() == [True] * len(structures)
    ends = np.cumsum([len(structure) for structure in structures])
    np.testing.assert_array_equal(arrays["meta/atoms_ptr"], [0, *ends])
    for path, array in arrays.items():
        group, _, field = path.partition("/")
        if group == "core":
            values = [getattr(structure, field) for structure in structures]
            per_atom = FIELDS[field].level == "atom"
            joined = np.concatenate(values) if per_atom else np.stack(values)
            np.testing.assert_array_equal(np.squeeze(array), np.squeeze(joined), err_msg=field)


@every_source
def test_a_database_has_what_was_read(make, tmp_path: Path) -> None:
    source = make(tmp_path)
    sink = ASELMDBSink(tmp_path / "out", on_unwritable="drop")
    run(source, sink, db_dir=tmp_path / "run")
    again = ASELMDBSource(tmp_path / "out")
    for one, other in zip(again[0], source[0], strict=True):
        assert_comes_back(one, other)


@every_source
def test_an_xyz_file_has_what_was_read(make, tmp_path: Path) -> None:
    source = make(tmp_path)
    run(source, ExtxyzSink(tmp_path / "out", on_unwritable="drop"), db_dir=tmp_path / "run")
    for one, other in zip(ASESource(tmp_path / "out")[0], source[0], strict=True):
        for field in ("positions", "cell", "pbc", "forces", "energy", "stress", "charge", "spin"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        assert one.info.keys() <= other.info.keys()


@every_source
def test_filters_work_on_them(make, tmp_path: Path) -> None:
    source = make(tmp_path)
    structures = list(source[0])
    filters: list[Filter[Any, Any]] = [
        AtomicInfoFilter(tmp_path / "info.json"),
        AtomicStatsFilter(tmp_path / "stats.parquet"),
        NeighbourList(3.0),
    ]
    sink = ASELMDBSink(tmp_path / "out", on_unwritable="drop")
    gather_pipeline(run(source, *filters, sink, db_dir=tmp_path / "run"))
    assert json.loads((tmp_path / "info.json").read_text())["structures"] == len(structures)
    for structure in ASELMDBSource(tmp_path / "out")[0]:
        assert structure.edge_index is not None
        sender, receiver = structure.edge_index
        vectors = structure.positions[receiver] - structure.positions[sender] + structure.shifts
        assert (np.linalg.norm(vectors, axis=1) <= 3.0 + 1e-9).all()
