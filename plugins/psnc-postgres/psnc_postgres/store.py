"""The checkpoint store on PostgreSQL: one server, many runs, written by many hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import psycopg

from psnc.config import Durability
from psnc.group_commit import WorkerRow
from psnc.records import IndexRecord, utc_timestamp
from psnc.sql_store import CHUNK, Rows, SQLStore, Statement
from psnc_postgres.connection import (
    Connection,
    advisory_key,
    connect,
    raise_store_error,
    unlogged,
)
from psnc_postgres.url import parse_url
from psnc_postgres.writer import own_run, qualified, text_for, transaction, write_group

if TYPE_CHECKING:
    from psnc.run import Run

__all__ = ["PostgresStore"]

T = TypeVar("T")


class PostgresStore(SQLStore):
    """Records to the tables that a URL names, over one connection a process.

    Its threads take turns: what they write is put into one transaction anyhow, a turn is a few
    round trips, and a server has few connections to give to many hosts.

    Parameters
    ----------
    url : str
        ``postgresql://user@host:port/database?schema=NAME``, as libpq takes it; the schema is
        ``psnc`` unless it is named.
    create : bool
        Whether to make the tables where there are none.
    durability : {"grouped", "index", "full"}
        How finished indices share transactions; ``"full"`` has the server wait for its disk even
        if it is set up not to.

    Raises
    ------
    StoreError
        If the server cannot be reached, or what is there is not psnc's.
    """

    def __init__(self, url: str, *, create: bool, durability: Durability = "grouped") -> None:
        self._at = parse_url(url)
        self._waits_for_disk = durability == "full"
        self._connection: Connection | None = None
        # Whether the latest group may be in the store although nobody was told.
        self._in_doubt = False
        super().__init__(durability)
        with self.gate:
            self._connection = connect(self._at, create=create)

    def __del__(self) -> None:
        connection = self.__dict__.get("_connection")
        if connection is not None:
            connection.close()

    @property
    def place(self) -> str:
        """The URL, without a password."""
        return self._at.shown

    # --- which run ----------------------------------------------------------------------------

    def attach(self, run: Run) -> None:
        """Find the run to record to, or begin one.

        A pipeline object stays with the run that it was attached to first, and so do its copies
        in other processes: a worker that starts late finds the run of its driver, although
        somebody has begun another run of the same configuration meanwhile.
        """
        self._run_id = self._use("write", lambda connection: self._attached(connection, run))
        self.record_code(run.code)

    # --- recording ----------------------------------------------------------------------------

    def write_group(
        self, run_id: int, records: Sequence[IndexRecord], workers: Sequence[WorkerRow]
    ) -> None:
        """Write records and rows of workers in one transaction."""

        def write(connection: Connection) -> None:
            in_doubt, self._in_doubt = self._in_doubt, True
            write_group(
                connection,
                self._at.schema,
                run_id,
                records,
                workers,
                waits_for_disk=self._waits_for_disk,
                in_doubt=in_doubt,
            )
            self._in_doubt = False

        self._use("write", write)

    def read(self, query: str, *arguments: Any) -> tuple[list[tuple[Any, ...]], list[str]]:
        """Run a query, and return its rows and the names of their columns."""

        def read(connection: Connection) -> tuple[list[tuple[Any, ...]], list[str]]:
            cursor = self._execute(connection, query, arguments)
            return cursor.fetchall(), [column.name for column in cursor.description or ()]

        return self._use("read", read)

    @contextmanager
    def read_in_chunks(self, query: str, *arguments: Any) -> Iterator[Iterable[Rows]]:
        """Run a query, and have its rows a few at a time, all of one moment.

        The answer is here as a whole, but of Python's own objects there are a few at a time.
        """
        with closing(self._use("read", lambda it: self._execute(it, query, arguments))) as cursor:
            yield iter(lambda: cursor.fetchmany(CHUNK), [])

    def change(self, statements: Sequence[Statement], *, alone: bool = False) -> None:
        """Write what waits, then run statements in one transaction."""

        def change(connection: Connection) -> None:
            with transaction(connection, waits_for_disk=self._waits_for_disk):
                if alone:
                    own_run(connection, self._at.schema, self.run_id)
                for text, arguments in statements:
                    self._execute(connection, text, arguments)

        with self.gate:
            self.flush()
            self._use("write", change)

    def exchange(
        self,
        query: str,
        arguments: tuple[Any, ...],
        answer: Callable[[list[tuple[Any, ...]]], Sequence[Statement]],
    ) -> None:
        """Run a query, and the statements that follow from its rows, in one transaction."""
        key = advisory_key(self._at.schema, f"exchange of run {self.run_id}")

        def exchange(connection: Connection) -> None:
            with transaction(connection, waits_for_disk=self._waits_for_disk):
                connection.execute("SELECT pg_advisory_xact_lock(%s)", [key])
                rows = self._execute(connection, query, arguments).fetchall()
                for text, values in answer(rows):
                    self._execute(connection, text, values)

        self._use("write", exchange)

    # --- the machinery ------------------------------------------------------------------------

    def disconnect(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _use(self, action: str, task: Callable[[Connection], T]) -> T:
        """Do something over the connection, and once more over a new one if it was lost.

        That loses nothing and doubles nothing: what a task writes, it can write again.
        """
        with self.gate:
            self.refuse_if_closed()
            try:
                return self._try(task)
            except psycopg.Error as error:
                if self._connection is not None and not isinstance(error, _PASSING):
                    self._raise(action, error)
            try:
                return self._try(task)
            except psycopg.Error as error:
                self._raise(action, error)

    def _try(self, task: Callable[[Connection], T]) -> T:
        connection = self._connection
        if connection is None:
            connection = self._connection = connect(self._at, create=False)
        try:
            with unlogged():
                return task(connection)
        except BaseException:
            # Lost, or left in the middle of something by an interrupt: no use any more.
            if connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                self.disconnect()
            raise

    def _raise(self, action: str, error: psycopg.Error) -> NoReturn:
        raise_store_error(self._at, action, error)

    def _execute(
        self, connection: Connection, text: str, arguments: tuple[Any, ...]
    ) -> psycopg.Cursor[tuple[Any, ...]]:
        storable = text_for(connection)
        given = [storable(each) if isinstance(each, str) else each for each in arguments]
        return connection.execute(qualified(text.replace("?", "%s"), self._at.schema), given)

    def _attached(self, connection: Connection, run: Run) -> int:
        def one(text: str, *arguments: Any) -> Any:
            return connection.execute(qualified(text, self._at.schema), arguments).fetchone()

        instance = run.pipeline.instance_id
        with transaction(connection, waits_for_disk=self._waits_for_disk):
            found = one(_RUN_OF_INSTANCE, instance)
            if found is None:
                # Hosts that begin at once take turns, so that they find each other's run.
                key = advisory_key(self._at.schema, run.config_hash)
                connection.execute("SELECT pg_advisory_xact_lock(%s)", [key])
                found = one(_RUN_OF_INSTANCE, instance)
            if found is None:
                found = one(_LATEST_RUN, run.config_hash) if run.pipeline.resume else None
                if found is None:
                    found = one(_INSERT_RUN, *self._new_run(connection, run))
                connection.execute(
                    qualified(_INSERT_INSTANCE, self._at.schema), [instance, found[0]]
                )
            run_id, total_indices = found
            if total_indices != run.total_indices:
                update = qualified(_UPDATE_TOTAL, self._at.schema)
                connection.execute(update, [run.total_indices, run_id])
        return int(run_id)

    def _new_run(self, connection: Connection, run: Run) -> tuple[Any, ...]:
        run_dir = text_for(connection)(run.run_dir)
        config = run.config_hash, run.pipeline.config_json
        return (*config, utc_timestamp(), run_dir, run.total_indices, version("psnc"))


# Two that waited for each other, of which the server has ended one.
_PASSING = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)

_RUN_OF_INSTANCE = """
    SELECT run_id, total_indices
    FROM {schema}.pipeline_instances JOIN {schema}.pipeline_runs USING (run_id)
    WHERE instance_id = %s
"""
_LATEST_RUN = """
    SELECT run_id, total_indices FROM {schema}.pipeline_runs
    WHERE config_hash = %s ORDER BY run_id DESC LIMIT 1
"""
_INSERT_RUN = """
    INSERT INTO {schema}.pipeline_runs
        (config_hash, config_json, started_at, run_dir, total_indices, psnc_version)
    VALUES (%s, %s, %s, %s, %s, %s) RETURNING run_id, total_indices
"""
_INSERT_INSTANCE = "INSERT INTO {schema}.pipeline_instances (instance_id, run_id) VALUES (%s, %s)"
_UPDATE_TOTAL = "UPDATE {schema}.pipeline_runs SET total_indices = %s WHERE run_id = %s"
