"""The rows of one index on their way to its region: gathered by field, written by chunk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from psnc.errors import StageError
from psnc_atm.atomic_data import AtomicData
from psnc_atm.edge_files import EdgeBuffer
from psnc_atm.fields import EDGE_FIELDS, FIELDS, OPTIONAL
from psnc_atm.store_plan import FieldSpec, require_structure

__all__ = ["Column", "RegionBuffer", "holds"]

# Joining some structures at a time costs a fraction of putting each into its place. A few dozen
# are enough for that, and large ones are joined before they take much memory.
_BLOCK_STRUCTURES = 64
_BLOCK_ATOMS = 16_384
_SCALARS: dict[str, set[type]] = {"float64": {float, np.float64}, "bool": {bool}}


class Column:
    """What has come of one array and is not written yet.

    Attributes
    ----------
    spec : FieldSpec
        The array.
    start : int
        Where in the index's region the held rows begin.
    held : int
        Number of rows.
    """

    def __init__(self, spec: FieldSpec) -> None:
        self.spec = spec
        self.start = self.held = 0
        self._blocks: list[NDArray[Any]] = []

    def add(self, values: NDArray[Any]) -> None:
        """Append rows."""
        self._blocks.append(values)
        self.held += len(values)

    def take(self, count: int) -> NDArray[Any]:
        """Remove the first ``count`` rows and return them."""
        whole = self._blocks[0] if len(self._blocks) == 1 else np.concatenate(self._blocks)
        # Copied, so that the rows that are taken are not kept in memory for the others' sake.
        self._blocks = [whole[count:].copy()] if count < len(whole) else []
        self.start, self.held = self.start + count, self.held - count
        return whole[:count]


class RegionBuffer:
    """The structures of an index, as columns that are emptied while others still come.

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
    missing : {"refuse", "nan"}
        What to do where a structure lacks a field of the store.

    Attributes
    ----------
    columns : list of Column
        One for each array.
    edges : EdgeBuffer or None
        The edges of the index, if they are stored.
    kept_rows, kept_atoms : int
        What has come so far.
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
        missing: Literal["refuse", "nan"] = "refuse",
    ) -> None:
        self.index = index
        self.rows, self.atoms = rows, atoms
        self.kept_rows = self.kept_atoms = 0
        self.columns = [Column(spec) for spec in fields]
        self.edges = EdgeBuffer(edge_fields) if edge_fields else None
        self._atoms_ends = np.full(rows, -1, dtype=np.int64)
        self._nan = missing == "nan"
        stored = {column.spec.name for column in self.columns if column.spec.group == "core"}
        zero = {name for name in OPTIONAL if FIELDS[name].zero_if_missing}
        unwanted = {name for name in OPTIONAL if FIELDS[name].calculation_input}
        required = {*edge_fields} if self._nan else (stored - zero) | {*edge_fields}
        known = (*OPTIONAL, *EDGE_FIELDS)
        self._required = [name for name in known if name in required]
        self._refused = [name for name in known if name not in stored | unwanted | {*edge_fields}]
        if not refuse_others:
            self._refused = []

    def fill(self, items: Iterable[Any]) -> Iterator[None]:
        """Take over all structures of the index, and check that they fill its region.

        Yields whenever some have been added to the columns.
        """
        block: list[AtomicData] = []
        counts: list[int] = []
        atoms = 0
        for item in items:
            structure = item
            if item.__class__ is not AtomicData:
                structure = require_structure(item, self._place(len(block)))
            block.append(structure)
            counts.append(len(structure.atomic_numbers))
            atoms += counts[-1]
            if len(block) == _BLOCK_STRUCTURES or atoms >= _BLOCK_ATOMS:
                self._add(block, counts)
                block, counts, atoms = [], [], 0
                yield
        if block:
            self._add(block, counts)
            yield
        if self.kept_rows == self.rows and self.kept_atoms != self.atoms:
            raise StageError(
                f"index {self.index}: {self.kept_atoms} atoms came of {self.atoms} in the source; "
                "filters may drop structures, but not change their number of atoms"
            )

    def atoms_ends(self) -> NDArray[np.int64]:
        """Return where each row's atoms end, counted from the start of the region.

        Dropped rows come last and have no atoms, but for the very last: it owns those that are
        left over, so that the rows of all indices stay in one unbroken sequence.
        """
        ends = self._atoms_ends.copy()
        ends[self.kept_rows :] = self.kept_atoms
        ends[-1:] = self.atoms
        return ends

    def _add(self, block: Sequence[AtomicData], counts: Sequence[int]) -> None:
        self._check_room(counts)
        if self.edges is not None or (self._refused and not _none_has(block, self._refused)):
            self._check_fields(block)
        for column in self.columns:
            values = _joined(column.spec, block, counts)
            if values is None:
                values = self._one_by_one(column.spec, block, counts)
            column.add(values)
        if self.edges is not None:
            for position, structure in enumerate(block):
                self.edges.add(structure, self._place(position))
        rows, atoms = self.kept_rows + len(block), self.kept_atoms + sum(counts)
        self._atoms_ends[self.kept_rows : rows] = self.kept_atoms + np.cumsum(counts)
        self.kept_rows, self.kept_atoms = rows, atoms

    def _check_room(self, counts: Sequence[int]) -> None:
        if self.kept_rows + len(counts) > self.rows:
            raise StageError(
                f"index {self.index}: more structures than the {self.rows} in the source; "
                "filters may drop structures, but not add any"
            )
        ends = self.kept_atoms + np.cumsum(counts)
        if ends[-1] > self.atoms:
            place = self._place(int(np.searchsorted(ends, self.atoms, side="right")))
            raise StageError(
                f"{place}: more atoms than the {self.atoms} in the source; "
                "filters may drop structures, but not change their number of atoms"
            )

    def _check_fields(self, block: Sequence[AtomicData]) -> None:
        for position, structure in enumerate(block):
            missing = [name for name in self._required if getattr(structure, name) is None]
            extra = [name for name in self._refused if getattr(structure, name) is not None]
            differences = [
                *([f"has no {', '.join(missing)}"] if missing else []),
                *([f"has {', '.join(extra)}"] if extra else []),
            ]
            if differences:
                raise StageError(
                    f"{self._place(position)}: {' and '.join(differences)}, unlike the first "
                    "structure; name the fields to store (fields=...), take missing='nan', "
                    "or filter"
                )

    def _one_by_one(
        self, spec: FieldSpec, block: Sequence[AtomicData], counts: Sequence[int]
    ) -> NDArray[Any]:
        """Return the rows of one array, and say which structure does not fit."""
        self._check_fields(block)
        ends = np.cumsum(counts)
        rows = ends[-1] if spec.level == "atom" else len(block)
        values = np.zeros((rows, *spec.shape), spec.dtype)
        for position, (structure, stop) in enumerate(zip(block, ends, strict=True)):
            start = stop - counts[position]
            place = values[start:stop] if spec.level == "atom" else values[position]
            self._put(spec, place, structure, position)
        return values

    def _put(
        self, spec: FieldSpec, place: NDArray[Any], structure: AtomicData, position: int
    ) -> None:
        value = spec.value_of(structure)
        if value is None:
            self._put_nothing(spec, place, position)
            return
        value = np.asarray(value)
        if value.shape != place.shape and not (value.shape == () and place.shape == (1,)):
            raise StageError(
                f"{self._place(position)}: {spec.name} has shape {value.shape}; "
                f"the store was laid out for {place.shape}"
            )
        scalar = spec.group == "core" and FIELDS[spec.name].scalar
        if not scalar and value.dtype.kind == "f" and value.dtype.name != spec.dtype:
            raise StageError(
                f"{self._place(position)}: {spec.name} is {value.dtype.name}; the store was laid "
                f"out for {spec.dtype}"
            )
        try:
            np.copyto(place, value, casting="same_kind")
        except TypeError as error:
            raise StageError(f"{self._place(position)}: {spec.name}: {error}") from error
        if value.dtype.kind in "iu" and not holds(place, value):
            raise StageError(
                f"{self._place(position)}: {spec.name} has {value.dtype.name} numbers that "
                f"{spec.dtype}, for which the store was laid out, cannot hold; convert it in a "
                "filter"
            )

    def _put_nothing(self, spec: FieldSpec, place: NDArray[Any], position: int) -> None:
        if spec.group == "core" and FIELDS[spec.name].zero_if_missing:
            return  # zero is what is there
        if self._nan and spec.may_be_missing:
            place[...] = np.nan
            return
        if spec.group == "core":
            raise StageError(f"{self._place(position)}: has no {spec.name}")
        hint = f"; {spec.dtype} has no NaN to put in its place" if self._nan else ""
        raise StageError(f"{self._place(position)}: has no {spec.name!r} in its info{hint}")

    def _place(self, position: int) -> str:
        return f"index {self.index}, structure {self.kept_rows + position}"


def holds(stored: NDArray[Any], integers: NDArray[Any]) -> bool:
    """Whether integers are in an array of another dtype as they were."""
    return bool((stored == integers).all() and (stored.astype(integers.dtype) == integers).all())


def _none_has(block: Sequence[AtomicData], names: Sequence[str]) -> bool:
    """Whether the fields are None in all structures."""
    values = map(attrgetter(*names), block)
    try:
        return {*(chain.from_iterable(values) if len(names) > 1 else values)} == {None}
    except TypeError:  # arrays cannot be hashed
        return False


def _joined(
    spec: FieldSpec, block: Sequence[AtomicData], counts: Sequence[int]
) -> NDArray[Any] | None:
    """Return the rows of one array, or ``None`` where not all structures are of the usual kind."""
    values = (
        [*map(spec.value_of, block)]
        if spec.group == "custom"
        else ([*map(attrgetter(spec.name), block)])
    )
    kinds = {*map(type, values)}
    if kinds == {np.ndarray}:
        return _joined_arrays(spec, values, counts)
    if spec.shape != (1,) or spec.level == "atom":
        return None
    if kinds <= _SCALARS.get(spec.dtype, set()):
        return np.array(values, dtype=spec.dtype)[:, None]
    return None


def _joined_arrays(
    spec: FieldSpec, values: Sequence[NDArray[Any]], counts: Sequence[int]
) -> NDArray[Any] | None:
    if {*map(attrgetter("dtype"), values)} != {np.dtype(spec.dtype)}:
        return None
    if spec.level == "system":
        if {*map(attrgetter("shape"), values)} != {spec.shape}:
            return None
        return np.concatenate(values).reshape(len(values), *spec.shape)
    try:
        if [*map(len, values)] != counts:
            return None
        joined = np.concatenate(values)
    except (TypeError, ValueError):  # no rows, or rows of different shapes
        return None
    return joined if joined.shape[1:] == spec.shape else None
