"""Files and directories that are whole as soon as they have their name.

What is new is written aside, in a draft beside the target (:mod:`psnc.drafts`), brought to the
disk, and only then takes the target's place. Whoever looks finds what was there before, or all
that is new.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, overload

from psnc.drafts import REPLACED, Draft
from psnc.errors import OutputError

__all__ = ["atomic_directory", "atomic_path", "atomic_write"]

AnyPath = str | os.PathLike[str]

# Others that write the same directory can be in the way at most as often as they write it.
_ATTEMPTS = 100
_AT_WORKING_DIRECTORY = -100
_RENAME_EXCHANGE = 2

_REMEDIES = {
    errno.ENOSPC: "free some space, and run it again",
    errno.EDQUOT: "free some of your quota, and run it again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: "give yourself the permission, or choose another place",
    errno.EPERM: "give yourself the permission, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOTDIR: "choose another place, or move away what is a file there",
    errno.EEXIST: "choose another place, or move away what is there",
    errno.ELOOP: "mend the link that leads to itself",
}


@overload
def atomic_write(path: AnyPath, mode: Literal["wb"] = "wb") -> AbstractContextManager[BinaryIO]: ...


@overload
def atomic_write(
    path: AnyPath, mode: Literal["w"], *, encoding: str | None = None, newline: str | None = None
) -> AbstractContextManager[TextIO]: ...


@contextmanager
def atomic_write(
    path: AnyPath,
    mode: str = "wb",
    *,
    encoding: str | None = None,
    newline: str | None = None,
) -> Iterator[Any]:
    """Write a file that is there whole, or as it was before.

    In the ``with`` block a draft is written. When the block is left, the draft is brought to the
    disk and takes the place of ``path``. If the block raises, or the process is killed, what was at
    ``path`` stays as it was. Of several that write one path at once, the last to end wins.

    A relative path means the file that it means as the block begins. Directories on the way are
    made. Through a symbolic link it writes the file that the link leads to, and the link stays. The
    permissions are those of the file that was there, or of a new one as ``open`` makes it; a file
    that may not be written to is refused. Other hard links keep the old content. A device or a pipe
    is written to directly.

    A process that is killed leaves its draft: a hidden file beside ``path`` whose name begins with
    that of the file and ends in ``.draft``. The next on this machine to write ``path`` removes it.
    A draft of a living process is never removed. Those of other machines, and those on file systems
    without locks, remain; they can be deleted by hand when nobody writes there.

    Parameters
    ----------
    path : str or path
        The file.
    mode : {"wb", "w"}
        Bytes, or text.
    encoding, newline : str, optional
        Of text, as for ``open``; but in UTF-8 by default, on every machine.

    Yields
    ------
    file
        The draft, open for writing. It can be closed in the block.

    Raises
    ------
    OutputError
        If the file cannot be written: one line that says which, and what to do. It is an
        ``OSError``.

    Examples
    --------
    >>> with atomic_write("out/7.txt", "w") as file:
    ...     _ = file.write("whole")
    >>> with atomic_write("out/7.txt", "w") as file:
    ...     _ = file.write("ha")
    ...     raise RuntimeError("half way")
    Traceback (most recent call last):
    RuntimeError: half way
    >>> Path("out/7.txt").read_text(), os.listdir("out")
    ('whole', ['7.txt'])
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode={mode!r}: choose 'wb', or 'w' for text")
    if mode == "wb" and (encoding, newline) != (None, None):
        raise ValueError("encoding and newline are of text: choose mode='w'")
    target, earlier = _file_at(path)
    text = {"encoding": encoding or "utf-8", "newline": newline} if mode == "w" else {}
    if earlier is not None and not stat.S_ISREG(earlier.st_mode):
        with open(target, mode, **text) as file:  # type: ignore[call-overload]
            yield file
        return
    draft = _claimed(target)
    try:
        file = _opened(draft, text)
        try:
            yield file
            with _explained(target):
                if not file.closed:
                    file.flush()
                _take_over_permissions(draft.descriptor, earlier)
                _put_file_in_place(draft, draft.path, draft.descriptor)
                _sync_directory(target.parent)
        finally:
            with suppress(OSError):
                file.close()
    finally:
        draft.discard()


@contextmanager
def atomic_path(path: AnyPath) -> Iterator[Path]:
    """Have a file written by its name, and nothing changed if none is written.

    For what is told where to write. It costs little enough for one file of each of many small
    indices: no directory is made, or waited for. A loss of power can leave what was there before.

    Yields
    ------
    Path
        Where to write; nothing is there. It ends as ``path`` does, since libraries look at that.
    """
    target, earlier = _file_at(path)
    if earlier is not None and not stat.S_ISREG(earlier.st_mode):
        raise OutputError(f"{target} cannot be written: it is no file, but a device or a pipe")
    draft = _claimed(target)
    try:
        yield draft.spare
        with _explained(target):
            if draft.spare.exists():
                descriptor = os.open(draft.spare, os.O_RDONLY)
                try:
                    _take_over_permissions(descriptor, earlier)
                    _put_file_in_place(draft, draft.spare, descriptor)
                finally:
                    os.close(descriptor)
    finally:
        draft.discard()


@contextmanager
def atomic_directory(path: AnyPath) -> Iterator[Path]:
    """Write a directory that is there with all its files, or as it was before.

    In the ``with`` block an empty draft directory is filled. When the block is left, all that is in
    it is brought to the disk, and it takes the place of ``path``: a directory that was there is
    replaced as a whole, and none of its files stay. If the block raises, what was at ``path`` stays
    as it was.

    Paths, links and permissions are as for :func:`atomic_write`; a file at ``path`` is refused. The
    draft has the name that ``path`` has, inside of a hidden directory beside it.

    What a process leaves that is killed depends on the system. Linux exchanges two directories in
    one step on most of its file systems (ext4, XFS, Btrfs, tmpfs), so that the old one or the new
    one is at ``path`` at every instant. Other systems, and file systems such as NFS, need two
    steps: the old one is moved into the hidden directory, then the new one takes its place. Killed
    between the two, a process leaves nothing at ``path``; the next on this machine to write it puts
    the old one back first. Where nothing was, or an empty directory, one step does everywhere. A
    killed process can leave its hidden directory, which is removed as the draft of a file is.

    Somebody who opens the files of a directory one by one while it is replaced can come to see some
    of the old and some of the new.

    Parameters
    ----------
    path : str or path
        The directory.

    Yields
    ------
    Path
        The draft, an absolute path. It may be removed and made again in the block.

    Raises
    ------
    OutputError
        If the directory cannot be written: one line that says which, and what to do. It is an
        ``OSError``.

    Examples
    --------
    >>> for names in ["ab", "bc"]:
    ...     with atomic_directory("out/7") as draft:
    ...         for name in names:
    ...             _ = (draft / name).write_text(names)
    >>> sorted(os.listdir("out/7"))
    ['b', 'c']
    """
    target, earlier = _target_of(path)
    if earlier is not None and not stat.S_ISDIR(earlier.st_mode):
        raise OutputError(f"{target} cannot be written: it is a file, not a directory")
    draft = _claimed(target, directory=True)
    try:
        filled = draft.path / target.name
        with _explained(target):
            os.mkdir(filled)
        yield filled
        if os.getpid() != draft.pid:
            return
        if not filled.is_dir():
            raise OutputError(f"{target} cannot be written: its draft is no directory any more")
        with _explained(target):
            _sync_tree(filled)
            _take_over_permissions(filled, earlier)
            _put_directory_in_place(filled, target, draft.path)
            _sync_directory(target.parent)
    finally:
        draft.discard()


# --- before -----------------------------------------------------------------------------------


def _target_of(path: AnyPath) -> tuple[Path, os.stat_result | None]:
    """Return what a path leads to, absolute, and what is there, if anything is."""
    path = os.fspath(path)
    with _explained(path):
        target = Path(os.path.realpath(path))
    with _explained(target):
        for _ in range(_ATTEMPTS):
            try:
                earlier = os.stat(target)
            except FileNotFoundError:
                return target, None
            # Also false for what another writer has moved away since.
            if os.access(target, os.W_OK):
                return target, earlier
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _file_at(path: AnyPath) -> tuple[Path, os.stat_result | None]:
    target, earlier = _target_of(path)
    if earlier is not None and stat.S_ISDIR(earlier.st_mode):
        raise OutputError(f"{target} cannot be written: it is a directory")
    return target, earlier


def _claimed(target: Path, *, directory: bool = False) -> Draft:
    with _explained(target):
        _make_directory(target.parent)
        return Draft.claim(target, directory=directory)


def _make_directory(directory: Path) -> None:
    """Make a directory, and those on the way, so that they outlast a loss of power."""
    if directory.is_dir():
        return
    _make_directory(directory.parent)
    with suppress(FileExistsError):
        os.mkdir(directory)
    _sync_directory(directory.parent)


def _opened(draft: Draft, text: dict[str, Any]) -> Any:
    # Another descriptor than the draft's own, which keeps the lock if the file is closed early.
    binary = io.BufferedWriter(_DraftFile(draft))
    try:
        return io.TextIOWrapper(binary, **text) if text else binary
    except (LookupError, ValueError):
        binary.close()
        raise


class _DraftFile(io.FileIO):
    """Says which file cannot be written, and why; the system says only why."""

    def __init__(self, draft: Draft) -> None:
        super().__init__(os.dup(draft.descriptor), "wb")
        self._target = draft.target

    def write(self, data: Any, /) -> int:
        with _explained(self._target):
            return super().write(data)


# --- after ------------------------------------------------------------------------------------


def _take_over_permissions(written: int | Path, earlier: os.stat_result | None) -> None:
    """Give the mode and owner of what was there, as if it had been written to."""
    if earlier is None:
        return
    with suppress(PermissionError):
        now = os.stat(written)
        if (now.st_uid, now.st_gid) != (earlier.st_uid, earlier.st_gid):
            os.chown(written, earlier.st_uid, earlier.st_gid)
    # Writing to a file takes away its set-user-ID bit; that of a directory is for what is in it.
    kept = 0o7777 if stat.S_ISDIR(earlier.st_mode) else 0o777
    os.chmod(written, earlier.st_mode & kept)


def _put_file_in_place(draft: Draft, written: Path, descriptor: int) -> None:
    # A child that was forked in the block leaves the file to its parent.
    if os.getpid() == draft.pid:
        os.fsync(descriptor)
        os.replace(written, draft.target)
        draft.moved = written == draft.path


def _put_directory_in_place(filled: Path, target: Path, aside: Path) -> None:
    for attempt in range(_ATTEMPTS):
        if _renamed(filled, target) or _exchanged(filled, target):
            return
        # Put back with the draft's end, if the new one cannot take its place then.
        with suppress(FileNotFoundError):
            os.rename(target, aside / f"{REPLACED}{attempt:03}")
    raise OutputError(f"{target} cannot be written: others write to it all the time")


def _renamed(filled: Path, target: Path) -> bool:
    """Put a directory where nothing is, or an empty one."""
    try:
        os.rename(filled, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _exchanged(one: Path, other: Path) -> bool:
    """Have two directories change places in one step, where the system can."""
    exchange = _exchange_function()
    if exchange is None:
        return False
    failure = exchange(os.fsencode(one), os.fsencode(other))
    # Not there any more, or not on this file system.
    if failure in (errno.ENOENT, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    if failure:
        raise OSError(failure, os.strerror(failure))
    return True


@cache
def _exchange_function() -> Callable[[bytes, bytes], int] | None:
    """Return Linux's exchange of two paths, which returns 0 or the number of an error."""
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    rename.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    here = _AT_WORKING_DIRECTORY

    def exchange(one: bytes, other: bytes) -> int:
        failed = rename(here, one, here, other, _RENAME_EXCHANGE)
        return ctypes.get_errno() if failed else 0

    return exchange


def _sync_tree(directory: Path) -> None:
    for place, _, files in os.walk(directory):
        for name in files:
            path = os.path.join(place, name)
            if stat.S_ISREG(os.lstat(path).st_mode):
                _sync(path)
        _sync_directory(Path(place))


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    try:
        _sync(directory)
    except OSError as error:
        # Some file systems do not do that for directories, nor for those that one may not list.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF):
            raise


@contextmanager
def _explained(target: AnyPath) -> Iterator[None]:
    """Make one line of an error of the system: which file, why, and what to do."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        reason = f"{error.strerror or error}{f'; {remedy}' if remedy else ''}"
        explained = OutputError(f"{target} cannot be written: {reason}")
        explained.errno = error.errno
        raise explained from error
