"""The tables of a checkpoint database, and how one of an earlier psnc gets the columns it lacks."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cache
from importlib import resources

from attrs import frozen

__all__ = [
    "APPLICATION_ID",
    "SCHEMA_VERSION",
    "TABLES",
    "WITHOUT_ROWID",
    "Column",
    "add_missing_columns",
    "are_plausible",
    "columns_from",
    "columns_of",
    "create_tables",
    "missing_columns",
    "schema_columns",
    "table_columns",
]

APPLICATION_ID = 0x70736E63  # "psnc"
SCHEMA_VERSION = 1

TABLES = (
    "pipeline_runs",
    "index_results",
    "stage_metrics",
    "output_files",
    "filter_artifacts",
    "logs",
    "workers",
)

# Their rows have no numbers, and are stored by key.
WITHOUT_ROWID = ("index_results", "stage_metrics")


@frozen
class Column:
    """One column: its name, its type, whether it takes NULL, its place in the primary key or 0."""

    name: str
    type: str
    nullable: bool
    key_place: int


def create_tables(connection: sqlite3.Connection) -> None:
    """Make the tables of this version, and mark the database as psnc's."""
    for statement in _statements():
        connection.execute(statement)
    connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def _statements() -> Iterator[str]:
    text = resources.files(__package__).joinpath("schema.sql").read_text(encoding="utf-8")
    pending = ""
    for line in text.splitlines():
        pending += line.partition("--")[0].rstrip() + "\n"
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""


@cache
def schema_columns() -> dict[str, tuple[Column, ...]]:
    """Return the columns of each table as this version makes it."""
    with closing(sqlite3.connect(":memory:")) as connection:
        create_tables(connection)
        return {table: _columns(connection, table) for table in TABLES}


@cache
def table_columns(table: str) -> tuple[str, ...]:
    """Return the names of the columns that this version gives a table, in order."""
    return tuple(column.name for column in schema_columns()[table])


def columns_from(statement: str, table: str) -> tuple[Column, ...]:
    """Return the columns of a table that a statement makes; none if it makes no such table."""
    with closing(sqlite3.connect(":memory:")) as connection:
        try:
            connection.execute(statement)
        except (sqlite3.Error, sqlite3.Warning, TypeError):
            return ()
        return _columns(connection, table)


def columns_of(connection: sqlite3.Connection, table: str) -> tuple[str, ...]:
    """Return the names of the columns that a table has in a database, in order.

    Raises
    ------
    sqlite3.DatabaseError
        If some have become others.
    """
    names = tuple(column.name for column in _columns(connection, table))
    if not are_plausible(names, table):
        # In SQLite's words, who does not compare names.
        raise sqlite3.DatabaseError(f"malformed columns of {table}")
    return names


def are_plausible(names: Sequence[str], table: str) -> bool:
    """Tell whether columns are those of this, an earlier or a later psnc.

    An earlier one has some less and a later one some more. A name that is not known in place of one
    that is missing was damaged, and would hide a checksum.
    """
    known = table_columns(table)
    return set(names) <= set(known) or set(names) >= set(known)


def _columns(connection: sqlite3.Connection, table: str) -> tuple[Column, ...]:
    query = 'SELECT name, type, "notnull", pk FROM pragma_table_info(?)'
    rows = connection.execute(query, (table,)).fetchall()
    return tuple(Column(row[0], row[1], not (row[2] or row[3]), row[3]) for row in rows)


def missing_columns(connection: sqlite3.Connection) -> list[tuple[str, Column]]:
    """Return the columns that an earlier psnc's tables lack, each with its table."""
    missing = []
    for table, columns in schema_columns().items():
        there = columns_of(connection, table)
        missing += [(table, column) for column in columns if there and column.name not in there]
    return missing


def add_missing_columns(connection: sqlite3.Connection) -> None:
    """Give an earlier psnc's tables the columns that came later; call it within a transaction.

    All of them take NULL, so that the earlier psnc goes on to write its rows.
    """
    for table, column in missing_columns(connection):
        connection.execute(f"ALTER TABLE {table} ADD COLUMN {column.name} {column.type}")
