"""What a resumed run and a gather rely on is compared with its checksum whenever it is read.

A result that is not as it was written is an error, and never a result. What no decision depends on,
times and log entries, is not compared here; ``psnc check`` does so with all that has a checksum.
"""

from __future__ import annotations

import gc
import json
import sqlite3
from abc import abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any
from zlib import crc32

from psnc.builtin.checkpoint.checksums import result_checksum
from psnc.builtin.checkpoint.connection import DATABASE_ERRORS, damaged, raise_store_error
from psnc.builtin.checkpoint.indices import (
    KnownRun,
    Problem,
    StoredIndex,
    known_runs,
    problem_of,
    result_of,
    snapshot,
    stored_indices,
)
from psnc.builtin.checkpoint.schema import columns_of
from psnc.errors import StoreError
from psnc.records import OutputFacts
from psnc.sql_store import Rows, SQLStore, is_among
from psnc.store import RecordedFile

__all__ = ["VerifiedStore"]


class VerifiedStore(SQLStore):
    """A store on an SQLite file that hands out nothing but what was recorded.

    Attributes
    ----------
    path : Path
        The database file.
    """

    path: Path

    def lookup(self, index: int) -> tuple[str, ...] | None:
        """Return the output paths of a completed index, written or still waiting."""
        pending = self.pending(index)
        if pending is not None and pending.status == "completed":
            return pending.output_paths
        # By the shortest way: every index that is to run is asked for first.
        query = self._results_query("output_paths", "idx = ? AND status = 'completed'")
        with self.gate:
            try:
                row = self._connection().execute(query, (self.run_id, index)).fetchone()
            except DATABASE_ERRORS as error:
                raise_store_error(self.path, "read", error)
        if row is None:
            return None
        paths, checksum = row
        if checksum is not None:
            self._compare(index, "completed", paths, None, checksum)
        return tuple(self._parsed(paths))

    def completed_outputs(self) -> dict[int, list[str]]:
        """Return the output paths of every completed index."""
        found: dict[int, list[str]] = {}
        with self._completed() as chunks, _without_search_for_cycles():
            for rows in chunks:
                # One parse of the joined text is several times faster than one a row.
                paths = self._parsed(f"[{','.join([row[1] for row in rows])}]")
                if len(paths) != len(rows):
                    raise self._no_arrays()
                found.update(zip([row[0] for row in rows], paths, strict=True))
        return found

    def completed_indices(self) -> set[int]:
        """Return the completed indices."""
        with self._completed() as chunks:
            return {row[0] for rows in chunks for row in rows}

    def failed_indices(self) -> dict[int, str]:
        """Return the failed indices with their error messages."""
        found = {}
        query = self._results_query("idx, output_paths, error", "status = 'error' ORDER BY idx")
        with self.read_in_chunks(query, self.run_id) as chunks:
            for index, paths, error, checksum in chain.from_iterable(chunks):
                if checksum is not None:
                    self._compare(index, "error", paths, error, checksum)
                found[index] = error
        return found

    def output_paths(self, index: int) -> list[str]:
        """Return the output paths of an index in the sink's order."""
        rows = self._results("status, output_paths, error", "idx = ?", index)
        for status, paths, error, checksum in rows:
            if checksum is not None:
                self._compare(index, status, paths, error, checksum)
            return list(self._parsed(paths))
        return []

    def artifacts(self, index: int | None = None) -> dict[int, list[Mapping[str, Any]]]:
        """Return filter artifacts by index."""
        found: dict[int, list[Mapping[str, Any]]] = {}
        with self.gate:
            try:
                with snapshot(self._connection()) as connection:
                    runs = dict(known_runs(connection))
                    for stored in stored_indices(connection, self.run_id, index):
                        self._require_whole(stored, runs)
                        if stored.artifacts:
                            found[stored.idx] = _as_dicts(stored)
            except TypeError as error:
                raise damaged(self.path, "there are keys that are no numbers") from error
            except DATABASE_ERRORS as error:
                raise_store_error(self.path, "read", error)
        return found

    def recorded_files(
        self, indices: Sequence[int]
    ) -> Iterator[tuple[int, Sequence[RecordedFile]]]:
        """Yield each completed index of these with its files, reading some at a time."""
        following, last = (indices[0], indices[-1]) if indices else (0, -1)
        while portion := self._whole_indices(following, last):
            shared = self.shared_outputs(portion[0].idx, portion[-1].idx)
            for stored in portion:
                if result_of(stored)["status"] == "completed" and is_among(stored.idx, indices):
                    yield stored.idx, self._files_of(stored, shared)
            following = portion[-1].idx + 1

    def _whole_indices(self, first: int, last: int) -> list[StoredIndex]:
        """Return the first indices of a span, as many as are read at a time."""
        with self.gate:
            try:
                with snapshot(self._connection()) as connection:
                    runs = dict(known_runs(connection))
                    stored = stored_indices(connection, self.run_id, span=(first, last))
                    portion = list(islice(stored, _PORTION))
            except DATABASE_ERRORS as error:
                raise_store_error(self.path, "read", error)
        for each in portion:
            self._require_whole(each, runs)
        return portion

    def _files_of(
        self, stored: StoredIndex, shared: Container[tuple[int, int]]
    ) -> list[RecordedFile]:
        # The column path cannot hold every name; output_paths can.
        paths = self._parsed(result_of(stored)["output_paths"])
        outputs = [
            RecordedFile(path, OutputFacts(*facts), (stored.idx, seq) in shared)
            for path, (seq, _, *facts) in zip(paths, stored.outputs, strict=True)
        ]
        return outputs + [RecordedFile(path, is_artifact=True) for _, path, _ in stored.artifacts]

    def _require_whole(self, stored: StoredIndex, runs: Mapping[int, KnownRun | None]) -> None:
        problem = problem_of(stored, runs)
        if problem not in (None, Problem.BEYOND_THE_END):
            raise damaged(self.path, f"index {stored.idx} is one of those {problem}")

    def refuse_damaged_runs(self) -> None:
        """Refuse to record beside runs that are not as they were written.

        Such a run is not found by its configuration, and would be begun anew without a word.

        Raises
        ------
        StoreError
            If there are any, or results of a run that is not there.
        """
        connection = self._connection()
        runs = dict(known_runs(connection))
        for run_id, known in runs.items():
            if known is None:
                raise damaged(self.path, f"the configuration of run {run_id} is not as written")
        for extreme in ("min", "max"):
            ((run_id,),) = connection.execute(f"SELECT {extreme}(run_id) FROM index_results")
            if run_id is not None and run_id not in runs:
                raise damaged(self.path, f"there are results of run {run_id}, which is missing")

    def unreadable_claims(self) -> StoreError:
        """Return the error of a database with claims that are not as psnc writes them."""
        return damaged(self.path, f"what drivers claim of run {self.run_id} cannot be read")

    def unreadable_code_versions(self) -> StoreError:
        """Return the error of a database whose code versions are not as psnc writes them."""
        what = f"code_versions of run {self.run_id} is not as it was written"
        return damaged(self.path, what)

    def column(self, table: str, name: str) -> str:
        """Return a column, or ``NULL`` where an earlier psnc made the table."""
        there = self._columns.get(table)
        if there is None:
            with self.gate:
                try:
                    there = columns_of(self._connection(), table)
                except DATABASE_ERRORS as error:
                    raise_store_error(self.path, "read", error)
            self._columns[table] = there
        return name if name in there else "NULL"

    # --- the machinery ------------------------------------------------------------------------

    @cached_property
    def _columns(self) -> dict[str, tuple[str, ...]]:
        """The columns of each table that somebody has asked for."""
        return {}

    @abstractmethod
    def _connection(self) -> sqlite3.Connection:
        """Return the calling thread's connection; called with the gate held."""

    @contextmanager
    def _completed(self) -> Iterator[Iterable[Rows]]:
        """Have index, paths and checksum of every completed index, which are as written."""
        query = self._results_query("idx, output_paths", "status = 'completed'")
        with self.read_in_chunks(query, self.run_id) as chunks:
            yield map(self._as_written, chunks)

    def _as_written(self, rows: Rows) -> Rows:
        run_id = self.run_id
        for index, paths, checksum in rows:
            # In line, for the sake of a million rows; without a checksum it is of an earlier psnc.
            if checksum is None:
                if type(index) is int and type(paths) is str:
                    continue
            elif checksum == crc32(f"{run_id}\0{index}\0completed\0{paths}\0".encode()):
                continue
            raise self._not_as_written(index)
        return rows

    def _results(self, columns: str, condition: str, *arguments: Any) -> Rows:
        """Return these columns and the checksum of results of the selected run."""
        query = self._results_query(columns, condition)
        return self.read(query, self.run_id, *arguments)[0]

    def _results_query(self, columns: str, condition: str) -> str:
        checksum = self.column("index_results", "checksum")
        return f"SELECT {columns}, {checksum} FROM index_results WHERE run_id = ? AND {condition}"

    def _compare(
        self, index: int, status: str, paths: str, error: str | None, checksum: int
    ) -> None:
        if checksum != result_checksum(self.run_id, index, status, paths, error):
            raise self._not_as_written(index)

    def _not_as_written(self, index: int) -> StoreError:
        return damaged(self.path, f"the result of index {index} is not as it was written")

    def _parsed(self, paths: str) -> list[Any]:
        try:
            parsed: list[Any] = json.loads(paths)
        except (ValueError, TypeError):
            raise self._no_arrays() from None
        return parsed

    def _no_arrays(self) -> StoreError:
        return damaged(self.path, "output_paths are no JSON arrays")


@contextmanager
def _without_search_for_cycles() -> Iterator[None]:
    """Keep Python from going through a million growing lists again and again, for nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# Indices in one query.
_PORTION = 1000


def _as_dicts(stored: StoredIndex) -> list[Mapping[str, Any]]:
    return [
        {"path": path, "filter_name": name, "filter_order": order}
        for order, path, name in stored.artifacts
    ]
