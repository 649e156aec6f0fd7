"""One writer at a time for a chunk that two regions share.

A chunk is read, changed and replaced, so that two writers of one chunk lose each other's half.
The lock is a byte of the array's own ``zarr.json``, at the offset of the chunk's number: nothing
is created that could be left behind, and the kernel releases it when its holder dies. Open file
description locks (Linux) hold between threads as well as between processes, which plain POSIX
locks do not. Where they are missing, ``flock`` locks the whole array instead.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["chunk_lock", "store_lock"]

_SET_LOCK_AND_WAIT: int | None = getattr(fcntl, "F_OFD_SETLKW", None)
# struct flock: type, whence, start, length, process (0 for this kind of lock), with its padding.
_FLOCK = struct.Struct("@hhqqi0q")


@contextmanager
def store_lock(anchor: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the lock of the store that ``anchor``, one of its files, is in at this moment.

    Shared by those who write regions; exclusive for the one that lays the store out anew. The store
    may be exchanged for another while one waits, so that what was locked has to be looked at again.
    """
    while True:
        descriptor = os.open(anchor, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            try:
                if os.path.samestat(os.fstat(descriptor), os.stat(anchor)):
                    yield
                    return
            finally:
                # Said, not left to close: a child forked meanwhile has the descriptor too.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)


@contextmanager
def chunk_lock(array_directory: Path, chunk: int) -> Iterator[None]:
    """Hold the lock of one chunk of the array in ``array_directory``."""
    # Opened for writing, since only then may it be locked exclusively; nothing is written.
    descriptor = os.open(array_directory / "zarr.json", os.O_RDWR | os.O_CLOEXEC)
    try:
        _set_lock(descriptor, chunk, locked=True)
        try:
            yield
        finally:
            # Said, not left to close: a child forked meanwhile has the descriptor too.
            _set_lock(descriptor, chunk, locked=False)
    finally:
        os.close(descriptor)


def _set_lock(descriptor: int, chunk: int, *, locked: bool) -> None:
    if _SET_LOCK_AND_WAIT is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX if locked else fcntl.LOCK_UN)
        return
    kind = fcntl.F_WRLCK if locked else fcntl.F_UNLCK
    fcntl.fcntl(descriptor, _SET_LOCK_AND_WAIT, _FLOCK.pack(kind, os.SEEK_SET, chunk, 1, 0))
