"""Rows of the arrays of a store, from chunks that are kept in memory."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from attrs import field, frozen
from numpy.typing import NDArray

from psnc.errors import SourceError
from psnc_atm.chunk_files import ChunkError, ChunkFiles, files_of_array

__all__ = ["ChunkCache", "Pieces", "StoredArray", "pieces_by_chunk", "stored_array"]

Chunk = NDArray[Any] | None
# Of each chunk the parts to take from it: from row, to row, and where they go.
Pieces = list[tuple[int, list[tuple[int, int, int]]]]


class ChunkCache:
    """Decoded chunks of all arrays of a store, the least recently used thrown out first.

    Each process has its own, also after a fork.

    Parameters
    ----------
    limit : int
        Bytes of decoded chunks to keep; 0 for none.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._begin()

    def __getstate__(self) -> int:
        return self.limit

    def __setstate__(self, limit: int) -> None:
        self.limit = limit
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        # Of a fork's parent another thread may hold the lock, for ever as the child sees it.
        self._lock = threading.Lock()
        self._chunks: OrderedDict[tuple[str, int], Chunk] = OrderedDict()
        self._bytes = 0

    def chunk(self, array: str, number: int, read: Callable[[int], Chunk]) -> Chunk:
        """Return a chunk of an array, by ``read`` if it is not here."""
        if self._process != os.getpid():
            self._begin()
        key = (array, number)
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
                return self._chunks[key]
        chunk = read(number)
        self._keep(key, chunk)
        return chunk

    def _keep(self, key: tuple[str, int], chunk: Chunk) -> None:
        size = _size(chunk)
        if size > self.limit:
            return
        with self._lock:
            self._bytes += size - _size(self._chunks.pop(key, None))
            self._chunks[key] = chunk
            while self._bytes > self.limit:
                self._bytes -= _size(self._chunks.popitem(last=False)[1])


def _size(chunk: Chunk) -> int:
    return 0 if chunk is None else chunk.nbytes


@frozen(eq=False)
class StoredArray:
    """One array of a store, to read rows of.

    Attributes
    ----------
    name : str
        Its path in the store, such as ``"core/positions"``.
    shape : tuple of int
        Its shape.
    dtype : np.dtype
        The dtype of its rows.
    chunk_rows : int
        Rows that are read and decoded together.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_rows: int
    _fill: Any
    _read: Callable[[int], Chunk]
    _cache: ChunkCache
    _unchanged: Callable[[], None] = field(repr=False)

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Return some rows, in an array of its own."""
        number, first = divmod(start, self.chunk_rows)
        last = first + stop - start
        if first < last <= self.chunk_rows:
            chunk = self._cache.chunk(self.name, number, self._load)
            if chunk is not None:
                return chunk[first:last].astype(self.dtype)
            return np.full((stop - start, *self.shape[1:]), self._fill, self.dtype)
        ranges = np.array([start]), np.array([stop])
        return self.take(pieces_by_chunk(*ranges, self.chunk_rows), stop - start)

    def take(self, pieces: Pieces, rows: int) -> NDArray[Any]:
        """Return the rows that ``pieces`` lists, ``rows`` in all, in an array of its own."""
        taken = np.empty((rows, *self.shape[1:]), dtype=self.dtype)
        for number, parts in pieces:
            chunk = self._cache.chunk(self.name, number, self._load)
            for start, stop, place in parts:
                taken[place : place + stop - start] = (
                    self._fill if chunk is None else chunk[start:stop]
                )
        return taken

    def _load(self, number: int) -> Chunk:
        try:
            return self._read(number)
        except ChunkError as error:
            raise SourceError(
                f"{error.file}: chunk {number} of {self.name} cannot be read ({error.cause}); "
                "restore the file, or have the indices in it written again"
            ) from error
        finally:
            # After the read: what was read before is of the store that was opened.
            self._unchanged()


@frozen
class _ZarrChunks:
    """Chunks as zarr-python reads them: from anywhere, with any codec."""

    name: str
    where: str
    array: zarr.Array[Any]

    def __call__(self, number: int) -> Chunk:
        rows = self.array.chunks[0]
        try:
            return np.asarray(self.array[number * rows : (number + 1) * rows])
        except Exception as error:  # stores and codecs have no common class of error
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SourceError(
                f"{self.where}: chunk {number} of {self.name} cannot be read ({cause}); restore "
                "it, or have the indices in it written again"
            ) from error


@frozen
class _FileChunks:
    files: ChunkFiles

    def __call__(self, number: int) -> Chunk:
        return self.files.read(number)


def stored_array(
    name: str,
    array: zarr.Array[Any],
    cache: ChunkCache,
    *,
    where: str,
    directory: Path | None,
    unchanged: Callable[[], None],
) -> StoredArray:
    """Make an array ready to be read.

    Parameters
    ----------
    name : str
        Its path in the store.
    array : zarr.Array
        The array.
    cache : ChunkCache
        Where its chunks are kept.
    where : str
        The store, for errors.
    directory : Path, optional
        The store's directory if it is in local files.
    unchanged : callable
        Called after each chunk that was read; raises if the store is another one by now.
    """
    files = None if directory is None else files_of_array(directory / name)
    return StoredArray(
        name=name,
        shape=array.shape,
        dtype=np.dtype(array.dtype).newbyteorder("="),
        chunk_rows=array.chunks[0] if files is None else files.chunk_rows,
        fill=0 if array.fill_value is None else array.fill_value,
        read=_ZarrChunks(name, where, array) if files is None else _FileChunks(files),
        cache=cache,
        unchanged=unchanged,
    )


def pieces_by_chunk(starts: NDArray[np.int64], stops: NDArray[np.int64], chunk_rows: int) -> Pieces:
    """Return what to take from each chunk, so that no chunk is needed twice.

    Ranges of rows come in any order, also repeatedly, and are put one behind the other.
    """
    parts: dict[int, list[tuple[int, int, int]]] = {}
    place = 0
    for start, stop in _joined(starts, stops):
        while start < stop:
            number, first = divmod(start, chunk_rows)
            last = min(first + stop - start, chunk_rows)
            parts.setdefault(number, []).append((first, last, place))
            place += last - first
            start += last - first
    return sorted(parts.items())


def _joined(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield ranges, those that follow on one another as one."""
    if not len(starts):
        return
    breaks = np.flatnonzero(starts[1:] != stops[:-1]) + 1
    firsts = starts[np.concatenate([[0], breaks])].tolist()
    lasts = stops[np.concatenate([breaks - 1, [-1]])].tolist()
    yield from zip(firsts, lasts, strict=True)
