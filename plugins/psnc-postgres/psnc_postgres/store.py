"""The checkpoint store on PostgreSQL: one server, many runs, written by many hosts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import psycopg

from psnc.config import Durability
from psnc.group_commit import GroupCommitStore, WorkerRow
from psnc.records import IndexRecord, utc_timestamp
from psnc.store import Counts, IndexRow, RunRow, StageTotal
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

# Results first: whoever holds the row of a result holds what belongs to it.
_INDEX_TABLES = ("index_results", "stage_metrics", "output_files", "filter_artifacts", "logs")
_RUN_TABLES = (*_INDEX_TABLES, "workers")


class PostgresStore(GroupCommitStore):
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

    def runs(self) -> list[RunRow]:
        """List the recorded runs, oldest first."""
        columns = "run_id, config_hash, config_json, started_at, run_dir, total_indices"
        query = f"SELECT {columns} FROM {{schema}}.pipeline_runs ORDER BY run_id"
        return [RunRow(*row) for row in self._read(query)[0]]

    # --- recording ----------------------------------------------------------------------------

    def lookup(self, index: int) -> tuple[str, ...] | None:
        """Return the output paths of a completed index, written or still waiting."""
        pending = self.pending(index)
        if pending is not None and pending.status == "completed":
            return pending.output_paths
        rows = self._ask(
            "SELECT output_paths FROM {schema}.index_results WHERE idx = %s AND "
            "status = 'completed' AND",
            "",
            index,
        )
        return tuple(json.loads(rows[0][0])) if rows else None

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

    def worker_gone(self, invocation_id: str, pid: int) -> None:
        """Note that a process died, whatever its workers were at."""
        self._go_idle("WHERE invocation_id = %s AND pid = %s", invocation_id, pid)

    def invocation_over(self, invocation_id: str) -> None:
        """Note that no worker of an invocation is at work any more."""
        self._go_idle("WHERE invocation_id = %s", invocation_id)

    def reset(self) -> None:
        """Forget every index, log entry and worker of the run."""
        self._delete(_RUN_TABLES, "WHERE run_id = %s", self.run_id)
        self.forget_workers()

    def reset_index(self, index: int) -> None:
        """Forget one index and its log entries."""
        self._delete(_INDEX_TABLES, "WHERE run_id = %s AND idx = %s", self.run_id, index)

    # --- questions ----------------------------------------------------------------------------

    def completed_outputs(self) -> dict[int, list[str]]:
        """Return the output paths of every completed index."""
        rows = self._ask(f"SELECT idx, output_paths {_OF_COMPLETED}")
        # One parse of the joined text is several times faster than one a row.
        paths = json.loads(f"[{','.join(row[1] for row in rows)}]")
        return dict(zip((row[0] for row in rows), paths, strict=True))

    def completed_indices(self) -> set[int]:
        """Return the completed indices."""
        return {row[0] for row in self._ask(f"SELECT idx {_OF_COMPLETED}")}

    def failed_indices(self) -> dict[int, str]:
        """Return the failed indices with their error messages."""
        query = "SELECT idx, error FROM {schema}.index_results WHERE status = 'error' AND"
        return dict(self._ask(query, "ORDER BY idx"))

    def counts(self, total: int) -> Counts:
        """Return how far the run is, of the indices below ``total``."""
        by_status = {
            status: (count, wall_time_ns)
            for status, count, wall_time_ns in self._ask(_COUNTS, "GROUP BY status", total)
        }
        spans = self._ask(_SPANS, "GROUP BY invocation_id")
        elapsed = sum(
            (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()
            for first, last, _ in spans
        )
        completed, wall_time_ns = by_status.get("completed", (0, 0))
        failed, _ = by_status.get("error", (0, 0))
        workers = sum(count for _, _, count in spans)
        return Counts(completed, failed, workers, wall_time_ns, elapsed)

    def workers(self) -> list[dict[str, Any]]:
        """Return the workers table, oldest first."""
        query = "SELECT * FROM {schema}.workers WHERE"
        return self._ask_dicts(query, "ORDER BY started_at, worker_id")

    def index_for_path(self, path: str) -> int | None:
        """Return the lowest index that produced an output path."""
        query = "SELECT min(idx) FROM {schema}.output_files WHERE path = %s AND run_id = %s"

        def find(connection: Connection) -> int | None:
            arguments = [text_for(connection)(path), self.run_id]
            row = connection.execute(qualified(query, self._at.schema), arguments).fetchone()
            return None if row is None else row[0]

        return self._use("read", find)

    def output_paths(self, index: int) -> list[str]:
        """Return the output paths of an index in the sink's order."""
        query = "SELECT output_paths FROM {schema}.index_results WHERE idx = %s AND"
        rows = self._ask(query, "", index)
        paths: list[str] = json.loads(rows[0][0]) if rows else []
        return paths

    def artifacts(self, index: int | None = None) -> dict[int, list[Mapping[str, Any]]]:
        """Return filter artifacts by index."""
        columns = "SELECT idx, path, filter_name, filter_order FROM {schema}.filter_artifacts WHERE"
        order = "ORDER BY idx, filter_order, path"
        if index is None:
            rows = self._ask_dicts(columns, order)
        else:
            rows = self._ask_dicts(f"{columns} idx = %s AND", order, index)
        found: dict[int, list[Mapping[str, Any]]] = {}
        for row in rows:
            found.setdefault(row.pop("idx"), []).append(row)
        return found

    def logs(self, index: int | None = None) -> list[dict[str, Any]]:
        """Return log entries, oldest first."""
        query = "SELECT * FROM {schema}.logs WHERE"
        if index is None:
            return self._ask_dicts(query, "ORDER BY id")
        return self._ask_dicts(f"{query} idx = %s AND", "ORDER BY id", index)

    def index_rows(self) -> Iterator[IndexRow]:
        """Yield the recorded indices in order."""
        columns = (
            "idx, status, completed_at, wall_time_ns, peak_memory_bytes, gpu_memory_bytes, error"
        )
        query = f"SELECT {columns} FROM {{schema}}.index_results WHERE"
        for row in self._ask(query, "ORDER BY idx"):
            yield IndexRow(*row)

    def stage_rows(self) -> Iterator[tuple[int, int, str, int]]:
        """Yield the stages' times, sorted by index and stage."""
        columns = "idx, stage_order, stage_name, wall_time_ns"
        query = f"SELECT {columns} FROM {{schema}}.stage_metrics WHERE"
        yield from self._ask(query, "ORDER BY idx, stage_order")

    def stage_totals(self) -> list[StageTotal]:
        """Sum the stages' times over the completed indices."""
        return [StageTotal(*row) for row in self._read(_STAGE_TOTALS, self.run_id)[0]]

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

    def _go_idle(self, where: str, *arguments: Any) -> None:
        text = f"UPDATE {{schema}}.workers SET current_index = NULL {where}"

        def go_idle(connection: Connection) -> None:
            connection.execute(qualified(text, self._at.schema), arguments)

        self._change(go_idle)

    def _delete(self, tables: Sequence[str], where: str, *arguments: Any) -> None:
        """Delete from tables what nobody else is writing to at the time."""

        def delete(connection: Connection) -> None:
            own_run(connection, self._at.schema, self.run_id)
            for table in tables:
                text = f"DELETE FROM {{schema}}.{table} {where}"
                connection.execute(qualified(text, self._at.schema), arguments)

        self._change(delete)

    def _change(self, task: Callable[[Connection], None]) -> None:
        """Write what waits, then do something else in one transaction."""

        def change(connection: Connection) -> None:
            with transaction(connection, waits_for_disk=self._waits_for_disk):
                task(connection)

        with self.gate:
            self.flush()
            self._use("write", change)

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

    def _ask(self, query: str, order: str = "", *arguments: Any) -> list[Any]:
        """Run a query that ends in ``WHERE … AND`` over the selected run."""
        return self._read(f"{query} run_id = %s {order}", *arguments, self.run_id)[0]

    def _ask_dicts(self, query: str, order: str = "", *arguments: Any) -> list[dict[str, Any]]:
        text = f"{query} run_id = %s {order}"
        rows, names = self._read(text, *arguments, self.run_id)
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _read(self, text: str, *arguments: Any) -> tuple[list[Any], list[str]]:
        def read(connection: Connection) -> tuple[list[Any], list[str]]:
            cursor = connection.execute(qualified(text, self._at.schema), arguments)
            return cursor.fetchall(), [column.name for column in cursor.description or ()]

        return self._use("read", read)


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
_OF_COMPLETED = "FROM {schema}.index_results WHERE status = 'completed' AND"
_COUNTS = """
    SELECT status, count(*), sum(wall_time_ns)::bigint
    FROM {schema}.index_results WHERE idx < %s AND
"""
_SPANS = "SELECT min(started_at), max(last_heartbeat), count(*) FROM {schema}.workers WHERE"
_STAGE_TOTALS = """
    SELECT stage_order, stage_name, count(*), sum(s.wall_time_ns)::bigint, max(s.wall_time_ns)
    FROM {schema}.stage_metrics s JOIN {schema}.index_results r USING (run_id, idx)
    WHERE run_id = %s AND r.status = 'completed'
    GROUP BY stage_order, stage_name ORDER BY stage_order, stage_name COLLATE "C"
"""
