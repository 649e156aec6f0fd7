"""ASEDatabaseSource: the rows of SQLite and JSON databases of ``ase.db``."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from psnc.errors import SourceError
from psnc.stages import Param
from psnc_atm.atomic_data import AtomicData
from psnc_atm.row_codec import structure_of_row
from psnc_atm.sqlite_rows import COLUMNS, structure_of_columns
from psnc_atm.structure_files import (
    FileRun,
    StructureFiles,
    bad_entry,
    cause_of,
    content_digest,
)

__all__ = ["ASEDatabaseSource"]

# Few enough that no transaction is open for long, and that memory stays flat.
_ROWS_AT_A_TIME = 64
_OLDEST, _NEWEST = 6, 9
_WAIT_SECONDS = 20.0
_STATE = (
    "SELECT count(*), min(id), max(id), total(mtime), min(unique_id), max(unique_id) FROM systems"
)
_BAD_ROW = (
    *(ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError),
    sqlite3.Error,
)


class ASEDatabaseSource(StructureFiles):
    """Structures from the SQLite (``.db``) and JSON (``.json``) databases that ``ase.db`` writes.

    Files are taken in the order of their names, the rows of a file in the order of their ids. Each
    file is an index, or each run of ``rows_per_index`` rows of a file. A file that cannot be read
    fails its own index only; without ``rows_per_index`` no file is opened before its index runs.

    Databases are opened for reading alone, and closed after a few rows. A JSON database is read
    whole for each index. ``.aselmdb`` files are for :class:`ASELMDBSource`.

    Parameters
    ----------
    path : str or Path
        A database, a directory, or a pattern such as ``"runs/*/results.db"``.
    selection : str, optional
        Which rows, as ``ase.db`` has it: ``"Cu>2,energy<0,relaxed=1"``.
    rows_per_index : int, optional
        Rows an index; the last index of each file may have fewer. By default a file is an index.
    pattern : str, optional
        Which files of a directory; by default ``"*.db"``.

    Raises
    ------
    psnc.SourceError
        If there is no such file; if a file or row of an index cannot be read.
    """

    name = "ase-db"
    description = "Structures from SQLite and JSON databases of ase.db"

    def __init__(
        self,
        path: Annotated[
            str | Path, Param(description="A database, a directory, or a pattern for files")
        ],
        selection: Annotated[
            str | None, Param(description="Which rows, as ase.db has it: Cu>2,relaxed=1")
        ] = None,
        rows_per_index: Annotated[
            int | None, Param(description="Rows an index; by default a file is an index")
        ] = None,
        pattern: Annotated[
            str | None, Param(description="Which files of a directory; by default *.db")
        ] = None,
    ) -> None:
        directory = Path(path).expanduser().is_dir()
        super().__init__(path, pattern or ("*.db" if directory else None), rows_per_index, "row")
        for name in self._names:
            if name.endswith(".aselmdb"):
                raise SourceError(f"{self._root / name} is an LMDB file; use ASELMDBSource")
        self._selection = selection

    def __getitem__(self, index: int) -> Iterator[AtomicData]:
        """Yield the structures of one index, decoding each as it is asked for."""
        run = self._run_of(index)
        rows = _json_rows if _is_json(run.path) else _sqlite_rows
        yield from rows(run.path, self._ids_of(run))

    def atom_counts(self, index: int) -> NDArray[np.int64]:
        """Return the number of atoms of each structure of one index, without decoding rows."""
        run = self._run_of(index)
        ids = self._ids_of(run)
        if _is_json(run.path):
            counts = [len(structure) for structure in _json_rows(run.path, ids)]
        else:
            counts = [int(count) for _, (count,) in _columns_of(run.path, ids, "natoms")]
        return np.array(counts, dtype=np.int64)

    def input_identity(self) -> dict[str, Any]:
        """Say what the indices are made from, so that a later run can tell whether it changed.

        Of each SQLite file the number of rows, the sum of the times at which they were written, and
        the first and last of their ids and unique ids: ``ase.db`` changes them with every change,
        and a copy has the same. Of each JSON file its size and a digest.
        """
        return {"selection": self._selection, **super().input_identity()}

    def _state_of(self, path: Path) -> list[Any]:
        try:
            if _is_json(path):
                return [path.stat().st_size, content_digest(path)]
            with _database(path) as connection:
                return [*connection.execute(_STATE).fetchone()]
        except (SourceError, sqlite3.Error, OSError):
            return [None]

    def _count(self, path: Path) -> int:
        return len(self._all_ids(path))

    def _ids_of(self, run: FileRun) -> list[int]:
        ids = self._all_ids(run.path)
        return ids if run.size is None else ids[run.start : run.start + run.size]

    def _all_ids(self, path: Path) -> list[int]:
        if self._selection is not None:
            return sorted(_selected_ids(path, self._selection))
        if _is_json(path):
            return sorted(_json_database(path))
        with _database(path) as connection:
            try:
                return [row for (row,) in connection.execute("SELECT id FROM systems ORDER BY id")]
            except sqlite3.Error as error:
                raise _bad_file(path, error) from error


def _is_json(path: Path) -> bool:
    return path.suffix == ".json"


def _sqlite_rows(path: Path, ids: Sequence[int]) -> Iterator[AtomicData]:
    for row, values in _columns_of(path, ids, *COLUMNS):
        try:
            structure = structure_of_columns(values)
        except _BAD_ROW as error:
            raise bad_entry(path, "row", row, error) from error
        yield structure


def _columns_of(
    path: Path, ids: Sequence[int], *columns: str
) -> Iterator[tuple[int, Sequence[Any]]]:
    """Yield each row's id and columns; between a few rows the file is not open."""
    for start in range(0, len(ids), _ROWS_AT_A_TIME):
        yield from _some_columns(path, ids[start : start + _ROWS_AT_A_TIME], columns)


def _some_columns(
    path: Path, ids: Sequence[int], columns: Sequence[str]
) -> list[tuple[int, Sequence[Any]]]:
    select = f"SELECT {', '.join(columns)} FROM systems WHERE id = ?"
    found: list[tuple[int, Sequence[Any]]] = []
    with _database(path) as connection:
        for row in ids:
            try:
                values = connection.execute(select, (row,)).fetchone()
            except sqlite3.Error as error:
                raise bad_entry(path, "row", row, error) from error
            if values is None:
                raise SourceError(f"{path}, row {row}: the row has gone; run the index again")
            found.append((row, values))
    return found


@contextmanager
def _database(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a database that is there, for reading alone."""
    try:
        path.open("rb").close()
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_WAIT_SECONDS
        )
    except (OSError, sqlite3.Error) as error:
        raise _bad_file(path, error) from error
    with closing(connection):
        _check_version(path, connection)
        yield connection


def _check_version(path: Path, connection: sqlite3.Connection) -> None:
    try:
        (tables,) = connection.execute(
            "SELECT count(*) FROM sqlite_master WHERE name IN ('systems', 'information')"
        ).fetchone()
        if tables < 2:
            raise SourceError(f"{path}: no database of ase.db; leave it out, or mend its name")
        (version,) = connection.execute(
            "SELECT value FROM information WHERE name = 'version'"
        ).fetchone()
    except (sqlite3.Error, TypeError) as error:
        raise _bad_file(path, error) from error
    if not _OLDEST <= int(version) <= _NEWEST:
        raise SourceError(
            f"{path}: has version {version} of ase.db's format, not {_OLDEST} to {_NEWEST}; "
            "convert it with python -m ase.db.convert"
        )


def _json_rows(path: Path, ids: Sequence[int]) -> Iterator[AtomicData]:
    rows = _json_database(path)
    for row in ids:
        try:
            structure = structure_of_row(rows[row])
        except _BAD_ROW as error:
            raise bad_entry(path, "row", row, error) from error
        yield structure


def _json_database(path: Path) -> Mapping[int, dict[str, Any]]:
    try:
        # Not orjson, which rounds integers of more than 64 bits.
        content = json.loads(path.read_bytes())
        rows = {int(key): row for key, row in content.items() if key.isdecimal()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise _bad_file(path, error) from error
    if not rows and "ids" not in content:
        raise SourceError(f"{path}: no database of ase.db; leave it out, or mend its name")
    return rows


def _selected_ids(path: Path, selection: str) -> Iterator[int]:
    """Have ``ase.db`` select rows, by a connection that cannot write."""
    from ase.db.jsondb import JSONDatabase
    from ase.db.sqlite import SQLite3Database

    try:
        if _is_json(path):
            for row in JSONDatabase(str(path)).select(selection, include_data=False):
                yield row.id
            return
        with _database(path) as connection:
            database = SQLite3Database(str(path))
            # As inside of a with block of its own, but for the connection.
            database.connection, database.change_count = connection, 0
            columns = ["id", "numbers", "positions", "cell", "pbc"]
            for row in database.select(selection, include_data=False, columns=columns):
                yield row.id
    except SourceError:
        raise
    except Exception as error:  # ase.db raises whatever a wrong selection leads it to
        raise SourceError(
            f"{path}: selection {selection!r} fails ({cause_of(error)}); mend it, or "
            "replace the file with a good copy"
        ) from error


def _bad_file(path: Path, error: BaseException) -> SourceError:
    return SourceError(f"{path}: {cause_of(error)}; replace it with a good copy")
