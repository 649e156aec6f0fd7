"""Salvage a damaged database into a new file: what is whole comes across, the rest runs again."""

from __future__ import annotations

import fcntl
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from attrs import Factory, define

from psnc.builtin.checkpoint.check import refuse_findings
from psnc.builtin.checkpoint.connection import DATABASE_ERRORS, raise_store_error
from psnc.builtin.checkpoint.identity import identity_of
from psnc.builtin.checkpoint.indices import (
    known_run,
    known_runs,
    problem_of,
    result_of,
    stored_indices,
)
from psnc.builtin.checkpoint.new_file import new_database, refuse_existing
from psnc.builtin.checkpoint.runs import OwnRun, run_rows
from psnc.builtin.checkpoint.salvage import salvage_pages
from psnc.builtin.checkpoint.schema import TABLES
from psnc.builtin.checkpoint.transfer import insert_index, insert_rows, rows_of
from psnc.code_versions import are_versions
from psnc.drafts import draft_directory
from psnc.errors import StoreError

__all__ = ["Recovered", "in_use", "recover"]


@define
class Recovered:
    """What came across.

    Attributes
    ----------
    by_page : bool
        Whether SQLite could not read the file, so that its pages were read one by one.
    lost_pages : int
        Pages of tables that were lost.
    unknown_pages : int
        Pages that were left alone, since their rows may have been deleted before.
    kept : Counter
        Rows by table.
    dropped : Counter
        Rows that were there and did not come across, by table.
    completed, failed : int
        Indices that came across.
    reasons : Counter
        Indices that did not, by what was wrong with them.
    """

    by_page: bool = False
    lost_pages: int = 0
    unknown_pages: int = 0
    kept: Counter[str] = Factory(Counter)
    dropped: Counter[str] = Factory(Counter)
    completed: int = 0
    failed: int = 0
    reasons: Counter[str] = Factory(Counter)

    @property
    def line(self) -> str:
        """The counts in one line."""
        parts = [f"{self.completed} completed and {self.failed} failed indices came across"]
        if self.reasons:
            parts.append(f"{sum(self.reasons.values())} were not whole and run again")
        if self.lost_pages:
            parts.append(f"{self.lost_pages} pages were lost, and their indices run again")
        return "; ".join(parts)


def recover(path: Path, output: Path, own: OwnRun | None = None) -> Recovered:
    """Write what is whole in a database to a new file, and leave the database as it is.

    Parameters
    ----------
    path : Path
        The database.
    output : Path
        The new file.
    own : OwnRun, optional
        The run that is about to resume, whose configuration is known in any case.

    Raises
    ------
    StoreError
        If the output is there already, the database is another program's or in use, or nothing of
        it can be read.
    """
    refuse_existing(output)
    identity_of(path)
    if in_use(path):
        raise StoreError(f"{path} is in use by another process: end that first")
    if not output.parent.is_dir():
        raise StoreError(f"{output.parent} is no directory: choose another place for the new file")
    try:
        found = _recover_aside(path, output, own)
    except OSError as error:
        raise_store_error(output, "write", error)
    refuse_findings(output)
    return found


def _recover_aside(path: Path, output: Path, own: OwnRun | None) -> Recovered:
    found = Recovered()
    # Beside the new file, where there has to be room anyway.
    with draft_directory(output) as directory:
        copy = _copy(path, directory / "by-sqlite")
        with _readable(path, copy, directory, found) as source, new_database(output) as new:
            _rebuild(path, own, source, new, found)
    return found


def in_use(path: Path) -> bool:
    """Tell whether a process has the database open: SQLite then holds a lock on these bytes.

    Not for a file that this process has open; its locks would go.
    """
    try:
        with open(path, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 510, 0x40000002)
    except BlockingIOError:
        return True
    except OSError:
        # Who may not write to it cannot ask.
        return False
    return False


def _copy(path: Path, directory: Path) -> Path:
    directory.mkdir()
    for ending in ("", "-wal", "-journal"):
        beside = path.with_name(path.name + ending)
        if beside.exists():
            shutil.copyfile(beside, directory / f"copy.db{ending}")
    return directory / "copy.db"


@contextmanager
def _readable(
    path: Path, copy: Path, directory: Path, found: Recovered
) -> Iterator[sqlite3.Connection]:
    """Yield a connection to the rows: to the copy if it is sound, else to what its pages have."""
    # A transaction that was cut off is rolled back by this, or what waits in the log is written.
    if _is_sound(copy):
        with closing(sqlite3.connect(copy)) as connection:
            yield connection
        return
    found.by_page = True
    journal = path.with_name(f"{path.name}-journal")
    rolled_back = journal.exists() and journal.stat().st_size > 0
    pages = copy if rolled_back else _copy(path, directory / "by-page")
    with closing(sqlite3.connect(directory / "rows.db", isolation_level=None)) as staging:
        staging.execute("PRAGMA journal_mode=OFF")
        staging.execute("PRAGMA synchronous=OFF")
        staging.execute("BEGIN")
        salvage = salvage_pages(pages, staging)
        staging.execute("COMMIT")
        found.lost_pages, found.unknown_pages = salvage.lost_pages, salvage.unknown_pages
        yield staging


def _is_sound(copy: Path) -> bool:
    if not copy.exists() or not copy.stat().st_size:
        return False
    try:
        with closing(sqlite3.connect(copy)) as connection:
            if connection.execute("PRAGMA integrity_check(1)").fetchall() != [("ok",)]:
                return False
            for _ in known_runs(connection):
                pass
            for _ in stored_indices(connection):
                pass
            for table in ("logs", "workers"):
                for _ in connection.execute(f"SELECT * FROM {table}"):
                    pass
    except (*DATABASE_ERRORS, TypeError):
        return False
    return True


def _rebuild(
    path: Path,
    own: OwnRun | None,
    source: sqlite3.Connection,
    new: sqlite3.Connection,
    found: Recovered,
) -> None:
    rows = run_rows(source, own)
    runs = {run_id: known_run(row) for run_id, row in rows.items()}
    for row in rows.values():
        if not are_versions(row.get("code_versions")):
            row["code_versions"] = None
    insert_rows(new, "pipeline_runs", rows.values())
    if not runs:
        raise _nothing_known(path, source)
    for stored in stored_indices(source):
        problem = problem_of(stored, runs)
        if problem is not None:
            found.reasons[problem] += 1
            continue
        insert_index(new, stored, stored.run_id)
        is_completed = result_of(stored)["status"] == "completed"
        found.completed += is_completed
        found.failed += not is_completed
    for table in ("logs", "workers"):
        # Of two rows with one key nobody knows which is right; neither decides anything.
        for run_id in runs:
            insert_rows(new, table, rows_of(source, table, run_id), "INSERT OR IGNORE")
    for table in TABLES:
        query = f"SELECT count(*) FROM {table}"
        found.kept[table] = new.execute(query).fetchone()[0]
        found.dropped[table] = source.execute(query).fetchone()[0] - found.kept[table]


def _nothing_known(path: Path, source: sqlite3.Connection) -> StoreError:
    if any(source.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in TABLES):
        return StoreError(
            f"{path}: the configuration of no run can be read, without which nothing else has a "
            "meaning; it was left as it is: run that pipeline with --recover, which knows its own"
        )
    return StoreError(f"{path}: nothing of a psnc database is in it, and it was left as it is")
