"""The rows of one index, gathered in memory so that each array is written once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psnc.errors import StageError
from psnc_atm.atomic_data import AtomicData
from psnc_atm.edge_parts import EdgeBuffer
from psnc_atm.fields import EDGE_FIELDS, FIELDS, OPTIONAL
from psnc_atm.store_plan import FieldSpec, require_structure

__all__ = ["RegionBuffer"]


class RegionBuffer:
    """Arrays of exactly the size of an index's region, filled structure by structure.

    Filling them in place needs half the memory of collecting structures and joining them.
    What is not filled, because a filter dropped structures, stays zero.

    Parameters
    ----------
    index : int
        For error messages.
    fields : iterable of FieldSpec
        The arrays of the store.
    rows, atoms : int
        The size of the region.
    edge_fields : sequence of str
        The fields of edges that the store is to have.
    refuse_others : bool
        Whether a structure with a field that the store does not have is an error.

    Attributes
    ----------
    edges : EdgeBuffer or None
        The edges of the index, if they are stored.
    """

    def __init__(
        self,
        index: int,
        fields: Iterable[FieldSpec],
        rows: int,
        atoms: int,
        *,
        edge_fields: Sequence[str] = (),
        refuse_others: bool = True,
    ) -> None:
        self.index = index
        self.rows, self.atoms = rows, atoms
        self.kept_rows = self.kept_atoms = 0
        self._atoms_ends = np.full(rows, -1, dtype=np.int64)
        self._arrays = [
            (spec, np.zeros(((atoms if spec.level == "atom" else rows), *spec.shape), spec.dtype))
            for spec in fields
        ]
        stored = {spec.name for spec, _ in self._arrays if spec.group == "core"}
        zero = {name for name in OPTIONAL if FIELDS[name].zero_if_missing}
        unwanted = {name for name in OPTIONAL if FIELDS[name].calculation_input}
        self.edges = EdgeBuffer(edge_fields) if edge_fields else None
        known = (*OPTIONAL, *EDGE_FIELDS)
        stored |= {*edge_fields}
        self._required = [name for name in known if name in stored - zero]
        self._refused = [name for name in known if name not in stored | unwanted]
        if not refuse_others:
            self._refused = []

    def fill(self, items: Iterable[Any]) -> None:
        """Take over all structures of the index, and check that they fill its region."""
        for item in items:
            self._add(require_structure(item, self._place()))
        if self.kept_rows == self.rows and self.kept_atoms != self.atoms:
            raise StageError(
                f"index {self.index}: {self.kept_atoms} atoms came of {self.atoms} in the source; "
                "filters may drop structures, but not change their number of atoms"
            )

    def arrays(self) -> Iterator[tuple[FieldSpec, NDArray[Any]]]:
        """Yield the field and the values of each array."""
        return iter(self._arrays)

    def atoms_ends(self) -> NDArray[np.int64]:
        """Return where each row's atoms end, counted from the start of the region.

        Dropped rows come last and have no atoms, but for the very last: it owns those that are
        left over, so that the rows of all indices stay in one unbroken sequence.
        """
        ends = self._atoms_ends.copy()
        ends[self.kept_rows :] = self.kept_atoms
        ends[-1:] = self.atoms
        return ends

    def _add(self, structure: AtomicData) -> None:
        row, atoms = self.kept_rows, len(structure)
        start, stop = self.kept_atoms, self.kept_atoms + atoms
        if row == self.rows:
            raise StageError(
                f"index {self.index}: more structures than the {self.rows} in the source; "
                "filters may drop structures, but not add any"
            )
        if stop > self.atoms:
            raise StageError(
                f"{self._place()}: more atoms than the {self.atoms} in the source; "
                "filters may drop structures, but not change their number of atoms"
            )
        self._check_fields(structure)
        for spec, array in self._arrays:
            place = array[start:stop] if spec.level == "atom" else array[row]
            self._put(spec, place, structure)
        if self.edges is not None:
            self.edges.add(structure, self._place())
        self._atoms_ends[row] = stop
        self.kept_rows, self.kept_atoms = row + 1, stop

    def _check_fields(self, structure: AtomicData) -> None:
        missing = [name for name in self._required if getattr(structure, name) is None]
        extra = [name for name in self._refused if getattr(structure, name) is not None]
        if not missing and not extra:
            return
        differences = [
            *([f"has no {', '.join(missing)}"] if missing else []),
            *([f"has {', '.join(extra)}"] if extra else []),
        ]
        raise StageError(
            f"{self._place()}: {' and '.join(differences)}, unlike the first structure; "
            "name the fields that all have (fields=...), or filter"
        )

    def _put(self, spec: FieldSpec, place: NDArray[Any], structure: AtomicData) -> None:
        if spec.group == "core":
            value = getattr(structure, spec.name)
            if value is None:
                return  # it is one whose absence means zero, which is what is there
        elif spec.name in structure.info:
            value = structure.info[spec.name]
        else:
            raise StageError(f"{self._place()}: has no {spec.name!r} in its info")
        value = np.asarray(value)
        if value.shape != place.shape and not (value.shape == () and place.shape == (1,)):
            raise StageError(
                f"{self._place()}: {spec.name} has shape {value.shape}; "
                f"the store was laid out for {place.shape}"
            )
        try:
            np.copyto(place, value, casting="same_kind")
        except TypeError as error:
            raise StageError(f"{self._place()}: {spec.name}: {error}") from error

    def _place(self) -> str:
        return f"index {self.index}, structure {self.kept_rows}"
