"""Structures in memory, and a source of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from psnc import Sink, Source
from psnc_atm import AtomicData


def molecule(numbers: Sequence[int], seed: int = 0, **fields: Any) -> AtomicData:
    """Atoms at random places, without a cell."""
    random = np.random.default_rng(seed)
    made: dict[str, Any] = {
        "atomic_numbers": np.array(numbers, dtype=np.int64),
        "positions": random.normal(size=(len(numbers), 3)),
    }
    return AtomicData(**{**made, **fields})


def some_structures(count: int, seed: int = 0) -> list[AtomicData]:
    """Molecules and crystals of different sizes, not all with the same fields."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        n = int(random.integers(0, 6))
        fields: dict[str, Any] = {}
        if number % 3:
            fields = {"energy": float(random.normal() * 1e3), "forces": random.normal(size=(n, 3))}
        if number % 2:
            fields["cell"] = random.normal(size=(3, 3)) + 4 * np.eye(3)
            fields["pbc"] = np.array([True, number % 4 == 1, True])
            fields["stress"] = random.normal(size=(3, 3))
        if number % 5 == 0:
            fields["tags"] = random.integers(0, 3, n)
        fields["info"] = {"gap": float(random.normal()), "site": random.normal(size=n)}
        made.append(molecule(random.integers(1, 30, n).tolist(), seed=number, **fields))
    return made


class Structures(Source[AtomicData]):
    """Structures of ``some_structures``, so many an index."""

    def __init__(self, sizes: Sequence[int], seed: int = 0) -> None:
        self.sizes, self.seed = list(sizes), seed

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Iterator[AtomicData]:
        start = sum(self.sizes[:index])
        made = some_structures(sum(self.sizes), self.seed)
        return iter(made[start : start + self.sizes[index]])


class Nowhere(Sink[AtomicData]):
    """Takes items and writes nothing."""

    def __call__(self, items: Iterator[AtomicData], index: int) -> None:
        for _ in items:
            pass
