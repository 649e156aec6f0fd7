"""Edges, compared with those that looking at every pair finds."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from ase.neighborlist import primitive_neighbor_list
from numpy.typing import NDArray
from structures import Structures, molecule

from psnc.errors import ConfigurationError, StageError
from psnc.testing import check_filter
from psnc_atm import AtomicData, NeighbourList

Edges = list[tuple[int, ...]]


def with_edges(structure: AtomicData, cutoff: float) -> AtomicData:
    [made] = NeighbourList(cutoff)(iter([structure]))
    assert isinstance(made, AtomicData)
    return made


def edges_of(structure: AtomicData) -> Edges:
    assert structure.edge_index is not None
    assert structure.unit_shifts is not None
    assert structure.edge_index.dtype == structure.unit_shifts.dtype == np.int64
    columns = (*structure.edge_index.tolist(), *structure.unit_shifts.T.tolist())
    return list(zip(*columns, strict=True))


def images_to_look_at(structure: AtomicData, cutoff: float) -> product[tuple[int, ...]]:
    """All shifts that can bring two atoms within the cutoff."""
    periodic = structure.pbc
    reach = np.zeros(3, dtype=int)
    if periodic.any():
        # Rows are at right angles to all other lattice vectors, and as long as a period is short.
        inverse = np.linalg.pinv(structure.cell[periodic]).T
        spans = np.ptp(structure.positions, axis=0, keepdims=True)
        farthest = cutoff + np.linalg.norm(spans)
        reach[periodic] = np.ceil(farthest * np.linalg.norm(inverse, axis=1)).astype(int)
    return product(*(range(-n, n + 1) for n in reach))


def every_pair(structure: AtomicData, cutoff: float) -> Edges:
    found = []
    positions = structure.positions
    for shift in images_to_look_at(structure, cutoff):
        vectors = (
            positions[np.newaxis] - positions[:, np.newaxis] + np.array(shift) @ structure.cell
        )
        for start, end in np.argwhere(np.linalg.norm(vectors, axis=-1) < cutoff).tolist():
            if start != end or any(shift):
                found.append((start, end, *shift))
    return sorted(found)


def structure(positions: Any, cell: Any = ((0, 0, 0),) * 3, pbc: Any = (False,) * 3) -> AtomicData:
    placed: NDArray[np.float64] = np.array(positions, dtype=float).reshape(-1, 3)
    return AtomicData(
        atomic_numbers=np.full(len(placed), 6),
        positions=placed,
        cell=np.array(cell, dtype=float),
        pbc=np.array(pbc),
    )


RANDOM = np.random.default_rng(3)
SKEWED = [[3.0, 0, 0], [2.5, 1.5, 0], [-2.0, 1.0, 2.5]]
FLAT = [[3.0, 0, 0], [0, 3.0, 0], [0, 0, 0]]
SCATTERED = RANDOM.normal(size=(8, 3)) * 3
CASES = {
    "a molecule": (structure(RANDOM.normal(size=(12, 3))), 1.5),
    "a molecule in a box that does not hold it": (structure(SCATTERED, np.eye(3) * 2), 3.0),
    "a molecule with cell vectors in one plane": (structure(SCATTERED, [[1, 0, 0]] * 3), 3.0),
    "one atom": (structure([1, 2, 3]), 5.0),
    "one atom and its images": (structure([1, 2, 3], np.eye(3) * 2, [True] * 3), 4.5),
    "two atoms at one place": (structure([[0, 0, 0], [0, 0, 0]]), 1.0),
    "atoms in a row": (structure([[x, 0, 0] for x in range(9)]), 2.5),
    "atoms in a plane": (structure([[x, y, 0] for x in range(3) for y in range(3)]), 1.5),
    "a crystal with atoms outside of its cell": (structure(SCATTERED, SKEWED, [True] * 3), 2.0),
    "a small skewed cell": (structure(RANDOM.random((2, 3)), SKEWED, [True] * 3), 5.0),
    "a left-handed cell": (structure(SCATTERED, SKEWED[::-1], [True] * 3), 2.5),
    "a slab": (structure(SCATTERED, SKEWED, [True, True, False]), 3.0),
    "a slab whose third vector is zero": (structure(SCATTERED, FLAT, [True, True, False]), 3.0),
    "a slab along other axes": (structure(SCATTERED, SKEWED, [False, True, True]), 3.0),
    "a wire": (structure(SCATTERED, SKEWED, [False, True, False]), 3.0),
    "far apart": (structure([[0, 0, 0], [1e6, -1e6, 1e6], [1e6, -1e6, 1e6 + 0.5]]), 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_edges_are_those_of_every_pair(name: str) -> None:
    before, cutoff = CASES[name]
    made = with_edges(before, cutoff)
    assert edges_of(made) == every_pair(before, cutoff)
    assert made.cutoff == cutoff
    assert made.edge_index is not None
    start, end = made.edge_index
    vectors = before.positions[end] - before.positions[start] + made.shifts
    assert (np.linalg.norm(vectors, axis=1) < cutoff).all()


@pytest.mark.parametrize("seed", range(30))
def test_edges_of_random_structures(seed: int) -> None:
    random = np.random.default_rng(seed)
    cell = random.normal(size=(3, 3)) + random.choice([2, 4]) * np.eye(3)
    positions = random.normal(size=(random.integers(1, 8), 3)) * random.choice([0.5, 4])
    before = structure(positions, cell, random.random(3) < 0.6)
    cutoff = float(random.choice([0.7, 1.5, 3.0]))
    assert edges_of(with_edges(before, cutoff)) == every_pair(before, cutoff)


def test_edges_of_a_crystal_are_those_of_ase() -> None:
    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True).repeat(2)
    atoms.rattle(0.1)
    start, end, shift = primitive_neighbor_list("ijS", atoms.pbc, atoms.cell, atoms.positions, 4.0)
    expected = sorted(zip(start.tolist(), end.tolist(), *shift.T.tolist(), strict=True))
    assert edges_of(with_edges(AtomicData.from_ase(atoms), 4.0)) == expected


def test_atoms_at_the_cutoff_are_no_neighbours() -> None:
    assert edges_of(with_edges(structure([[0, 0, 0], [2, 0, 0]]), 2.0)) == []


def test_a_structure_without_atoms_has_no_edges() -> None:
    made = with_edges(structure([], np.eye(3), [True] * 3), 2.0)
    assert made.edge_index is not None
    assert made.edge_index.shape == (2, 0)
    assert made.unit_shifts is not None
    assert made.unit_shifts.shape == (0, 3)


def test_edges_replace_those_that_were_there() -> None:
    before = structure([[0, 0, 0], [1, 0, 0], [3, 0, 0]])
    assert with_edges(with_edges(before, 9.0), 1.5) == with_edges(before, 1.5)


def test_the_filter_keeps_the_rules() -> None:
    check_filter(NeighbourList(3.0), Structures([4, 0, 3]), lazy=True)


@pytest.mark.parametrize("cutoff", [0, -1.0, float("nan"), float("inf")])
def test_a_cutoff_that_makes_no_sense_is_refused(cutoff: float) -> None:
    with pytest.raises(ConfigurationError, match="give a distance above 0, in Å"):
        NeighbourList(cutoff)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (structure([[0, 0, np.nan]]), r"structure 0 \(C\): a position is not a finite number"),
        (
            structure([0, 0, 0], FLAT, [True] * 3),
            r"structure 0 \(C\): it is periodic along lattice",
        ),
        (structure([0, 0, 0], [[1, 0, 0]] * 3, [True, True, False]), "span no volume"),
    ],
)
def test_structures_that_cannot_have_neighbours_are_named(broken: AtomicData, message: str) -> None:
    with pytest.raises(StageError, match=message):
        with_edges(broken, 2.0)


def test_other_fields_stay() -> None:
    before = molecule([8, 1, 1], energy=1.0, info={"name": "water"})
    made = with_edges(before, 2.0)
    assert (made.energy, made.info) == (1.0, {"name": "water"})
    assert made.positions is before.positions
