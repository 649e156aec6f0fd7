"""Real databases, and ways to damage them as failing disks and people do."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from stages_for_tests import Discard, FailOn, Log, Numbers, Sum

from psnc import Pipeline, run_pipeline
from psnc.builtin.checkpoint.schema import TABLES

PAGE = 4096

Rows = dict[str, list[tuple[Any, ...]]]


def make_database(path: Path, count: int = 60, bad: int | None = 7) -> Pipeline[int]:
    """Record a run with something in every table, and leave nothing beside the file."""
    pipeline = Pipeline(
        source=Numbers(count),
        filters=[Log(30), Sum(), FailOn([] if bad is None else [bad])],
        sink=Discard(files=2),
        db_file=path,
    )
    run_pipeline(pipeline)
    pipeline.__dict__["_run"].close()
    assert not path.with_name(f"{path.name}-wal").exists()
    return pipeline


def rows_of(path: Path) -> Rows:
    """Return all rows of all tables."""
    with closing(sqlite3.connect(path)) as connection:
        return {
            table: sorted(connection.execute(f"SELECT * FROM {table}"), key=repr)
            for table in TABLES
        }


def change(path: Path, *statements: str) -> None:
    """Change a database as somebody with another program might."""
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def root_page(path: Path, name: str) -> int:
    """Return the number of a table's or index's first page."""
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT rootpage FROM sqlite_schema WHERE name = ?"
        page: int = connection.execute(query, (name,)).fetchone()[0]
        return page


def overwrite(path: Path, offset: int, content: bytes) -> None:
    """Write bytes into the middle of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def zero_page(path: Path, number: int) -> None:
    """Fill a page with zeros."""
    overwrite(path, (number - 1) * PAGE, b"\0" * PAGE)


def copy(path: Path, to: Path) -> Path:
    """Copy a database without what is beside it."""
    shutil.copyfile(path, to)
    return to


# --- files that are no database of this psnc --------------------------------------------------


def foreign(path: Path) -> None:
    """Make a database of another program."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")


def newer(path: Path) -> None:
    """Make a database of a later psnc."""
    make_database(path, 2)
    change(path, "PRAGMA user_version=2")


def text(path: Path) -> None:
    """Make a file of text."""
    path.write_text("no database at all\n" * 1000)


def zeros(path: Path) -> None:
    """Make a file of nothing but zeros."""
    path.write_bytes(b"\0" * 10 * PAGE)
