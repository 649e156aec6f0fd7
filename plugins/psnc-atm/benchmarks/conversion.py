"""What it takes to bring .aselmdb files into one Zarr store, from bare decoding to the last byte.

python benchmarks/conversion.py [--files 8] [--rows 5000] [--atoms 50] [--repeats 5] [--metadata]
python benchmarks/conversion.py --memory

All ways read the same files, which ase-db-backends wrote. They take turns, so that a slow spell of
the machine does not fall on one of them; figures are medians over the turns, and only their ratios
mean anything on another machine.

- **Atoms**: each row through ``ase.db``, and ``toatoms()``: what everybody has today.
- **bare**: each row inflated, its JSON parsed, its arrays made, and nothing else.
- **source**: the items of ``ASELMDBSource``; in two processes too that have started before, each
  with half of the files, which is what the machine has to give.
- **store**: ``run_pipeline`` from nothing to the finished store, with the plan, the database that
  records every index, and the start of the workers.

``--metadata`` puts a ``metadata.npz`` beside the files, as fairchem's datasets have it: a store is
then laid out without a look at each row. ``--memory`` measures the peak memory of a process that
writes one index of 20,000 rows, and one of 200,000.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import count
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import ase.db
import lmdb
import numpy as np
import orjson
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from psnc import Pipeline, run_pipeline
from psnc_atm import ASELMDBSource, AtomicDataZarrSink

LIBRARIES = ("ase", "ase-db-backends", "isal", "lmdb", "numpy", "orjson", "zarr", "numcodecs")
# Rows that are written one by one; further files have the same rows under other ids.
WRITTEN_ROWS = 5_000
# ase.db takes so long that a part of the files says enough.
ROWS_THROUGH_ASE = 2_000


def write_files(directory: Path, files: int, rows: int, atoms: int, *, metadata: bool) -> None:
    """Write molecules of ``atoms`` atoms on average, with energies, forces, charge and spin."""
    written = directory.parent / "written.aselmdb"
    random = np.random.default_rng(0)
    with ase.db.connect(written) as database:
        for _ in range(min(WRITTEN_ROWS, rows * files)):
            n = int(random.integers(atoms // 2, atoms * 3 // 2 + 1))
            molecule = Atoms(random.integers(1, 18, n), positions=random.normal(size=(n, 3)) * 4)
            molecule.calc = SinglePointCalculator(
                molecule, energy=random.normal() * 1e4, forces=random.normal(size=(n, 3))
            )
            data = {"charge": int(random.integers(-1, 2)), "spin": 1, "source": "made up"}
            database.write(molecule, data=data)
    directory.mkdir()
    values = [value for key, value in raw_rows(written) if key.isdigit()]
    for number in range(files):
        copy_rows(directory / f"data{number:04}.aselmdb", values, number * rows, rows)
    if metadata:
        sizes = [orjson.loads(zlib.decompress(value))["numbers"]["__ndarray__"] for value in values]
        natoms = np.resize([shape[0] for shape, *_ in sizes], files * rows)
        np.savez(directory / "metadata.npz", natoms=natoms)


def raw_rows(path: Path) -> Iterator[tuple[bytes, bytes]]:
    with (
        lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment,
        environment.begin() as transaction,
        transaction.cursor() as cursor,
    ):
        yield from cursor


def copy_rows(path: Path, values: list[bytes], start: int, rows: int) -> None:
    size = 2 * rows * max(map(len, values)) + 2**24
    with (
        lmdb.open(str(path), subdir=False, map_size=size, lock=False) as environment,
        environment.begin(write=True) as transaction,
    ):
        for row in range(rows):
            transaction.put(b"%d" % (row + 1), values[(start + row) % len(values)])
        transaction.put(b"nextid", zlib.compress(b"%d" % (rows + 1)))
        transaction.put(b"deleted_ids", zlib.compress(b"[]"))


def rows_to_atoms(directory: Path) -> int:
    path = sorted(directory.glob("*.aselmdb"))[0]
    with ase.db.connect(path) as database:
        return sum(1 for row in database.select(limit=ROWS_THROUGH_ASE) if row.toatoms())


def bare(directory: Path) -> int:
    structures = 0
    for path in sorted(directory.glob("*.aselmdb")):
        for key, value in raw_rows(path):
            if key.isdigit():
                row = orjson.loads(zlib.decompress(value))
                arrays = [
                    np.array(entry["__ndarray__"][2], entry["__ndarray__"][1])
                    for entry in row.values()
                    if isinstance(entry, dict) and "__ndarray__" in entry
                ]
                structures += bool(arrays)
    return structures


def read(directory: Path, part: slice = slice(None)) -> int:
    source = ASELMDBSource(directory)
    return sum(1 for index in range(len(source))[part] for _ in source[index])


def read_by_two(directory: Path, pool: Pool) -> int:
    halves = [(directory, slice(0, None, 2)), (directory, slice(1, None, 2))]
    return sum(pool.starmap(read, halves, chunksize=1))


def convert(directory: Path, store: Path, n_jobs: int, options: dict[str, Any]) -> int:
    sink = AtomicDataZarrSink(store, **options)
    records = store.with_suffix(".records")
    pipeline = Pipeline(source=ASELMDBSource(directory), sink=sink, db_dir=records)
    run_pipeline(pipeline, n_jobs, on_error="raise")
    return len(sink_rows(store))


def sink_rows(store: Path) -> Any:
    import zarr

    mask = np.asarray(zarr.open_array(store / "meta" / "samples_mask", mode="r")[:])
    return np.flatnonzero(mask)


def timed(way: Callable[[], int]) -> tuple[float, int]:
    """Return seconds and structures a second."""
    started = time.perf_counter()
    structures = way()
    return time.perf_counter() - started, structures


def size_of(path: Path) -> int:
    return sum(
        file.stat().st_size
        for file in path.rglob("*")
        if file.is_file() and not file.name.endswith("-lock")
    )


def compare(directory: Path, repeats: int, options: dict[str, Any], pool: Pool) -> None:
    # Each turn writes another: ext4 is slow to make files for minutes after others were removed.
    stores = (directory.parent / f"made-{number}.zarr" for number in count())
    ways: dict[str, Callable[[], int]] = {
        "Atoms": lambda: rows_to_atoms(directory),
        "bare": lambda: bare(directory),
        "source": lambda: read(directory),
        "source, two processes": lambda: read_by_two(directory, pool),
        "store": lambda: convert(directory, next(stores), 1, options),
        "store, two processes": lambda: convert(directory, next(stores), 2, options),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds, structures = timed(way)
            rates[name].append(structures / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{'':24}{'structures/s':>14}{'of source':>12}")
    for name, rate in medians.items():
        print(f"{name:24}{rate:14.0f}{rate / medians['source']:12.2f}")

    def ratio(name: str, other: str) -> str:
        turns = sorted(one / two for one, two in zip(rates[name], rates[other], strict=True))
        return f"{statistics.median(turns):.2f} (turns {turns[0]:.2f} to {turns[-1]:.2f})"

    print(f"source : Atoms                  {ratio('source', 'Atoms')}")
    print(f"bare : source                   {ratio('bare', 'source')}")
    print(f"store : source                  {ratio('store', 'source')}")
    print(f"two processes : one, store      {ratio('store, two processes', 'store')}")
    print(f"two processes : one, source     {ratio('source, two processes', 'source')}")
    one = directory.parent / "made-0.zarr"
    print(f"store's size : input's          {size_of(one) / size_of(directory):.3f}")


def peak_memory_mb() -> float:
    """Return this process's own peak; what getrusage() tells may be that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def measure_memory(directory: Path, rows: int, options: dict[str, Any]) -> float:
    """Return the peak memory, in MB, of a process that writes one index of ``rows`` rows."""
    values = [
        value for key, value in raw_rows(directory.parent / "written.aselmdb") if key.isdigit()
    ]
    one = directory.parent / f"one-{rows}"
    one.mkdir()
    copy_rows(one / "data.aselmdb", values, 0, rows)
    command = [sys.executable, __file__, "--convert", str(one), "--options", repr(options)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(one)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways from .aselmdb files to one store.")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rows", type=int, default=5_000, help="rows a file")
    parser.add_argument("--atoms", type=int, default=50, help="atoms a structure, on average")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--options", default="{}", help="of AtomicDataZarrSink, a Python dict")
    parser.add_argument("--metadata", action="store_true", help="put a metadata.npz beside them")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sink_options = eval(arguments.options, {})
    if arguments.convert:
        store = arguments.convert.with_suffix(".zarr")
        convert(arguments.convert, store, 1, sink_options)
        print(peak_memory_mb())
        return
    print(
        ", ".join(
            [f"Python {platform.python_version()}", *(f"{x} {version(x)}" for x in LIBRARIES)]
        )
    )
    with tempfile.TemporaryDirectory(dir=".") as place:
        directory = Path(place).absolute() / "data"
        size = (arguments.files, arguments.rows, arguments.atoms)
        write_files(directory, *size, metadata=arguments.metadata)
        if arguments.memory:
            for rows in (20_000, 200_000):
                print(f"{rows:8} rows: {measure_memory(directory, rows, sink_options):8.0f} MB")
        else:
            megabytes = size_of(directory) / 1e6
            print(f"{arguments.files} files of {arguments.rows} rows, {megabytes:.0f} MB")
            with multiprocessing.get_context("forkserver").Pool(2) as pool:
                pool.map(time.sleep, [0.5, 0.5], chunksize=1)  # until both have started
                compare(directory, arguments.repeats, sink_options, pool)


if __name__ == "__main__":
    main()
