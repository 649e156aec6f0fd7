"""Set a damaged database aside under a new name, and put what is whole of it in its place."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from psnc.builtin.checkpoint.check import check
from psnc.builtin.checkpoint.connection import raise_store_error
from psnc.builtin.checkpoint.identity import remains
from psnc.builtin.checkpoint.recover import in_use, recover
from psnc.builtin.checkpoint.runs import OwnRun
from psnc.drafts import draft_directory
from psnc.errors import StoreError

__all__ = ["recover_in_place"]


def recover_in_place(path: Path, own: OwnRun | None = None) -> str | None:
    """Replace a damaged database by what can be salvaged of it.

    Whatever happens on the way, what is damaged keeps a name, and so does a database.

    Parameters
    ----------
    path : Path
        The database.
    own : OwnRun, optional
        The run that is about to resume.

    Returns
    -------
    str or None
        What was done, in one line; ``None`` if nothing was wrong.

    Raises
    ------
    StoreError
        If the file is another program's or a newer psnc's, is in use, or nothing of it can be read.
    """
    if not path.exists() and not any(True for _ in remains(path)):
        return None
    try:
        with _alone(path):
            return _recover_alone(path, own)
    except OSError as error:
        raise_store_error(path, "recover", error)


def _recover_alone(path: Path, own: OwnRun | None) -> str | None:
    # Whoever waited for another finds that one's work.
    findings = check(path)
    if not findings:
        return None
    if in_use(path):
        raise StoreError(
            f"{path} is damaged ({findings[0].message}), and another process has it open: end "
            "that first"
        )
    with draft_directory(path) as directory:
        new = directory / path.name
        found = recover(path, new, own)
        aside = _give_second_name(path)
        # What waits in a log is the old database's, and would be written into the new one.
        for ending in ("-wal", "-shm", "-journal"):
            path.with_name(path.name + ending).unlink(missing_ok=True)
        os.replace(new, path)
    return f"{path} was damaged ({findings[0].message}) and is now {aside}: {found.line}"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from doing the same meanwhile; the lock ends with the process."""
    lock = path.with_name(f".{path.name}.recovering")
    while True:
        with open(lock, "w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever had it before has taken the file away, and others may hold a new one.
            if not _is_at(lock, file.fileno()):
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _give_second_name(path: Path) -> Path:
    """Give a database, and what belongs to it, names that nothing has; return the first."""
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    number = 1
    while True:
        more = "" if number == 1 else f"-{number}"
        aside = path.with_name(f"{path.name}.damaged-{moment}{more}")
        try:
            for ending in ("", "-wal", "-shm", "-journal"):
                beside = path.with_name(path.name + ending)
                if beside.exists():
                    _link(beside, aside.with_name(aside.name + ending))
        except FileExistsError:
            number += 1
            continue
        return aside


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except FileExistsError:
        raise
    except OSError:
        # Where there are no links.
        with open(to, "xb") as target, open(path, "rb") as source:
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(target.fileno())
