"""ASELMDBSource: the rows of a directory of ``.aselmdb`` files."""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from psnc.errors import SourceError
from psnc.stages import Param, Source
from psnc_atm.atomic_data import AtomicData
from psnc_atm.lmdb_file import LMDBFile, header_of, open_file
from psnc_atm.lmdb_header import fingerprint
from psnc_atm.row_codec import atom_count, decode_row

__all__ = ["ASELMDBSource"]

_SUFFIX = ".aselmdb"
# Rows are copied out of the map this many at a time: enough that the transaction costs nothing,
# few enough that memory stays flat.
_ROWS_AT_A_TIME = 64
# With several indices a file, listing its ids anew for each would cost more than reading few rows.
_KEPT_OPEN = 4
_BAD_ROW = (zlib.error, ValueError, KeyError, TypeError, AttributeError, OverflowError)


class ASELMDBSource(Source[AtomicData]):
    """Structures from ``.aselmdb`` files, the LMDB databases that ``ase-db-backends`` writes.

    The files of a directory are taken in the order of their names, the rows of a file in the
    order of their ids. Each file is an index, or each run of ``rows_per_index`` rows of a file.
    A file that cannot be read fails its own index only; without ``rows_per_index`` no file is
    opened before its index runs.

    Files may be added behind the others between two runs. A run is not resumed where a completed
    index is another file's now.

    Parameters
    ----------
    data_dir : str or Path
        A directory of ``.aselmdb`` files, or one such file.
    rows_per_index : int, optional
        Rows an index; the last index of each file may have fewer. By default a file is an index.

    Raises
    ------
    psnc.SourceError
        If ``data_dir`` is missing or holds no ``.aselmdb`` file; if a file or row of an index
        cannot be read.
    """

    name = "ase-lmdb"
    description = "Structures from a directory of .aselmdb files"

    def __init__(
        self,
        data_dir: Annotated[
            str | Path, Param(description="Directory of .aselmdb files, or one file")
        ],
        rows_per_index: Annotated[
            int | None, Param(description="Rows an index; by default a file is an index")
        ] = None,
    ) -> None:
        if rows_per_index is not None and rows_per_index < 1:
            raise SourceError(f"rows_per_index is {rows_per_index}; give 1 or more, or None")
        self._rows_per_index = rows_per_index
        self._kept_open: deque[LMDBFile] = deque(maxlen=_KEPT_OPEN)
        self._directory, self._names = _list_files(Path(data_dir))

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind: they never cross to another process."""
        return {**self.__dict__, "_kept_open": deque(maxlen=_KEPT_OPEN)}

    def __len__(self) -> int:
        """Return the number of indices."""
        return int(self._first_index[-1])

    def __getitem__(self, index: int) -> Iterator[AtomicData]:
        """Yield the structures of one index, decoding each as it is asked for."""
        file, ids = self._rows_of(index)
        for start in range(0, len(ids), _ROWS_AT_A_TIME):
            some = ids[start : start + _ROWS_AT_A_TIME].tolist()
            for row, value in zip(some, file.values(some), strict=True):
                try:
                    structure = decode_row(value)
                except _BAD_ROW as error:
                    raise _bad_row(file.path, row, error) from error
                yield structure

    def atom_counts(self, index: int) -> NDArray[np.int64]:
        """Return the number of atoms of each structure of one index.

        Inflates no more than the first bytes of each row, which is several times faster than
        reading it.
        """
        file, ids = self._rows_of(index)
        counts = np.empty(len(ids), dtype=np.int64)
        for start in range(0, len(ids), _ROWS_AT_A_TIME):
            some = ids[start : start + _ROWS_AT_A_TIME].tolist()
            for offset, value in enumerate(file.values(some)):
                try:
                    counts[start + offset] = atom_count(value)
                except _BAD_ROW as error:
                    raise _bad_row(file.path, some[offset], error) from error
        return counts

    def input_identity(self) -> dict[str, Any]:
        """Say what the indices are made from, so that a later run can tell whether it changed.

        Of each file its name, its size, the number of its last transaction, which grows whenever
        the content changes, and a digest of its first and last rows, which are others when the
        file is written anew. None of these changes when the file is copied.
        """
        files = []
        for name in self._names:
            path = self._directory / name
            try:
                header = header_of(path)
                content = fingerprint(path, header)
                files.append([name, header.file_size, header.transaction, content])
            except (SourceError, OSError):
                files.append([name, path.stat().st_size if path.exists() else None, None, None])
        return {"rows_per_index": self._rows_per_index, "files": files}

    def index_name(self, index: int) -> str:
        """Return the name of the index's file, and its place in it if that has several."""
        position = self._position_of(index)
        if self._rows_per_index is None:
            return self._names[position]
        start = (index - int(self._first_index[position])) * self._rows_per_index
        return f"{self._names[position]} from row {start} on"

    @cached_property
    def _first_index(self) -> NDArray[np.int64]:
        """Of each file its first index, and the number of indices at the end."""
        counts = [1] * len(self._names)
        if self._rows_per_index is not None:
            counts = [self._indices_of(self._directory / name) for name in self._names]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def _indices_of(self, path: Path) -> int:
        assert self._rows_per_index is not None
        try:
            return -(-open_file(path).row_count() // self._rows_per_index)
        except SourceError:
            return 1  # so that there is an index to fail

    def _position_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} indices")
        return int(np.searchsorted(self._first_index, index, side="right")) - 1

    def _rows_of(self, index: int) -> tuple[LMDBFile, NDArray[np.int64]]:
        position = self._position_of(index)
        file = open_file(self._directory / self._names[position])
        if self._rows_per_index is None:
            return file, file.ids
        if file not in self._kept_open:
            self._kept_open.append(file)
        if len(file.ids) != file.row_count():
            raise SourceError(
                f"{file.path}: has keys that are no row ids; read it without rows_per_index"
            )
        start = (index - int(self._first_index[position])) * self._rows_per_index
        return file, file.ids[start : start + self._rows_per_index]


def _list_files(path: Path) -> tuple[Path, tuple[str, ...]]:
    if path.is_file():
        return path.parent, (path.name,)
    if not path.exists():
        raise SourceError(f"{path} does not exist; give a directory of {_SUFFIX} files or one")
    try:
        # What is hidden is a draft that somebody was killed over.
        names = sorted(
            name for name in os.listdir(path) if name.endswith(_SUFFIX) and name[0] != "."
        )
    except OSError as error:
        raise SourceError(f"{path} cannot be listed ({error.strerror})") from error
    if not names:
        raise SourceError(f"{path} holds no {_SUFFIX} file; give the directory that does")
    return path, tuple(names)


def _bad_row(path: Path, row: int, error: Exception) -> SourceError:
    cause = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
    return SourceError(f"{path}, row {row}: cannot be decoded ({cause}); repair or delete the row")
