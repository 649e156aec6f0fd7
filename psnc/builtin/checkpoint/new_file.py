"""Write a whole new database, which has its name only once it is complete."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from psnc.builtin.checkpoint.connection import (
    DATABASE_ERRORS,
    connect,
    empty_log,
    raise_store_error,
)
from psnc.builtin.checkpoint.identity import remains
from psnc.drafts import draft_directory
from psnc.errors import StoreError

__all__ = ["give_name", "new_database", "refuse_existing"]


@contextmanager
def new_database(output: Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection to a new database, in a transaction, and name it in the end.

    Raises
    ------
    StoreError
        If there is a file of that name, before or after, or it cannot be written.
    """
    refuse_existing(output)
    try:
        # A directory, since SQLite has files of its own beside the database. A process number
        # would not do for a name: in containers it is the same for the next process too, which
        # would go on with what is left of this one.
        with draft_directory(output) as directory:
            aside = directory / output.name
            with closing(connect(aside, create=True, durability="full")) as connection:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
                empty_log(connection)
            _wait_for_disk(aside)
            give_name(aside, output)
    except (*DATABASE_ERRORS, OSError) as error:
        raise_store_error(output, "write", error)


def refuse_existing(output: Path) -> None:
    """Refuse to write where a file is, or what is left of one.

    Raises
    ------
    StoreError
        If there is any.
    """
    for path in (output, *remains(output)):
        if path.exists() or path.is_symlink():
            raise StoreError(f"{path} is there already and was left as it is: choose another name")


def give_name(aside: Path, output: Path) -> None:
    """Give a file its name, unless another has it."""
    try:
        os.link(aside, output)
    except FileExistsError:
        refuse_existing(output)
        raise
    except OSError:
        # Where there are no links. Whoever makes the file first has the name.
        os.close(os.open(output, os.O_CREAT | os.O_EXCL))
        os.replace(aside, output)


def _wait_for_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
