"""How to write many indices into one Zarr store: four ways, compared in one run.

python benchmarks/zarr_writing.py [--structures 20000] [--atoms 40] [--indices 20] [--repeats 3]

Times are wall times of the writing alone, from structures in memory, medians over the repeats.
Only their ratios mean anything on another machine.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from psnc import Pipeline, Source
from psnc_atm import AtomicData, AtomicDataZarrSink

Arrays = dict[str, NDArray[Any]]
ONE_AT_A_TIME = 400  # structures: enough to time, and the rest would take minutes


class Made(Source[AtomicData]):
    """Structures in memory, cut into indices."""

    def __init__(self, structures: int, atoms: int, indices: int) -> None:
        random = np.random.default_rng(0)
        made = [_structure(random, atoms) for _ in range(structures)]
        cuts = np.linspace(0, structures, indices + 1).astype(int)
        self.parts = [made[start:stop] for start, stop in pairwise(cuts)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Iterator[AtomicData]:
        return iter(self.parts[index])


def _structure(random: np.random.Generator, atoms: int) -> AtomicData:
    # Sizes differ, so that regions end within chunks as they do in real data.
    count = int(random.integers(atoms // 2, atoms * 3 // 2 + 1))
    return AtomicData(
        atomic_numbers=random.integers(1, 30, count),
        positions=random.normal(size=(count, 3)),
        forces=random.normal(size=(count, 3)),
        energy=float(random.normal()),
    )


def joined(structures: Iterable[AtomicData]) -> Arrays:
    """Join structures into the arrays of a store."""
    some = list(structures)
    return {
        "atomic_numbers": np.concatenate([one.atomic_numbers for one in some]),
        "positions": np.concatenate([one.positions for one in some]),
        "forces": np.concatenate([one.forces for one in some if one.forces is not None]),
        "energy": np.array([[one.energy] for one in some]),
        "cell": np.stack([one.cell for one in some]),
        "pbc": np.stack([one.pbc for one in some]),
        "atoms_ptr": np.cumsum([0, *(len(one) for one in some)]),
        "samples_mask": np.ones(len(some), dtype=bool),
        "atoms_mask": np.ones(sum(map(len, some)), dtype=bool),
    }


def create(path: Path, arrays: Arrays, chunk: dict[str, int]) -> None:
    """Write whole arrays, each in one go."""
    root = zarr.create_group(path)
    for name, values in arrays.items():
        by_atom = name in ("atomic_numbers", "positions", "forces", "atoms_mask")
        rows = min(len(values), chunk["atom" if by_atom else "system"])
        made = root.create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=(rows, *values.shape[1:])
        )
        made[:] = values


def one_big_write(source: Made, path: Path, chunk: dict[str, int]) -> float:
    create(path, joined(one for part in source.parts for one in part), chunk)
    return 1.0


def regions(source: Made, path: Path, chunk: dict[str, int]) -> float:
    sink = AtomicDataZarrSink(path, chunk["atom"], chunk["system"])
    sink.prepare(Pipeline(source=source, sink=sink, track_metrics=False))
    for index, part in enumerate(source.parts):
        sink(iter(part), index)
    return 1.0


def parts_then_assembled(source: Made, path: Path, chunk: dict[str, int]) -> float:
    for index, part in enumerate(source.parts):
        create(path / f"part{index}", joined(part), chunk)
    groups = [zarr.open_group(path / f"part{index}") for index in range(len(source))]
    names = list(groups[0].array_keys())
    parts = {name: [_whole(group, name) for group in groups] for name in names}
    create(path / "whole", {name: np.concatenate(parts[name]) for name in names}, chunk)
    for index in range(len(source)):
        shutil.rmtree(path / f"part{index}")
    return 1.0


def _whole(group: zarr.Group, name: str) -> NDArray[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return np.asarray(array[:])


def one_structure_at_a_time(source: Made, path: Path, chunk: dict[str, int]) -> float:
    first, *rest = [one for part in source.parts for one in part][:ONE_AT_A_TIME]
    root = zarr.create_group(path)
    arrays = {
        name: root.create_array(
            name,
            shape=(0, *values.shape[1:]),
            dtype=values.dtype,
            chunks=(chunk["atom" if len(values) == len(first) else "system"], *values.shape[1:]),
        )
        for name, values in joined([first]).items()
    }
    for structure in (first, *rest):
        for name, values in joined([structure]).items():
            arrays[name].append(values)
    return sum(map(len, source.parts)) / ONE_AT_A_TIME


WAYS: dict[str, Callable[[Made, Path, dict[str, int]], float]] = {
    "one big write": one_big_write,
    "regions of a preallocated store": regions,
    "parts, then assembled": parts_then_assembled,
    "one structure at a time": one_structure_at_a_time,
}


def timed(way: Callable[..., float], source: Made, chunk: dict[str, int]) -> float:
    with tempfile.TemporaryDirectory(dir=".") as directory:
        started = time.perf_counter()
        share = way(source, Path(directory) / "store", chunk)
        return (time.perf_counter() - started) * share


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways to write one Zarr store.")
    parser.add_argument("--structures", type=int, default=20_000)
    parser.add_argument("--atoms", type=int, default=40)
    parser.add_argument("--indices", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--atoms-per-chunk", type=int, default=16_384)
    parser.add_argument("--systems-per-chunk", type=int, default=8_192)
    options = parser.parse_args()
    chunk = {"atom": options.atoms_per_chunk, "system": options.systems_per_chunk}
    source = Made(options.structures, options.atoms, options.indices)
    # The ways take turns, so that a slow spell of the machine does not fall on one of them.
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(options.repeats):
        for name, way in WAYS.items():
            times[name].append(timed(way, source, chunk))
    medians = {name: statistics.median(values) for name, values in times.items()}
    shortest = medians["one big write"]
    print(f"{options.structures} structures, {options.indices} indices, chunks {chunk}")
    for name, median in medians.items():
        print(f"{name:34} {median:9.3f} s {median / shortest:8.2f} x one big write")


if __name__ == "__main__":
    main()
