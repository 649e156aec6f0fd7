"""Tell what a file is by its bytes, also where SQLite cannot open it any more.

Only for files that this process has no connection to: closing one takes the connection's locks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from psnc.builtin.checkpoint.schema import APPLICATION_ID, SCHEMA_VERSION
from psnc.errors import StoreError

__all__ = ["Identity", "identity_of", "remains"]

_MAGIC = b"SQLite format 3\0"
# What the statements that make psnc's tables begin with; they are in the file's first page.
_OWN_TABLES = (b"CREATE TABLE pipeline_runs (", b"CREATE TABLE index_results (")


@frozen
class Identity:
    """What the beginning of a file says of it.

    Attributes
    ----------
    has_header : bool
        It begins as SQLite's files do.
    is_ours : bool
        It says that it is psnc's, by its header or by its tables.
    """

    has_header: bool
    is_ours: bool


def identity_of(path: Path) -> Identity:
    """Return what a file is, as far as it can be told.

    Raises
    ------
    StoreError
        If it cannot be read, or is surely another program's or a newer psnc's database.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(65536)
    except FileNotFoundError:
        if any(True for _ in remains(path)):
            start = b""
        else:
            raise StoreError(f"no database at {path}: check the path") from None
    except OSError as error:
        raise StoreError(f"cannot read {path} ({error.strerror}): name a database file") from error
    has_header = start.startswith(_MAGIC)
    application_id = int.from_bytes(start[68:72], "big")
    version = int.from_bytes(start[60:64], "big")
    is_ours = application_id == APPLICATION_ID or all(each in start for each in _OWN_TABLES)
    if has_header and application_id == APPLICATION_ID and version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer psnc (schema {version}), and this psnc reads up to "
            f"schema {SCHEMA_VERSION}: upgrade psnc"
        )
    if has_header and not is_ours:
        raise StoreError(f"{path} is an SQLite database of another program and was left as it is")
    return Identity(has_header, is_ours)


def remains(path: Path) -> Iterator[Path]:
    """Yield the files beside a database that hold a part of it."""
    for ending in ("-wal", "-journal"):
        beside = path.with_name(path.name + ending)
        if beside.exists() and beside.stat().st_size:
            yield beside
