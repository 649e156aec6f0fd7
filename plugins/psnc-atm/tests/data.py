"""Structures and databases for the tests, written by ase and ase-db-backends alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ase.db
import lmdb
import numpy as np
import zarr
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.collections import g2
from ase.constraints import FixAtoms


def molecules(count: int, seed: int = 0) -> Iterator[Atoms]:
    """Molecules of the G2 set, displaced, with energies and forces."""
    random = np.random.default_rng(seed)
    for number in range(count):
        atoms = g2[g2.names[number % len(g2.names)]]
        atoms.positions += random.normal(scale=0.1, size=atoms.positions.shape)
        forces = random.normal(size=atoms.positions.shape)
        atoms.calc = SinglePointCalculator(atoms, energy=random.normal(), forces=forces)
        yield atoms


def crystals(count: int, seed: int = 0) -> Iterator[Atoms]:
    """Periodic structures with everything that a row can hold."""
    random = np.random.default_rng(seed)
    for number in range(count):
        atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True).repeat((1 + number % 2, 1, 1))
        n = len(atoms)
        atoms.positions += random.normal(scale=0.1, size=(n, 3))
        atoms.pbc = (True, number % 2 == 0, True)
        atoms.set_tags(np.arange(n))
        atoms.set_masses(np.linspace(20, 40, n))
        atoms.set_velocities(random.normal(size=(n, 3)))
        atoms.set_initial_charges(random.normal(size=n))
        atoms.set_initial_magnetic_moments(random.normal(size=n))
        atoms.set_constraint(FixAtoms([0, 2]))
        atoms.calc = SinglePointCalculator(
            atoms,
            energy=random.normal(),
            free_energy=random.normal(),
            forces=random.normal(size=(n, 3)),
            stress=random.normal(size=6),
            dipole=random.normal(size=3),
            magmom=random.normal(),
            magmoms=random.normal(size=n),
            charges=random.normal(size=n),
        )
        yield atoms


def write_database(path: Path, structures: Iterable[Atoms], **row: Any) -> list[int]:
    """Write structures to an ``.aselmdb`` file; ``row`` is what ``db.write`` takes."""
    with ase.db.connect(path) as database:
        return [database.write(atoms, **row) for atoms in structures]


def write_dataset(directory: Path, files: int, rows: int) -> Path:
    """Write ``files`` files of ``rows`` molecules each."""
    directory.mkdir(parents=True)
    for number in range(files):
        write_database(
            directory / f"data{number:04}.aselmdb",
            molecules(rows, seed=number),
            data={"charge": number - 1, "gap": 0.25 * number},
        )
    return directory


def change_raw_row(path: Path, key: bytes, value: bytes) -> None:
    """Put bytes into a database that its writer never would."""
    with (
        lmdb.open(str(path), subdir=False, map_size=2**30) as environment,
        environment.begin(write=True) as transaction,
    ):
        transaction.put(key, value)


def raw_row(path: Path, key: bytes) -> bytes:
    with (
        lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        return bytes(transaction.get(key))


def contents(store: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every array of a Zarr store, by its path."""
    root = zarr.open_group(store, mode="r")
    return {
        name: np.asarray(member[...])
        for name, member in root.members(max_depth=None)
        if isinstance(member, zarr.Array)
    }


def assert_same_store(one: Path, other: Path, *, apart_from: Iterable[str] = ()) -> None:
    """Compare two stores array by array, element by element, and their attributes."""
    left, right = contents(one), contents(other)
    assert left.keys() == right.keys()
    for name in left.keys() - set(apart_from):
        assert left[name].dtype == right[name].dtype, name
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)
    attributes: list[Mapping[str, Any]] = [
        dict(zarr.open_group(store, mode="r").attrs) for store in (one, other)
    ]
    assert attributes[0] == attributes[1]
