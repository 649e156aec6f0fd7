"""Connect to the tables of a store: make them, or make sure that they are there and known.

Nothing is kept in the session of a connection: every transaction says itself what it needs. So
the store works behind a pooler that hands out another session each time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.metadata import version
from typing import Any, NoReturn

import psycopg
from psycopg import sql

from psnc import StoreError
from psnc_postgres.url import Place

__all__ = ["Connection", "advisory_key", "connect", "raise_store_error", "unlogged"]

Connection = psycopg.Connection[tuple[Any, ...]]

SCHEMA_VERSION = 1

# libpq itself would wait for ever for a host that does not answer, and for a quarter of an hour
# for one that stops answering. Each is left alone where the URL or the environment says something.
_PATIENCE = {
    "connect_timeout": ("PGCONNECT_TIMEOUT", 10),
    "keepalives_idle": (None, 30),
    "keepalives_interval": (None, 10),
    "keepalives_count": (None, 3),
    "tcp_user_timeout": (None, 60_000),
    "application_name": ("PGAPPNAME", "psnc"),
}


def connect(place: Place, *, create: bool) -> Connection:
    """Return a connection to a store's tables.

    Parameters
    ----------
    place : Place
        Where they are.
    create : bool
        Whether to make them where there are none.

    Raises
    ------
    StoreError
        If the server cannot be reached, or has no tables of this version.
    """
    parameters = dict(place.parameters)
    for name, (variable, value) in _PATIENCE.items():
        if variable is None or variable not in os.environ:
            parameters.setdefault(name, value)
    parameters["client_encoding"] = "UTF8"
    try:
        connection = psycopg.connect(**parameters, autocommit=True, prepare_threshold=None)
    except psycopg.Error as error:
        raise StoreError(
            f"cannot connect to {place.shown} ({_reason(error)}): see that the server runs, takes "
            "this user, and has this database, and resume"
        ) from error
    try:
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        _require_tables(connection, place, create=create)
    except psycopg.Error as error:
        connection.close()
        raise_store_error(place, "open", error)
    except BaseException:
        connection.close()
        raise
    return connection


def raise_store_error(place: Place, action: str, error: psycopg.Error) -> NoReturn:
    """Raise what the server says as a :class:`psnc.StoreError` that names it and a way out."""
    raise StoreError(
        f"cannot {action} {place.shown} ({_reason(error)}): {_remedy(place, error)}"
    ) from error


def _reason(error: psycopg.Error) -> str:
    text = error.diag.message_primary or str(error).partition("\n")[0]
    return " ".join(text.split()) or type(error).__name__


def _remedy(place: Place, error: psycopg.Error) -> str:
    errors = psycopg.errors
    if isinstance(error, errors.InsufficientPrivilege):
        return (
            f"grant this user CREATE on the database, or the use of schema {place.schema} and of "
            "its tables"
        )
    if isinstance(error, errors.ReadOnlySqlTransaction):
        return "this server takes no writes, as a standby does: name the primary"
    if isinstance(error, (errors.DiskFull, errors.OutOfMemory)):
        return "make room on the server and resume: what was recorded before is safe"
    if isinstance(error, errors.LockNotAvailable):
        return "another client has held it for a minute: see which one, and resume"
    if isinstance(error, (errors.UndefinedTable, errors.UndefinedColumn)):
        return f"something has changed the tables in schema {place.schema}: restore them"
    if isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)):
        return "see that the server runs and is reached, and resume: what was recorded is safe"
    return "see the server's log, and resume"


_this_thread = threading.local()


@contextmanager
def unlogged() -> Iterator[None]:
    """Keep psycopg from logging, in this thread, the errors that it ignores because of others.

    The others are raised, and said by whoever catches them. A lost connection is no news at all if
    a new one can be made.
    """
    _this_thread.is_quiet = True
    try:
        yield
    finally:
        _this_thread.is_quiet = False


def _is_to_be_logged(record: logging.LogRecord) -> bool:
    return not getattr(_this_thread, "is_quiet", False)


logging.getLogger("psycopg").addFilter(_is_to_be_logged)


def advisory_key(schema: str, what: str) -> int:
    """Return the number of an advisory lock; such locks are the whole database's."""
    digest = hashlib.sha256(f"psnc {schema} {what}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


# --- the tables -------------------------------------------------------------------------------


def _require_tables(connection: Connection, place: Place, *, create: bool) -> None:
    if _are_ours(connection, place):
        return
    if not create:
        raise StoreError(
            f"{place.shown} has no tables of psnc in schema {place.schema!r}: check the URL, or "
            "run the pipeline first"
        )
    with connection.transaction():
        connection.execute(
            "SELECT pg_advisory_xact_lock(%s)", [advisory_key(place.schema, "tables")]
        )
        # Another process may have made them while this one waited.
        if not _are_ours(connection, place):
            _make_tables(connection, place)


def _are_ours(connection: Connection, place: Place) -> bool:
    """Tell tables of psnc (True) from a place without any (False); raise for all others."""
    names = {name for (name,) in connection.execute(_TABLES, [place.schema])}
    if "psnc_schema" in names:
        query = sql.SQL("SELECT version, written_by FROM {schema}.psnc_schema")
        rows = connection.execute(_in_schema(query, place)).fetchall()
        if len(rows) == 1:
            _refuse_newer(place, *rows[0])
            return True
    if names:
        raise StoreError(
            f"{place.shown} has tables of another program in schema {place.schema!r} "
            f"({', '.join(sorted(names))}), which were left as they are: choose another with "
            "?schema=NAME"
        )
    return False


def _refuse_newer(place: Place, schema_version: int, written_by: str) -> None:
    if schema_version > SCHEMA_VERSION:
        raise StoreError(
            f"{place.shown} was made by {written_by} (schema {schema_version}), and this "
            f"psnc-postgres reads up to schema {SCHEMA_VERSION}: upgrade psnc-postgres, or choose "
            "another place with ?schema=NAME"
        )


def _make_tables(connection: Connection, place: Place) -> None:
    # Asked first: where the schema is there, making one needs no right to make one.
    if connection.execute("SELECT to_regnamespace(quote_ident(%s))", [place.schema]).fetchone() == (
        None,
    ):
        connection.execute(_in_schema(sql.SQL("CREATE SCHEMA {schema}"), place))
    text = resources.files(__package__).joinpath("schema.sql").read_text(encoding="utf-8")
    # The file is part of this package, and so as literal as one in the code.
    connection.execute(_in_schema(sql.SQL(text), place))
    insert = sql.SQL("INSERT INTO {schema}.psnc_schema VALUES (%s, %s)")
    written_by = f"psnc-postgres {version('psnc-postgres')}"
    connection.execute(_in_schema(insert, place), [SCHEMA_VERSION, written_by])


def _in_schema(query: sql.SQL, place: Place) -> sql.Composed:
    return query.format(schema=sql.Identifier(place.schema))


_TABLES = """
    SELECT tablename FROM pg_catalog.pg_tables WHERE schemaname = %s AND tablename IN (
        'psnc_schema', 'pipeline_runs', 'pipeline_instances', 'index_results', 'stage_metrics',
        'workers', 'output_files', 'filter_artifacts', 'logs'
    )
"""
