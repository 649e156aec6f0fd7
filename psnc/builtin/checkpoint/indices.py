"""Indices as a database holds them, each with its rows of all tables, and whether one is whole."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

from psnc.builtin.checkpoint.checksums import details_checksum, result_checksum
from psnc.builtin.checkpoint.schema import columns_of, table_columns
from psnc.builtin.checkpoint.writer import roll_back, storable_text

__all__ = [
    "DETAILS",
    "FIGURES",
    "KnownRun",
    "Problem",
    "StoredIndex",
    "known_run",
    "known_runs",
    "problem_of",
    "result_of",
    "snapshot",
    "stored_indices",
]

# The columns of a result that are covered by its second checksum.
FIGURES = (
    "completed_at",
    "wall_time_ns",
    "peak_memory_bytes",
    "gpu_memory_bytes",
    "worker_id",
    "measurements",
    "attempts",
    "code_digest",
)

# The columns that make up a row besides its index, those of the primary key first.
DETAILS = {
    "stage_metrics": ("stage_order", "stage_name", "wall_time_ns"),
    "output_files": ("seq", "path", "size_bytes", "content_digest"),
    "filter_artifacts": ("filter_order", "path", "filter_name"),
}


_figures = itemgetter(*FIGURES)


class Problem(StrEnum):
    """What keeps an index from being whole, as the end of "indices …"."""

    NO_RUN = "that belong to no run, or to one whose configuration is damaged"
    NO_RESULT = "with stages, outputs or artifacts, but no result"
    SEVERAL_RESULTS = "with several results"
    BEYOND_THE_END = "beyond the end of the source"
    RESULT_CHANGED = "whose result is not what was written (checksum)"
    STATUS_AND_ERROR = "whose status and error do not go together"
    MEASUREMENTS = "whose measurements are no JSON object"
    PATHS = "whose output_paths are no JSON array of paths"
    FAILED_WITH_FILES = "that failed and have output files"
    OTHER_FILES = "whose rows in output_files are not those of output_paths"
    DETAILS_CHANGED = "whose stages, artifacts or figures are not what was written (checksum)"
    STAGES = "that are completed without a row for each stage"


class KnownRun(NamedTuple):
    """A run whose configuration is as it was written.

    Attributes
    ----------
    config_hash : str
        SHA-256 of the configuration.
    total_indices : int
        Length of the source.
    stages : int or None
        How many stages the configuration has, where it can be told.
    """

    config_hash: str
    total_indices: int
    stages: int | None


class StoredIndex(NamedTuple):
    """The rows of one index, without its key.

    Attributes
    ----------
    run_id, idx : int
        The key.
    results : list of tuple
        The rows of ``index_results``, all columns; one if all is well.
    stages : list of tuple
        ``stage_order``, ``stage_name``, ``wall_time_ns``.
    outputs : list of tuple
        ``seq``, ``path``, ``size_bytes``, ``content_digest``.
    artifacts : list of tuple
        ``filter_order``, ``path``, ``filter_name``.
    """

    run_id: int
    idx: int
    results: list[tuple[Any, ...]]
    stages: list[tuple[Any, ...]]
    outputs: list[tuple[Any, ...]]
    artifacts: list[tuple[Any, ...]]


def known_runs(connection: sqlite3.Connection) -> Iterator[tuple[int, KnownRun | None]]:
    """Yield each run's number with what is known of it; ``None`` if its row is not as written."""
    names = ("run_id", "config_hash", "config_json", "total_indices")
    # Not by way of an index, which may have been damaged where the table was not.
    query = f"SELECT {', '.join(names)} FROM pipeline_runs NOT INDEXED"
    for values in connection.execute(query):
        row = dict(zip(names, values, strict=True))
        yield row["run_id"], known_run(row)


def known_run(row: Mapping[str, Any]) -> KnownRun | None:
    """Return what is known of a run by its row; ``None`` if that is not as it was written."""
    config_json, total_indices = row["config_json"], row["total_indices"]
    if not isinstance(config_json, str) or not isinstance(total_indices, int):
        return None
    config_hash = sha256(config_json.encode()).hexdigest()
    if config_hash != row["config_hash"] or total_indices < 0:
        return None
    try:
        config = json.loads(config_json)
        stages = [config["source"], *config["filters"], config["sink"]]
    except (ValueError, KeyError, TypeError):
        return KnownRun(config_hash, total_indices, None)
    return KnownRun(config_hash, total_indices, sum(map(bool, stages)))


@contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Have several queries see one state, whatever is written meanwhile."""
    connection.execute("BEGIN")
    try:
        yield connection
    finally:
        roll_back(connection)


def stored_indices(
    connection: sqlite3.Connection,
    run_id: int | None = None,
    index: int | None = None,
    span: tuple[int, int] | None = None,
) -> Iterator[StoredIndex]:
    """Yield every index that has a row in any table, in order of run and index.

    Parameters
    ----------
    connection : sqlite3.Connection
        A database with this or an earlier version's tables.
    run_id : int, optional
        Only those of this run.
    index : int, optional
        Only this one.
    span : tuple of int, optional
        Only those from the first to the second, both included.
    """
    tables = {"index_results": table_columns("index_results"), **DETAILS}
    streams = [
        groupby(
            connection.execute(*_query(connection, table, names, run_id, index, span)),
            itemgetter(0, 1),
        )
        for table, names in tables.items()
    ]
    heads = [next(stream, None) for stream in streams]
    while keys := [head[0] for head in heads if head is not None]:
        key = min(keys)
        parts: list[list[tuple[Any, ...]]] = []
        for place, head in enumerate(heads):
            if head is not None and head[0] == key:
                parts.append([row[2:] for row in head[1]])
                heads[place] = next(streams[place], None)
            else:
                parts.append([])
        yield StoredIndex(*key, *parts)


def _query(
    connection: sqlite3.Connection,
    table: str,
    columns: Sequence[str],
    run_id: int | None,
    index: int | None,
    span: tuple[int, int] | None,
) -> tuple[str, tuple[int, ...]]:
    there = columns_of(connection, table)
    # A column that the database is too old for reads as NULL.
    selected = [name if name in there else "NULL" for name in columns]
    given = {"run_id": run_id, "idx": index}
    wanted = {name: value for name, value in given.items() if value is not None}
    # Of a row with any other key nobody can tell where it belongs.
    conditions = [f"typeof({name}) = 'integer'" for name in given]
    conditions += [f"{name} = ?" for name in wanted]
    if span is not None:
        conditions.append("idx BETWEEN ? AND ?")
    order = ", ".join(
        ("run_id", "idx", *(name for name in DETAILS.get(table, ()) if name in there))
    )
    return (
        f"SELECT run_id, idx, {', '.join(selected)} FROM {table} "
        f"WHERE {' AND '.join(conditions)} ORDER BY {order}",
        (*wanted.values(), *(span or ())),
    )


def result_of(stored: StoredIndex) -> dict[str, Any]:
    """Return the row of ``index_results`` by the names of its columns."""
    return dict(zip(table_columns("index_results"), stored.results[0], strict=True))


def problem_of(stored: StoredIndex, runs: Mapping[int, KnownRun | None]) -> Problem | None:
    """Say what keeps an index from being whole; ``None`` if it is."""
    run = runs.get(stored.run_id)
    if run is None:
        return Problem.NO_RUN
    if not stored.results:
        return Problem.NO_RESULT
    if len(stored.results) > 1:
        return Problem.SEVERAL_RESULTS
    if not 0 <= stored.idx < run.total_indices:
        return Problem.BEYOND_THE_END
    result = result_of(stored)
    return (
        _problem_of_result(stored, result)
        or _problem_of_outputs(stored, result)
        or _problem_of_details(stored, result, run)
    )


def _problem_of_result(stored: StoredIndex, result: Mapping[str, Any]) -> Problem | None:
    status, error = result["status"], result["error"]
    if result["checksum"] is not None:
        expected = result_checksum(stored.run_id, stored.idx, status, result["output_paths"], error)
        if result["checksum"] != expected:
            return Problem.RESULT_CHANGED
    if status not in ("completed", "error") or (status == "error") != (error is not None):
        return Problem.STATUS_AND_ERROR
    if result["measurements"] is not None and not isinstance(_parsed(result["measurements"]), dict):
        return Problem.MEASUREMENTS
    return None


def _problem_of_outputs(stored: StoredIndex, result: Mapping[str, Any]) -> Problem | None:
    paths = _parsed(result["output_paths"])
    if not isinstance(paths, list) or not {str}.issuperset(map(type, paths)):
        return Problem.PATHS
    if paths and result["status"] == "error":
        return Problem.FAILED_WITH_FILES
    if [(seq, storable_text(path)) for seq, path in enumerate(paths)] != [
        row[:2] for row in stored.outputs
    ]:
        return Problem.OTHER_FILES
    return None


def _problem_of_details(
    stored: StoredIndex, result: Mapping[str, Any], run: KnownRun
) -> Problem | None:
    if result["details_checksum"] is not None:
        figures = _figures(result)
        details = (stored.stages, stored.outputs, stored.artifacts)
        if result["details_checksum"] != details_checksum(
            stored.run_id, stored.idx, figures, *details
        ):
            return Problem.DETAILS_CHANGED
        return None
    # Of an earlier psnc: what is known is how many stages there must be.
    counted = result["status"] == "completed" and run.stages is not None
    if counted and [row[0] for row in stored.stages] != list(range(run.stages or 0)):
        return Problem.STAGES
    return None


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError):
        return None
