"""What storing edges costs, compared with finding them, and how large they are.

python benchmarks/edges.py [--structures 1000] [--atoms 100] [--cutoff 5] [--repeats 5]

Periodic structures with the density of a solid, in four indices. Times are wall times of one
process, medians over the repeats, in which the ways take turns. Only ratios mean anything on
another machine.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psnc import Pipeline, Source
from psnc_atm import AtomicData, AtomicDataZarrSink, NeighbourList

INDICES = 4


class Made(Source[AtomicData]):
    """Structures in memory."""

    def __init__(self, structures: Sequence[AtomicData]) -> None:
        self.structures = structures

    def __len__(self) -> int:
        return INDICES

    def __getitem__(self, index: int) -> Iterator[AtomicData]:
        return iter(self.structures[index::INDICES])


def structure(random: np.random.Generator, atoms: int) -> AtomicData:
    """Atoms on a displaced grid at the density of a solid, 12 Å³ an atom."""
    count = int(random.integers(atoms // 2, atoms * 3 // 2 + 1))
    side = int(np.ceil(count ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3), axis=-1).reshape(-1, 3)
    places = random.permutation(grid)[:count] / side
    length = (12.0 * count) ** (1 / 3)
    return AtomicData(
        atomic_numbers=random.integers(1, 30, count),
        positions=places * length + random.normal(scale=0.1, size=(count, 3)),
        cell=np.eye(3) * length,
        pbc=np.ones(3, dtype=bool),
        forces=random.normal(size=(count, 3)),
        energy=float(random.normal()),
    )


def written(structures: Sequence[AtomicData], path: Path) -> tuple[float, float]:
    """Write a store, and return the seconds that the indices took, and joining."""
    pipeline = Pipeline[Any](
        source=Made(structures), sink=AtomicDataZarrSink(path), track_metrics=False
    )
    sink = pipeline.sink
    assert sink is not None
    sink.prepare(pipeline)
    started = time.perf_counter()
    for index in range(INDICES):
        sink(iter(pipeline.source[index]), index)
    in_between = time.perf_counter()
    sink.gather(range(INDICES))
    return in_between - started, time.perf_counter() - in_between


def size(*directories: Path) -> int:
    files = (path for directory in directories for path in directory.rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file())


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--structures", type=int, default=1000)
    parser.add_argument("--atoms", type=int, default=100)
    parser.add_argument("--cutoff", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    random = np.random.default_rng(0)
    plain = [structure(random, chosen.atoms) for _ in range(chosen.structures)]
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        stores = {name: Path(directory) / name for name in ("without", "with")}
        for _ in range(chosen.repeats):
            for store in stores.values():
                shutil.rmtree(store, ignore_errors=True)
            started = time.perf_counter()
            linked = list(NeighbourList(chosen.cutoff)(iter(plain)))
            found = time.perf_counter() - started
            without, _ = written(plain, stores["without"])
            files, joining = written(linked, stores["with"])
            for name, taken in (
                ("finding edges", found),
                ("writing without edges", without),
                ("writing files of edges", files - without),
                ("joining edges", joining),
            ):
                times.setdefault(name, []).append(taken)
        edges = sum(each.edge_index.shape[1] for each in linked)
        core = stores["with"] / "core"
        sizes = {
            "store without edges": size(stores["without"]),
            "files of edges": size(stores["with"] / "psnc/edges"),
            "neighbor_list": size(core / "neighbor_list"),
            "neighbor_list_shifts": size(core / "neighbor_list_shifts"),
        }
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    print(f"{edges} edges, {edges / sum(map(len, plain)):.1f} an atom")
    for name, median in medians.items():
        print(f"  {name:24} {median:8.3f} s {median / medians['finding edges']:7.3f}")
    for name, taken in sizes.items():
        print(f"  {name:24} {taken / 1e6:8.2f} MB {taken / edges:7.2f} bytes an edge")


if __name__ == "__main__":
    main()
