"""Comparing a store with what the source and the filters give, bit by bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from psnc import Pipeline, Source
from psnc.errors import IndexRangeError, PsncError, SourceError, StageError
from psnc.index_ranges import ranges_text
from psnc_atm.atomic_data import AtomicData
from psnc_atm.fields import FIELDS, OPTIONAL
from psnc_atm.region_buffer import holds
from psnc_atm.store_parts import part_of_source
from psnc_atm.stored_array import ChunkCache
from psnc_atm.stored_structures import StoredField, StoredStructures, read_structures
from psnc_atm.zarr_sink import AtomicDataZarrSink
from psnc_atm.zarr_store import WRITTEN, ZarrStore, open_store

__all__ = ["Difference", "StoreReport", "verify_store"]

# The chunks of two neighbouring indices, of every field.
_CACHE_BYTES = 64 * 2**20
_TOLD = 20


@frozen
class Difference:
    """Something that is not in the store as it should be.

    Attributes
    ----------
    index : int
        The index of the source.
    name : str, optional
        What the source calls it, such as the name of a file.
    structure : int, optional
        The structure, counted among those of the index that the filters keep; ``None`` if it is
        about the whole index.
    field : str, optional
        The first field that differs, by its name in the store.
    atom : int, optional
        The first atom, or the first edge, at which it differs.
    stored, expected : object
        What is there and what should be, at this place.
    problem : str
        All of it in words, without the place.
    """

    index: int
    problem: str
    name: str | None = None
    structure: int | None = None
    field: str | None = None
    atom: int | None = None
    stored: Any = None
    expected: Any = None

    def __str__(self) -> str:
        name = "" if self.name is None else f" ({self.name})"
        structure = "" if self.structure is None else f", structure {self.structure}"
        return f"index {self.index}{name}{structure}: {self.problem}"


@frozen
class StoreReport:
    """What a comparison of a store with its source has found; true if that is nothing.

    Attributes
    ----------
    path : Path
        The store.
    indices, structures : int
        How many were compared.
    differences : tuple of Difference
        The first ones, one for each structure.
    found : int
        How many there are in all.
    missing, extra : int
        Structures that the source has and the store has not, and the other way round.
    not_written : tuple of int
        Indices that are not in the store.
    rounded : tuple of str
        Fields that the store has in lower precision: they were compared after rounding.
    not_compared : tuple of str
        Fields of the store that structures of the source have no place for.
    not_stored : tuple of str
        Fields of the source that the store has not.
    """

    path: Path
    indices: int
    structures: int
    differences: tuple[Difference, ...]
    found: int
    missing: int
    extra: int
    not_written: tuple[int, ...]
    rounded: tuple[str, ...]
    not_compared: tuple[str, ...]
    not_stored: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether everything that was compared is in the store as it should be."""
        return not self.found and not self.not_written

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield from map(str, self.differences)
        if self.found > len(self.differences):
            yield f"... and {self.found - len(self.differences)} more"
        if self.not_written:
            yield f"not written: {_indices(self.not_written)}"
        if self.missing or self.extra:
            yield f"{self.missing} structures are missing, {self.extra} should not be there"
        if self.rounded:
            yield f"compared after rounding to the store's precision: {', '.join(self.rounded)}"
        if self.not_compared:
            yield f"not compared, being no fields of a source: {', '.join(self.not_compared)}"
        if self.not_stored:
            yield f"in the source, but not in the store: {', '.join(self.not_stored)}"
        verdict = "is as the source" if self.ok else "is not as the source"
        indices = "1 index" if self.indices == 1 else f"{self.indices} indices"
        yield f"{self.path} {verdict}: {indices}, {self.structures} structures compared"


def verify_store(
    expected: Pipeline[Any] | Source[Any],
    store: str | Path | None = None,
    *,
    indices: Iterable[int] | None = None,
    at_most: int = _TOLD,
) -> StoreReport:
    """Compare a store with what it was made from, every number of every structure.

    Numbers are the same if their bits are, or if both are NaN. Nothing is written. One index after
    the other is read anew from the source, through the filters; memory stays flat.

    Parameters
    ----------
    expected : Pipeline or Source
        What the store was made with; a source alone, if there were no filters.
    store : str or Path, optional
        The store; by default that of the pipeline's ``AtomicDataZarrSink``.
    indices : iterable of int, optional
        The indices to compare; by default all.
    at_most : int
        How many differences to describe; all are counted.

    Returns
    -------
    StoreReport
        What differs. It is true if nothing does; as a string it says all in words.

    Raises
    ------
    psnc.SourceError
        If there is no store that psnc laid out.
    psnc.StageError
        If the store has another number of indices, or the pipeline no such sink.
    psnc.IndexRangeError
        If one of ``indices`` is not in the source.
    """
    pipeline = expected if isinstance(expected, Pipeline) else Pipeline(source=expected)
    path = _path_of(pipeline) if store is None else Path(store).absolute()
    comparison = _Comparison(pipeline, path, at_most)
    for index in range(comparison.total) if indices is None else indices:
        comparison.compare(index)
    return comparison.report()


def _path_of(pipeline: Pipeline[Any]) -> Path:
    if not isinstance(pipeline.sink, AtomicDataZarrSink):
        raise StageError(
            "the pipeline does not write a Zarr store by AtomicDataZarrSink; say which store to "
            "compare with"
        )
    return pipeline.sink._path


class _Comparison:
    """Goes through indices and gathers what differs."""

    def __init__(self, pipeline: Pipeline[Any], path: Path, at_most: int) -> None:
        self._pipeline, self._path, self._at_most = pipeline, path, at_most
        self._stored: StoredStructures = read_structures(path, ChunkCache(_CACHE_BYTES))
        self._layout = _layout(path)
        self.total = len(pipeline.source)
        self._places = part_of_source(self._layout, pipeline.source).indices()
        if len(self._places) != self.total:
            raise StageError(
                f"{path} was laid out for other input: it has {len(self._places)} indices, the "
                f"source has {self.total}; give the source that it was made from"
            )
        marks = self._layout.read(WRITTEN, 0, len(self._layout.rows_before) - 1)
        self._written = marks[self._places] != 0
        self._fields = [one for one in self._stored.fields if _comparable(one)]
        self._indices = self._structures = self._found = self._missing = self._extra = 0
        self._differences: list[Difference] = []
        self._not_written: list[int] = []
        self._rounded: set[str] = set()
        self._not_stored: set[str] = set()

    def compare(self, index: int) -> None:
        """Compare one index."""
        if not 0 <= index < self.total:
            raise IndexRangeError(f"index {index} is out of range: there are {self.total}")
        self._indices += 1
        if not self._written[index]:
            self._not_written.append(index)
            return
        stored = self._of_store(index)
        try:
            for number, structure in enumerate(self._of_source(index)):
                found = next(stored, None)
                if found is None:
                    self._missing += 1
                    self._tell(index, "is not in the store", structure=number)
                else:
                    self._structures += 1
                    self._compare(index, number, structure, *found)
            extra = sum(1 for _ in stored)
        except PsncError as error:
            self._tell(index, f"cannot be compared: {error}")
            return
        if extra:
            self._extra += extra
            self._tell(index, f"has {extra} more structures in the store than in the source")

    def report(self) -> StoreReport:
        """Return what was found until now."""
        compared = {one.key for one in self._fields}
        return StoreReport(
            path=self._path,
            indices=self._indices,
            structures=self._structures,
            differences=tuple(self._differences),
            found=self._found,
            missing=self._missing,
            extra=self._extra,
            not_written=tuple(self._not_written),
            rounded=tuple(sorted(self._rounded)),
            not_compared=tuple(one.key for one in self._stored.fields if one.key not in compared),
            not_stored=tuple(sorted(self._not_stored)),
        )

    def _of_source(self, index: int) -> Iterator[AtomicData]:
        try:
            yield from self._pipeline.items(index)
        except PsncError:
            raise
        except Exception as error:  # whatever it is, the other indices can be compared
            raise SourceError(f"{type(error).__name__}: {error}") from error

    def _of_store(self, index: int) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """Yield the row of each structure of an index, and the values of its fields."""
        place = int(self._places[index])
        region = self._layout.rows_before[place : place + 2]
        first, last = np.searchsorted(self._stored.rows, region)
        for rows in self._stored.blocks(self._stored.rows[first:last]):
            columns = self._stored.columns(rows)
            ends = {
                level: np.cumsum(self._stored.counts(level, rows))
                for level in {one.level for one in self._fields}
            }
            for at, row in enumerate(rows.tolist()):
                values = {}
                for one in self._fields:
                    stop = int(ends[one.level][at])
                    start = int(ends[one.level][at - 1]) if at else 0
                    values[one.key] = columns[one.key][start:stop]
                yield row, values

    def _compare(
        self,
        index: int,
        number: int,
        structure: AtomicData,
        row: int,
        stored: Mapping[str, NDArray[Any]],
    ) -> None:
        atoms = len(stored["atomic_numbers"])
        if atoms != len(structure):
            problem = f"has {atoms} atoms in the store, {len(structure)} in the source"
            self._tell(index, problem, structure=number)
            return
        self._note_what_is_not_stored(structure)
        differing = []
        for one in self._fields:
            wanted = self._wanted(one, structure, row)
            if wanted is not None and not _same_bits(stored[one.key], wanted):
                differing.append((one, wanted))
        if differing:
            one, wanted = differing[0]
            others = [other.key for other, _ in differing[1:]]
            self._tell_values(index, number, one, stored[one.key], wanted, others)

    def _wanted(self, one: StoredField, structure: AtomicData, row: int) -> NDArray[Any] | None:
        """Return what the store should have, in its dtype; ``None`` if it does not matter."""
        if one.tells_of is not None:
            return np.full((1, *one.array.shape[1:]), _value(one.tells_of, structure) is not None)
        value = _value(one.name, structure) if one.attribute else structure.info.get(one.name)
        if value is None:
            return self._wanted_of_nothing(one, len(structure))
        array = np.asarray(value)
        if one.attribute == "edge_index":
            array = array.T + self._stored.atoms_ptr[row]
        if one.level == "system":
            array = array.reshape(1, *(array.shape or one.array.shape[1:]))
        dtype = one.array.dtype
        if array.dtype != dtype:
            if array.dtype.kind in "fc" and array.dtype.itemsize > dtype.itemsize:
                self._rounded.add(one.key)
            with np.errstate(over="ignore", invalid="ignore"):
                cast = array.astype(dtype)
            if array.dtype.kind in "iu" and not holds(cast, array):
                raise SourceError(f"{one.key} has integers that {dtype} cannot hold")
            array = cast
        return array

    def _wanted_of_nothing(self, one: StoredField, atoms: int) -> NDArray[Any] | None:
        if any(other.tells_of == one.name for other in self._fields):
            return None  # the mask says that there is nothing, and is compared
        zero = one.attribute is not None and FIELDS[one.attribute].zero_if_missing
        rows = (atoms if zero else 0, *one.array.shape[1:])
        return np.zeros(rows, one.array.dtype)

    def _note_what_is_not_stored(self, structure: AtomicData) -> None:
        stored = {one.attribute for one in self._fields}
        self._not_stored.update(
            name
            for name in (*OPTIONAL, "edge_index")
            if name not in stored and getattr(structure, name) is not None
        )

    def _tell_values(
        self,
        index: int,
        number: int,
        one: StoredField,
        stored: NDArray[Any],
        wanted: NDArray[Any],
        others: list[str],
    ) -> None:
        also = f"; {', '.join(others)} too" if others else ""
        if stored.shape != wanted.shape:
            what = "nothing" if len(wanted) == 0 else f"shape {wanted.shape[1:]}"
            problem = f"{one.key} is in the store, and has {what} in the source{also}"
            self._tell(index, problem, structure=number, field=one.key)
            return
        where = np.argwhere(_differing(stored, wanted))
        first = tuple(where[0].tolist())
        atom = None if one.level == "system" else first[0]
        of = "" if atom is None else f" of {one.level} {atom}"
        there, should = stored[first].item(), wanted[first].item()
        places = "" if len(where) == 1 else f", and {len(where)} numbers of it differ"
        self._tell(
            index,
            f"{one.key}{of} is {there!r} in the store, {should!r} in the source{places}{also}",
            structure=number,
            field=one.key,
            atom=atom,
            stored=there,
            expected=should,
        )

    def _tell(self, index: int, problem: str, **where: Any) -> None:
        self._found += 1
        if len(self._differences) < self._at_most:
            name = self._pipeline.source.index_name(index)
            self._differences.append(Difference(index, problem, name, **where))


def _layout(path: Path) -> ZarrStore:
    if not (path / "psnc" / "zarr.json").exists():
        raise SourceError(
            f"{path} was not laid out by psnc, so that nothing says which structures belong to "
            "which index; compare what open_dataset gives"
        )
    store = open_store(path)
    assert store is not None
    return store


def _comparable(one: StoredField) -> bool:
    return one.attribute is not None or one.array.name.startswith("custom/")


def _value(name: str, structure: AtomicData) -> Any:
    """Return a field by its name in the store, or an entry of info."""
    attribute = {"neighbor_list": "edge_index", "neighbor_list_shifts": "unit_shifts"}.get(
        name, name
    )
    return getattr(structure, attribute) if attribute in FIELDS else structure.info.get(name)


def _same_bits(stored: NDArray[Any], wanted: NDArray[Any]) -> bool:
    if stored.shape != wanted.shape:
        return False
    return stored.tobytes() == wanted.tobytes() or not _differing(stored, wanted).any()


def _differing(stored: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.bool_]:
    """Say of each number whether its bits differ; NaN is NaN."""
    bits = [np.ascontiguousarray(array).view(np.uint8) for array in (stored, wanted)]
    size = stored.dtype.itemsize
    differ = (bits[0] != bits[1]).reshape(*stored.shape, size).any(axis=-1)
    if stored.dtype.kind in "fc":
        differ &= ~(np.isnan(stored) & np.isnan(wanted))
    return np.asarray(differ)


def _indices(indices: Iterable[int]) -> str:
    numbers = sorted(set(indices))
    return f"{'index' if len(numbers) == 1 else 'indices'} {ranges_text(numbers)}"
