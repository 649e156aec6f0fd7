"""Drafts: hidden names beside a target, under which its new content is written.

The draft of ``out/7.txt`` is ``out/.7.txt.8c1f02ab-0.draft``: the target's name, a digest of this
machine's name, and a number that tells writers of one target apart. Its writer holds a lock on it
(``flock``), which the system drops when the process ends, however it ends. So a draft of this
machine whose lock is free was left over, and is removed by the next who writes the same target.
Drafts of other machines are left alone, since not every file system tells of their locks. Where a
file system has no locks at all, a draft gets a random name that nobody takes for a left-over.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import Self

__all__ = ["REPLACED", "Draft", "draft_directory", "remove_left_overs"]

# What the name of a directory begins with that was moved into a draft to make way.
REPLACED = "replaced-"

# So many names are looked at for left-overs at each write, and further ones while there are some.
_LOOKED_AT = 4

# A longer name leaves no room for what a draft's has besides: most systems take 255 bytes.
_LONGEST_NAME = 150
_LONGEST_ENDING = 10


class Draft:
    """A file or directory of a name that is this writer's alone, until it is let go.

    Attributes
    ----------
    target : Path
        What it is to become.
    path : Path
        Where it is.
    spare : Path
        A second name that is this writer's alone, where nothing is yet. It ends as the target's.
    descriptor : int
        It, open; the lock goes with it.
    pid : int
        The process that made it.
    moved : bool
        Whether the draft has taken the target's place, so that nothing of it is left here.
    """

    def __init__(self, target: Path, path: Path, descriptor: int) -> None:
        self.target = target
        self.path = path
        self.spare = _spare_path(path, target)
        self.descriptor = descriptor
        self.pid = os.getpid()
        self.moved = False

    @classmethod
    def claim(cls, target: Path, *, directory: bool = False) -> Self:
        """Make a draft, empty, and remove those that killed writers of the target left here.

        Raises
        ------
        OSError
            If the directory of the target takes no draft.
        """
        mine: Self | None = None
        for number in count():
            path = _draft_path(target, str(number))
            if mine is None:
                mine = cls._made(target, path, directory)
            elif os.path.lexists(path):
                remove_left_over(path, target)
            elif number >= _LOOKED_AT:
                break
        assert mine is not None
        return mine

    @classmethod
    def _made(cls, target: Path, path: Path, directory: bool) -> Self | None:
        """Make a draft of this name, unless another writer has it."""
        if os.path.lexists(path) and not remove_left_over(path, target):
            return None
        try:
            descriptor = _create(path, directory)
        except FileExistsError:
            return None
        try:
            # Before it was locked, another may have taken it for a left-over.
            mine = _lock(descriptor) and _is_at(path, descriptor)
        except OSError:
            # There are no locks here, so that nobody but this writer would remove it.
            os.close(descriptor)
            _remove(path)
            return cls._unlocked(target, directory)
        if mine:
            return cls(target, path, descriptor)
        os.close(descriptor)
        return None

    @classmethod
    def _unlocked(cls, target: Path, directory: bool) -> Self:
        path = _draft_path(target, uuid.uuid4().hex)
        return cls(target, path, _create(path, directory))

    def discard(self) -> None:
        """Remove it, if there is anything left of it, and let the name go."""
        if os.getpid() == self.pid and not self.moved:
            _put_back_replaced(self.path, self.target)
            _remove(self.spare)
            _remove(self.path)
        os.close(self.descriptor)


@contextmanager
def draft_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory beside a target, to make it in, which is removed in the end.

    If the process is killed, it is removed by the next who writes the target, or by
    :func:`remove_left_overs`.
    """
    draft = Draft.claim(target, directory=True)
    try:
        yield draft.path
    finally:
        draft.discard()


def remove_left_overs(target: Path) -> None:
    """Remove the drafts of a target that killed writers left, where nobody writes it again."""
    for number in range(_LOOKED_AT):
        path = _draft_path(target, str(number))
        if os.path.lexists(path):
            remove_left_over(path, target)


def remove_left_over(path: Path, target: Path) -> bool:
    """Remove a draft, unless it is somebody's; tell whether the name is free."""
    try:
        descriptor = _open_as_it_is(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        if not (_lock(descriptor) and _is_at(path, descriptor)):
            return False
        _put_back_replaced(path, target)
        _remove(_spare_path(path, target))
        _remove(path)
        return not os.path.lexists(path)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _open_as_it_is(path: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        # For writing, without which NFS gives no exclusive lock.
        return os.open(path, os.O_RDWR | flags)
    except IsADirectoryError:
        return os.open(path, os.O_RDONLY | flags)


def _put_back_replaced(draft: Path, target: Path) -> None:
    """Put back what was moved out of the way of what then did not come."""
    for replaced in sorted(draft.glob(f"{REPLACED}*"), reverse=True):
        if not os.path.lexists(target):
            with suppress(OSError):
                os.rename(replaced, target)


def _draft_path(target: Path, distinction: str) -> Path:
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return target.with_name(f".{name}.{_machine()}-{distinction}.draft")


def _spare_path(draft: Path, target: Path) -> Path:
    ending = "".join(target.suffixes)[-_LONGEST_ENDING:]
    return draft.with_name(f"{draft.name}-new{ending}")


@cache
def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _create(path: Path, directory: bool) -> int:
    if not directory:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    os.mkdir(path)
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise FileExistsError(f"{path} was taken for a left-over and removed") from error


def _lock(descriptor: int) -> bool:
    """Take the lock, if it is free; an ``OSError`` says that there are no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Tell whether a path still leads to what was opened, and not to what came after it."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))


def _remove(path: Path) -> None:
    # What cannot be removed is left over; that is no reason to fail what is whole by now.
    try:
        os.unlink(path)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.EPERM):
            shutil.rmtree(path, ignore_errors=True)
