"""The checkpoint store on SQLite: one file, in WAL mode, written by many threads and processes."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from psnc.builtin.checkpoint.connection import (
    DATABASE_ERRORS,
    connect,
    raise_store_error,
    refuse_other_databases,
)
from psnc.builtin.checkpoint.schema import add_missing_columns, missing_columns
from psnc.builtin.checkpoint.verified import VerifiedStore
from psnc.builtin.checkpoint.writer import (
    Transaction,
    roll_back,
    storable_text,
    write_group,
)
from psnc.config import Config
from psnc.group_commit import WorkerRow
from psnc.records import IndexRecord, utc_timestamp
from psnc.sql_store import CHUNK, Rows, Statement

if TYPE_CHECKING:
    from psnc.run import Run

__all__ = ["SQLiteStore", "is_open_here"]


class _ThreadConnection:
    """One thread's connection, closed when the thread ends."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.closed = False

    def close(self) -> None:
        self.closed = True
        self.connection.close()

    def __del__(self) -> None:
        self.connection.close()


class SQLiteStore(VerifiedStore):
    """Records to the SQLite database at ``path``; one connection a process and thread.

    Parameters
    ----------
    path : Path
        The database file.
    create : bool
        Whether to make it where there is none.
    looking : bool
        Whether it may be where nothing can be written.
    config : Config
        Tells the durability.

    Raises
    ------
    StoreError
        If it cannot be opened.
    """

    def __init__(self, path: Path, *, create: bool, looking: bool = False, config: Config) -> None:
        self.path = path
        self._looking = looking
        self._durability = config.durability
        self._local = threading.local()
        self._connections: WeakSet[_ThreadConnection] = WeakSet()
        # Whether the latest group may be in the database although nobody was told.
        self._in_doubt = False
        refuse_other_databases(path)
        super().__init__(config.durability)
        _stores.add(self)
        with self.gate:
            self._new_connection(create=create)

    # --- which run ----------------------------------------------------------------------------

    def attach(self, run: Run) -> None:
        """Find the run of this configuration, or begin to record one."""
        with self.gate:
            try:
                self._attach(run)
            except DATABASE_ERRORS as error:
                raise_store_error(self.path, "write", error)

    # --- recording ----------------------------------------------------------------------------

    def write_group(
        self, run_id: int, records: Sequence[IndexRecord], workers: Sequence[WorkerRow]
    ) -> None:
        """Write records and rows of workers in one transaction."""
        connection = self._connection()
        in_doubt, self._in_doubt = self._in_doubt, True
        try:
            write_group(connection, run_id, records, workers, in_doubt=in_doubt)
        except DATABASE_ERRORS as error:
            raise_store_error(self.path, "write", error)
        except BaseException:
            # An interrupt right behind BEGIN must not leave everybody else locked out.
            roll_back(connection)
            raise
        self._in_doubt = False

    def read(self, query: str, *arguments: Any) -> tuple[list[tuple[Any, ...]], list[str]]:
        """Run a query, and return its rows and the names of their columns."""
        with self.gate:
            try:
                cursor = self._connection().execute(*_in_sqlite(query, arguments))
                return cursor.fetchall(), [column[0] for column in cursor.description]
            except DATABASE_ERRORS as error:
                raise_store_error(self.path, "read", error)

    @contextmanager
    def read_in_chunks(self, query: str, *arguments: Any) -> Iterator[Iterable[Rows]]:
        """Run a query, and have its rows a few at a time, all of one moment."""
        with self.gate:
            try:
                with closing(self._connection().execute(*_in_sqlite(query, arguments))) as cursor:
                    yield iter(lambda: cursor.fetchmany(CHUNK), [])
            except DATABASE_ERRORS as error:
                raise_store_error(self.path, "read", error)

    def change(self, statements: Sequence[Statement], *, alone: bool = False) -> None:
        """Write what waits, then run statements in one transaction; one writes at a time anyhow."""
        with self.gate:
            self.flush()
            self._transact(lambda connection: _execute_all(connection, statements))

    def exchange(
        self,
        query: str,
        arguments: tuple[Any, ...],
        answer: Callable[[list[tuple[Any, ...]]], Sequence[Statement]],
    ) -> None:
        """Run a query, and the statements that follow from its rows, in one transaction."""

        def exchange(connection: sqlite3.Connection) -> None:
            rows = connection.execute(*_in_sqlite(query, arguments)).fetchall()
            _execute_all(connection, answer(rows))

        with self.gate:
            self._transact(exchange)

    # --- the machinery ------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether it has any connection."""
        return any(not each.closed for each in list(self._connections))

    @property
    def place(self) -> str:
        """The database file."""
        return str(self.path)

    def disconnect(self) -> None:
        """Close every thread's connection."""
        for each in list(self._connections):
            each.close()

    def _transact(self, task: Callable[[sqlite3.Connection], None]) -> None:
        connection = self._connection()
        try:
            with Transaction(connection):
                task(connection)
        except DATABASE_ERRORS as error:
            raise_store_error(self.path, "write", error)
        except BaseException:
            roll_back(connection)
            raise

    def _connection(self) -> sqlite3.Connection:
        self.refuse_if_closed()
        own: _ThreadConnection | None = getattr(self._local, "own", None)
        if own is None or own.closed:
            return self._new_connection(create=False)
        return own.connection

    def _new_connection(self, *, create: bool) -> sqlite3.Connection:
        connection = connect(
            self.path, create=create, looking=self._looking, durability=self._durability
        )
        own = _ThreadConnection(connection)
        self._local.own = own
        self._connections.add(own)
        self.make_room()
        return connection

    def _attach(self, run: Run) -> None:
        connection = self._connection()
        if missing_columns(connection):
            with Transaction(connection):
                # Another process may have been faster.
                add_missing_columns(connection)
            self._columns.clear()
        self.refuse_damaged_runs()
        find = "SELECT run_id, total_indices FROM pipeline_runs WHERE config_hash = ?"
        row = connection.execute(find, (run.config_hash,)).fetchone()
        if row is None:
            config, run_dir = run.pipeline.config_json, storable_text(run.run_dir)
            values = (run.config_hash, config, utc_timestamp(), run_dir, run.total_indices)
            connection.execute(_INSERT_RUN, (*values, version("psnc")))
            row = connection.execute(find, (run.config_hash,)).fetchone()
        run_id, total_indices = row
        if total_indices != run.total_indices:
            update = "UPDATE pipeline_runs SET total_indices = ? WHERE run_id = ?"
            connection.execute(update, (run.total_indices, run_id))
        self._run_id = run_id
        self.record_code(run.code)


_stores: WeakSet[SQLiteStore] = WeakSet()


def is_open_here(path: Path) -> bool:
    """Tell whether a store of this process has a database open."""
    return any(store.path == path and store.is_open for store in list(_stores))


def _execute_all(connection: sqlite3.Connection, statements: Sequence[Statement]) -> None:
    for text, arguments in statements:
        connection.execute(*_in_sqlite(text, arguments))


def _in_sqlite(text: str, arguments: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """Return a query and its arguments as SQLite takes them."""
    storable = (storable_text(each) if isinstance(each, str) else each for each in arguments)
    return text.replace("{schema}", "main"), tuple(storable)


_INSERT_RUN = """
    INSERT OR IGNORE INTO pipeline_runs
        (config_hash, config_json, started_at, run_dir, total_indices, psnc_version)
    VALUES (?, ?, ?, ?, ?, ?)
"""
