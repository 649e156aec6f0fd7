"""The checkpoint store on SQLite: one file, in WAL mode, written by many threads and processes."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from psnc.builtin.checkpoint.connection import (
    connect,
    raise_store_error,
    refuse_other_databases,
)
from psnc.builtin.checkpoint.writer import (
    Transaction,
    roll_back,
    storable_text,
    write_group,
)
from psnc.config import Config
from psnc.group_commit import GroupCommitStore, WorkerRow
from psnc.records import IndexRecord, utc_timestamp
from psnc.store import Counts, IndexRow, RunRow, StageTotal

if TYPE_CHECKING:
    from psnc.run import Run

__all__ = ["SQLiteStore"]

_RUN_TABLES = (
    "index_results",
    "stage_metrics",
    "output_files",
    "filter_artifacts",
    "logs",
    "workers",
)
_INDEX_TABLES = _RUN_TABLES[:-1]


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


class SQLiteStore(GroupCommitStore):
    """Records to the SQLite database at ``path``; one connection a process and thread.

    Parameters
    ----------
    path : Path
        The database file.
    create : bool
        Whether to make it where there is none.
    config : Config
        Tells the durability.

    Raises
    ------
    StoreError
        If it cannot be opened.
    """

    def __init__(self, path: Path, *, create: bool, config: Config) -> None:
        self.path = path
        self._durability = config.durability
        self._local = threading.local()
        self._connections: WeakSet[_ThreadConnection] = WeakSet()
        # Whether the latest group may be in the database although nobody was told.
        self._in_doubt = False
        refuse_other_databases(path)
        super().__init__(config.durability)
        with self.gate:
            self._new_connection(create=create)

    # --- which run ----------------------------------------------------------------------------

    def attach(self, run: Run) -> None:
        """Find the run of this configuration, or begin to record one."""
        with self.gate:
            try:
                self._attach(run)
            except sqlite3.Error as error:
                raise_store_error(self.path, "write", error)

    def runs(self) -> list[RunRow]:
        """List the recorded runs, oldest first."""
        columns = "run_id, config_hash, config_json, started_at, run_dir, total_indices"
        return [
            RunRow(*row) for row in self._query(f"SELECT {columns} FROM pipeline_runs ORDER BY 1")
        ]

    # --- recording ----------------------------------------------------------------------------

    def lookup(self, index: int) -> tuple[str, ...] | None:
        """Return the output paths of a completed index, written or still waiting."""
        pending = self.pending(index)
        if pending is not None and pending.status == "completed":
            return pending.output_paths
        with self.gate:
            try:
                row = self._connection().execute(_LOOKUP, (self.run_id, index)).fetchone()
            except sqlite3.Error as error:
                raise_store_error(self.path, "read", error)
        return tuple(json.loads(row[0])) if row else None

    def write_group(
        self, run_id: int, records: Sequence[IndexRecord], workers: Sequence[WorkerRow]
    ) -> None:
        """Write records and rows of workers in one transaction."""
        connection = self._connection()
        in_doubt, self._in_doubt = self._in_doubt, True
        try:
            write_group(connection, run_id, records, workers, in_doubt=in_doubt)
        except sqlite3.Error as error:
            raise_store_error(self.path, "write", error)
        except BaseException:
            # An interrupt right behind BEGIN must not leave everybody else locked out.
            roll_back(connection)
            raise
        self._in_doubt = False

    def worker_gone(self, invocation_id: str, pid: int) -> None:
        """Note that a process died, whatever its workers were at."""
        query = "UPDATE workers SET current_index = NULL WHERE invocation_id = ? AND pid = ?"
        self._change([(query, (invocation_id, pid))])

    def invocation_over(self, invocation_id: str) -> None:
        """Note that no worker of an invocation is at work any more."""
        query = "UPDATE workers SET current_index = NULL WHERE invocation_id = ?"
        self._change([(query, (invocation_id,))])

    def reset(self) -> None:
        """Forget every index, log entry and worker of the run."""
        run = (self.run_id,)
        self._change([(f"DELETE FROM {table} WHERE run_id = ?", run) for table in _RUN_TABLES])
        self.forget_workers()

    def reset_index(self, index: int) -> None:
        """Forget one index and its log entries."""
        key = (self.run_id, index)
        where = "WHERE run_id = ? AND idx = ?"
        self._change([(f"DELETE FROM {table} {where}", key) for table in _INDEX_TABLES])

    # --- questions ----------------------------------------------------------------------------

    def completed_outputs(self) -> dict[int, list[str]]:
        """Return the output paths of every completed index."""
        rows = self._ask("SELECT idx, output_paths FROM index_results WHERE status='completed' AND")
        # One parse of the joined text is several times faster than one a row.
        paths = json.loads(f"[{','.join(row[1] for row in rows)}]")
        return dict(zip((row[0] for row in rows), paths, strict=True))

    def completed_indices(self) -> set[int]:
        """Return the completed indices."""
        return {
            row[0]
            for row in self._ask("SELECT idx FROM index_results WHERE status='completed' AND")
        }

    def failed_indices(self) -> dict[int, str]:
        """Return the failed indices with their error messages."""
        rows = self._ask(
            "SELECT idx, error FROM index_results WHERE status='error' AND", "ORDER BY idx"
        )
        return dict(rows)

    def counts(self, total: int) -> Counts:
        """Return how far the run is, of the indices below ``total``."""
        by_status = {
            status: (count, wall_time_ns)
            for status, count, wall_time_ns in self._ask(
                "SELECT status, count(*), sum(wall_time_ns) FROM index_results WHERE idx < ? AND",
                "GROUP BY status",
                total,
            )
        }
        spans = self._ask(
            "SELECT min(started_at), max(last_heartbeat), count(*) FROM workers WHERE",
            "GROUP BY invocation_id",
        )
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
        return self._ask_dicts("SELECT * FROM workers WHERE", "ORDER BY started_at, worker_id")

    def index_for_path(self, path: str) -> int | None:
        """Return the lowest index that produced an output path."""
        rows = self._ask(
            "SELECT min(idx) FROM output_files WHERE path = ? AND", "", storable_text(path)
        )
        index: int | None = rows[0][0]
        return index

    def output_paths(self, index: int) -> list[str]:
        """Return the output paths of an index in the sink's order."""
        rows = self._ask("SELECT output_paths FROM index_results WHERE idx = ? AND", "", index)
        paths: list[str] = json.loads(rows[0][0]) if rows else []
        return paths

    def artifacts(self, index: int | None = None) -> dict[int, list[Mapping[str, Any]]]:
        """Return filter artifacts by index."""
        columns = "SELECT idx, path, filter_name, filter_order FROM filter_artifacts WHERE"
        order = "ORDER BY idx, filter_order, path"
        if index is None:
            rows = self._ask_dicts(columns, order)
        else:
            rows = self._ask_dicts(f"{columns} idx = ? AND", order, index)
        found: dict[int, list[Mapping[str, Any]]] = {}
        for row in rows:
            found.setdefault(row.pop("idx"), []).append(row)
        return found

    def logs(self, index: int | None = None) -> list[dict[str, Any]]:
        """Return log entries, oldest first."""
        if index is None:
            return self._ask_dicts("SELECT * FROM logs WHERE", "ORDER BY id")
        return self._ask_dicts("SELECT * FROM logs WHERE idx = ? AND", "ORDER BY id", index)

    def index_rows(self) -> Iterator[IndexRow]:
        """Yield the recorded indices in order."""
        columns = (
            "idx, status, completed_at, wall_time_ns, peak_memory_bytes, gpu_memory_bytes, error"
        )
        for row in self._ask(f"SELECT {columns} FROM index_results WHERE", "ORDER BY idx"):
            yield IndexRow(*row)

    def stage_rows(self) -> Iterator[tuple[int, int, str, int]]:
        """Yield the stages' times, sorted by index and stage."""
        columns = "idx, stage_order, stage_name, wall_time_ns"
        yield from self._ask(
            f"SELECT {columns} FROM stage_metrics WHERE", "ORDER BY idx, stage_order"
        )

    def stage_totals(self) -> list[StageTotal]:
        """Sum the stages' times over the completed indices."""
        rows = self._query(_STAGE_TOTALS, self.run_id)
        return [StageTotal(*row) for row in rows]

    # --- the machinery ------------------------------------------------------------------------

    @property
    def place(self) -> str:
        """The database file."""
        return str(self.path)

    def disconnect(self) -> None:
        """Close every thread's connection."""
        for each in list(self._connections):
            each.close()

    def _connection(self) -> sqlite3.Connection:
        self.refuse_if_closed()
        own: _ThreadConnection | None = getattr(self._local, "own", None)
        if own is None or own.closed:
            return self._new_connection(create=False)
        return own.connection

    def _new_connection(self, *, create: bool) -> sqlite3.Connection:
        connection = connect(self.path, create=create, durability=self._durability)
        own = _ThreadConnection(connection)
        self._local.own = own
        self._connections.add(own)
        return connection

    def _attach(self, run: Run) -> None:
        connection = self._connection()
        find = "SELECT run_id, total_indices FROM pipeline_runs WHERE config_hash = ?"
        row = connection.execute(find, (run.config_hash,)).fetchone()
        if row is None:
            values = (run.config_hash, run.pipeline.config_json, utc_timestamp(), run.run_dir)
            connection.execute(_INSERT_RUN, (*values, run.total_indices, version("psnc")))
            row = connection.execute(find, (run.config_hash,)).fetchone()
        run_id, total_indices = row
        if total_indices != run.total_indices:
            update = "UPDATE pipeline_runs SET total_indices = ? WHERE run_id = ?"
            connection.execute(update, (run.total_indices, run_id))
        self._run_id = run_id

    def _change(self, statements: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        """Write what waits, then run other statements, in one transaction."""
        with self.gate:
            self.flush()
            connection = self._connection()
            try:
                with Transaction(connection):
                    for statement, arguments in statements:
                        connection.execute(statement, arguments)
            except sqlite3.Error as error:
                raise_store_error(self.path, "write", error)
            except BaseException:
                roll_back(connection)
                raise

    def _ask(self, query: str, order: str = "", *arguments: Any) -> list[Any]:
        """Run a query that ends in ``WHERE … AND`` over the selected run."""
        return self._query(f"{query} run_id = ? {order}", *arguments, self.run_id)

    def _ask_dicts(self, query: str, order: str = "", *arguments: Any) -> list[dict[str, Any]]:
        text = f"{query} run_id = ? {order}"
        rows, names = self._read(text, (*arguments, self.run_id))
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _query(self, text: str, *arguments: Any) -> list[Any]:
        return self._read(text, arguments)[0]

    def _read(self, text: str, arguments: tuple[Any, ...]) -> tuple[list[Any], list[str]]:
        with self.gate:
            try:
                cursor = self._connection().execute(text, arguments)
                return cursor.fetchall(), [column[0] for column in cursor.description]
            except sqlite3.Error as error:
                raise_store_error(self.path, "read", error)


_LOOKUP = """
    SELECT output_paths FROM index_results WHERE run_id = ? AND idx = ? AND status = 'completed'
"""
_INSERT_RUN = """
    INSERT OR IGNORE INTO pipeline_runs
        (config_hash, config_json, started_at, run_dir, total_indices, psnc_version)
    VALUES (?, ?, ?, ?, ?, ?)
"""
_STAGE_TOTALS = """
    SELECT stage_order, stage_name, count(*), sum(s.wall_time_ns), max(s.wall_time_ns)
    FROM stage_metrics s JOIN index_results r ON r.run_id = s.run_id AND r.idx = s.idx
    WHERE s.run_id = ? AND r.status = 'completed'
    GROUP BY stage_order, stage_name ORDER BY stage_order
"""
