"""What reading rows of .aselmdb files costs, compared with the least that it can cost.

python benchmarks/reading.py [--structures 5000] [--atoms 50] [--turns 15]

The least is one zlib.decompress, one orjson.loads and one numpy.array for each array of a row. The
others are ASELMDBSource, with its options, without ISA-L and with it where it is installed; the
numbers of atoms alone; and ase-db-backends, up to its row and up to ase.Atoms. The ways take turns.
Figures are medians of the processor time, which others on the machine disturb less than the time on
the clock. Only ratios mean anything on another machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
import orjson
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from psnc_atm import ASELMDBSource, inflate, row_codec
from psnc_atm.lmdb_file import open_file

Way = Callable[[], Any]


def write_rows(path: Path, structures: int, atoms: int) -> None:
    """Write rows with what those of OMol25 have: results, and data with texts, numbers, arrays."""
    random = np.random.default_rng(0)
    with ase.db.connect(path) as database:
        for number in range(structures):
            n = int(random.integers(atoms // 2, atoms * 3 // 2 + 1))
            made = Atoms(random.integers(1, 18, n), positions=random.normal(size=(n, 3)) * 4)
            made.calc = SinglePointCalculator(
                made, energy=random.normal() * 1e4, forces=random.normal(size=(n, 3))
            )
            data = {
                **{"charge": 0, "spin": 1, "num_electrons": 6 * n, "source": f"set/{number}"},
                **{"composition": "C2H6O", "homo_lumo_gap": float(random.normal())},
                "lowdin_charges": random.normal(size=n),
            }
            database.write(made, data=data)


def raw_rows(path: Path) -> list[bytes]:
    file = open_file(path)
    return file.values(file.ids.tolist())


def bare(rows: list[bytes], inflated: Callable[[bytes], bytes]) -> Way:
    """Inflate, parse, and make each array: what no reader of such rows can leave out."""

    def run() -> None:
        for value in rows:
            row = orjson.loads(inflated(value))
            entries = [row[key] for key in ("numbers", "positions", "cell", "pbc", "forces")]
            for entry in (*entries, row["data"]["lowdin_charges"]):
                shape, dtype, flat = entry["__ndarray__"]
                np.array(flat, dtype).reshape(shape)

    return run


def all_of(source: ASELMDBSource) -> Way:
    def run() -> None:
        for _ in source[0]:
            pass

    return run


def with_zlib(way: Way) -> Way:
    def run() -> None:
        usual = row_codec.inflate
        row_codec.inflate = zlib.decompress
        try:
            way()
        finally:
            row_codec.inflate = usual

    return run


def ase_rows(path: Path, *, atoms: bool) -> Way:
    def run() -> None:
        with ase.db.connect(path, readonly=True) as database:
            for row in database.select():
                if atoms:
                    row.toatoms()

    return run


def ways_for(path: Path) -> dict[str, Way]:
    rows = raw_rows(path)
    usual = ASELMDBSource(path)
    ways = {
        "the bare sum": bare(rows, zlib.decompress),
        "source": with_zlib(all_of(usual)),
        'source, data="drop"': with_zlib(all_of(ASELMDBSource(path, data="drop"))),
        'source, dtype="float32"': with_zlib(all_of(ASELMDBSource(path, dtype="float32"))),
        "atom_counts": lambda: usual.atom_counts(0),
        "ase.db, rows": ase_rows(path, atoms=False),
        "ase.db, Atoms": ase_rows(path, atoms=True),
    }
    if inflate.inflate is not zlib.decompress:
        ways["source with ISA-L"] = all_of(usual)
        ways["the bare sum with ISA-L"] = bare(rows, inflate.inflate)
    return ways


def median_times(ways: dict[str, Way], turns: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            started = time.process_time()
            way()
            times[name].append(time.process_time() - started)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the reading of .aselmdb files.")
    parser.add_argument("--structures", type=int, default=5000)
    parser.add_argument("--atoms", type=int, default=50)
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as directory:
        path = Path(directory) / "rows.aselmdb"
        write_rows(path, options.structures, options.atoms)
        times = median_times(ways_for(path), options.turns)
    base, atoms = times["the bare sum"], times["ase.db, Atoms"]
    print(f"{options.structures} rows of {options.atoms} atoms, medians of {options.turns} turns")
    print(f"{'':26}{'µs a row':>10}{'x bare sum':>12}{'x faster than ase.db':>22}")
    for name, taken in times.items():
        each = taken / options.structures * 1e6
        print(f"{name:26}{each:10.1f}{taken / base:12.3f}{atoms / taken:22.1f}")


if __name__ == "__main__":
    main()
