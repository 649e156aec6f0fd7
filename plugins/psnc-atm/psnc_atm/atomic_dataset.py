"""AtomicDataset: a Zarr store as a sequence of structures."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from psnc.errors import IndexRangeError, SourceError
from psnc_atm.atomic_data import AtomicData
from psnc_atm.fields import Level
from psnc_atm.stored_array import ChunkCache
from psnc_atm.stored_structures import StoredStructures, read_structures

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.abc.store import Store

__all__ = ["AtomicDataset", "open_dataset"]

_CACHE_BYTES = 256 * 2**20


def open_dataset(
    store: str | Path | Store,
    *,
    fields: Sequence[str] | None = None,
    cache_bytes: int = _CACHE_BYTES,
) -> AtomicDataset:
    """Open a Zarr store of atomic data to read its structures.

    It is what ``AtomicDataZarrSink`` writes, or any other store with this layout. It may be
    written to meanwhile: the dataset has the structures that are complete now.

    Parameters
    ----------
    store : path, URL or zarr.abc.store.Store
        The store. Local files are read fastest; what has ``://`` in it, and store objects, are
        read through zarr-python.
    fields : sequence of str, optional
        The fields to read besides ``atomic_numbers``, ``positions``, ``cell`` and ``pbc``, by
        their names in the store; by default all. Those that are not asked for cost nothing.
    cache_bytes : int
        Memory for decoded chunks, in each process that reads, in bytes.

    Returns
    -------
    AtomicDataset
        Its structures.

    Raises
    ------
    psnc.SourceError
        If there is no store, or one of another layout, or without one of ``fields``.
    """
    return AtomicDataset(store, fields=fields, cache_bytes=cache_bytes)


class AtomicDataset:
    """The structures of a Zarr store, in the order in which they are in it.

    ``dataset[7]`` is a structure. Several at once are a dataset again, which reads when it is asked
    to: ``dataset[10:20]``, ``dataset[[3, 1, 2]]``, ``dataset[dataset.atom_counts < 50]``. It can
    be given to ``torch.utils.data.DataLoader`` as it is: it is pickled without what is in memory,
    and a process that is forked off reads by itself.

    Parameters
    ----------
    store, fields, cache_bytes
        See :func:`open_dataset`.
    """

    def __init__(
        self,
        store: str | Path | Store,
        *,
        fields: Sequence[str] | None = None,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        if cache_bytes < 0:
            raise SourceError(f"cache_bytes is {cache_bytes}; give 0 or more")
        self._store, self._asked, self._cache_bytes = store, fields, cache_bytes
        self._selected = False
        self._read()

    def _read(self) -> None:
        cache = ChunkCache(self._cache_bytes)
        self._structures: StoredStructures = read_structures(self._store, cache, self._asked)
        self._rows = self._structures.rows

    def refresh(self) -> None:
        """Look again which structures are complete; the same number may be another one then.

        Selections that were made before stay as they are.
        """
        if self._selected:
            raise SourceError(
                "a selection stays as it is; refresh the dataset that it is of, and select again"
            )
        self._read()

    @property
    def fields(self) -> dict[str, Level]:
        """What is read of each structure, by the names in the store, each with its level."""
        return {field.key: field.level for field in self._structures.fields}

    @property
    def attrs(self) -> Mapping[str, Any]:
        """The root attributes of the store."""
        return self._structures.attrs

    @property
    def atom_counts(self) -> NDArray[np.int64]:
        """The number of atoms of each structure, without reading any."""
        return self._structures.counts("atom", self._rows)

    @property
    def rows(self) -> NDArray[np.int64]:
        """The row of each structure in the arrays of the store."""
        return self._rows.copy()

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        count = "1 structure" if len(self) == 1 else f"{len(self)} structures"
        return f"AtomicDataset({self._structures.where}, {count}: {', '.join(self.fields)})"

    @overload
    def __getitem__(self, which: int | np.integer[Any]) -> AtomicData: ...
    @overload
    def __getitem__(self, which: slice | Sequence[int] | NDArray[Any]) -> AtomicDataset: ...

    def __getitem__(
        self, which: int | np.integer[Any] | slice | Sequence[int] | NDArray[Any]
    ) -> AtomicData | AtomicDataset:
        """Return one structure, or a dataset of several.

        Parameters
        ----------
        which : int, slice, sequence of int, or array of int or bool
            Negative numbers count from the end.

        Raises
        ------
        psnc.IndexRangeError
            If there is no such structure.
        psnc.SourceError
            If a chunk of it cannot be read.
        """
        if isinstance(which, slice):
            return self._selection(self._rows[which])
        if isinstance(which, bool):  # which Python takes for a number
            raise _no_index(which)
        try:
            number = operator.index(which)  # type: ignore[arg-type]
        except TypeError:
            return self._selection(self._rows[self._positions(which)])
        if not -len(self) <= number < len(self):
            raise self._out_of_range(number)
        return self._structures.structure(int(self._rows[number]))

    def __iter__(self) -> Iterator[AtomicData]:
        """Yield the structures in order, reading some at a time."""
        for rows in self._structures.blocks(self._rows):
            yield from self._structures.structures(rows)

    def batch(self, which: ArrayLike) -> list[AtomicData]:
        """Return several structures, in the order asked for; each chunk is read once.

        Parameters
        ----------
        which : sequence or array of int, or array of bool
            As for indexing.
        """
        return self._structures.structures(self._rows[self._positions(which)])

    # What PyTorch's DataLoader asks for a batch, where a dataset has it.
    __getitems__ = batch

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all structures as one array a field, in the layout of the store.

        Returns
        -------
        dict of str to ndarray
            Each field by its name in the store, atoms and edges of all structures one behind the
            other; ``"atoms_ptr"``, and ``"edges_ptr"`` where there are edges, say where those of
            each structure begin. ``"neighbor_list"`` counts the atoms of all structures.
        """
        return self._structures.arrays(self._rows)

    def _selection(self, rows: NDArray[np.int64]) -> AtomicDataset:
        selection = object.__new__(AtomicDataset)
        selection.__dict__.update(self.__dict__, _rows=rows, _selected=True)
        return selection

    def _positions(self, which: Any) -> NDArray[Any]:
        """Return which structures are meant, as numbers that are in range or as a mask."""
        wanted = np.asarray(which)
        if wanted.size == 0 and wanted.ndim == 1:
            return np.empty(0, dtype=np.int64)
        if wanted.ndim != 1 or wanted.dtype.kind not in "iub":
            raise _no_index(which)
        if wanted.dtype.kind == "b":
            if len(wanted) != len(self):
                raise IndexRangeError(
                    f"a mask of {len(wanted)} does not fit: {self._structures.where} has "
                    f"{len(self)} structures"
                )
            return wanted
        outside = (wanted < -len(self)) | (wanted >= len(self))
        if outside.any():
            raise self._out_of_range(int(wanted[outside][0]))
        return wanted

    def _out_of_range(self, number: int) -> IndexRangeError:
        return IndexRangeError(
            f"index {number} is out of range: {self._structures.where} has "
            f"{len(self)} {'structure' if len(self) == 1 else 'structures'}"
        )


def _no_index(which: object) -> TypeError:
    return TypeError(
        "structures are indexed by integers, slices and one-dimensional arrays of integers or "
        f"booleans, not {type(which).__name__}"
    )
