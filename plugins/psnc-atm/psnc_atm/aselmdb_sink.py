"""ASELMDBSink: an ``.aselmdb`` file of each index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import lmdb

from psnc.atomic import atomic_path
from psnc.errors import OutputError
from psnc.stages import Param, Sink
from psnc_atm.atomic_data import AtomicData
from psnc_atm.row_encoding import encode_row, encode_value
from psnc_atm.store_plan import require_structure
from psnc_atm.unwritable import OnUnwritable, Unwritable, check_on_unwritable

__all__ = ["ASELMDBSink"]

# A file says how large it may become, and readers map as much: so it begins small, and doubles.
_FIRST_MAP_BYTES = 2**20
_ROWS_AT_A_TIME = 256


class ASELMDBSink(Sink[AtomicData]):
    """Write each index to an ``.aselmdb`` file, which ``ase-db-backends`` reads.

    Index 7 becomes ``00000007.aselmdb``: it is there whole, or not at all. Rows have the ids 1, 2,
    ... in the order of the structures, which may be none. :class:`ASELMDBSource` reads every field,
    constraint, result and entry of ``info`` as it was written, to the last bit.

    A run that is resumed does not notice that the content of an input file has changed: what is
    completed stays as it is. ``psnc reset`` has it run again.

    Entries of ``info`` that ``ase.db`` takes as ``key_value_pairs`` (numbers, truth values and
    texts under usual names) become such, and can be selected by; the others become ``data``. Ids
    are made from the content, and times are zero, so that a file written twice is the same twice.

    Parameters
    ----------
    output_dir : str or Path
        Directory of the files. It is created.
    on_unwritable : {"fail", "drop"}
        What to do about entries of ``info``, results and constraints that would not come back as
        they are, such as objects of Python: fail the index, or leave them out.

    Raises
    ------
    psnc.StageError
        If a structure has what cannot be written, and it is not to be dropped.
    psnc.OutputError
        If a file cannot be written.
    """

    name = "aselmdb-files"
    description = "An .aselmdb file of each index"

    def __init__(
        self,
        output_dir: Annotated[str | Path, Param(description="Directory of the files")],
        on_unwritable: Annotated[
            OnUnwritable, Param(description="fail or drop what a row cannot hold")
        ] = "fail",
    ) -> None:
        check_on_unwritable(on_unwritable)
        self._directory = Path(output_dir)
        self._on_unwritable: OnUnwritable = on_unwritable

    def __call__(self, items: Iterator[AtomicData], index: int) -> Path:
        """Write the structures of one index and return the file's path."""
        path = self._directory / f"{index:08}.aselmdb"
        rows = self._rows(items, index)
        with atomic_path(path) as draft:
            try:
                _write(draft, rows)
            except lmdb.Error as error:
                raise OutputError(
                    f"{path} cannot be written ({error}); free some space, and run it again"
                ) from error
        return path

    def _rows(self, items: Iterator[AtomicData], index: int) -> Iterator[bytes]:
        for number, item in enumerate(items):
            place = f"index {index}, structure {number}"
            unwritable = Unwritable(place, "a row of an .aselmdb file", self._on_unwritable)
            yield encode_row(require_structure(item, place), place, unwritable)


def _write(path: Path, rows: Iterator[bytes]) -> None:
    # Without LMDB's own lock file, and brought to the disk when the draft is.
    with lmdb.open(
        str(path), subdir=False, lock=False, sync=False, map_size=_FIRST_MAP_BYTES
    ) as environment:
        count = 0
        while some := list(islice(rows, _ROWS_AT_A_TIME)):
            _put(environment, [(b"%d" % id, row) for id, row in enumerate(some, count + 1)])
            count += len(some)
        _put(environment, [(b"nextid", encode_value(count + 1))])


def _put(environment: Any, entries: Sequence[tuple[bytes, bytes]]) -> None:
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in entries:
                    transaction.put(key, value)
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])
        else:
            return
