"""Open a checkpoint database: make it, or make sure that it is one, and touch nothing else.

A file that is not psnc's, is damaged, or was written by a newer version is refused as it stands.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import NoReturn

from psnc.builtin.checkpoint.mounts import network_filesystem
from psnc.builtin.checkpoint.schema import APPLICATION_ID, SCHEMA_VERSION, TABLES, create_tables
from psnc.config import Durability
from psnc.drafts import draft_directory, remove_left_overs
from psnc.errors import StoreError

__all__ = [
    "DATABASE_ERRORS",
    "connect",
    "damaged",
    "empty_log",
    "open_to_look",
    "raise_store_error",
    "refuse_other_databases",
    "written_at",
]

# How long to wait for another writer. It holds the lock for milliseconds at a time, so that only
# a process that is stopped inside a transaction can use this up.
_BUSY_TIMEOUT_S = 60.0

# Of bytes: one page of the smallest size.
_SMALLEST_DATABASE = 512

_logger = logging.getLogger("psnc.checkpoint")


def connect(
    path: Path, *, create: bool, looking: bool = False, durability: Durability = "grouped"
) -> sqlite3.Connection:
    """Return a connection to the checkpoint database at ``path``.

    Parameters
    ----------
    path : Path
        The database.
    create : bool
        Whether to make the file, and its directory, where there is none.
    looking : bool
        Whether a connection that cannot write will do, as on a disk that is mounted read-only.
    durability : {"grouped", "index", "full"}
        ``"full"`` waits for the disk at every commit.

    Raises
    ------
    StoreError
        If the file cannot be opened or made, or is no database of this version.
    """
    if create:
        _make_directory(path)
        _refuse_remains(path)
        _tell_lost_log(path)
        _tell_network(path)
        _make_aside(path)
    elif not path.exists():
        raise StoreError(f"no database at {path}: check the path, or run the pipeline first")
    try:
        connection = _open(path)
    except (*DATABASE_ERRORS, OSError) as error:
        raise_store_error(path, "open", error)
    try:
        with_wal = _set_up(connection, path, create=create)
        # Without a write-ahead log NORMAL could cost the whole database when power fails.
        wait = durability == "full" or not with_wal
        connection.execute(f"PRAGMA synchronous={'FULL' if wait else 'NORMAL'}")
        connection.execute("PRAGMA cell_size_check=ON")
    except DATABASE_ERRORS as error:
        connection.close()
        if looking and getattr(error, "sqlite_errorcode", 0) & 0xFF in _CANNOT_WRITE:
            return _connect_to_look(path)
        raise_store_error(path, "open", error)
    except StoreError:
        connection.close()
        raise
    return connection


# Without the right to write, SQLite finds no place for what it has beside the file.
_CANNOT_WRITE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)


def _connect_to_look(path: Path) -> sqlite3.Connection:
    connection = open_to_look(path)
    try:
        _is_ours(connection, path)
    except sqlite3.Error as error:
        connection.close()
        raise_store_error(path, "read", error)
    return connection


def raise_store_error(path: Path, action: str, error: Exception) -> NoReturn:
    """Raise what SQLite says as a :class:`StoreError` that names the file and a way out."""
    reason = str(error)
    if "not a database" in reason:
        raise _no_database(path) from error
    if _no_descriptor_is_left():
        remedy = "this process has too many files open: raise the limit (ulimit -n), or close some"
    elif "File too large" in reason or ("disk I/O error" in reason and _size_is_limited()):
        remedy = "raise the limit on the size of files (ulimit -f), or see to its disk, and resume"
    elif any(sign in reason for sign in _SIGNS_OF_FULL) or _found_no_room(error):
        remedy = "free some space and resume: what was recorded before is safe"
    elif "unable to open" in reason and _has_log_alone(path):
        remedy = "copy it and its -wal file to a directory that is writable, and look there"
    elif "readonly" in reason or "unable to open" in reason or isinstance(error, PermissionError):
        remedy = (
            "make it and its directory writable, or choose another with --db-dir or PSNC_CACHE_DIR"
        )
    elif any(sign in reason for sign in _SIGNS_OF_DAMAGE):
        remedy = f"it is damaged and was left as it is: {_WAYS_OUT}"
    elif "locked" in reason:
        remedy = "another process has held it for a minute: see which one, and resume"
    else:
        remedy = "see that its disk is well, and resume"
    raise StoreError(f"cannot {action} database {path} ({reason}): {remedy}") from error


_WAYS_OUT = "salvage it with psnc recover, or with psnc run --recover, or restore a copy"
# What SQLite says of damaged schemas can be no text.
DATABASE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
_SIGNS_OF_FULL = ("full", "No space", "quota exceeded")
_SIGNS_OF_DAMAGE = (
    "malformed",
    "corrupt",
    "unsupported file format",
    "decode",
    "no such table",
    "no such column",
)


def damaged(path: Path, what: str) -> StoreError:
    """Return the error of a database that is damaged, with the ways out."""
    return StoreError(f"{path} is damaged and was left as it is ({what}): {_WAYS_OUT}")


def _no_descriptor_is_left() -> bool:
    """Tell whether no file can be opened, of which SQLite says no more than that of any other."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False


def _found_no_room(error: Exception) -> bool:
    """Tell whether there was no room for the index of a write-ahead log."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code == sqlite3.SQLITE_IOERR_SHMSIZE


def _size_is_limited() -> bool:
    """Tell whether this process may write files of a certain size only; SQLite does not say so."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return soft != resource.RLIM_INFINITY


def _no_database(path: Path) -> StoreError:
    return StoreError(
        f"{path} is no SQLite database or is damaged and was left as it is: choose another "
        "db_file, salvage what there is with psnc recover, or restore a copy"
    )


def _refuse_remains(path: Path) -> None:
    """Refuse to begin anew where a database was lost or cut off, but not what belongs to it."""
    if _has_content(path):
        return
    # SQLite itself brings an empty file back from a journal, and throws a log away.
    endings = ("-wal",) if path.exists() else ("-wal", "-journal")
    for beside in (path.with_name(path.name + ending) for ending in endings):
        # In this order: whoever just made the database had it before anything beside it.
        if _has_content(beside) and not _has_content(path):
            raise StoreError(
                f"{path} is {'empty' if path.exists() else 'gone'}, and {beside} is left of it: "
                "restore a copy, salvage it with psnc recover, or move both away to begin anew"
            )
    if path.exists() and not _has_content(path):
        _logger.warning("%s is an empty file: a new database begins in it", path)


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _tell_lost_log(path: Path) -> None:
    """Say that a write-ahead log is gone: whoever closes a database takes its index away first."""
    wal, index = (path.with_name(path.name + ending) for ending in ("-wal", "-shm"))
    # Another process may be opening it right now, and makes the log first.
    if not wal.exists() and index.exists() and not wal.exists():
        _logger.warning(
            "%s has lost its write-ahead log: what was recorded last may be missing, and runs "
            "again (psnc check tells whether the rest is sound)",
            path,
        )


def _make_directory(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot make directory {path.parent} for the database ({error.strerror}): choose "
            "another with --db-dir or PSNC_CACHE_DIR"
        ) from error


def _make_aside(path: Path) -> None:
    """Make a new database under another name and link it into place.

    So no process ever sees one that another is still making, and one that is killed while it
    makes one leaves a draft, which the next to open the database removes.
    """
    if path.exists():
        remove_left_overs(path)
        return
    try:
        # A directory, since SQLite has files of its own beside the database.
        with draft_directory(path) as directory:
            aside = directory / path.name
            with closing(_open(aside)) as connection:
                _set_up(connection, aside, create=True)
                empty_log(connection)
            # Where another process was faster, its file is as good. Where there are no links, the
            # database is made in place.
            with suppress(OSError):
                os.link(aside, path)
    except (*DATABASE_ERRORS, OSError) as error:
        raise_store_error(path, "open", error)


def empty_log(connection: sqlite3.Connection) -> None:
    """Bring all into the database file itself, before it is closed and given another name.

    To close it does the same, but for want of room leaves part of it in the log without a word.
    """
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def refuse_other_databases(path: Path) -> None:
    """Refuse what is no psnc database of this version, without changing a byte of it.

    An ordinary connection would write another program's pending changes into its file. Nor is the
    file opened in any other way than SQLite's: closing it again would take this process's locks
    from every connection that is open to it.

    Raises
    ------
    StoreError
        If it is not psnc's, or a newer version's.
    """
    try:
        if path.is_dir():
            raise StoreError(f"{path} is a directory: name a database file")
        size = path.stat().st_size if path.exists() else 0
        if 0 < size < _SMALLEST_DATABASE:
            # SQLite itself would take some of these for empty.
            raise _no_database(path)
        if size > 0:
            _require_ours(path)
    except (*DATABASE_ERRORS, OSError) as error:
        raise_store_error(path, "open", error)


def _require_ours(path: Path) -> None:
    before = written_at(path)
    try:
        with closing(open_to_look(path)) as connection:
            _is_ours(connection, path)
    except DATABASE_ERRORS:
        if written_at(path) == before:
            raise
        with closing(open_to_look(path)) as connection:
            _is_ours(connection, path)


def written_at(path: Path) -> list[tuple[int, int] | None]:
    """Return when a database and its log were last written, and how long they were then.

    Whoever looks at a file without a log looks without a lock. If somebody begins to write then,
    and merges the log into the file, there may seem to be damage, and another look sees none.
    """
    found: list[tuple[int, int] | None] = []
    for each in (path, path.with_name(f"{path.name}-wal")):
        try:
            status = each.stat()
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((status.st_mtime_ns, status.st_size))
    return found


def open_to_look(path: Path) -> sqlite3.Connection:
    """Open a database to read it, without a change to it."""
    # `immutable` reads the file alone and leaves nothing beside it, but does not see changes that
    # wait in a write-ahead log.
    wal = path.with_name(f"{path.name}-wal")
    mode = "mode=ro" if wal.exists() and wal.stat().st_size else "immutable=1"
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?{mode}",
        timeout=_BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
        uri=True,
        factory=_Connection,
    )


def _has_log_alone(path: Path) -> bool:
    """Tell whether there are changes that nobody can read without writing an index of them."""
    wal, shm = (path.with_name(f"{path.name}{end}") for end in ("-wal", "-shm"))
    return wal.exists() and not shm.exists()


def _open(path: Path) -> sqlite3.Connection:
    # Transactions are begun and ended by hand; threads take turns under the store's locks.
    return sqlite3.connect(
        path,
        timeout=_BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
        factory=_Connection,
    )


class _Connection(sqlite3.Connection):
    """One that goes with its store, which nobody has to close; since Python 3.13 others warn."""

    def __del__(self) -> None:
        # One that could not be opened cannot be closed.
        with suppress(sqlite3.ProgrammingError):
            self.close()


def _set_up(connection: sqlite3.Connection, path: Path, *, create: bool) -> bool:
    """Make the tables where there are none; tell whether there is a write-ahead log."""
    network = network_filesystem(path) if create else None
    if network:
        _do_without_log(connection, path)
    if not _is_ours(connection, path):
        if not create:
            raise StoreError(f"{path} is an empty file: run the pipeline first")
        if not network:
            connection.execute("PRAGMA journal_mode=WAL")
        _make_tables(connection, path)
    (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    return bool(mode == "wal")


def _make_tables(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have made the tables while this one waited for the lock.
        if not _is_ours(connection, path):
            create_tables(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _do_without_log(connection: sqlite3.Connection, path: Path) -> None:
    """Use a rollback journal where the memory that a write-ahead log needs is not shared."""
    # Exclusive until then: so the log that may be there is read without that memory.
    connection.execute("PRAGMA locking_mode=EXCLUSIVE")
    _is_ours(connection, path)
    connection.execute("PRAGMA journal_mode=DELETE")
    connection.execute("PRAGMA locking_mode=NORMAL")
    # The lock goes with the next look.
    _is_ours(connection, path)


def _tell_network(path: Path) -> None:
    network = network_filesystem(path)
    if network and path not in _told_of_network:
        _told_of_network.add(path)
        _logger.warning(
            "%s is on a network file system (%s): it is used without a write-ahead log, which is "
            "slower; a local disk is better (--db-dir, PSNC_CACHE_DIR)",
            path,
            network,
        )


_told_of_network: set[Path] = set()


def _is_ours(connection: sqlite3.Connection, path: Path) -> bool:
    """Tell a psnc database (True) from an empty file (False); raise for all others."""
    application_id, version, tables, own = connection.execute(_WHAT_IT_IS).fetchone()
    if application_id == APPLICATION_ID:
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{path} was written by psnc {_writer(connection)} (schema {version}), and this "
                f"psnc reads up to schema {SCHEMA_VERSION}: upgrade psnc, or choose another db_dir"
            )
        return True
    if own == len(TABLES):
        raise damaged(path, "its header does not say that it is psnc's, but its tables are")
    if tables or application_id:
        raise StoreError(
            f"{path} is an SQLite database of another program and was left as it is: choose "
            "another db_file"
        )
    return False


# One statement, so that all are of one moment.
_WHAT_IT_IS = f"""
    SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema),
        (SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name IN {TABLES})
    FROM pragma_application_id, pragma_user_version
"""


def _writer(connection: sqlite3.Connection) -> str:
    query = "SELECT psnc_version FROM pipeline_runs ORDER BY run_id DESC LIMIT 1"
    try:
        row = connection.execute(query).fetchone()
    except sqlite3.Error:  # the newer schema may have no such column
        row = None
    return row[0] if row else "of a newer version"
