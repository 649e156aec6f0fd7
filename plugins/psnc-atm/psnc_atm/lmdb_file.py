"""Open ``.aselmdb`` files, shared by whoever reads them in one process.

LMDB allows one environment a file and process, and none may cross a fork. So open files are
shared by a registry keyed by inode. It holds them weakly: a file is open for as long as somebody
reads it or keeps it, and then free for others, ``ase.db`` for one. A forked child closes what it
inherited before it opens anything itself.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import lmdb
import numpy as np
from numpy.typing import NDArray

from psnc.errors import SourceError
from psnc_atm.lmdb_header import LMDBHeader, check_complete, has_key, read_header

__all__ = ["LMDBFile", "header_of", "open_file", "row_count"]

_NO_ROWS = frozenset((b"nextid", b"deleted_ids", b"metadata"))
_ID_DIGITS = 18  # more do not fit into int64
_WAIT_FOR_CLOSE_SECONDS = 1.0
# What has been read of a file counts as memory of the process until the file is closed.
_MOST_MAPPED_BYTES = 2**27
# Systems map what is around a page too. A row takes two pages: that of its key, which may be
# anywhere, and that where it begins.
_MAPPED_FOR_A_ROW = 2 * 2**16
_PAGE_BYTES = mmap.PAGESIZE
_Identity = tuple[int, int]

Result = TypeVar("Result")


class LMDBFile:
    """One ``.aselmdb`` file, open for reading; made by :func:`open_file` alone."""

    def __init__(self, path: Path, header: LMDBHeader) -> None:
        self.path = path
        self.header = header
        self._identity = _identity_of(path)
        # Held for moments: nobody may read while the file is closed and opened again.
        self._opening = threading.Lock()
        self._readers = self._mapped_bytes = 0
        self._environment = self._open()

    def _open(self) -> Any:
        self._resident_before = _resident_file_bytes() or 0
        # readahead: whole files are read in order, and that is what the kernel is good at.
        return lmdb.open(
            str(self.path),
            subdir=False,
            readonly=True,
            lock=False,
            readahead=True,
            max_spare_txns=4,
        )

    @property
    def ids(self) -> NDArray[np.int64]:
        """The ids of all rows in numeric order; there may be gaps.

        Keys that ``ase.db`` would not write for a row, such as ``007``, are none.
        """
        return self._keys[0]

    @property
    def other_keys(self) -> int:
        """The number of keys that ``ase.db`` would not write at all."""
        return self._keys[1]

    @cached_property
    def _keys(self) -> tuple[NDArray[np.int64], int]:
        keys = self._all_keys()
        known = len(_NO_ROWS.intersection(keys))
        of_rows = _keys_of_rows(keys)
        ids = np.array(of_rows, dtype=np.bytes_).astype(np.int64)
        ids.sort()
        return ids, len(keys) - len(ids) - known

    def _all_keys(self) -> list[bytes]:
        # To look at a key maps the rows around it too.
        bytes_a_key = max(1, self.header.file_size // max(1, self.header.entries))
        at_a_time = max(1, _MOST_MAPPED_BYTES // bytes_a_key)
        keys: list[bytes] = []
        following = b""
        while True:
            with self._transaction() as transaction, transaction.cursor() as cursor:
                if not cursor.set_range(following):
                    return keys
                some = list(islice(cursor.iternext(keys=True, values=False), at_a_time))
            keys += some
            following = some[-1] + b"\0"
            self._count_mapped(len(some) * bytes_a_key)

    def values(self, ids: Sequence[int]) -> list[bytes]:
        """Return the raw rows of ``ids``, copied out of the map."""
        with self._transaction() as transaction:
            found = [transaction.get(b"%d" % row) for row in ids]
        self._require_all(ids, found)
        self._count_mapped(_mapped_by(found))
        return found

    def map_values(
        self, ids: Sequence[int], function: Callable[[Sequence[memoryview]], Result]
    ) -> Result:
        """Return what a function makes of the raw rows of ``ids``, which are not copied.

        What it does not look at is not read. It must not keep them.
        """
        with self._transaction(buffers=True) as transaction:
            found = [transaction.get(b"%d" % row) for row in ids]
            self._require_all(ids, found)
            result = function(found)
            mapped = _mapped_by(found)
        self._count_mapped(mapped)
        return result

    def _require_all(self, ids: Sequence[int], found: Sequence[Any]) -> None:
        for row, value in zip(ids, found, strict=True):
            if value is None:
                raise SourceError(f"{self.path}, row {row}: the row has gone; run the index again")

    @contextmanager
    def _transaction(self, *, buffers: bool = False) -> Iterator[Any]:
        with self._opening:
            self._readers += 1
        try:
            with self._environment.begin(buffers=buffers) as transaction:
                yield transaction
        except lmdb.Error as error:
            raise SourceError(f"{self.path}: {error}; replace it with a good copy") from error
        finally:
            with self._opening:
                self._readers -= 1

    def _count_mapped(self, size: int) -> None:
        """Open the file anew once much of it is mapped, so that memory stays flat."""
        with self._opening:
            self._mapped_bytes += size
            if self._mapped_bytes < _MOST_MAPPED_BYTES or self._readers:
                return
            resident = _resident_file_bytes()
            if resident is not None:
                # Rows that lie side by side share pages, and were counted as if they did not.
                self._mapped_bytes = max(0, resident - self._resident_before)
                if self._mapped_bytes < _MOST_MAPPED_BYTES:
                    return
            self._mapped_bytes = 0
            self._environment.close()
            try:
                self._environment = self._open()
                same = _identity_of(self.path) == self._identity
            except (OSError, lmdb.Error) as error:
                raise SourceError(
                    f"{self.path}: cannot be opened again ({_cause(error)}); run the index again"
                ) from error
        if not same:
            raise SourceError(
                f"{self.path}: was replaced by another file while it was read; run the index again"
            )

    def close(self) -> None:
        """Close it; nothing may be read any more."""
        self._environment.close()


class _Registry:
    """The files that are open in this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.open: WeakValueDictionary[_Identity, LMDBFile] = WeakValueDictionary()

    def get(self, path: Path) -> LMDBFile:
        header = header_of(path)
        identity = _identity_of(path)
        with self.lock:
            file = self.open.get(identity)
            if file is not None and file.header == header:
                return file
            if file is not None:  # it changed on disk, and LMDB refuses to open a file twice
                file.close()
            file = self.open[identity] = _open(path, header)
            return file


def open_file(path: Path) -> LMDBFile:
    """Return the open file ``path`` of this process; keep it only for as long as it is read.

    Raises
    ------
    psnc.SourceError
        If it is missing, no LMDB file, or truncated.
    """
    return _registry.get(path)


def row_count(path: Path) -> int:
    """Return the number of rows of ``path``, without opening it as a database.

    Other keys than those that ``ase.db`` writes count as rows.

    Raises
    ------
    psnc.SourceError
        If it is missing, no LMDB file, or too damaged to tell.
    """
    header = header_of(path)
    try:
        return header.entries - sum(has_key(path, header, key) for key in _NO_ROWS)
    except (OSError, ValueError, struct.error) as error:
        raise SourceError(f"{path}: {_cause(error)}; replace it with a good copy") from error


def header_of(path: Path) -> LMDBHeader:
    """Read the header of ``path``, without opening it as a database.

    Raises
    ------
    psnc.SourceError
        If it is missing or no LMDB file.
    """
    try:
        return read_header(path)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: {_cause(error)}; replace it with a good copy") from error


def _open(path: Path, header: LMDBHeader) -> LMDBFile:
    try:
        check_complete(path, header)
        return _open_once_free(path, header)
    except (OSError, ValueError, lmdb.Error) as error:
        raise SourceError(f"{path}: {_cause(error)}; replace it with a good copy") from error


def _open_once_free(path: Path, header: LMDBHeader) -> LMDBFile:
    """Open a file that another thread may be just about to close.

    The registry forgets a file a moment before its environment is gone, and in that moment LMDB
    still counts it as open.
    """
    give_up = time.monotonic() + _WAIT_FOR_CLOSE_SECONDS
    while True:
        try:
            return LMDBFile(path, header)
        except lmdb.Error as error:
            if "already open" not in str(error):
                raise
            if time.monotonic() > give_up:
                raise SourceError(
                    f"{path}: open in this process already, by ase.db perhaps; close it there"
                ) from error
            time.sleep(0.001)


def _keys_of_rows(keys: list[bytes]) -> list[bytes]:
    """Return those of a file's keys, in the order of its own, that ``ase.db`` writes for rows."""
    zero = bisect_left(keys, b"0")
    others = keys[bisect_left(keys, b"1") : bisect_left(keys, b":")]
    # One look at all, since in most files all between the first digit and the last are ids.
    if not b"".join(others).isdigit() or max(map(len, others)) > _ID_DIGITS:
        others = [key for key in others if key.isdigit() and len(key) <= _ID_DIGITS]
    return [*(key for key in keys[zero : zero + 1] if key == b"0"), *others]


def _mapped_by(rows: Sequence[Any]) -> int:
    return max(sum(map(len, rows)), len(rows) * _MAPPED_FOR_A_ROW)


def _resident_file_bytes() -> int | None:
    """Return how much of mapped files counts as memory of this process, where the system says."""
    try:
        with open("/proc/self/statm", "rb") as file:
            # A sandbox may say 0, which no process that runs Python has.
            return int(file.read().split()[2]) * _PAGE_BYTES or None
    except OSError:
        return None


def _identity_of(path: Path) -> _Identity:
    status = path.stat()
    return status.st_dev, status.st_ino


def _cause(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return str(error)


def _start_afresh_after_fork() -> None:
    global _registry
    # The parent's lock may be held by a thread that does not exist here, so it is not taken.
    for file in list(_registry.open.values()):
        file.close()
    _registry = _Registry()


_registry = _Registry()
os.register_at_fork(after_in_child=_start_afresh_after_fork)
