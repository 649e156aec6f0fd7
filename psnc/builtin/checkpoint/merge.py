"""Merge the databases of shards into one: the same configuration's indices become one run."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from attrs import Factory, define

from psnc.builtin.checkpoint.check import refuse_findings
from psnc.builtin.checkpoint.connection import DATABASE_ERRORS, open_to_look, raise_store_error
from psnc.builtin.checkpoint.indices import StoredIndex, result_of, snapshot, stored_indices
from psnc.builtin.checkpoint.new_file import new_database, refuse_existing
from psnc.builtin.checkpoint.transfer import (
    insert_index,
    insert_rows,
    remove_index,
    rows_of,
    run_rows_of,
)
from psnc.code_versions import united
from psnc.errors import StoreError

__all__ = ["Merged", "Prefer", "merge"]

Prefer = Literal["first", "last"]

_SHOWN = 5


@define
class Merged:
    """What was merged.

    Attributes
    ----------
    runs, completed, failed, logs, workers : int
        What the new database holds.
    again : int
        Indices that several databases had.
    decided : int
        Indices that were completed with different outputs, of which one was preferred.
    """

    runs: int = 0
    completed: int = 0
    failed: int = 0
    logs: int = 0
    workers: int = 0
    again: int = 0
    decided: int = 0

    @property
    def line(self) -> str:
        """The counts in one line."""
        parts = [
            f"{self.completed} completed and {self.failed} failed indices of {self.runs} "
            f"configuration{'' if self.runs == 1 else 's'}, {self.logs} log entries, "
            f"{self.workers} workers"
        ]
        if self.again:
            parts.append(f"{self.again} indices were in several databases")
        if self.decided:
            parts.append(f"{self.decided} of them with different outputs")
        return "; ".join(parts)


def merge(paths: Sequence[Path], output: Path, prefer: Prefer | None = None) -> Merged:
    """Merge databases into a new file, and change none of them.

    Parameters
    ----------
    paths : sequence of Path
        The databases, in the order that ``prefer`` refers to.
    output : Path
        The new file.
    prefer : {"first", "last"}, optional
        Which of several completions with different outputs comes along.

    Raises
    ------
    StoreError
        If the output is there already, a database is damaged or no psnc database, or an index was
        completed with different outputs and nothing is preferred.
    """
    refuse_existing(output)
    for path in paths:
        refuse_findings(path)
    with new_database(output) as new:
        merger = _Merger(new, prefer)
        for path in paths:
            try:
                with closing(open_to_look(path)) as source, snapshot(source):
                    merger.take(path, source)
            except DATABASE_ERRORS as error:
                raise_store_error(path, "read", error)
        merger.refuse_conflicts()
        return merger.counted()


@define
class _Merger:
    """Takes one database after the other into a new one."""

    new: sqlite3.Connection
    prefer: Prefer | None
    merged: Merged = Factory(Merged)
    conflicts: list[str] = Factory(list)
    conflict_count: int = 0
    paths: list[Path] = Factory(list)

    def take(self, path: Path, source: sqlite3.Connection) -> None:
        """Take all of a database."""
        if not self.paths:
            # Which database an index that is there came from.
            self.new.execute(
                "CREATE TEMP TABLE origins (run_id, idx, place, PRIMARY KEY (run_id, idx))"
            )
        self.paths.append(path)
        runs = {row["run_id"]: self._run(row) for row in run_rows_of(source)}
        for stored in stored_indices(source):
            self._take_index(stored, runs[stored.run_id])
        self._take_logs(source, runs)
        self._take_workers(source, runs)

    def refuse_conflicts(self) -> None:
        """Refuse if an index was completed with different outputs, and say where."""
        if self.conflicts:
            more = self.conflict_count - len(self.conflicts)
            shown = ", ".join(self.conflicts) + (f" and {more} more" if more else "")
            raise StoreError(
                f"completed with different outputs: {shown}: say which to keep with --prefer first "
                "or --prefer last"
            )

    def counted(self) -> Merged:
        """Return what the new database holds."""
        for name, table in (
            ("runs", "pipeline_runs"),
            ("completed", "index_results WHERE status = 'completed'"),
            ("failed", "index_results WHERE status = 'error'"),
            ("logs", "logs"),
            ("workers", "workers"),
        ):
            ((count,),) = self.new.execute(f"SELECT count(*) FROM {table}")
            setattr(self.merged, name, count)
        return self.merged

    def _run(self, row: dict[str, Any]) -> int:
        """Return the number of a configuration in the new database, begun if it is not there."""
        del row["run_id"]
        find = "SELECT run_id FROM pipeline_runs WHERE config_hash = ?"
        known = self.new.execute(find, (row["config_hash"],)).fetchone()
        if known is None:
            insert_rows(self.new, "pipeline_runs", [row])
            known = self.new.execute(find, (row["config_hash"],)).fetchone()
        run_id: int = known[0]
        # The source may have grown between the shards' runs.
        ((versions,),) = self.new.execute(
            "SELECT code_versions FROM pipeline_runs WHERE run_id = ?", (run_id,)
        ).fetchall()
        update = """
            UPDATE pipeline_runs SET total_indices = max(total_indices, ?),
                started_at = min(started_at, ?), code_versions = ?
            WHERE run_id = ?
        """
        versions = united(versions, row.get("code_versions"))
        self.new.execute(update, (row["total_indices"], row["started_at"], versions, run_id))
        return run_id

    def _take_index(self, stored: StoredIndex, run_id: int) -> None:
        place = len(self.paths) - 1
        key = (run_id, stored.idx)
        there = self.new.execute(_THERE, key).fetchone()
        if there is not None:
            self.merged.again += 1
            if not self._takes_the_place(stored, key, *there):
                return
            remove_index(self.new, *key)
        insert_index(self.new, stored, run_id)
        self.new.execute("INSERT OR REPLACE INTO temp.origins VALUES (?, ?, ?)", (*key, place))

    def _takes_the_place(
        self, stored: StoredIndex, key: tuple[int, int], status: str, paths: str, place: int
    ) -> bool:
        """Tell whether an index takes the place of what an earlier database had of it."""
        result = result_of(stored)
        if "error" in (status, result["status"]):
            # An error never displaces a completion; of two errors the later one is the latest.
            return status == "error"
        if json.loads(paths) == json.loads(result["output_paths"]):
            return self.prefer == "last"
        self.merged.decided += 1
        if self.prefer is None:
            self.conflict_count += 1
            if len(self.conflicts) < _SHOWN:
                self.conflicts.append(f"index {key[1]} in {self.paths[place]} and {self.paths[-1]}")
        return self.prefer == "last"

    def _take_logs(self, source: sqlite3.Connection, runs: dict[int, int]) -> None:
        latest = self.new.execute("SELECT max(id) FROM logs").fetchone()[0] or 0
        for row in rows_of(source, "logs"):
            row["run_id"] = runs[row["run_id"]]
            del row["id"]
            # Copies of a database have entries in common, which an entry's worker tells.
            known = (*(row[name] for name in _ENTRY), latest)
            if not self.new.execute(_KNOWN_ENTRY, known).fetchone():
                insert_rows(self.new, "logs", [row])

    def _take_workers(self, source: sqlite3.Connection, runs: dict[int, int]) -> None:
        for row in rows_of(source, "workers"):
            row["run_id"] = runs[row["run_id"]]
            heartbeat = "SELECT last_heartbeat FROM workers WHERE worker_id = ?"
            known = self.new.execute(heartbeat, (row["worker_id"],)).fetchone()
            if known is None or known[0] < row["last_heartbeat"]:
                insert_rows(self.new, "workers", [row], "INSERT OR REPLACE")


_THERE = """
    SELECT status, output_paths, place FROM index_results JOIN temp.origins USING (run_id, idx)
    WHERE run_id = ? AND idx = ?
"""
_ENTRY = ("run_id", "idx", "timestamp", "level", "logger_name", "message", "worker_id")
_KNOWN_ENTRY = f"""
    SELECT 1 FROM logs WHERE {" AND ".join(f"{name} IS ?" for name in _ENTRY)} AND id <= ?
"""
