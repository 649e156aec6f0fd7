"""What output files are: looked at as an index ends, and again before its result is relied on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from hashlib import sha256
from stat import S_ISDIR, S_ISLNK, S_ISREG
from threading import Event
from typing import Literal, get_args

from psnc.records import OutputFacts
from psnc.stages import Sink, Stage

__all__ = ["LEVELS", "VerifyLevel", "facts_now", "facts_to_record"]

VerifyLevel = Literal["exists", "size", "checksum"]
LEVELS: tuple[VerifyLevel, ...] = get_args(VerifyLevel)

_NOTHING = OutputFacts()
_BLOCK = 2**18


def facts_to_record(
    sink: Sink[object] | Stage, paths: Sequence[str], level: VerifyLevel | None
) -> tuple[OutputFacts, ...]:
    """Return what is to be recorded of the output files of an index that has just ended.

    Parameters
    ----------
    sink : Sink
        Who wrote them. Of outputs that indices share there is nothing to record.
    paths : sequence of str
        What it returned. What is no local file, or is not there, may be among it.
    level : {"exists", "size", "checksum"}, optional
        What the run was told to verify. Sizes of files are recorded in any case, those of
        directories from ``"size"`` on, and contents for ``"checksum"``.

    Raises
    ------
    OSError
        If a content that is to be recorded cannot be read.
    """
    if not paths or getattr(sink, "shares_outputs", False):
        return ()
    return tuple([_fact_to_record(path, level) for path in paths])


def _fact_to_record(path: str, level: VerifyLevel | None) -> OutputFacts:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        # A URL, the name of something in a database, or nothing at all.
        return _NOTHING
    if S_ISREG(status.st_mode) and level != "checksum":
        return OutputFacts(status.st_size)
    if level not in ("size", "checksum"):
        return _NOTHING
    try:
        return facts_now(path, status, with_digest=level == "checksum")
    except FileNotFoundError:
        # Somebody else is at work in the directory, and what the sink wrote is no less whole.
        return _NOTHING


def facts_now(
    path: str, status: os.stat_result, *, with_digest: bool, stop: Event | None = None
) -> OutputFacts:
    """Return what a file or directory is; nothing of what is neither.

    Parameters
    ----------
    path : str
        Where it is; links are followed.
    status : os.stat_result
        What the system says of it.
    with_digest : bool
        Whether to read its content.
    stop : Event, optional
        Ends the reading of a large one.

    Raises
    ------
    OSError
        If it cannot be read.
    CancelledError
        After ``stop``.
    """
    if S_ISDIR(status.st_mode):
        return _facts_of_directory(os.fsencode(path), with_digest, stop)
    if not S_ISREG(status.st_mode):
        return _NOTHING
    if not with_digest:
        return OutputFacts(status.st_size)
    return OutputFacts(*_size_and_digest(path, stop))


def _facts_of_directory(directory: bytes, with_digest: bool, stop: Event | None) -> OutputFacts:
    """Sum up the sizes of the files in a directory, and put names and contents in one digest."""
    size = 0
    digest = sha256()
    for path, status in _below(directory):
        content = ""
        if S_ISREG(status.st_mode):
            size += status.st_size
            if with_digest:
                _, content = _size_and_digest(path, stop)
        elif S_ISLNK(status.st_mode):
            content = f"-> {sha256(os.readlink(path)).hexdigest()}"
        # Neither holds a NUL character.
        digest.update(b"%b\0%b\0" % (path[len(directory) :], content.encode()))
    return OutputFacts(size, digest.hexdigest() if with_digest else None)


def _below(directory: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """Yield all that is in a directory, in an order that the names alone decide."""
    with os.scandir(directory) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        status = entry.stat(follow_symlinks=False)
        yield entry.path, status
        if S_ISDIR(status.st_mode):
            yield from _below(entry.path)


def _size_and_digest(path: str | bytes, stop: Event | None) -> tuple[int, str]:
    digest = sha256()
    size = 0
    block = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            if stop is not None and stop.is_set():
                raise CancelledError
            digest.update(block[:count])
            size += count
    return size, digest.hexdigest()
