"""Reading structures at random: from .aselmdb files, and from Zarr stores in several ways.

python benchmarks/random_reads.py [--structures 20000] [--atoms 50] [--repeats 5]

One dataset is written to an .aselmdb file and to stores with chunks of several sizes. Structures
are read one by one, and in batches of 64, at random; each repeat takes others. "Cold" decodes every
chunk it needs, as with a store that is much larger than the cache; "warm" has all in its cache. The
files are in the page cache of the system in every way. The ways take turns, and each figure is the
median of the repeats. Only ratios mean anything on another machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
import zarr
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from psnc import Pipeline, run_pipeline
from psnc_atm import ASELMDBSource, AtomicData, AtomicDataZarrSink, open_dataset
from psnc_atm.lmdb_file import open_file
from psnc_atm.row_codec import decode_row

# Atoms a chunk, structures a chunk.
CHUNKS = [(1_024, 128), (4_096, 512), (16_384, 8_192)]
BATCH = 64

Numbers = NDArray[np.int64]
Read = Callable[[Numbers], Any]
Ways = dict[str, Read]


def median_times(ways: Ways, chosen: Sequence[Numbers]) -> dict[str, float]:
    """Time every way to read some structures, once for each choice of them, in turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for numbers in chosen:
        for name, way in ways.items():
            started = time.perf_counter()
            way(numbers)
            times[name].append((time.perf_counter() - started) / len(numbers))
    return {name: statistics.median(taken) for name, taken in times.items()}


def show(title: str, times: dict[str, float]) -> None:
    first, base = next(iter(times.items()))
    print(f"\n{title}")
    for name, taken in times.items():
        print(f"  {name:42} {taken * 1e6:10.1f} us a structure {taken / base:9.3f} x {first}")


def write_rows(path: Path, structures: int, atoms: int) -> None:
    random = np.random.default_rng(0)
    with ase.db.connect(path) as database:
        for _ in range(structures):
            n = int(random.integers(atoms // 2, atoms * 3 // 2 + 1))
            made = Atoms(random.integers(1, 18, n), positions=random.normal(size=(n, 3)) * 4)
            made.calc = SinglePointCalculator(
                made, energy=random.normal(), forces=random.normal(size=(n, 3))
            )
            database.write(made)


def write_store(rows: Path, store: Path, chunks: tuple[int, int]) -> None:
    pipeline = Pipeline(
        source=ASELMDBSource(rows, rows_per_index=2_000),
        sink=AtomicDataZarrSink(store, atoms_per_chunk=chunks[0], systems_per_chunk=chunks[1]),
        track_metrics=False,
    )
    run_pipeline(pipeline, progress=False)


def recode(store: Path, target: Path, **options: Any) -> None:
    """Copy the atoms and systems of a store into arrays that are stored in another way."""
    old, new = zarr.open_group(store, mode="r"), zarr.create_group(target)
    new.attrs.update(old.attrs.asdict())
    for name, array in old.members(max_depth=None):
        if isinstance(array, zarr.Array) and not name.startswith("psnc/"):
            how = {**options}
            if "shards" in how:
                chunk = array.chunks[0]
                whole = -(-array.shape[0] // chunk)
                how["shards"] = (min(how["shards"], whole) * chunk, *array.shape[1:])
            kept = array[...]
            new.create_array(name, data=kept, chunks=array.chunks, fill_value=0, **how)


def from_rows(path: Path) -> Read:
    """One get and one decoding a structure."""
    file = open_file(path)
    ids = file.ids

    def read(numbers: Numbers) -> list[AtomicData]:
        return [decode_row(value) for i in numbers for value in file.values([int(ids[i])])]

    return read


class Slices:
    """The arrays of a store, opened with zarr-python and sliced."""

    def __init__(self, store: Path) -> None:
        root = zarr.open_group(store, mode="r")
        self.ptr = np.asarray(root["meta/atoms_ptr"][:])
        levels = root.attrs["fields"]["core"]
        self.arrays = [(root[f"core/{name}"], level) for name, level in levels.items()]

    def one_by_one(self, numbers: Numbers) -> None:
        for i in numbers.tolist():
            for array, level in self.arrays:
                array[self.ptr[i] : self.ptr[i + 1]] if level == "atom" else array[i]

    def orthogonal(self, numbers: Numbers) -> None:
        """One selection of all rows an array, in their order: so nvalchemi's reader does it."""
        for batch in batches(numbers):
            rows = np.sort(batch)
            atoms = np.concatenate([np.arange(self.ptr[i], self.ptr[i + 1]) for i in rows])
            for array, level in self.arrays:
                array.oindex[atoms if level == "atom" else rows]


def batches(numbers: Numbers) -> list[Numbers]:
    return [numbers[at : at + BATCH] for at in range(0, len(numbers), BATCH)]


def warmed(store: Path) -> Any:
    dataset = open_dataset(store, cache_bytes=2**40)
    for _ in dataset:
        pass
    return dataset


def compare(directory: Path, names: Sequence[str], structures: int, repeats: int) -> None:
    random = np.random.default_rng(1)
    some = [random.permutation(structures)[:256] for _ in range(repeats)]
    rows = from_rows(directory / "rows.aselmdb")
    one: Ways = {".aselmdb": rows}
    many: Ways = {".aselmdb": rows}
    every: Ways = {".aselmdb": rows}
    for what in names:
        store = directory / f"{what}.zarr"
        title = f", {what}"
        slices, warm = Slices(store), warmed(store)
        cold = open_dataset(store, cache_bytes=0)
        one |= {
            f"zarr-python{title}": slices.one_by_one,
            f"dataset[i], cold{title}": lambda some, d=cold: [d[i] for i in some],
            f"dataset[i], warm{title}": lambda some, d=warm: [d[i] for i in some],
        }
        many |= {
            f"zarr-python, oindex{title}": slices.orthogonal,
            f"dataset.batch, cold{title}": lambda some, d=cold: [d.batch(b) for b in batches(some)],
            f"dataset.batch, warm{title}": lambda some, d=warm: [d.batch(b) for b in batches(some)],
            f"arrays(), warm{title}": lambda some, d=warm: [d[b].arrays() for b in batches(some)],
        }
        every[f"dataset{title}"] = lambda some, s=store: list(open_dataset(s)[: len(some)])
        every[f"arrays(){title}"] = lambda some, s=store: open_dataset(s)[: len(some)].arrays()
    show("one structure at random", median_times(one, some))
    show(f"batches of {BATCH} at random", median_times(many, some))
    show("all in order", median_times(every, [np.arange(min(structures, 5_000))] * repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time random reads of structures.")
    parser.add_argument("--structures", type=int, default=20_000)
    parser.add_argument("--atoms", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as name:
        directory = Path(name)
        write_rows(directory / "rows.aselmdb", options.structures, options.atoms)
        print(f".aselmdb: {(directory / 'rows.aselmdb').stat().st_size / 1e6:.1f} MB")
        names = [f"{atoms} atoms a chunk" for atoms, _ in CHUNKS]
        for what, chunks in zip(names, CHUNKS, strict=True):
            write_store(directory / "rows.aselmdb", directory / f"{what}.zarr", chunks)
        small = directory / f"{names[0]}.zarr"
        ways: dict[str, dict[str, Any]] = {
            "uncompressed": {"compressors": None},
            "LZ4": {"compressors": BloscCodec(cname="lz4", shuffle="shuffle")},
            "16 in a shard": {"shards": 16},
        }
        for what, options_of_arrays in ways.items():
            names.append(f"{CHUNKS[0][0]}, {what}")
            recode(small, directory / f"{names[-1]}.zarr", **options_of_arrays)
        for what in names:
            files = [path for path in (directory / f"{what}.zarr").rglob("*") if path.is_file()]
            size = sum(path.stat().st_size for path in files)
            print(f"{what}: {len(files)} files, {size / 1e6:.1f} MB")
        compare(directory, names, options.structures, options.repeats)


if __name__ == "__main__":
    main()
