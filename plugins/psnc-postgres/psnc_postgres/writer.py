"""Write one group of records in one transaction, each index whole.

The rows of a table travel as one array a column, and statements do not wait for each other's
answers: a group costs a few round trips to the server, however many indices it has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import psycopg
from psycopg import sql

from psnc.group_commit import WorkerRow
from psnc.records import IndexRecord
from psnc_postgres.connection import Connection, advisory_key

__all__ = [
    "own_run",
    "qualified",
    "share_run",
    "storable_text",
    "text_for",
    "transaction",
    "write_group",
]

Rows = Sequence[tuple[Any, ...]]
Text = Callable[[str], str]

_LOCK_TIMEOUT = "60s"


def storable_text(text: str, *, ascii_only: bool = False) -> str:
    r"""Return text as PostgreSQL can hold it: what it cannot is escaped, as in ``\x00``.

    Parameters
    ----------
    text : str
        Any text: with NUL characters, or with the lone surrogates that stand for odd bytes in
        file names.
    ascii_only : bool
        For a database whose encoding is not Unicode.
    """
    if not text.isascii():
        encoding = "ascii" if ascii_only else "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    return text.replace("\0", "\\x00")


def text_for(connection: Connection) -> Text:
    """Return :func:`storable_text` for the database that a connection is to."""
    encoding = connection.info.parameter_status("server_encoding")
    return partial(storable_text, ascii_only=encoding not in ("UTF8", "SQL_ASCII"))


@cache
def qualified(text: str, schema: str) -> sql.Composed:
    """Return a query on the tables of a schema; ``text`` is literal and says ``{schema}``."""
    return sql.SQL(text).format(schema=sql.Identifier(schema))


@contextmanager
def transaction(connection: Connection, *, waits_for_disk: bool) -> Iterator[None]:
    """Commit on leaving, roll back on an error.

    Parameters
    ----------
    connection : Connection
        The connection.
    waits_for_disk : bool
        Have the server wait for its disk, however it is set up. What it does otherwise is the
        server's own setting, which is to wait unless somebody has changed it.
    """
    with connection.transaction():
        connection.execute(_SETTINGS, [_LOCK_TIMEOUT])
        if waits_for_disk:
            connection.execute(_WAIT_FOR_DISK)
        yield


def share_run(connection: Connection, schema: str, run_id: int) -> None:
    """Keep a run from whoever would own it until the transaction ends; wait for who does now."""
    connection.execute(_SHARE_RUN, [_run_key(schema, run_id)])


def own_run(connection: Connection, schema: str, run_id: int) -> None:
    """Wait until nobody writes to a run, and keep all others waiting until the transaction ends."""
    connection.execute(_OWN_RUN, [_run_key(schema, run_id)])


def _run_key(schema: str, run_id: int) -> int:
    return advisory_key(schema, f"run {run_id}")


def write_group(
    connection: Connection,
    schema: str,
    run_id: int,
    records: Sequence[IndexRecord],
    workers: Sequence[WorkerRow],
    *,
    waits_for_disk: bool,
    in_doubt: bool,
) -> None:
    """Write records, no two of one index, and rows of workers, in one transaction.

    Parameters
    ----------
    connection : Connection
        To write over.
    schema : str
        Where the tables are.
    run_id : int
        The run that the records belong to.
    records, workers : sequence
        What to write.
    waits_for_disk : bool
        Have the server wait for its disk, however it is set up.
    in_doubt : bool
        They may be there already, since a connection was lost while they were being written. Log
        entries, which are only ever added, are then looked for first.
    """
    text = text_for(connection)

    def run(statement: str, *arguments: Any) -> psycopg.Cursor[tuple[Any, ...]]:
        return connection.execute(qualified(statement, schema), [run_id, *arguments])

    def insert(statement: str, rows: Rows) -> None:
        if rows:
            run(statement, *map(list, zip(*rows, strict=True)))

    with _pipelined(connection), transaction(connection, waits_for_disk=waits_for_disk):
        share_run(connection, schema, run_id)
        kept = _write_results(run, records, text)
        if kept:
            for forget in _FORGET:
                run(forget, sorted(kept))
        whole = [record for record in records if record.index in kept]
        insert(_INSERT_STAGES, _stage_rows(whole, text))
        insert(_INSERT_OUTPUTS, _output_rows(whole, text))
        insert(_INSERT_ARTIFACTS, _artifact_rows(whole, text))
        insert(_INSERT_MISSING_LOGS if in_doubt else _INSERT_LOGS, _log_rows(records, text))
        insert(_INSERT_WORKERS, sorted(_worker_row(worker, text) for worker in workers))


def _write_results(
    run: Callable[..., psycopg.Cursor[tuple[Any, ...]]], records: Sequence[IndexRecord], text: Text
) -> set[int]:
    """Write the results, and return the indices of those that were not too late."""
    # In the order of the indices, so that no two writers can wait for each other.
    rows = sorted((_result_row(record, text) for record in records), key=lambda row: row[0])
    if not rows:
        return set()
    return {index for (index,) in run(_INSERT_RESULTS, *map(list, zip(*rows, strict=True)))}


def _pipelined(connection: Connection) -> AbstractContextManager[Any]:
    return connection.pipeline() if psycopg.Pipeline.is_supported() else nullcontext()


# --- rows -------------------------------------------------------------------------------------


def _result_row(record: IndexRecord, text: Text) -> tuple[Any, ...]:
    measurements = dict(record.measurements)
    peak_memory = measurements.pop("peak_memory_bytes", None)
    gpu_memory = measurements.pop("gpu_memory_bytes", None)
    return (
        record.index,
        record.status,
        json.dumps(record.output_paths),
        record.completed_at,
        record.wall_time_ns,
        peak_memory,
        gpu_memory,
        None if record.error is None else text(record.error),
        record.worker.worker_id if record.worker else None,
        json.dumps(measurements) if measurements else None,
        1,
        record.code_digest,
    )


def _stage_rows(records: Sequence[IndexRecord], text: Text) -> Rows:
    return [
        (record.index, stage.order, text(stage.name), stage.wall_time_ns)
        for record in records
        for stage in record.stages
    ]


def _output_rows(records: Sequence[IndexRecord], text: Text) -> Rows:
    return [
        (text(path), record.index, seq, facts.size_bytes, facts.content_digest)
        for record in records
        for seq, (path, facts) in enumerate(record.outputs())
    ]


def _artifact_rows(records: Sequence[IndexRecord], text: Text) -> Rows:
    return [
        (text(artifact.path), record.index, text(artifact.filter_name), artifact.filter_order)
        for record in records
        for artifact in record.artifacts
    ]


def _log_rows(records: Sequence[IndexRecord], text: Text) -> Rows:
    return [
        (
            log.timestamp,
            log.level,
            text(log.level_name),
            text(log.logger_name),
            text(log.message),
            record.worker.worker_id if record.worker else None,
            record.index,
        )
        for record in records
        for log in record.logs
    ]


def _worker_row(worker: WorkerRow, text: Text) -> tuple[Any, ...]:
    info = worker.info
    return (
        info.worker_id,
        info.pid,
        text(info.hostname),
        info.started_at,
        worker.last_heartbeat,
        worker.current_index,
        worker.completed_count,
        info.invocation_id,
    )


# --- statements -------------------------------------------------------------------------------


def _insert_into(table: str, **columns: str) -> str:
    """Return the insertion of a run's rows, which are given as one array a column."""
    arrays = ", ".join(f"%s::{kind}[]" for kind in columns.values())
    return f"""
        INSERT INTO {{schema}}.{table} AS present (run_id, {", ".join(columns)})
        SELECT run.run_id, given.*
        FROM (SELECT %s::bigint) AS run (run_id), unnest({arrays}) AS given ({", ".join(columns)})
    """


_SETTINGS = "SELECT set_config('lock_timeout', %s, true)"
_WAIT_FOR_DISK = """
    SELECT set_config('synchronous_commit', 'on', true)
    WHERE current_setting('synchronous_commit') NOT IN ('on', 'remote_apply')
"""
# Whoever asks for an advisory lock waits behind all that asked before. Those who share the lock of
# a row do not: they would pass by a reset, which among many writers would never have its turn.
_SHARE_RUN = "SELECT pg_advisory_xact_lock_shared(%s)"
_OWN_RUN = "SELECT pg_advisory_xact_lock(%s)"
_INSERT_RESULTS = (
    _insert_into(
        "index_results",
        idx="bigint",
        status="text",
        output_paths="text",
        completed_at="text",
        wall_time_ns="bigint",
        peak_memory_bytes="bigint",
        gpu_memory_bytes="bigint",
        error="text",
        worker_id="text",
        measurements="text",
        attempts="bigint",
        code_digest="text",
    )
    # An attempt that failed must not take the place of one that another process completed.
    + """
        ON CONFLICT (run_id, idx) DO UPDATE SET
            status = excluded.status,
            output_paths = excluded.output_paths,
            completed_at = excluded.completed_at,
            wall_time_ns = excluded.wall_time_ns,
            peak_memory_bytes = excluded.peak_memory_bytes,
            gpu_memory_bytes = excluded.gpu_memory_bytes,
            error = excluded.error,
            worker_id = excluded.worker_id,
            measurements = excluded.measurements,
            attempts = coalesce(present.attempts, 1) + 1,
            code_digest = excluded.code_digest
        WHERE present.status <> 'completed' OR excluded.status = 'completed'
        RETURNING idx
    """
)
_FORGET = [
    f"DELETE FROM {{schema}}.{table} WHERE run_id = %s AND idx = ANY(%s::bigint[])"
    for table in ("stage_metrics", "output_files", "filter_artifacts")
]
_INSERT_STAGES = _insert_into(
    "stage_metrics", idx="bigint", stage_order="bigint", stage_name="text", wall_time_ns="bigint"
)
_INSERT_OUTPUTS = _insert_into(
    "output_files",
    path="text",
    idx="bigint",
    seq="bigint",
    size_bytes="bigint",
    content_digest="text",
)
_INSERT_ARTIFACTS = _insert_into(
    "filter_artifacts", path="text", idx="bigint", filter_name="text", filter_order="bigint"
)
_INSERT_LOGS = _insert_into(
    "logs",
    timestamp="text",
    level="bigint",
    level_name="text",
    logger_name="text",
    message="text",
    worker_id="text",
    idx="bigint",
)
# A worker runs one index at a time: no two attempts have an entry of the same microsecond.
_INSERT_MISSING_LOGS = (
    _INSERT_LOGS
    + """
        WHERE NOT EXISTS (
            SELECT 1 FROM {schema}.logs earlier
            WHERE earlier.run_id = run.run_id AND earlier.idx = given.idx
                AND earlier.worker_id IS NOT DISTINCT FROM given.worker_id
                AND earlier.timestamp = given.timestamp AND earlier.message = given.message
        )
    """
)
_INSERT_WORKERS = (
    _insert_into(
        "workers",
        worker_id="text",
        pid="bigint",
        hostname="text",
        started_at="text",
        last_heartbeat="text",
        current_index="bigint",
        completed_count="bigint",
        invocation_id="text",
    )
    + """
        ON CONFLICT (worker_id) DO UPDATE SET
            run_id = excluded.run_id,
            last_heartbeat = excluded.last_heartbeat,
            current_index = excluded.current_index,
            completed_count = excluded.completed_count
    """
)
