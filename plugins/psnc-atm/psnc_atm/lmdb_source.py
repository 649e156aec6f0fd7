"""ASELMDBSource: the rows of a directory of ``.aselmdb`` files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from psnc.errors import SourceError
from psnc.stages import Param, Source
from psnc_atm.atomic_data import AtomicData
from psnc_atm.dataset_metadata import DatasetMetadata, find_metadata
from psnc_atm.lmdb_file import LMDBFile, header_of, open_file, row_count
from psnc_atm.lmdb_header import LMDBHeader, fingerprint
from psnc_atm.row_codec import BAD_ROW, RowDecoder, atom_count, atom_counts_of_heads
from psnc_atm.structure_files import check_per_index

__all__ = ["ASELMDBSource"]

logger = logging.getLogger("psnc_atm")

Kept = Literal["keep", "drop"]

_SUFFIX = ".aselmdb"
# Rows are copied out of the map this many at a time: enough that the transaction costs nothing,
# few enough that memory stays flat.
_ROWS_AT_A_TIME = 64
_HEADS_AT_A_TIME = 1024
# With several indices a file, listing its ids anew for each would cost more than reading few rows.
# They are kept, and not the open file, which nobody else in this process could open then.
_KEPT_LISTS = 4
_USUAL = {"dtype": "float64", "constraints": "keep", "data": "keep"}


@frozen(eq=False)
class _ListOfIds:
    path: Path
    header: LMDBHeader
    ids: NDArray[np.int64]


class ASELMDBSource(Source[AtomicData]):
    """Structures from ``.aselmdb`` files, the LMDB databases that ``ase-db-backends`` writes.

    The files of a directory are taken in the order of their names, the rows of a file in the
    order of their ids. Each file is an index, or each run of ``rows_per_index`` rows of a file.
    A file that cannot be read fails its own index only; without ``rows_per_index`` no file is
    opened before its index runs.

    Files may be added behind the others between two runs. A run is not resumed where a completed
    index is another file's now.

    A directory may have a ``metadata.npz``, as fairchem's datasets do, with the number of atoms of
    each row in an array ``natoms``. Then no row has to be looked at before a store is laid out.
    Each row is compared with it when it is decoded.

    Parameters
    ----------
    data_dir : str or Path
        A directory of ``.aselmdb`` files, or one such file.
    rows_per_index : int, optional
        Rows an index; the last index of each file may have fewer. By default a file is an index.
    dtype : {"float64", "float32"}
        Of all arrays of floats, those in ``info`` and ``results`` too. Numbers by themselves,
        energies above all, are Python's floats in any case: of a total energy of -1e5 eV, float32
        would keep hundredths. A row that has a number beyond the range of float32 is a bad row.
    constraints : {"keep", "drop"}
        Whether the structures have the constraints of the rows.
    data : {"keep", "drop"}
        Whether ``info`` has the entries of a row's ``data``. A ``charge`` and ``spin`` that are
        there become fields in any case.
    on_bad_row : {"fail", "skip"}
        What becomes of a row that cannot be decoded. By default its index fails. With ``"skip"``
        the row is left out, with a warning that has the file, the row's id and the cause. How many
        there were is a measurement of the index, ``skipped_rows``. A file that cannot be read
        fails its index in any case.
    metadata : bool
        Whether ``metadata.npz`` is used where it is there.

    Raises
    ------
    psnc.SourceError
        If ``data_dir`` is missing or holds no ``.aselmdb`` file; if an option is none of those
        above; if ``metadata.npz`` is not of these files; if a file or row of an index cannot be
        read.
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
        dtype: Annotated[
            Literal["float64", "float32"], Param(description="Of all arrays of floats")
        ] = "float64",
        constraints: Annotated[Kept, Param(description="Constraints: keep or drop")] = "keep",
        data: Annotated[
            Kept, Param(description="Entries of the rows' data: keep or drop")
        ] = "keep",
        on_bad_row: Annotated[
            Literal["fail", "skip"],
            Param(description="A row that cannot be decoded fails its index, or is left out"),
        ] = "fail",
        metadata: Annotated[
            bool, Param(description="Take numbers of atoms from metadata.npz, if it is there")
        ] = True,
    ) -> None:
        check_per_index("rows_per_index", rows_per_index)
        _require("dtype", dtype, ("float64", "float32"))
        _require("constraints", constraints, ("keep", "drop"))
        _require("data", data, ("keep", "drop"))
        _require("on_bad_row", on_bad_row, ("fail", "skip"))
        self._rows_per_index = rows_per_index
        self._options = {"dtype": dtype, "constraints": constraints, "data": data}
        self._decode = RowDecoder(dtype, constraints=constraints == "keep", data=data == "keep")
        self._skips = on_bad_row == "skip"
        self._skipped: dict[int, int] = {}
        self._kept_lists: tuple[_ListOfIds, ...] = ()
        path = Path(os.path.expanduser(data_dir))
        self._directory, self._names = _list_files(path)
        self._metadata: DatasetMetadata | None = None
        if metadata and path.is_dir():
            self._metadata = find_metadata(
                self._directory, lambda: self._row_counts, self._id_counts
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave behind what each process finds out itself."""
        return {**self.__dict__, "_kept_lists": (), "_skipped": {}}

    def __len__(self) -> int:
        """Return the number of indices."""
        return int(self._first_index[-1])

    def __getitem__(self, index: int) -> Iterator[AtomicData]:
        """Yield the structures of one index, decoding each as it is asked for."""
        file, ids = self._rows_of(index)
        expected = self._expected_counts(index, file, len(ids))
        skipped = self._skipped[index] = 0
        for start in range(0, len(ids), _ROWS_AT_A_TIME):
            some = ids[start : start + _ROWS_AT_A_TIME].tolist()
            for place, (row, value) in enumerate(zip(some, file.values(some), strict=True), start):
                try:
                    structure = self._decode(value)
                except BAD_ROW as error:
                    if not self._skips:
                        raise _bad_row(file.path, row, error) from error
                    skipped = self._skipped[index] = skipped + 1
                    logger.warning("%s, row %d: left out (%s)", file.path, row, _cause(error))
                    continue
                if expected is not None and expected[place] != len(structure):
                    place_of_row = f"{file.path}, row {row}"
                    raise self._disagrees(place_of_row, f"{len(structure)} atoms", expected[place])
                yield structure
        if skipped:
            logger.warning(
                "%s: left out %d of %d rows, which cannot be decoded", file.path, skipped, len(ids)
            )

    def atom_counts(self, index: int) -> NDArray[np.int64]:
        """Return the number of atoms of each row of one index.

        They are those of ``metadata.npz`` if there is one. Otherwise no more than the first bytes
        of each row are inflated, which is many times faster than reading it. A row that is to be
        left out counts 0 if its number of atoms cannot be read.
        """
        told = self._told_counts(index)
        if told is not None:
            return told
        file, ids = self._rows_of(index)
        counts: list[int] = []
        for start in range(0, len(ids), _HEADS_AT_A_TIME):
            some = ids[start : start + _HEADS_AT_A_TIME].tolist()
            found = file.map_values(some, atom_counts_of_heads)
            counts += (
                self._count_in(file, row) if count is None else count
                for row, count in zip(some, found, strict=True)
            )
        return np.array(counts, dtype=np.int64)

    def _count_in(self, file: LMDBFile, row: int) -> int:
        (value,) = file.values([row])
        try:
            return atom_count(value)
        except BAD_ROW as error:
            if self._skips:
                return 0
            raise _bad_row(file.path, row, error) from error

    @property
    def leaves_out_rows(self) -> bool:
        """Whether an index may have fewer structures than it has rows."""
        return self._skips

    def index_measurements(self, index: int) -> Mapping[str, int] | None:
        """Return what is recorded of an index that ran just now: how many rows were left out.

        ``None`` where none may be left out.
        """
        skipped = self._skipped.pop(index, 0)
        return {"skipped_rows": skipped} if self._skips else None

    def input_identity(self) -> dict[str, Any]:
        """Say what the indices are made from, so that a later run can tell whether it changed.

        Of each file its name, its size, the number of its last transaction, which grows whenever
        the content changes, and a digest of its first and last rows, which are others when the
        file is written anew. None of these changes when the file is copied. If ``metadata.npz`` is
        used, a digest of its numbers of atoms; and the options that change structures.
        """
        files = []
        for name in self._names:
            path = self._directory / name
            try:
                header = header_of(path)
                content = fingerprint(path, header)
                state: list[Any] = [name, header.file_size, header.transaction, content]
            except (SourceError, OSError):
                state = [name, path.stat().st_size if path.exists() else None, None, None]
            files.append(state)
        identity: dict[str, Any] = {"rows_per_index": self._rows_per_index, "files": files}
        identity |= {key: value for key, value in self._options.items() if value != _USUAL[key]}
        if self._metadata is not None:
            identity["natoms"] = self._metadata.digest()
        return identity

    def index_name(self, index: int) -> str:
        """Return the name of the index's file, and its place in it if that has several."""
        position = self._position_of(index)
        if self._rows_per_index is None:
            return self._names[position]
        rows = self._slice_of(index, position)
        # The end tells a last index that has grown from what it was.
        count = self._row_counts[position]
        stop = rows.stop if count is None else min(rows.stop, count)
        return f"{self._names[position]}, rows {rows.start} to {stop - 1}"

    @cached_property
    def _first_index(self) -> NDArray[np.int64]:
        """Of each file its first index, and the number of indices at the end."""
        counts = [1] * len(self._names)
        if self._rows_per_index is not None:
            # One index of a file that is damaged, so that there is one to fail.
            rows = (1 if count is None else count for count in self._row_counts)
            counts = [-(-count // self._rows_per_index) for count in rows]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @cached_property
    def _row_counts(self) -> list[int | None]:
        """The number of rows of each file, read once; ``None`` of one that is damaged."""
        return [_row_count(self._directory / name) for name in self._names]

    def _id_counts(self) -> list[int | None]:
        """Count the ids of each file, for which it has to be opened."""
        return [_id_count(self._directory / name) for name in self._names]

    def _position_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} indices")
        return int(np.searchsorted(self._first_index, index, side="right")) - 1

    def _slice_of(self, index: int, position: int) -> slice:
        """Return which rows of its file an index has."""
        if self._rows_per_index is None:
            return slice(None)
        start = (index - int(self._first_index[position])) * self._rows_per_index
        return slice(start, start + self._rows_per_index)

    def _rows_of(self, index: int) -> tuple[LMDBFile, NDArray[np.int64]]:
        position = self._position_of(index)
        file = open_file(self._directory / self._names[position])
        if self._rows_per_index is None:
            return file, file.ids
        return file, self._ids_of(file)[self._slice_of(index, position)]

    def _ids_of(self, file: LMDBFile) -> NDArray[np.int64]:
        for kept in self._kept_lists:
            if kept.path == file.path and kept.header == file.header:
                return kept.ids
        if file.other_keys:
            raise SourceError(
                f"{file.path}: has keys that are no row ids; read it without rows_per_index"
            )
        # One assignment, since threads share a source.
        kept = _ListOfIds(file.path, file.header, file.ids)
        self._kept_lists = (*self._kept_lists[1 - _KEPT_LISTS :], kept)
        return kept.ids

    def _told_counts(self, index: int) -> NDArray[np.int64] | None:
        """Return what ``metadata.npz`` says of an index, if it is used and does."""
        position = self._position_of(index)
        if self._metadata is None:
            return None
        return self._metadata.of_rows(position, self._slice_of(index, position))

    def _expected_counts(self, index: int, file: LMDBFile, rows: int) -> list[int] | None:
        told = self._told_counts(index)
        if told is None:
            return None
        if len(told) != rows:
            raise self._disagrees(str(file.path), f"{rows} rows", len(told))
        expected: list[int] = told.tolist()
        return expected

    def _disagrees(self, place: str, there: str, told: int) -> SourceError:
        assert self._metadata is not None
        return SourceError(
            f"{place}: has {there}, and {told} by {self._metadata.path}; make that file anew, "
            "delete it, or read without it (metadata=False)"
        )


def _row_count(path: Path) -> int | None:
    try:
        return row_count(path)
    except SourceError:
        return None  # its own index says why when it runs


def _id_count(path: Path) -> int | None:
    try:
        return len(open_file(path).ids)
    except SourceError:
        return None


def _require(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SourceError(f"{name} is {value!r}; give {' or '.join(map(repr, known))}")


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
    return SourceError(
        f"{path}, row {row}: cannot be decoded ({_cause(error)}); repair or delete the row, or "
        "leave it out (on_bad_row='skip')"
    )


def _cause(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {error}"
    return (str(error) or type(error).__name__).splitlines()[0]
