"""Which runs of a damaged database can be told, with or without the pipeline's own word for it."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

from attrs import frozen

from psnc.builtin.checkpoint.indices import known_run
from psnc.builtin.checkpoint.transfer import run_rows_of

__all__ = ["RUN_HASHES", "OwnRun", "run_rows"]

# Beside salvaged tables: what the index of config_hash had, a page of its own.
RUN_HASHES = "run_hashes"


@frozen
class OwnRun:
    """What a pipeline that is about to resume would record of itself."""

    config_hash: str
    config_json: str
    run_dir: str
    total_indices: int
    psnc_version: str


def run_rows(source: sqlite3.Connection, own: OwnRun | None) -> dict[int, dict[str, Any]]:
    """Return the rows of ``pipeline_runs`` that are as they were written, by number of the run.

    Parameters
    ----------
    source : sqlite3.Connection
        Where they are.
    own : OwnRun, optional
        Its configuration takes the place of one that is damaged, if the hash says that they are
        the same.
    """
    rows = list(run_rows_of(source))
    if own is not None:
        rows = [_mended(row, own) for row in rows]
        rows.extend(_lost(source, rows, own))
    # Each is there once, or nobody knows which is right.
    numbers = Counter(row["run_id"] for row in rows)
    hashes = Counter(row["config_hash"] for row in rows)
    return {
        row["run_id"]: row
        for row in rows
        if known_run(row) is not None and numbers[row["run_id"]] == hashes[row["config_hash"]] == 1
    }


def _mended(row: dict[str, Any], own: OwnRun) -> dict[str, Any]:
    if known_run(row) is not None:
        return row
    hashes = (row["config_hash"], sha256(str(row["config_json"]).encode()).hexdigest())
    if own.config_hash not in hashes:
        return row
    return row | {
        "config_hash": own.config_hash,
        "config_json": own.config_json,
        "total_indices": own.total_indices,
    }


def _lost(
    source: sqlite3.Connection, rows: Sequence[dict[str, Any]], own: OwnRun
) -> Iterator[dict[str, Any]]:
    """Yield the row of the pipeline's own run, if all that is left of it is its hash."""
    there = "SELECT 1 FROM sqlite_schema WHERE name = ?"
    if not source.execute(there, (RUN_HASHES,)).fetchone():
        return
    known = {row["run_id"] for row in rows}
    query = f"SELECT run_id FROM {RUN_HASHES} WHERE config_hash = ?"
    for (run_id,) in source.execute(query, (own.config_hash,)).fetchall():
        first = "SELECT min(completed_at) FROM index_results WHERE run_id = ?"
        ((started_at,),) = source.execute(first, (run_id,))
        if run_id not in known and started_at is not None:
            yield {
                "run_id": run_id,
                "config_hash": own.config_hash,
                "config_json": own.config_json,
                "started_at": started_at,
                "run_dir": own.run_dir,
                "total_indices": own.total_indices,
                "psnc_version": own.psnc_version,
            }
