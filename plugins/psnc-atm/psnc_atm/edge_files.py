"""The edges of one index, in a file of their own inside the store until all are joined.

How many edges an index has is known only when they are made, so that they have no region. The
file holds them as they are in the structures, with atoms counted from the first of each structure:
it stays right wherever the index's region moves.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from attrs import frozen
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from psnc.atomic import atomic_path
from psnc.errors import StageError
from psnc_atm.atomic_data import AtomicData

__all__ = [
    "EdgeBuffer",
    "EdgeFile",
    "EdgeFileHead",
    "IndexName",
    "carry_edge_files",
    "edge_file_path",
    "open_edge_file",
    "read_head",
]

Ints = NDArray[np.int64]

_DIRECTORY = "psnc/edges"
_MAGIC = b"psnc-e1\n"
# Magic, mark, digest, structures, edges, pieces.
_HEAD = struct.Struct("<8sQ16sQQQ")
# Of each compressed array: the size of its integers, and of what follows.
_SIZE = struct.Struct("<BQ")
_CODEC = Zstd(level=3)
_DIGEST_BYTES = 16
_EDGES_PER_PIECE = 1 << 17
# What reading a damaged file raises.
_NO_EDGE_FILE = (OSError, RuntimeError, ValueError, struct.error)
_INTEGERS = (np.int8, np.int16, np.int32, np.int64)


def edge_file_path(store: Path, index: int) -> Path:
    """Return where the edges of an index are."""
    return store / _DIRECTORY / f"{index}.edges"


@frozen
class EdgeFileHead:
    """What is known of a file of edges without reading it.

    Attributes
    ----------
    mark : int
        That of the pipeline that wrote it, as in ``psnc/written``.
    digest : bytes
        Of all that follows.
    structures, edges : int
        How many there are.
    pieces : int
        How many times edges follow.
    """

    mark: int
    digest: bytes
    structures: int
    edges: int
    pieces: int


class EdgeBuffer:
    """Takes over the edges of an index structure by structure, compressed as they come.

    Parameters
    ----------
    names : sequence of str
        ``"edge_index"``, and ``"unit_shifts"`` if it is stored too.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._with_shifts = "unit_shifts" in names
        self._atoms: list[int] = []
        self._edges: list[int] = []
        self._waiting: list[Ints] = []
        self._waiting_edges = 0
        self._pieces: list[bytes] = []

    def add(self, structure: AtomicData, place: str) -> None:
        """Take over the edges of a structure."""
        edges = _columns(structure, self._with_shifts, place)
        self._atoms.append(len(structure))
        self._edges.append(edges.shape[1])
        self._waiting.append(edges)
        self._waiting_edges += edges.shape[1]
        if self._waiting_edges >= _EDGES_PER_PIECE:
            self._compress()

    def write(self, store: Path, index: int, mark: int) -> None:
        """Write the file of an index, in one step."""
        self._compress()
        sizes = _compressed(np.array([self._atoms, self._edges], dtype=np.int64))
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for content in (sizes, *self._pieces):
            digest.update(content)
        head = _HEAD.pack(
            *(_MAGIC, mark, digest.digest()),
            *(len(self._atoms), sum(self._edges), len(self._pieces)),
        )
        path = edge_file_path(store, index)
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path) as draft, open(draft, "wb") as file:
            file.writelines([head, sizes, *self._pieces])

    def _compress(self) -> None:
        if not self._waiting_edges:
            self._waiting.clear()
            return
        columns = np.concatenate(self._waiting, axis=1)
        self._pieces.append(b"".join(map(_compressed, columns)))
        self._waiting, self._waiting_edges = [], 0


class EdgeFile:
    """A file of edges that is being read: as it was opened, whatever takes its place.

    Attributes
    ----------
    head : EdgeFileHead
        What it says of itself.
    atoms, edges : (structures,) int64
        How many each structure has.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.head = _head_of(file)
        self._digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        sizes = self._next_array().reshape(2, self.head.structures)
        self.atoms: Ints = sizes[0]
        self.edges: Ints = sizes[1]

    def columns(self, rows: int) -> Iterator[Ints]:
        """Yield the edges a piece at a time: (5, m), or (2, m) without shifts."""
        for _ in range(self.head.pieces):
            yield np.stack([self._next_array() for _ in range(rows)])
        if self._digest.digest() != self.head.digest:
            raise OSError("it is damaged")

    def _next_array(self) -> Ints:
        before = self._file.read(_SIZE.size)
        itemsize, size = _SIZE.unpack(before)
        compressed = self._file.read(size)
        self._digest.update(before + compressed)
        inflated = _CODEC.decode(compressed) if size else b""
        return np.frombuffer(inflated, dtype=f"<i{itemsize}").astype(np.int64)


@frozen
class IndexName:
    """What people call an index, whose number in the store may be another.

    Attributes
    ----------
    own : int
        Its number in its source.
    source : int, optional
        The number of the source, from 1 on, where several were appended to the store.
    """

    own: int
    source: int | None = None

    def __str__(self) -> str:
        of_source = "" if self.source is None else f" of source {self.source} in the store"
        return f"index {self.own}{of_source}"

    @property
    def advice(self) -> str:
        """How to run it again."""
        database = "DB" if self.source is None else "DB_OF_THAT_SOURCE"
        return f"run the index again (psnc reset {database} --index {self.own})"


@contextmanager
def open_edge_file(
    store: Path, index: int, name_of: Callable[[int], IndexName]
) -> Iterator[EdgeFile]:
    """Open the file of edges of an index for reading.

    Raises
    ------
    psnc.StageError
        If it is not there, or damaged, as far as it is read.
    """
    path = edge_file_path(store, index)
    try:
        with open(path, "rb") as file:
            yield EdgeFile(file)
    except _NO_EDGE_FILE as error:
        name = name_of(index)
        raise StageError(
            f"{path}, which has the edges of {name}, cannot be read ({error}): restore it, or "
            f"{name.advice}"
        ) from error


def read_head(store: Path, index: int, name_of: Callable[[int], IndexName]) -> EdgeFileHead:
    """Read what the file of edges of an index says of itself.

    Raises
    ------
    psnc.StageError
        If it is not there, or damaged.
    """
    with open_edge_file(store, index, name_of) as edges:
        return edges.head


def carry_edge_files(old: Path, new: Path, indices: Sequence[int]) -> None:
    """Give the store ``new`` the edges of these indices that ``old`` has, without a second copy."""
    for index in indices:
        source, target = edge_file_path(old, index), edge_file_path(new, index)
        target.parent.mkdir(exist_ok=True)
        if source.exists():
            try:
                # Such a file is replaced, and never changed in place.
                os.link(source, target)
            except OSError:  # no links on this file system
                shutil.copyfile(source, target)


def _columns(structure: AtomicData, with_shifts: bool, place: str) -> Ints:
    """Return start, end and the three shifts of each edge as rows of one array."""
    index, shifts = np.asarray(structure.edge_index), np.asarray(structure.unit_shifts)
    named = [("edge_index", index), *([("unit_shifts", shifts)] if with_shifts else [])]
    for name, values in named:
        if values.dtype.kind not in "iu" and values.size:
            raise StageError(f"{place}: {name} is {values.dtype}; give integers")
    if index.size and not (index.min() >= 0 and index.max() < len(structure)):
        raise StageError(
            f"{place}: edge_index goes from atom {index.min()} to {index.max()}; "
            f"the structure has {len(structure)} atoms, counted from 0"
        )
    rows = np.concatenate([index, shifts.T]) if with_shifts else index
    return rows.astype(_smallest(rows))


def _smallest(values: NDArray[Any]) -> type[np.signedinteger[Any]]:
    if not values.size:
        return np.int8
    least, most = int(values.min()), int(values.max())
    return next(
        kind for kind in _INTEGERS if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max
    )


def _compressed(values: Ints) -> bytes:
    narrow = np.ascontiguousarray(values, dtype=np.dtype(_smallest(values)).newbyteorder("<"))
    compressed = bytes(_CODEC.encode(narrow.reshape(-1))) if narrow.size else b""
    return _SIZE.pack(narrow.itemsize, len(compressed)) + compressed


def _head_of(file: BinaryIO) -> EdgeFileHead:
    magic, *rest = _HEAD.unpack(file.read(_HEAD.size))
    if magic != _MAGIC:
        raise OSError("it is no file of edges")
    return EdgeFileHead(*rest)
