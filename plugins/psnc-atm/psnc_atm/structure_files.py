"""Files of structures, each of them an index or several."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from psnc.errors import SourceError
from psnc.sources import FilesSource
from psnc.stages import Source
from psnc_atm.atomic_data import AtomicData

__all__ = [
    "FileRun",
    "StructureFiles",
    "bad_entry",
    "cause_of",
    "check_per_index",
    "content_digest",
]

_WHOLE_BYTES = 2**20
_PIECES = 64
_PIECE_BYTES = 2**14


@frozen
class FileRun:
    """What of a file is an index.

    Attributes
    ----------
    path : Path
        The file.
    position : int
        Its position among the files.
    start : int
        The first of its structures, counted from 0.
    size : int, optional
        How many there are at most; ``None`` for all.
    """

    path: Path
    position: int
    start: int
    size: int | None


class StructureFiles(Source[AtomicData]):
    """The base of sources that read files in the order of their names.

    Each file is an index, or each run of so many structures of a file. A file that cannot be read
    has one index, which fails.
    """

    def __init__(
        self, path: str | Path, pattern: str | None, per_index: int | None, unit: str
    ) -> None:
        check_per_index(f"{unit}s_per_index", per_index)
        self._root, self._names = _list_files(path, pattern)
        self._per_index = per_index
        self._unit = unit

    def __len__(self) -> int:
        """Return the number of indices."""
        return int(self._first_index[-1])

    def index_name(self, index: int) -> str:
        """Return the name of the index's file, and its place in it if that has several."""
        run = self._run_of(index)
        name = self._names[run.position]
        if run.size is None:
            return name
        # The end tells a last index that has grown from what it was.
        stop = min(run.start + run.size, self._counts[run.position] or run.size)
        return f"{name}, {self._unit}s {run.start} to {stop - 1}"

    def input_identity(self) -> dict[str, Any]:
        """Say what the indices are made from, so that a later run can tell whether it changed."""
        files = [[name, *self._state_of(self._root / name)] for name in self._names]
        # By this name the Zarr sink knows that one file's content moves the indices of others.
        return {"rows_per_index": self._per_index, "files": files}

    @abstractmethod
    def _count(self, path: Path) -> int:
        """Return the number of structures of a file.

        Raises
        ------
        SourceError
            If the file cannot be read.
        """

    def _state_of(self, path: Path) -> list[Any]:
        """Return what changes whenever the content of a file does, and not when it is copied."""
        try:
            return [path.stat().st_size, content_digest(path)]
        except OSError:
            return [None, None]

    def _run_of(self, index: int) -> FileRun:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} indices")
        position = int(np.searchsorted(self._first_index, index, side="right")) - 1
        path = self._root / self._names[position]
        if self._per_index is None:
            return FileRun(path, position, 0, None)
        start = (index - int(self._first_index[position])) * self._per_index
        return FileRun(path, position, start, self._per_index)

    @cached_property
    def _first_index(self) -> NDArray[np.int64]:
        """Of each file its first index, and the number of indices at the end."""
        counts = [1] * len(self._names)
        if self._per_index is not None:
            # One index of a file that cannot be read, so that there is one to fail.
            found = (1 if count is None else count for count in self._counts)
            counts = [-(-count // self._per_index) for count in found]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @cached_property
    def _counts(self) -> list[int | None]:
        """The number of structures of each file; ``None`` of one that cannot be read."""
        return [self._count_or_none(self._root / name) for name in self._names]

    def _count_or_none(self, path: Path) -> int | None:
        try:
            return self._count(path)
        except SourceError:
            return None  # its own index says why when it runs


def check_per_index(name: str, value: object) -> None:
    """Refuse what is no number of structures an index."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise SourceError(f"{name} is {value!r}; give an integer, 1 or more, or None")
    if value < 1:
        raise SourceError(f"{name} is {value}; give 1 or more, or None")


def bad_entry(path: Path, unit: str, number: object, error: BaseException) -> SourceError:
    """Say in one line which frame or row of a file cannot be read, and why."""
    return SourceError(
        f"{path}, {unit} {number}: cannot be read ({cause_of(error)}); repair or delete it"
    )


def cause_of(error: BaseException) -> str:
    """Return the first line of what an exception says, after its type where that says more."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def content_digest(path: Path) -> str:
    """Return a digest of a small file, or of both ends and pieces of a large one.

    Raises
    ------
    OSError
        If it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _WHOLE_BYTES:
            digest.update(file.readall())
        else:
            last = size - _PIECE_BYTES
            for piece in range(_PIECES):
                start = last * piece // (_PIECES - 1)
                digest.update(os.pread(file.fileno(), _PIECE_BYTES, start))
    return digest.hexdigest()[:16]


def _list_files(given: str | Path, pattern: str | None) -> tuple[Path, tuple[str, ...]]:
    path = os.path.expanduser(given)
    if os.path.isdir(path):
        root = Path(path)
        found = FilesSource(os.path.join(glob.escape(path), pattern or "*")).paths
    else:
        if pattern is not None:
            raise SourceError(f"pattern={pattern!r} is for a directory, and {given} is none")
        root = _fixed_part(path)
        found = FilesSource(path).paths
    return root, tuple(Path(file).relative_to(root).as_posix() for file in found)


def _fixed_part(path: str) -> Path:
    """Return the directory that names are below: what comes before the first wildcard."""
    if os.path.exists(path):
        return Path(path).parent
    parts = Path(path).parts
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))
