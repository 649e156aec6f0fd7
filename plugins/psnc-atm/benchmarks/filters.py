"""What the filters of atomic data cost, compared with reading the structures.

python benchmarks/filters.py [--structures 2000] [--atoms 50] [--repeats 5]

The source decodes rows of an .aselmdb file. Each filter is timed over the same structures, already
decoded; the figure is its time as a share of the time of the decoding. Neighbour lists and sums are
besides compared with other ways to the same result. The ways take turns, and each figure is the
least of the repeats. Only ratios mean anything on another machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.neighborlist import primitive_neighbor_list
from numpy.typing import NDArray

from psnc import Filter
from psnc_atm import (
    ASELMDBSource,
    AtomicData,
    AtomicInfoFilter,
    AtomicStatsFilter,
    ConvertUnits,
    DropDuplicates,
    NeighbourList,
    SelectElements,
    SelectEnergy,
    SelectForces,
    SelectSize,
)
from psnc_atm.moments import Moments
from psnc_atm.power_sums import UNIT_BITS

Ways = dict[str, Callable[[], Any]]


def least_times(ways: Ways, repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started)
    return {name: min(taken) for name, taken in times.items()}


def show(title: str, times: dict[str, float]) -> None:
    first, base = next(iter(times.items()))
    print(f"\n{title}")
    for name, taken in times.items():
        print(f"  {name:28} {taken * 1e3:10.2f} ms {taken / base:9.3f} x {first}")


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


def filters(directory: Path) -> dict[str, Callable[[], Filter[Any, Any]]]:
    return {
        "AtomicStatsFilter": lambda: AtomicStatsFilter(directory / "stats.parquet"),
        "AtomicInfoFilter": lambda: AtomicInfoFilter(directory / "info.json"),
        "SelectElements": lambda: SelectElements(excluded=["U"]),
        "SelectSize": lambda: SelectSize(maximum=10_000),
        "SelectEnergy": lambda: SelectEnergy(maximum=1e9, per_atom=True),
        "SelectForces": lambda: SelectForces(maximum=1e9),
        "ConvertUnits": lambda: ConvertUnits(energy=("eV", "Hartree"), length=("Ang", "Bohr")),
        "DropDuplicates": DropDuplicates,
        "NeighbourList(3.0)": lambda: NeighbourList(3.0),
        "NeighbourList(6.0)": lambda: NeighbourList(6.0),
    }


def through(filter: Filter[Any, Any], structures: Iterable[AtomicData], directory: Path) -> None:
    for _ in filter(iter(structures)):
        pass
    flush = getattr(filter, "flush", None)
    if flush is not None:
        flush(directory / "shard.json")


def compare_filters(structures: int, atoms: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory(dir=".") as name:
        directory = Path(name)
        write_rows(directory / "rows.aselmdb", structures, atoms)
        source = ASELMDBSource(directory)
        decoded = list(source[0])
        ways: Ways = {"decoding": lambda: list(source[0])}
        for title, make in filters(directory).items():
            ways[title] = lambda make=make: through(make(), decoded, directory)  # type: ignore[misc]
        show(f"{structures} structures of {atoms} atoms", least_times(ways, repeats))


def in_numpy(values: NDArray[np.float64]) -> tuple[Any, ...]:
    """All figures in float64, in two passes: neither exact nor to be merged."""
    mean, size = values.mean(), np.abs(values)
    off = values - mean
    squares = off * off
    figures = (squares.mean(), (squares * off).mean(), (squares * squares).mean())
    return (mean, values.min(), values.max(), size.mean(), size.max(), *figures)


def in_fractions(values: NDArray[np.float64]) -> list[int]:
    """Add up the first four powers exactly, number by number."""
    sums = [0, 0, 0, 0]
    for value in values.tolist():
        numerator, denominator = value.as_integer_ratio()
        whole = (numerator << UNIT_BITS) // denominator
        power = 1
        for place in range(4):
            power *= whole
            sums[place] += power
    return sums


def compare_sums(repeats: int) -> None:
    random = np.random.default_rng(0)
    for count in (100, 10_000, 100_000):
        values = random.normal(size=count)
        ways: Ways = {
            "NumPy, two passes": lambda values=values: in_numpy(values),  # type: ignore[misc]
            "exact moments": lambda values=values: Moments().add(values),  # type: ignore[misc]
            "a fraction a number": lambda values=values: in_fractions(values),  # type: ignore[misc]
        }
        show(f"moments of {count} numbers", least_times(ways, 3 * repeats))


def compare_neighbour_lists(repeats: int) -> None:
    salt = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    for atoms in (bulk("Cu"), salt, salt.repeat(2), salt.repeat(4)):
        atoms.rattle(0.1)
        structure = AtomicData.from_ase(atoms)
        for cutoff in (3.0, 6.0):
            edges = NeighbourList(cutoff)
            ways: Ways = {
                "NeighbourList (matscipy)": lambda edges=edges, one=structure: list(  # type: ignore[misc]
                    edges(iter([one]))
                ),
                "ase.neighborlist": lambda atoms=atoms, cutoff=cutoff: primitive_neighbor_list(  # type: ignore[misc]
                    "ijS", atoms.pbc, atoms.cell, atoms.positions, cutoff
                ),
            }
            show(f"{len(atoms)} atoms in a crystal, {cutoff} Å", least_times(ways, 4 * repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the filters of atomic data.")
    parser.add_argument("--structures", type=int, default=2000)
    parser.add_argument("--atoms", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    compare_filters(options.structures, options.atoms, options.repeats)
    compare_sums(options.repeats)
    compare_neighbour_lists(options.repeats)


if __name__ == "__main__":
    main()
