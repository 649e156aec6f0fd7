"""Carry runs, indices and other rows from one database to another."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any

from psnc.builtin.checkpoint.checksums import details_checksum, result_checksum
from psnc.builtin.checkpoint.indices import DETAILS, FIGURES, StoredIndex, result_of
from psnc.builtin.checkpoint.schema import columns_of, table_columns

__all__ = ["insert_index", "insert_rows", "remove_index", "rows_of", "run_rows_of"]


def rows_of(
    connection: sqlite3.Connection, table: str, run_id: int | None = None
) -> Iterable[dict[str, Any]]:
    """Return the rows of a table, or those of one run, by this version's names of the columns."""
    there = columns_of(connection, table)
    names = [name for name in table_columns(table) if name in there]
    order = " ORDER BY id" if "id" in names else ""
    condition, arguments = ("", ()) if run_id is None else (" WHERE run_id = ?", (run_id,))
    query = f"SELECT {', '.join(names)} FROM {table} NOT INDEXED{condition}{order}"
    return (dict(zip(names, row, strict=True)) for row in connection.execute(query, arguments))


def run_rows_of(connection: sqlite3.Connection) -> Iterator[dict[str, Any]]:
    """Yield the rows of the runs, without the claims of those who are at work on that database."""
    for row in rows_of(connection, "pipeline_runs"):
        row.pop("claims", None)
        yield row


def insert_rows(
    connection: sqlite3.Connection, table: str, rows: Iterable[dict[str, Any]], how: str = "INSERT"
) -> None:
    """Insert rows by the names of their columns; ``how`` may say what becomes of conflicts."""
    for row in rows:
        marks = ", ".join("?" * len(row))
        statement = f"{how} INTO {table} ({', '.join(row)}) VALUES ({marks})"
        connection.execute(statement, tuple(row.values()))


def insert_index(connection: sqlite3.Connection, stored: StoredIndex, run_id: int) -> None:
    """Insert an index that is whole, as one of a run that may have another number there."""
    result = result_of(stored)
    key = {"idx": stored.idx, "run_id": run_id}
    if run_id != stored.run_id:
        result |= {"run_id": run_id, **_checksums(stored, result, run_id)}
    insert_rows(connection, "index_results", [result])
    details = (stored.stages, stored.outputs, stored.artifacts)
    for (table, names), rows in zip(DETAILS.items(), details, strict=True):
        insert_rows(connection, table, (key | dict(zip(names, row, strict=True)) for row in rows))


def remove_index(connection: sqlite3.Connection, run_id: int, index: int) -> None:
    """Remove an index with its rows in all tables but the log."""
    for table in ("index_results", "stage_metrics", "output_files", "filter_artifacts"):
        connection.execute(f"DELETE FROM {table} WHERE run_id = ? AND idx = ?", (run_id, index))


def _checksums(stored: StoredIndex, result: dict[str, Any], run_id: int) -> dict[str, int]:
    """Return checksums for another number of the run, where there were any."""
    found = {}
    if result["checksum"] is not None:
        values = (result["status"], result["output_paths"], result["error"])
        found["checksum"] = result_checksum(run_id, stored.idx, *values)
    if result["details_checksum"] is not None:
        figures = tuple(result[name] for name in FIGURES)
        details = (stored.stages, stored.outputs, stored.artifacts)
        found["details_checksum"] = details_checksum(run_id, stored.idx, figures, *details)
    return found
