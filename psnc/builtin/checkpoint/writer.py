"""Write one group of records in one SQLite transaction, each index whole."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from psnc.builtin.checkpoint.checksums import details_checksum, result_checksum
from psnc.group_commit import WorkerRow
from psnc.records import IndexRecord

__all__ = ["Transaction", "roll_back", "storable_text", "write_group"]

_IS_COMPLETED = """
    SELECT 1 FROM index_results WHERE run_id = ? AND idx = ? AND status = 'completed'
"""
_ATTEMPTS = "SELECT attempts FROM index_results WHERE run_id = ? AND idx = ?"
_IS_THERE = """
    SELECT 1 FROM index_results WHERE run_id = ? AND idx = ? AND worker_id IS ? AND completed_at = ?
"""
_HAS_ENTRY = "SELECT 1 FROM logs WHERE run_id = ? AND idx = ? AND worker_id IS ? AND timestamp = ?"
_FORGET = [
    f"DELETE FROM {table} WHERE run_id = ? AND idx = ?"
    for table in ("stage_metrics", "output_files", "filter_artifacts")
]


def write_group(
    connection: sqlite3.Connection,
    run_id: int,
    records: Sequence[IndexRecord],
    workers: Sequence[WorkerRow],
    *,
    in_doubt: bool,
) -> None:
    """Write records, no two of one index, and rows of workers, in one transaction.

    Parameters
    ----------
    connection : sqlite3.Connection
        To write over.
    run_id : int
        The run that the records belong to.
    records, workers : sequence
        What to write.
    in_doubt : bool
        They may be there already, since an interrupt came while they were being committed.
        Log entries, which are only ever added, must not be added twice.
    """
    # Before others have to wait. Most indices are new, and their rows are these.
    index_rows = _index_rows(run_id, records, {})
    expected = len(records)
    with Transaction(connection):
        if in_doubt:
            records = [each for each in records if not _is_there(connection, run_id, each)]
        # An attempt that failed must not take the place of one that another process completed.
        kept = [each for each in records if not _comes_too_late(connection, run_id, each)]
        # One question is cheaper than three deletions.
        earlier = _earlier_attempts(connection, run_id, kept)
        again = [(run_id, index) for index in earlier]
        for statement in _FORGET if again else ():
            connection.executemany(statement, again)
        if earlier or len(kept) < expected:
            index_rows = _index_rows(run_id, kept, earlier)
        for statement, rows in (*index_rows, _log_rows(run_id, records)):
            if rows:
                connection.executemany(statement, rows)
        connection.executemany(_INSERT_WORKER, [_worker_row(run_id, each) for each in workers])


class Transaction:
    """Commit on leaving, roll back on an error."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        # An interrupt between two lines can have left one open.
        roll_back(self._connection)
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            try:
                self._connection.execute("COMMIT")
                return
            except sqlite3.Error:
                roll_back(self._connection)
                raise
        roll_back(self._connection)


def roll_back(connection: sqlite3.Connection) -> None:
    """End a transaction without its changes, if one is open."""
    # Some errors, a full disk among them, have rolled back already.
    if connection.in_transaction:
        connection.execute("ROLLBACK")


_INSERT_RESULT = """
    INSERT OR REPLACE INTO index_results (
        idx, run_id, status, output_paths, completed_at, wall_time_ns,
        peak_memory_bytes, gpu_memory_bytes, error, worker_id, measurements,
        checksum, details_checksum, attempts, code_digest
    ) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_INSERT_STAGE = "INSERT INTO stage_metrics VALUES (?, ?, ?, ?, ?)"
_INSERT_OUTPUT = """
    INSERT INTO output_files (path, idx, run_id, seq, size_bytes, content_digest)
    VALUES (?, ?, ?, ?, ?, ?)
"""
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


def _earlier_attempts(
    connection: sqlite3.Connection, run_id: int, records: Sequence[IndexRecord]
) -> dict[int, int]:
    """Return how often each index was tried before, of those that are recorded."""
    attempts = {}
    for record in records:
        row = connection.execute(_ATTEMPTS, (run_id, record.index)).fetchone()
        if row is not None:
            # An earlier psnc did not count: once at the least.
            attempts[record.index] = row[0] or 1
    return attempts


def _index_rows(
    run_id: int, records: Sequence[IndexRecord], earlier: Mapping[int, int]
) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """Return what is written of indices, as statements and their rows."""
    results: list[tuple[Any, ...]] = []
    stages: list[tuple[Any, ...]] = []
    outputs: list[tuple[Any, ...]] = []
    artifacts: list[tuple[Any, ...]] = []
    for record in records:
        own_stages = [(each.order, each.name, each.wall_time_ns) for each in record.stages]
        own_outputs = _output_rows(record)
        own_artifacts = sorted(
            (each.filter_order, storable_text(each.path), each.filter_name)
            for each in record.artifacts
        )
        attempts = earlier.get(record.index, 0) + 1
        details = (own_stages, own_outputs, own_artifacts)
        results.append(_result_row(run_id, record, attempts, *details))
        key = (record.index, run_id)
        stages.extend((*key, *row) for row in own_stages)
        outputs.extend((path, *key, seq, *facts) for seq, path, *facts in own_outputs)
        artifacts.extend((path, *key, name, order) for order, path, name in own_artifacts)
    return [
        (_INSERT_RESULT, results),
        (_INSERT_STAGE, stages),
        (_INSERT_OUTPUT, outputs),
        (_INSERT_ARTIFACT, artifacts),
    ]


def _output_rows(record: IndexRecord) -> list[tuple[Any, ...]]:
    return [
        (seq, storable_text(path), facts.size_bytes, facts.content_digest)
        for seq, (path, facts) in enumerate(record.outputs())
    ]


def _result_row(
    run_id: int,
    record: IndexRecord,
    attempts: int,
    stages: Sequence[tuple[Any, ...]],
    outputs: Sequence[tuple[Any, ...]],
    artifacts: Sequence[tuple[Any, ...]],
) -> tuple[Any, ...]:
    measurements = dict(record.measurements)
    memory = [_figure(measurements.pop(name, None)) for name in _MEMORY]
    index, status, paths = record.index, record.status, json.dumps(record.output_paths)
    error = None if record.error is None else storable_text(record.error)
    figures = (
        record.completed_at,
        record.wall_time_ns,
        *memory,
        record.worker.worker_id if record.worker else None,
        json.dumps(measurements) if measurements else None,
        attempts,
        record.code_digest,
    )
    checksum = result_checksum(run_id, index, status, paths, error)
    details = details_checksum(run_id, index, figures, stages, outputs, artifacts)
    completed_at, wall_time_ns, peak, gpu, worker_id, measured, *later = figures
    return (
        *(index, run_id, status, paths, completed_at, wall_time_ns, peak, gpu, error),
        *(worker_id, measured, checksum, details, *later),
    )


_MEMORY = ("peak_memory_bytes", "gpu_memory_bytes")


def _figure(value: Any) -> int | None:
    """Return a number as the column of integers gives it back, which a checksum depends on."""
    if value is None or type(value) is int:
        return value
    try:
        number: int = round(value)
    except (TypeError, ValueError, OverflowError):  # text, or no finite number
        return None
    return number


def _comes_too_late(connection: sqlite3.Connection, run_id: int, record: IndexRecord) -> bool:
    if record.status == "completed":
        return False
    return connection.execute(_IS_COMPLETED, (run_id, record.index)).fetchone() is not None


def _is_there(connection: sqlite3.Connection, run_id: int, record: IndexRecord) -> bool:
    """Tell whether a record, which is written whole or not at all, is written."""
    key = (run_id, record.index, record.worker.worker_id if record.worker else None)
    if connection.execute(_IS_THERE, (*key, record.completed_at)).fetchone():
        return True
    # Of an attempt that failed too late there are its entries only.
    first = record.logs[:1]
    return any(connection.execute(_HAS_ENTRY, (*key, log.timestamp)).fetchone() for log in first)


def _log_rows(run_id: int, records: Sequence[IndexRecord]) -> tuple[str, list[tuple[Any, ...]]]:
    rows = []
    for record in records:
        worker_id = record.worker.worker_id if record.worker else None
        for log in record.logs:
            names = storable_text(log.level_name), storable_text(log.logger_name)
            entry = (log.timestamp, log.level, *names, storable_text(log.message))
            rows.append((run_id, *entry, worker_id, record.index))
    return _INSERT_LOG, rows


def _worker_row(run_id: int, worker: WorkerRow) -> tuple[Any, ...]:
    info = worker.info
    return (
        info.worker_id,
        run_id,
        info.pid,
        info.hostname,
        info.started_at,
        worker.last_heartbeat,
        worker.current_index,
        worker.completed_count,
        info.invocation_id,
    )
