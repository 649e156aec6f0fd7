"""Group finished indices into transactions, so that a tiny index costs a share of one.

Records and signs of life wait in memory, and a thread writes them at the latest 50 ms after the
first of them came; an index that took that long itself is written at once. The write lock is held
only for the writing, never while an index runs.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from psnc.builtin.checkpoint.connection import raise_store_error
from psnc.records import IndexRecord, WorkerInfo, utc_timestamp

__all__ = ["GroupWriter", "storable_text"]

GROUP_NS = 50_000_000
_LINGER_S = 1.0

_IS_COMPLETED = """
    SELECT 1 FROM index_results WHERE run_id = ? AND idx = ? AND status = 'completed'
"""
_IS_RECORDED = "SELECT 1 FROM index_results WHERE run_id = ? AND idx = ?"
_FORGET = [
    f"DELETE FROM {table} WHERE run_id = ? AND idx = ?"
    for table in ("stage_metrics", "output_files", "filter_artifacts")
]


class _WorkerState:
    """The row of a worker, as it should read."""

    __slots__ = ("completed_count", "current_index", "info", "last_heartbeat")

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.current_index: int | None = None
        self.completed_count = 0
        self.last_heartbeat = time.time()


class GroupWriter:
    """Collects what is to be written for one run, and writes it in order, each index whole.

    Parameters
    ----------
    path : Path
        The database, for error messages.
    connection : callable
        Returns the calling thread's connection.
    run_id : callable
        Returns the run that records belong to.
    gate : threading.RLock
        Held while the database is used.
    one_by_one : bool
        Write every index in a transaction of its own.
    """

    def __init__(
        self,
        path: Path,
        connection: Callable[[], sqlite3.Connection],
        run_id: Callable[[], int],
        *,
        gate: Any,
        one_by_one: bool,
    ) -> None:
        self._path = path
        self._connection = connection
        self._run_id = run_id
        self._one_by_one = one_by_one
        # Guards the memory below for moments; the gate is held through a transaction.
        self._lock = threading.Lock()
        self._gate = gate
        self._pending: dict[int, IndexRecord] = {}
        self._states: dict[str, _WorkerState] = {}
        self._changed: set[str] = set()
        self._error: Exception | None = None
        # Whether somebody was told of the latest failure to write.
        self.failure_is_known = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def pending(self, index: int) -> IndexRecord | None:
        """Return the record of an index that is not written yet."""
        return self._pending.get(index)

    def index_started(self, worker: WorkerInfo, index: int) -> None:
        """Note that a worker is at an index."""
        self._raise_earlier_error()
        with self._lock:
            state = self._state(worker)
            state.current_index = index
        self._wake_thread()

    def worker_idle(self, worker: WorkerInfo) -> None:
        """Note that a worker is at no index."""
        with self._lock:
            self._state(worker).current_index = None
        self.flush()

    def record(self, record: IndexRecord) -> None:
        """Take a record; write it now if it took long."""
        self._raise_earlier_error()
        with self._lock:
            self._pending[record.index] = record
            if record.worker is not None:
                state = self._state(record.worker)
                state.current_index = None
                state.completed_count += record.status == "completed"
        if self._one_by_one or record.wall_time_ns >= GROUP_NS:
            self.flush()
        else:
            self._wake_thread()

    def flush(self) -> None:
        """Write all that waits.

        Raises
        ------
        StoreError
            If it cannot be written. It stays in memory, and the next call tries again.
        """
        with self._gate:
            with self._lock:
                records = list(self._pending.values())
                states = [self._states[worker_id] for worker_id in self._changed]
                rows = [_worker_row(state, self._run_id()) for state in states]
                self._changed.clear()
            if not records and not rows:
                return
            try:
                self._write(records, rows)
            except BaseException as error:
                # Whatever it was: what is not written stays to be written.
                with self._lock:
                    self._changed.update(state.info.worker_id for state in states)
                if not isinstance(error, sqlite3.Error):
                    raise
                self.failure_is_known = True
                raise_store_error(self._path, "write", error)
            with self._lock:
                for record in records:
                    if self._pending.get(record.index) is record:
                        del self._pending[record.index]

    def change(self, statements: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        """Write what waits, then run other statements, in one transaction."""
        with self._gate:
            self.flush()
            connection = self._connection()
            try:
                with _Transaction(connection):
                    for statement, arguments in statements:
                        connection.execute(statement, arguments)
            except sqlite3.Error as error:
                raise_store_error(self._path, "write", error)

    def forget_workers(self) -> None:
        """Begin to count the workers' indices anew."""
        with self._lock:
            self._states.clear()
            self._changed.clear()

    def close(self) -> None:
        """Write what waits; the thread ends by itself."""
        self._wake.set()
        self.flush()

    def _state(self, worker: WorkerInfo) -> _WorkerState:
        state = self._states.get(worker.worker_id)
        if state is None:
            state = self._states[worker.worker_id] = _WorkerState(worker)
        state.last_heartbeat = time.time()
        self._changed.add(worker.worker_id)
        return state

    def _raise_earlier_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            self.failure_is_known = True
            raise error

    def _wake_thread(self) -> None:
        if self._wake.is_set():
            return
        with self._lock:
            self._wake.set()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_write_in_time,
                    args=(weakref.ref(self), self._wake),
                    name="psnc-checkpoint",
                    daemon=True,
                )
                self._thread.start()

    def flush_in_time(self) -> None:
        """Write what waits, and keep an error for the thread that records next."""
        try:
            self.flush()
        except Exception as error:
            self._error = error
            self.failure_is_known = False

    def retire_thread(self) -> bool:
        """Let the thread go, unless there is something to write again."""
        with self._lock:
            if self._wake.is_set():
                return False
            self._thread = None
            return True

    def _write(self, records: list[IndexRecord], worker_rows: list[tuple[Any, ...]]) -> None:
        run_id = self._run_id()
        connection = self._connection()
        with _Transaction(connection):
            # An attempt that failed must not take the place of one that another process completed.
            kept = [each for each in records if not _comes_too_late(connection, run_id, each)]
            keys = [(run_id, record.index) for record in kept]
            # Most indices are new, and one question is cheaper than three deletions.
            again = [key for key in keys if connection.execute(_IS_RECORDED, key).fetchone()]
            for statement in _FORGET if again else ():
                connection.executemany(statement, again)
            connection.executemany(_INSERT_RESULT, [_result_row(run_id, each) for each in kept])
            for statement, rows in (*_detail_rows(run_id, kept), _log_rows(run_id, records)):
                if rows:
                    connection.executemany(statement, rows)
            connection.executemany(_INSERT_WORKER, worker_rows)


def _write_in_time(reference: weakref.ref[GroupWriter], wake: threading.Event) -> None:
    """Write 50 ms after something came; end when nothing has come for a while.

    Between times the thread does not hold the writer, which can so be collected with its store.
    """
    while True:
        idle = not wake.wait(_LINGER_S)
        if not idle:
            time.sleep(GROUP_NS / 1e9)
            wake.clear()
        writer = reference()
        if writer is None or (idle and writer.retire_thread()):
            return
        writer.flush_in_time()
        del writer


class _Transaction:
    """Commit on leaving, roll back on an error."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        # An interrupt between two lines can have left one open.
        self._roll_back()
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            try:
                self._connection.execute("COMMIT")
                return
            except sqlite3.Error:
                self._roll_back()
                raise
        self._roll_back()

    def _roll_back(self) -> None:
        # Some errors, a full disk among them, have rolled back already.
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")


_INSERT_RESULT = """
    INSERT OR REPLACE INTO index_results (
        idx, run_id, status, output_paths, completed_at, wall_time_ns,
        peak_memory_bytes, gpu_memory_bytes, error, worker_id, measurements
    ) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_INSERT_STAGE = "INSERT INTO stage_metrics VALUES (?, ?, ?, ?, ?)"
_INSERT_OUTPUT = "INSERT INTO output_files VALUES (?, ?, ?, ?)"
_INSERT_ARTIFACT = "INSERT INTO filter_artifacts VALUES (?, ?, ?, ?, ?)"
_INSERT_LOG = """
    INSERT INTO logs (run_id, timestamp, level, level_name, logger_name, message, worker_id, idx)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?)
"""
_INSERT_WORKER = """
    INSERT INTO workers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (worker_id) DO UPDATE SET
        run_id = excluded.run_id,
        last_heartbeat = excluded.last_heartbeat,
        current_index = excluded.current_index,
        completed_count = excluded.completed_count
"""


def storable_text(text: str) -> str:
    """Return text as UTF-8 can hold it: of a file name that is none, the odd bytes escaped."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _result_row(run_id: int, record: IndexRecord) -> tuple[Any, ...]:
    measurements = dict(record.measurements)
    peak_memory = measurements.pop("peak_memory_bytes", None)
    gpu_memory = measurements.pop("gpu_memory_bytes", None)
    return (
        record.index,
        run_id,
        record.status,
        json.dumps(record.output_paths),
        record.completed_at,
        record.wall_time_ns,
        peak_memory,
        gpu_memory,
        None if record.error is None else storable_text(record.error),
        record.worker.worker_id if record.worker else None,
        json.dumps(measurements) if measurements else None,
    )


def _comes_too_late(connection: sqlite3.Connection, run_id: int, record: IndexRecord) -> bool:
    if record.status == "completed":
        return False
    return connection.execute(_IS_COMPLETED, (run_id, record.index)).fetchone() is not None


def _log_rows(run_id: int, records: list[IndexRecord]) -> tuple[str, list[tuple[Any, ...]]]:
    rows = []
    for record in records:
        worker_id = record.worker.worker_id if record.worker else None
        for log in record.logs:
            names = storable_text(log.level_name), storable_text(log.logger_name)
            entry = (log.timestamp, log.level, *names, storable_text(log.message))
            rows.append((run_id, *entry, worker_id, record.index))
    return _INSERT_LOG, rows


def _detail_rows(
    run_id: int, records: list[IndexRecord]
) -> list[tuple[str, list[tuple[Any, ...]]]]:
    stages, outputs, artifacts = [], [], []
    for record in records:
        index = record.index
        for stage in record.stages:
            stages.append((index, run_id, stage.order, stage.name, stage.wall_time_ns))
        for seq, path in enumerate(record.output_paths):
            outputs.append((storable_text(path), index, run_id, seq))
        for artifact in record.artifacts:
            path = storable_text(artifact.path)
            artifacts.append((path, index, run_id, artifact.filter_name, artifact.filter_order))
    return [
        (_INSERT_STAGE, stages),
        (_INSERT_OUTPUT, outputs),
        (_INSERT_ARTIFACT, artifacts),
    ]


def _worker_row(state: _WorkerState, run_id: int) -> tuple[Any, ...]:
    info = state.info
    return (
        info.worker_id,
        run_id,
        info.pid,
        info.hostname,
        info.started_at,
        utc_timestamp(state.last_heartbeat),
        state.current_index,
        state.completed_count,
        info.invocation_id,
    )
