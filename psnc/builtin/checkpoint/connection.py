"""Open a checkpoint database: make it, or make sure that it is one, and touch nothing else.

A file that is not psnc's, is damaged, or was written by a newer version is refused as it stands.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from contextlib import closing, suppress
from importlib import resources
from pathlib import Path
from typing import NoReturn

from psnc.config import Durability
from psnc.errors import StoreError

__all__ = [
    "APPLICATION_ID",
    "SCHEMA_VERSION",
    "connect",
    "raise_store_error",
    "refuse_other_databases",
]

APPLICATION_ID = 0x70736E63  # "psnc"
SCHEMA_VERSION = 1

# How long to wait for another writer. It holds the lock for milliseconds at a time, so that only
# a process that is stopped inside a transaction can use this up.
_BUSY_TIMEOUT_S = 60.0

# Of bytes: one page of the smallest size.
_SMALLEST_DATABASE = 512


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
        _make_aside(path)
    elif not path.exists():
        raise StoreError(f"no database at {path}: check the path, or run the pipeline first")
    try:
        connection = _open(path)
    except (sqlite3.Error, OSError) as error:
        raise_store_error(path, "open", error)
    try:
        _set_up(connection, path, create=create)
        connection.execute(f"PRAGMA synchronous={'FULL' if durability == 'full' else 'NORMAL'}")
    except sqlite3.Error as error:
        connection.close()
        if looking and error.sqlite_errorcode & 0xFF in _CANNOT_WRITE:
            return _connect_to_look(path)
        raise_store_error(path, "open", error)
    except StoreError:
        connection.close()
        raise
    return connection


# Without the right to write, SQLite finds no place for what it has beside the file.
_CANNOT_WRITE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)


def _connect_to_look(path: Path) -> sqlite3.Connection:
    connection = _open_to_look(path)
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
    elif "full" in reason:
        remedy = "free some space and resume: what was recorded before is safe"
    elif "unable to open" in reason and _has_log_alone(path):
        remedy = "copy it and its -wal file to a directory that is writable, and look there"
    elif "readonly" in reason or "unable to open" in reason or isinstance(error, PermissionError):
        remedy = (
            "make it and its directory writable, or choose another with --db-dir or PSNC_CACHE_DIR"
        )
    elif "malformed" in reason:
        remedy = "it is damaged and was left as it is: set it aside, or restore a copy"
    elif "locked" in reason:
        remedy = "another process has held it for a minute: see which one, and resume"
    else:
        remedy = "see that its disk is well, and resume"
    raise StoreError(f"cannot {action} database {path} ({reason}): {remedy}") from error


def _no_descriptor_is_left() -> bool:
    """Tell whether no file can be opened, of which SQLite says no more than that of any other."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False


def _no_database(path: Path) -> StoreError:
    return StoreError(
        f"{path} is no SQLite database or is damaged and was left as it is: choose another "
        "db_file, or restore a copy"
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
    makes one leaves none.
    """
    if path.exists():
        return
    aside = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}.new")
    try:
        with closing(_open(aside)) as connection:
            _set_up(connection, aside, create=True)
        # Where another process was faster, its file is as good. Where there are no links, the
        # database is made in place.
        with suppress(OSError):
            os.link(aside, path)
    except (sqlite3.Error, OSError) as error:
        raise_store_error(path, "open", error)
    finally:
        aside.unlink(missing_ok=True)


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
            with closing(_open_to_look(path)) as connection:
                _is_ours(connection, path)
    except (sqlite3.Error, OSError) as error:
        raise_store_error(path, "open", error)


def _open_to_look(path: Path) -> sqlite3.Connection:
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
    )


def _has_log_alone(path: Path) -> bool:
    """Tell whether there are changes that nobody can read without writing an index of them."""
    wal, shm = (path.with_name(f"{path.name}{end}") for end in ("-wal", "-shm"))
    return wal.exists() and not shm.exists()


def _open(path: Path) -> sqlite3.Connection:
    # Transactions are begun and ended by hand; threads take turns under the store's locks.
    return sqlite3.connect(
        path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )


def _set_up(connection: sqlite3.Connection, path: Path, *, create: bool) -> None:
    if _is_ours(connection, path):
        return
    if not create:
        raise StoreError(f"{path} is an empty file: run the pipeline first")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have made the tables while this one waited for the lock.
        if not _is_ours(connection, path):
            for statement in _schema_statements():
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _is_ours(connection: sqlite3.Connection, path: Path) -> bool:
    """Tell a psnc database (True) from an empty file (False); raise for all others."""
    application_id, version, tables = connection.execute(_WHAT_IT_IS).fetchone()
    if application_id == APPLICATION_ID:
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{path} was written by psnc {_writer(connection)} (schema {version}), and this "
                f"psnc reads up to schema {SCHEMA_VERSION}: upgrade psnc, or choose another db_dir"
            )
        return True
    if tables or application_id:
        raise StoreError(
            f"{path} is an SQLite database of another program and was left as it is: choose "
            "another db_file"
        )
    return False


# One statement, so that all three are of one moment.
_WHAT_IT_IS = """
    SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema)
    FROM pragma_application_id, pragma_user_version
"""


def _writer(connection: sqlite3.Connection) -> str:
    query = "SELECT psnc_version FROM pipeline_runs ORDER BY run_id DESC LIMIT 1"
    try:
        row = connection.execute(query).fetchone()
    except sqlite3.Error:  # the newer schema may have no such column
        row = None
    return row[0] if row else "of a newer version"


def _schema_statements() -> list[str]:
    text = resources.files(__package__).joinpath("schema.sql").read_text(encoding="utf-8")
    statements: list[str] = []
    pending = ""
    for line in text.splitlines():
        pending += line.partition("--")[0].rstrip() + "\n"
        if sqlite3.complete_statement(pending):
            statements.append(pending)
            pending = ""
    return statements
