"""Read the rows of psnc's tables from a damaged file, page by page.

Rows count that a table's root leads to. Where a page on the way is lost, those below it are found
by elimination: a page that is in no table or index, and not among the free ones, can belong to that
page only. Where the list of free pages is lost too, such pages are left alone: they may be what is
left of indices that somebody has reset.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

from attrs import define, field

from psnc.builtin.checkpoint.pages import PageFile, TreePage
from psnc.builtin.checkpoint.runs import RUN_HASHES
from psnc.builtin.checkpoint.schema import (
    TABLES,
    WITHOUT_ROWID,
    Column,
    are_plausible,
    columns_from,
    create_tables,
    schema_columns,
)

__all__ = ["Salvage", "salvage_pages"]


@define
class Salvage:
    """What was found, besides the rows themselves.

    Attributes
    ----------
    lost_pages : int
        Pages of tables that are not sound, or are not there.
    unknown_pages : int
        Sound pages with rows that may have been deleted, which were left alone.
    """

    lost_pages: int = 0
    unknown_pages: int = 0


def salvage_pages(path: Path, staging: sqlite3.Connection) -> Salvage:
    """Write every row that can be trusted into tables of another database, without constraints."""
    with closing(PageFile(path)) as file:
        reader = _Reader(file)
        for table in TABLES:
            columns = [column.name for column in schema_columns()[table]]
            staging.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
            marks = ", ".join("?" * len(columns))
            staging.executemany(f"INSERT INTO {table} VALUES ({marks})", reader.rows(table))
        staging.execute(f"CREATE TABLE {RUN_HASHES} (config_hash, run_id)")
        staging.executemany(f"INSERT INTO {RUN_HASHES} VALUES (?, ?)", reader.run_hashes())
        for table, row in reader.rows_of_lost_branches():
            staging.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)
        return reader.salvage


@define
class _Shape:
    """How a table's rows are stored.

    Attributes
    ----------
    columns : tuple of Column
        In the table's order.
    order : list of int
        The place, among these, of each stored value.
    """

    table: str
    columns: tuple[Column, ...]
    root: int
    order: list[int] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.order = list(range(len(self.columns)))
        if self.table in WITHOUT_ROWID:
            # The key comes first.
            self.order.sort(key=lambda place: self.columns[place].key_place or len(self.columns))

    @property
    def has_rowid(self) -> bool:
        return self.table not in WITHOUT_ROWID

    @property
    def key_length(self) -> int:
        return sum(1 for column in self.columns if column.key_place)

    def _is_rowid(self, column: Column) -> bool:
        """Tell whether a column is another name for the rows' numbers, and stored as NULL."""
        return column.key_place == 1 == self.key_length and column.type == "INTEGER"

    def row(self, rowid: int | None, values: Sequence[Any]) -> tuple[Any, ...] | None:
        """Return a record as a row of this version's table; ``None`` if it is none."""
        given: dict[str, Any] = {}
        for place, value in zip(self.order, values, strict=False):
            column = self.columns[place]
            if value is None and self._is_rowid(column):
                value = rowid
            if not _fits(column, value):
                return None
            given[column.name] = value
        wanted = schema_columns()[self.table]
        if any(column.name not in given and not column.nullable for column in wanted):
            return None
        return tuple(given.get(column.name) for column in wanted)


def _fits(column: Column, value: Any) -> bool:
    if value is None:
        return column.nullable
    if column.type == "TEXT":
        return isinstance(value, str)
    return isinstance(value, (int, float)) and (column.nullable or isinstance(value, int))


class _Reader:
    """Walks the tables of a file, and keeps account of its pages."""

    def __init__(self, file: PageFile) -> None:
        self._file = file
        self._reached: set[int] = set()
        self.salvage = Salvage()
        self._shapes = _shapes(file)
        self._stage_names: set[str] = set()

    def rows(self, table: str) -> Iterator[tuple[Any, ...]]:
        """Yield the rows that a table's root leads to."""
        shape = self._shapes[table]
        for page in self._walk(shape, shape.root, None, None):
            for row in _rows_of(shape, page):
                self._learn_names(table, row)
                yield row

    def run_hashes(self) -> Iterator[tuple[Any, ...]]:
        """Yield the hash and number of each run as the index of hashes has them."""
        page = self._file.tree_page(_root_of(self._file, "sqlite_autoindex_pipeline_runs_1"))
        if page is None or page.is_table or not page.is_leaf:
            return
        for cell in page.cells:
            if cell.values is not None and [*map(type, cell.values)] == [str, int]:
                yield cell.values

    def rows_of_lost_branches(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Yield rows on pages that lost pages led to, each with the name of its table."""
        if not self.salvage.lost_pages:
            return
        free = self._file.free_pages()
        for number in range(2, self._file.count + 1):
            if number in self._reached or (free is not None and number in free):
                continue
            page = self._file.tree_page(number)
            found = None if page is None else self._recognise(page)
            if page is None or found is None:
                continue
            if free is None:
                self.salvage.unknown_pages += 1
                continue
            for row in _rows_of(found, page):
                yield found.table, row

    def _walk(self, shape: _Shape, number: int, low: Any, high: Any) -> Iterator[TreePage]:
        """Yield the sound pages of a tree, whose keys are where they belong."""
        page = self._file.tree_page(number) if self._may_be(number) else None
        if (
            page is None
            or page.is_table != shape.has_rowid
            or not _in_order(keys := _keys(shape, page), low, high)
        ):
            self.salvage.lost_pages += 1
            return
        self._reached.add(number)
        yield page
        for child, before, after in zip(page.children, [low, *keys], [*keys, high], strict=False):
            yield from self._walk(shape, child, before, after)

    def _may_be(self, number: int) -> bool:
        return 0 < number <= self._file.count and number not in self._reached

    def _recognise(self, page: TreePage) -> _Shape | None:
        """Return the only table that a page's rows can be of."""
        found = [
            shape
            for shape in self._shapes.values()
            if shape.has_rowid == page.is_table and self._are_all_of(shape, page)
        ]
        return found[0] if len(found) == 1 else None

    def _are_all_of(self, shape: _Shape, page: TreePage) -> bool:
        cells = [cell for cell in page.cells if cell.values is not None]
        for cell in cells:
            assert cell.values is not None
            row = shape.row(cell.rowid, cell.values)
            # Of the same form are the entries of the index of filter_artifacts.
            if row is None or (shape.table == "stage_metrics" and row[3] not in self._stage_names):
                return False
        return bool(cells) and (page.is_leaf or not page.is_table)

    def _learn_names(self, table: str, row: tuple[Any, ...]) -> None:
        if table == "stage_metrics":
            self._stage_names.add(row[3])
        elif table == "pipeline_runs":
            self._stage_names.update(_names_in(row[2]))


def _names_in(config_json: str) -> Iterator[str]:
    try:
        config = json.loads(config_json)
        for stage in (config["source"], *config["filters"], config["sink"]):
            yield stage["class"].rpartition(":")[2].rpartition(".")[2]
    except (ValueError, TypeError, KeyError):
        return


def _rows_of(shape: _Shape, page: TreePage) -> Iterator[tuple[Any, ...]]:
    for cell in page.cells:
        if cell.values is not None:
            row = shape.row(cell.rowid, cell.values)
            if row is not None:
                yield row


def _keys(shape: _Shape, page: TreePage) -> list[Any]:
    if page.is_table:
        return [cell.rowid for cell in page.cells]
    length = shape.key_length
    return [(cell.values or ())[:length] for cell in page.cells]


def _in_order(keys: Iterable[Any], low: Any, high: Any) -> bool:
    """Tell whether keys ascend between two others."""
    # An empty key is that of a record that is lost.
    known = [key for key in (low, *keys) if key not in (None, ())]
    try:
        ascends = all(before < after for before, after in pairwise(known))
        return ascends and (high in (None, ()) or not known or known[-1] <= high)
    except TypeError:
        return False


def _shapes(file: PageFile) -> dict[str, _Shape]:
    """Return how the tables are stored: as the file says, or as every psnc makes them."""
    shapes = {
        table: _Shape(table, schema_columns()[table], _root_of(file, table)) for table in TABLES
    }
    for _, name, _, root, statement in _schema_rows(file, 1, 0):
        if name in shapes and isinstance(root, int):
            columns = columns_from(statement, name)
            if columns and are_plausible([column.name for column in columns], name):
                shapes[name] = _Shape(name, columns, root)
    return shapes


def _root_of(file: PageFile, name: str) -> int:
    """Return the first page of a table or index: as the file says, or where every psnc has it."""
    for _, there, _, root, _ in _schema_rows(file, 1, 0):
        if there == name and isinstance(root, int):
            return root
    with closing(sqlite3.connect(":memory:")) as fresh:
        create_tables(fresh)
        query = "SELECT rootpage FROM sqlite_schema WHERE name = ?"
        root_page: int = fresh.execute(query, (name,)).fetchone()[0]
    return root_page


def _schema_rows(file: PageFile, number: int, depth: int) -> Iterator[tuple[Any, ...]]:
    page = file.tree_page(number)
    if page is None or not page.is_table or depth > 3:
        return
    for cell in page.cells if page.is_leaf else ():
        if cell.values is not None and len(cell.values) == 5:
            yield cell.values
    for child in page.children:
        yield from _schema_rows(file, child, depth + 1)
