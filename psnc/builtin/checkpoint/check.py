"""Look whether a database is sound and its tables agree, without changing a byte of it."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from attrs import frozen

from psnc.builtin.checkpoint.connection import DATABASE_ERRORS, open_to_look, written_at
from psnc.builtin.checkpoint.identity import identity_of
from psnc.builtin.checkpoint.indices import known_runs, problem_of, snapshot, stored_indices
from psnc.builtin.checkpoint.schema import APPLICATION_ID, SCHEMA_VERSION
from psnc.builtin.checkpoint.transfer import rows_of
from psnc.claims import claims_in
from psnc.code_versions import are_versions
from psnc.errors import StoreError

__all__ = ["Finding", "check", "refuse_findings"]

# Of SQLite's own findings, which can be as many as there are rows.
_SHOWN = 20
# So many of the indices that have one problem are named.
_EXAMPLES = 3


@frozen
class Finding:
    """One kind of thing that is wrong.

    Attributes
    ----------
    kind : {"file", "integrity", "run", "index", "reference"}
        What it is about: the file, SQLite's own structures, the configuration of runs, indices
        with their rows, or rows that refer to no run.
    message : str
        One line for a person.
    count : int
        How many there are of the kind.
    """

    kind: str
    message: str
    count: int = 1


def check(path: Path) -> list[Finding]:
    """Return what is wrong with a database; nothing if it is sound.

    Raises
    ------
    StoreError
        If there is no such file, or it is another program's or a newer psnc's.
    """
    identity_of(path)
    before = written_at(path)
    findings = _findings(path)
    if findings and written_at(path) != before:
        # By somebody who has begun since: what was seen may be of two moments.
        findings = _findings(path)
    return findings


def _findings(path: Path) -> list[Finding]:
    findings = list(_lost_log(path))
    with _to_read(path) as readable:
        for kind, look in _LOOKS.items():
            try:
                with closing(open_to_look(readable)) as connection, snapshot(connection):
                    _refuse_newer(connection, path)
                    findings.extend(look(connection))
            except (*DATABASE_ERRORS, TypeError) as error:
                findings.append(Finding(kind, f"cannot be read: {error}"))
                if kind == "file":
                    break
    return findings


@contextmanager
def _to_read(path: Path) -> Iterator[Path]:
    """Yield a database that can be read as it stands: a copy, if that takes changes to it."""
    journal = path.with_name(f"{path.name}-journal")
    if not journal.exists() or not journal.stat().st_size:
        yield path
        return
    # A transaction was cut off, and whoever opens the database rolls it back.
    with tempfile.TemporaryDirectory(prefix="psnc-check-") as directory:
        copy = Path(directory, path.name)
        shutil.copyfile(path, copy)
        shutil.copyfile(journal, copy.with_name(journal.name))
        with closing(sqlite3.connect(copy)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        yield copy


def _lost_log(path: Path) -> Iterator[Finding]:
    wal, index = (path.with_name(path.name + ending) for ending in ("-wal", "-shm"))
    if index.exists() and not wal.exists():
        yield Finding(
            "file",
            f"the write-ahead log {wal.name} is gone: what was recorded last may be missing",
        )


def _refuse_newer(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse what only the write-ahead log says to be of a newer version."""
    ((version,),) = connection.execute("PRAGMA user_version")
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer psnc (schema {version}), and this psnc reads up to "
            f"schema {SCHEMA_VERSION}: upgrade psnc"
        )


def _header(connection: sqlite3.Connection) -> Iterator[Finding]:
    ((version,),) = connection.execute("PRAGMA user_version")
    ((application_id,),) = connection.execute("PRAGMA application_id")
    if (application_id, version) != (APPLICATION_ID, SCHEMA_VERSION):
        said = f"application_id {application_id:#x}, user_version {version}"
        yield Finding("file", f"the header does not say that it is psnc's: {said}")


def _integrity(connection: sqlite3.Connection) -> Iterator[Finding]:
    rows = connection.execute(f"PRAGMA integrity_check({_SHOWN})").fetchall()
    if rows == [("ok",)]:
        return
    for (text,) in rows:
        yield Finding("integrity", " ".join(str(text).removeprefix("*** in database").split()))
    if len(rows) >= _SHOWN:
        yield Finding("integrity", "there is more: these are the first that SQLite found")


def _runs(connection: sqlite3.Connection) -> Iterator[Finding]:
    for run_id, known in known_runs(connection):
        if known is None:
            yield Finding("run", f"run {run_id}: its configuration has another hash than recorded")
    for row in rows_of(connection, "pipeline_runs"):
        if not are_versions(row.get("code_versions")):
            what = "code_versions is not as it was written"
            yield Finding("run", f"run {row['run_id']}: {what}")
        try:
            claims_in(row.get("claims"))
        except ValueError:
            yield Finding("run", f"run {row['run_id']}: what drivers claim of it cannot be read")


def _indices(connection: sqlite3.Connection) -> Iterator[Finding]:
    runs = dict(known_runs(connection))
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for stored in stored_indices(connection):
        problem = problem_of(stored, runs)
        if problem is not None:
            counts[problem] += 1
            named = examples.setdefault(problem, [])
            if len(named) < _EXAMPLES:
                named.append(f"{stored.idx} of run {stored.run_id}")
    for what, count in counts.items():
        shown = ", ".join(examples[what]) + (", …" if count > _EXAMPLES else "")
        noun = "1 index is one of those" if count == 1 else f"{count} indices"
        yield Finding("index", f"{noun} {what}: {shown}", count)


def _references(connection: sqlite3.Connection) -> Iterator[Finding]:
    for table in ("logs", "workers"):
        ((count,),) = connection.execute(
            f"SELECT count(*) FROM {table} "
            "WHERE run_id NOT IN (SELECT run_id FROM pipeline_runs NOT INDEXED)"
        )
        if count:
            yield Finding("reference", f"{count} rows of {table} belong to no run", count)
        # Whether it can be read at all.
        for _ in connection.execute(f"SELECT * FROM {table} NOT INDEXED"):
            pass


_LOOKS = {
    "file": _header,
    "integrity": _integrity,
    "run": _runs,
    "index": _indices,
    "reference": _references,
}


def refuse_findings(path: Path) -> None:
    """Refuse a database that is not sound.

    Raises
    ------
    StoreError
        If there is any finding.
    """
    findings = check(path)
    if findings:
        raise StoreError(f"{path} is damaged ({findings[0].message}): see psnc check, psnc recover")
