"""NeighbourList: edges between the atoms that are near each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Annotated

import numpy as np
from attrs import evolve
from numpy.typing import NDArray

from psnc.errors import ConfigurationError, StageError
from psnc.stages import Filter, Param
from psnc_atm.atomic_data import AtomicData
from psnc_atm.filter_input import place_of, structures_of
from psnc_atm.optional_libraries import require_library

__all__ = ["NeighbourList"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Space is divided into boxes of the cutoff's size. Those of a molecule whose fragments are far
# apart would fill the memory.
_MOST_BOXES = 100_000
_FLAT = 1e-9


class NeighbourList(Filter[AtomicData, AtomicData]):
    """Give each structure an edge between any two atoms that are closer than a cutoff.

    Each pair has two edges, one in either direction. In a periodic structure an atom has edges to
    all images of others, and of itself, within the cutoff. Edges a structure had are replaced.

    Sets ``edge_index`` (2, m), the atoms that edges go from and to; ``unit_shifts`` (m, 3), the
    lattice vectors, as multiples, by which the second is shifted; and ``cutoff``. An edge is the
    vector ``r[to] - r[from] + unit_shifts @ cell``. Edges are sorted by the first atom, the second,
    and the shift.

    Parameters
    ----------
    cutoff : float
        Å. Atoms whose distance is less are neighbours.

    Raises
    ------
    psnc.ConfigurationError
        If the cutoff is not a positive number, or matscipy is not installed.
    psnc.StageError
        If a structure has a position that is not finite, or periodic directions whose lattice
        vectors span no volume.
    """

    name = "neighbour-list"
    description = "Edges between atoms that are closer than a cutoff"

    def __init__(
        self,
        cutoff: Annotated[float, Param(description="Distance below which there is an edge, Å")],
    ) -> None:
        require_library("matscipy", "NeighbourList", extra="neighbours")
        if not (cutoff > 0 and math.isfinite(cutoff)):
            raise ConfigurationError(f"cutoff is {cutoff}; give a distance above 0, in Å")
        self._cutoff = float(cutoff)

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        """Yield the structures with edges."""
        for position, structure in structures_of(items, self):
            edge_index, unit_shifts = _edges(structure, self._cutoff, position)
            yield evolve(
                structure, edge_index=edge_index, unit_shifts=unit_shifts, cutoff=self._cutoff
            )


def _edges(structure: AtomicData, cutoff: float, position: int) -> tuple[Ints, Ints]:
    if len(structure) == 0:
        return np.empty((2, 0), dtype=np.int64), np.empty((0, 3), dtype=np.int64)
    from matscipy.neighbours import neighbour_list

    cell, origin = _search_cell(structure, cutoff, position)
    start, end, shifts = neighbour_list(
        "ijS",
        cutoff=cutoff,
        positions=structure.positions,
        cell=cell,
        pbc=structure.pbc,
        cell_origin=origin,
    )
    order = np.lexsort((*shifts.T[::-1], end, start))
    edge_index = np.stack([start[order], end[order]]).astype(np.int64)
    return edge_index, shifts[order].astype(np.int64)


def _search_cell(structure: AtomicData, cutoff: float, position: int) -> tuple[Floats, Floats]:
    """Return a cell to look for neighbours in, and its origin.

    It has the structure's own lattice vectors where those are periodic. The others may be zero, or
    anything: in their place come vectors at right angles to all others, that span the atoms.
    """
    if not np.isfinite(structure.positions).all():
        raise StageError(f"{place_of(structure, position)}: a position is not a finite number")
    periodic = structure.pbc
    cell = np.array(structure.cell, dtype=np.float64)
    origin = np.zeros(3)
    _require_volume(cell[periodic], structure, position)
    if not periodic.all():
        free = _at_right_angles(cell[periodic])
        places = structure.positions @ free.T
        spans = _spans(np.ptp(places, axis=0), cutoff)
        cell[~periodic] = free * spans[:, np.newaxis]
        origin = places.min(axis=0) @ free
    return cell, origin


def _at_right_angles(vectors: Floats) -> Floats:
    """Return the unit vectors at right angles to some vectors and to each other."""
    if len(vectors) == 0:
        return np.eye(3)
    return np.linalg.svd(vectors)[2][len(vectors) :]


def _spans(spans: Floats, cutoff: float) -> Floats:
    """Limit how far a cell reaches; atoms beyond are found too, more slowly."""
    spans = np.maximum(spans, cutoff)
    while np.prod(spans / cutoff) > _MOST_BOXES:
        longest = spans.argmax()
        spans[longest] = max(spans[longest] / 2, cutoff)
    return spans


def _require_volume(vectors: Floats, structure: AtomicData, position: int) -> None:
    """Refuse lattice vectors of which one is zero, or lies in the plane or line of the others."""
    if len(vectors) == 0:
        return
    thickness = np.linalg.svd(vectors, compute_uv=False) if np.isfinite(vectors).all() else [0.0]
    if thickness[-1] <= _FLAT * thickness[0]:
        raise StageError(
            f"{place_of(structure, position)}: it is periodic along lattice vectors that span no "
            f"volume: cell {structure.cell.tolist()}, pbc {structure.pbc.tolist()}"
        )
