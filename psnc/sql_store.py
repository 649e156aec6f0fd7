"""What the stores on SQL databases have in common: the tables, what is asked of them and deleted.

A store on another database derives from :class:`SQLStore`. It makes the tables, writes groups into
them, and says how a query is run; all questions are asked here.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from itertools import islice
from typing import Any

from psnc.claims import Claim, claims_in, claims_text
from psnc.code_versions import CodeVersion, versions_in, versions_text
from psnc.errors import StoreError
from psnc.group_commit import GroupCommitStore
from psnc.index_ranges import runs_of
from psnc.records import OutputFacts
from psnc.store import Counts, IndexRow, RecordedFile, RunRow, StageTotal

__all__ = ["CHUNK", "Rows", "SQLStore", "Statement", "is_among"]

Statement = tuple[str, tuple[Any, ...]]
Rows = list[tuple[Any, ...]]

# Of so many rows at a time: an answer about a million indices takes little more memory than itself.
CHUNK = 5_000

# In one transaction, for which others wait.
_RANGES_AT_ONCE = 1_000

# Results first: whoever holds the row of a result holds what belongs to it.
INDEX_TABLES = ("index_results", "stage_metrics", "output_files", "filter_artifacts", "logs")
RUN_TABLES = (*INDEX_TABLES, "workers")


class SQLStore(GroupCommitStore):
    """A store whose records are rows of the documented tables.

    The queries name a table ``{schema}.table`` and a parameter ``?``. They are written in what
    SQLite and PostgreSQL understand alike.
    """

    @abstractmethod
    def read(self, query: str, *arguments: Any) -> tuple[list[tuple[Any, ...]], list[str]]:
        """Run a query, and return its rows and the names of their columns.

        Raises
        ------
        StoreError
            If the database cannot be read.
        """

    @contextmanager
    def read_in_chunks(self, query: str, *arguments: Any) -> Iterator[Iterable[Rows]]:
        """Run a query, and have its rows a few at a time, all of one moment.

        This one has them all in memory. A store that can do with less does so.

        Raises
        ------
        StoreError
            If the database cannot be read.
        """
        yield [self.read(query, *arguments)[0]]

    @abstractmethod
    def change(self, statements: Sequence[Statement], *, alone: bool = False) -> None:
        """Write what waits in memory, then run statements in one transaction.

        Parameters
        ----------
        statements : sequence of (str, tuple)
            Each with its arguments.
        alone : bool
            While nobody else writes to the run.

        Raises
        ------
        StoreError
            If the database cannot be written to.
        """

    def exchange(
        self,
        query: str,
        arguments: tuple[Any, ...],
        answer: Callable[[list[tuple[Any, ...]]], Sequence[Statement]],
    ) -> None:
        """Run a query, and the statements that follow from its rows, in one transaction.

        Two of them never overlap, whoever calls them. What waits in memory may still wait. A store
        that has no such transaction keeps no claims, and refuses no second driver.

        Parameters
        ----------
        query : str
            Asks about the selected run.
        arguments : tuple
            Those of the query.
        answer : callable
            Returns statements for rows. May be called again, if a transaction is begun again. If it
            raises, nothing is changed.

        Raises
        ------
        StoreError
            If the database cannot be read or written to.
        """
        raise NotImplementedError

    def unreadable_claims(self) -> StoreError:
        """Return the error of a run whose claims are not as psnc writes them."""
        return StoreError(
            f"{self.place}: what drivers claim of run {self.run_id} cannot be read: if none is at "
            "work, set claims in its row of pipeline_runs to NULL"
        )

    def unreadable_code_versions(self) -> StoreError:
        """Return the error of a run whose code versions are not as psnc writes them."""
        return StoreError(
            f"{self.place}: code_versions of run {self.run_id} is not as it was written: restore "
            "it, or set it to NULL"
        )

    def column(self, table: str, name: str) -> str:
        """Return a column in a query: ``NULL`` where the tables are those of a psnc without it."""
        return name

    # --- recording ----------------------------------------------------------------------------

    def lookup(self, index: int) -> tuple[str, ...] | None:
        """Return the output paths of a completed index, written or still waiting."""
        pending = self.pending(index)
        if pending is not None and pending.status == "completed":
            return pending.output_paths
        rows, _ = self.read(_LOOKUP, self.run_id, index)
        return tuple(json.loads(rows[0][0])) if rows else None

    def worker_gone(self, invocation_id: str, pid: int) -> None:
        """Note that a process died, whatever its workers were at."""
        self.change([(f"{_GO_IDLE} WHERE invocation_id = ? AND pid = ?", (invocation_id, pid))])

    def invocation_over(self, invocation_id: str) -> None:
        """Note that no worker of an invocation is at work any more."""
        self.change([(f"{_GO_IDLE} WHERE invocation_id = ?", (invocation_id,))])

    def change_claims(self, change: Callable[[tuple[Claim, ...]], tuple[Claim, ...]]) -> None:
        """Replace the claims of the run's drivers by what a function makes of them."""
        if type(self).exchange is SQLStore.exchange:
            super().change_claims(change)
            return

        def answer(rows: list[tuple[Any, ...]]) -> list[Statement]:
            earlier = self._claims_in(rows)
            later = change(earlier)
            if later == earlier:
                return []
            return [(_SET_CLAIMS, (claims_text(later), self.run_id))]

        self.exchange(f"SELECT claims {_RUN}", (self.run_id,), answer)

    def record_code(self, code: CodeVersion) -> None:
        """Have it on record what the code of the stages is; for the end of :meth:`attach`."""
        if code.digest in self.code_versions():
            return

        def answer(rows: list[tuple[Any, ...]]) -> list[Statement]:
            # Again, since another process may have added its own.
            versions = self._versions_in(rows) | {code.digest: code}
            return [(_SET_CODE_VERSIONS, (versions_text(versions), self.run_id))]

        self.exchange(f"SELECT code_versions {_RUN}", (self.run_id,), answer)

    def reset(self) -> None:
        """Forget every index, log entry and worker of the run."""
        run = (self.run_id,)
        delete = "DELETE FROM {{schema}}.{} WHERE run_id = ?"
        self.change([(delete.format(table), run) for table in RUN_TABLES], alone=True)
        self.forget_workers()

    def reset_index(self, index: int) -> None:
        """Forget one index and its log entries."""
        key = (self.run_id, index)
        delete = "DELETE FROM {{schema}}.{} WHERE run_id = ? AND idx = ?"
        self.change([(delete.format(table), key) for table in INDEX_TABLES], alone=True)

    def reset_indices(self, indices: Iterable[int]) -> None:
        """Forget indices, and their log entries; those that follow each other at once."""
        delete = "DELETE FROM {{schema}}.{} WHERE run_id = ? AND idx BETWEEN ? AND ?"
        ranges = runs_of(sorted(set(indices)))
        while some := list(islice(ranges, _RANGES_AT_ONCE)):
            keys = [(self.run_id, *ends) for ends in some]
            statements = [(delete.format(table), key) for key in keys for table in INDEX_TABLES]
            self.change(statements, alone=True)

    # --- questions ----------------------------------------------------------------------------

    def runs(self) -> list[RunRow]:
        """List the recorded runs, oldest first."""
        return [RunRow(*row) for row in self.read(_RUNS)[0]]

    def completed_outputs(self) -> dict[int, list[str]]:
        """Return the output paths of every completed index."""
        found: dict[int, list[str]] = {}
        with self._ask_in_chunks("SELECT idx, output_paths", _COMPLETED) as chunks:
            for rows in chunks:
                # One parse of the joined text is several times faster than one a row.
                paths = json.loads(f"[{','.join([row[1] for row in rows])}]")
                found.update(zip([row[0] for row in rows], paths, strict=True))
        return found

    def completed_indices(self) -> set[int]:
        """Return the completed indices."""
        with self._ask_in_chunks("SELECT idx", _COMPLETED) as chunks:
            return {row[0] for rows in chunks for row in rows}

    def recorded_files(
        self, indices: Sequence[int]
    ) -> Iterator[tuple[int, Sequence[RecordedFile]]]:
        """Yield each completed index of these with its files, reading some at a time."""
        following, last = (indices[0], indices[-1]) if indices else (0, -1)
        portion = f"{_COMPLETED} AND {_BETWEEN} ORDER BY idx LIMIT {_PORTION}"
        while rows := self._ask("SELECT idx, output_paths", portion, following, last):
            yield from self._with_files(rows, indices)
            following = rows[-1][0] + 1

    def _with_files(
        self, rows: Sequence[tuple[int, str]], indices: Sequence[int]
    ) -> Iterator[tuple[int, Sequence[RecordedFile]]]:
        """Yield those of a portion of completed indices that are wanted, with their files."""
        span = (rows[0][0], rows[-1][0])
        shared = self.shared_outputs(*span)
        columns = ", ".join(self.column("output_files", each) for each in _FACTS)
        known = self._ask(f"SELECT idx, seq, {columns}", f"{_OUTPUTS} AND {_BETWEEN}", *span)
        facts = {(idx, seq): OutputFacts(*values) for idx, seq, *values in known}
        made: dict[int, list[RecordedFile]] = {}
        order = f"{_ARTIFACTS} AND {_BETWEEN} ORDER BY idx, filter_order, path"
        for index, path in self._ask("SELECT idx, path", order, *span):
            made.setdefault(index, []).append(RecordedFile(path, is_artifact=True))
        for index, paths in rows:
            if is_among(index, indices):
                keyed = [((index, seq), path) for seq, path in enumerate(json.loads(paths))]
                outputs = [
                    RecordedFile(path, facts.get(key, OutputFacts()), key in shared)
                    for key, path in keyed
                ]
                yield index, outputs + made.get(index, [])

    def shared_outputs(self, first: int, last: int) -> set[tuple[int, int]]:
        """Return index and place of those outputs, of indices in a span, that others have too."""
        return {(row[0], row[1]) for row in self._ask("SELECT idx, seq", _SHARED, first, last)}

    def index_names(self) -> dict[int, str]:
        """Return what the source called each completed index."""
        named = f"{_COMPLETED} AND measurements IS NOT NULL"
        with self._ask_in_chunks("SELECT idx, measurements", named) as chunks:
            each = (
                (row[0], json.loads(row[1]).get("index_name")) for rows in chunks for row in rows
            )
            return {index: name for index, name in each if name is not None}

    def code_versions(self) -> dict[str, CodeVersion]:
        """Return what the code of the stages was, by its digest."""
        column = self.column("pipeline_runs", "code_versions")
        return self._versions_in(self._ask(f"SELECT {column}", _RUN))

    def other_code(self, code_digest: str) -> list[str]:
        """Return the digests of other code that completed indices ran with."""
        column = self.column("index_results", "code_digest")
        # Of a million indices none is, as a rule: so they are not sorted.
        rows = self._ask(
            f"SELECT DISTINCT {column}", f"{_COMPLETED} AND {column} <> ?", code_digest
        )
        return sorted(row[0] for row in rows)

    def indices_of_code(self, code_digest: str) -> list[int]:
        """Return the completed indices that ran with such code."""
        rows = self._ask(
            "SELECT idx", f"{_COMPLETED} AND code_digest = ? ORDER BY idx", code_digest
        )
        return [row[0] for row in rows]

    def failed_indices(self) -> dict[int, str]:
        """Return the failed indices with their error messages."""
        failed = f"{_RESULTS} AND status = 'error' ORDER BY idx"
        with self._ask_in_chunks("SELECT idx, error", failed) as chunks:
            return {index: error for rows in chunks for index, error in rows}

    def counts(self, total: int) -> Counts:
        """Return how far the run is, of the indices below ``total``."""
        columns = "SELECT status, count(*), CAST(sum(wall_time_ns) AS bigint)"
        rows = self._ask(columns, f"{_RESULTS} AND idx < ? GROUP BY status", total)
        by_status = {status: (count, wall_time_ns) for status, count, wall_time_ns in rows}
        completed, wall_time_ns = by_status.get("completed", (0, 0))
        failed, _ = by_status.get("error", (0, 0))
        columns = "SELECT min(started_at), max(last_heartbeat), count(*)"
        spans = self._ask(columns, f"{_WORKERS} GROUP BY invocation_id")
        elapsed = sum(
            # A clock that was set back adds nothing.
            max((datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds(), 0.0)
            for first, last, _ in spans
        )
        workers = sum(count for _, _, count in spans)
        return Counts(completed, failed, workers, wall_time_ns, elapsed)

    def workers(self) -> list[dict[str, Any]]:
        """Return the workers table, oldest first."""
        return self._ask_dicts("SELECT *", f"{_WORKERS} ORDER BY started_at, worker_id")

    def claims(self) -> tuple[Claim, ...]:
        """Return the claims of the run's drivers."""
        return self._claims_in(self._ask(f"SELECT {self.column('pipeline_runs', 'claims')}", _RUN))

    def index_for_path(self, path: str) -> int | None:
        """Return the lowest index that produced an output path."""
        rows = self._ask("SELECT min(idx)", f"{_OUTPUTS} AND path = ?", path)
        index: int | None = rows[0][0]
        return index

    def output_paths(self, index: int) -> list[str]:
        """Return the output paths of an index in the sink's order."""
        rows = self._ask("SELECT output_paths", f"{_RESULTS} AND idx = ?", index)
        paths: list[str] = json.loads(rows[0][0]) if rows else []
        return paths

    def artifacts(self, index: int | None = None) -> dict[int, list[Mapping[str, Any]]]:
        """Return filter artifacts by index."""
        rows = self._ask_dicts(
            "SELECT idx, path, filter_name, filter_order",
            *_of_index(_ARTIFACTS, index, "idx, filter_order, path"),
        )
        found: dict[int, list[Mapping[str, Any]]] = {}
        for row in rows:
            found.setdefault(row.pop("idx"), []).append(row)
        return found

    def logs(self, index: int | None = None) -> list[dict[str, Any]]:
        """Return log entries, oldest first."""
        return self._ask_dicts("SELECT *", *_of_index(_LOGS, index, "id"))

    def index_rows(self) -> Iterator[IndexRow]:
        """Yield the recorded indices in order."""
        columns = (
            "idx, status, completed_at, wall_time_ns, peak_memory_bytes, gpu_memory_bytes, error, "
            + self.column("index_results", "attempts")
        )
        for row in self._ask(f"SELECT {columns}", f"{_RESULTS} ORDER BY idx"):
            yield IndexRow(*row)

    def stage_rows(self) -> Iterator[tuple[int, int, str, int]]:
        """Yield the stages' times, sorted by index and stage."""
        columns = "SELECT idx, stage_order, stage_name, wall_time_ns"
        yield from self._ask(columns, f"{_STAGES} ORDER BY idx, stage_order")

    def stage_totals(self) -> list[StageTotal]:
        """Sum the stages' times over the completed indices."""
        # Not by the database, in which text may be sorted as people of some place would.
        return [StageTotal(*row) for row in sorted(self.read(_STAGE_TOTALS, self.run_id)[0])]

    def _claims_in(self, rows: list[tuple[Any, ...]]) -> tuple[Claim, ...]:
        try:
            return claims_in(rows[0][0]) if rows else ()
        except ValueError:
            raise self.unreadable_claims() from None

    def _versions_in(self, rows: list[tuple[Any, ...]]) -> dict[str, CodeVersion]:
        try:
            return versions_in(rows[0][0]) if rows else {}
        except ValueError:
            raise self.unreadable_code_versions() from None

    def _ask(self, columns: str, tables: str, *arguments: Any) -> list[Any]:
        """Run a query whose first parameter is the selected run."""
        return self.read(f"{columns} {tables}", self.run_id, *arguments)[0]

    def _ask_in_chunks(
        self, columns: str, tables: str, *arguments: Any
    ) -> AbstractContextManager[Iterable[Rows]]:
        return self.read_in_chunks(f"{columns} {tables}", self.run_id, *arguments)

    def _ask_dicts(self, columns: str, tables: str, *arguments: Any) -> list[dict[str, Any]]:
        rows, names = self.read(f"{columns} {tables}", self.run_id, *arguments)
        return [dict(zip(names, row, strict=True)) for row in rows]


def is_among(index: int, indices: Sequence[int]) -> bool:
    """Tell whether an index is one of these, which are sorted."""
    place = bisect_left(indices, index)
    return place < len(indices) and indices[place] == index


def _of_index(tables: str, index: int | None, order: str) -> tuple[Any, ...]:
    """Return the end of a query about one index, or about all, and its further argument."""
    if index is None:
        return (f"{tables} ORDER BY {order}",)
    return (f"{tables} AND idx = ? ORDER BY {order}", index)


_RUN = "FROM {schema}.pipeline_runs WHERE run_id = ?"
_SET_CODE_VERSIONS = "UPDATE {schema}.pipeline_runs SET code_versions = ? WHERE run_id = ?"
_SET_CLAIMS = "UPDATE {schema}.pipeline_runs SET claims = ? WHERE run_id = ?"
# Indices in one query: less than it can have parameters.
_PORTION = 500
_FACTS = ("size_bytes", "content_digest")
_BETWEEN = "idx BETWEEN ? AND ?"
_RESULTS = "FROM {schema}.index_results WHERE run_id = ?"
_COMPLETED = f"{_RESULTS} AND status = 'completed'"
_STAGES = "FROM {schema}.stage_metrics WHERE run_id = ?"
_OUTPUTS = "FROM {schema}.output_files WHERE run_id = ?"
_SHARED = """
    FROM {schema}.output_files AS f
    WHERE run_id = ? AND idx BETWEEN ? AND ? AND EXISTS (
        SELECT 1 FROM {schema}.output_files AS another
        WHERE another.path = f.path AND another.run_id = f.run_id AND another.idx <> f.idx
    )
"""
_ARTIFACTS = "FROM {schema}.filter_artifacts WHERE run_id = ?"
_LOGS = "FROM {schema}.logs WHERE run_id = ?"
_WORKERS = "FROM {schema}.workers WHERE run_id = ?"
_GO_IDLE = "UPDATE {schema}.workers SET current_index = NULL"
_LOOKUP = f"SELECT output_paths {_COMPLETED} AND idx = ?"
_RUNS = """
    SELECT run_id, config_hash, config_json, started_at, run_dir, total_indices
    FROM {schema}.pipeline_runs ORDER BY run_id
"""
_STAGE_TOTALS = """
    SELECT stage_order, stage_name, count(*), CAST(sum(s.wall_time_ns) AS bigint),
        max(s.wall_time_ns)
    FROM {schema}.stage_metrics s JOIN {schema}.index_results r
        ON r.run_id = s.run_id AND r.idx = s.idx
    WHERE s.run_id = ? AND r.status = 'completed'
    GROUP BY stage_order, stage_name
"""
