"""Time the sources and sinks of files against what ASE does with the same files.

    python benchmarks/formats.py

Each figure is the median of rounds in which all ways take turns, in microseconds a structure.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from psnc_atm import (
    ASEDatabaseSource,
    ASELMDBSink,
    ASELMDBSource,
    ASESource,
    AtomicData,
    ExtxyzSink,
)

ROUNDS, STRUCTURES, ATOMS = 5, 500, 40


def structures() -> Iterator[Atoms]:
    random = np.random.default_rng(0)
    for _ in range(STRUCTURES):
        atoms = Atoms(
            random.integers(1, 60, ATOMS), random.normal(size=(ATOMS, 3)), cell=np.eye(3), pbc=True
        )
        atoms.info = {"label": "x", "gap": float(random.normal())}
        atoms.calc = SinglePointCalculator(
            atoms, energy=random.normal(), forces=random.normal(size=(ATOMS, 3))
        )
        yield atoms


def write_database(path: Path, made: list[Atoms]) -> None:
    path.unlink(missing_ok=True)
    with ase.db.connect(path) as database:
        for atoms in made:
            database.write(atoms, **atoms.info)


def main() -> None:
    made = list(structures())
    taken_over = [AtomicData.from_ase(atoms) for atoms in made]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for suffix in (".db", ".aselmdb"):
            write_database(directory / f"in{suffix}", made)
        for suffix in (".extxyz", ".traj"):
            ase.io.write(directory / f"in{suffix}", made)

        def of(suffix: str) -> Path:
            return directory / f"in{suffix}"

        def with_ase_db(suffix: str) -> Callable[[], object]:
            return lambda: [
                (row.toatoms(), row.data) for row in ase.db.connect(of(suffix)).select()
            ]

        def with_ase_io(suffix: str) -> Callable[[], object]:
            return lambda: ase.io.read(of(suffix), index=":")

        ways: dict[str, Callable[[], object]] = {
            "read .db: ase.db, to Atoms": with_ase_db(".db"),
            "read .db: ASEDatabaseSource": lambda: list(ASEDatabaseSource(of(".db"))[0]),
            "count .db": lambda: ASEDatabaseSource(of(".db")).atom_counts(0),
            "read .aselmdb: ase.db, to Atoms": with_ase_db(".aselmdb"),
            "read .aselmdb: ASELMDBSource": lambda: list(ASELMDBSource(of(".aselmdb"))[0]),
            "read .extxyz: ase.io": with_ase_io(".extxyz"),
            "read .extxyz: ASESource": lambda: list(ASESource(of(".extxyz"))[0]),
            "count .extxyz": lambda: ASESource(of(".extxyz")).atom_counts(0),
            "read .traj: ase.io": with_ase_io(".traj"),
            "read .traj: ASESource": lambda: list(ASESource(of(".traj"))[0]),
            "count .traj": lambda: ASESource(of(".traj")).atom_counts(0),
            "write .aselmdb: ase.db": lambda: write_database(directory / "out.aselmdb", made),
            "write .aselmdb: ASELMDBSink": lambda: ASELMDBSink(directory)(iter(taken_over), 0),
            "write .extxyz: ase.io, 8 decimals": lambda: ase.io.write(
                directory / "out.extxyz", made
            ),
            "write .extxyz: ExtxyzSink, exact": lambda: ExtxyzSink(directory)(iter(taken_over), 0),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, act in ways.items():
                start = time.perf_counter()
                act()
                times[way].append(time.perf_counter() - start)
        for way, taken in times.items():
            print(f"{way:36} {statistics.median(taken) / STRUCTURES * 1e6:8.0f}")
        for file in (of(".aselmdb"), *directory.glob("000*")):
            print(f"{file.name:36} {file.stat().st_size / STRUCTURES:8.0f} bytes a structure")


if __name__ == "__main__":
    main()
