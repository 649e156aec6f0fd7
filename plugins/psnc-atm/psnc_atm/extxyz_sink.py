"""ExtxyzSink: an extended xyz file of each index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from psnc.atomic import atomic_write
from psnc.errors import StageError
from psnc.stages import Param, Sink
from psnc_atm.atomic_data import AtomicData
from psnc_atm.extxyz_frame import extxyz_frame
from psnc_atm.store_plan import require_structure
from psnc_atm.unwritable import OnUnwritable, Unwritable, check_on_unwritable

__all__ = ["ExtxyzSink"]


class ExtxyzSink(Sink[AtomicData]):
    """Write each index to an extended xyz file, which ASE and most programs of the field read.

    Index 7 becomes ``00000007.extxyz``: it is there whole, or not at all. Frames are in the order
    of the structures, which may be none. Numbers are written with all their digits, so that
    :class:`ASESource` reads every number as it was, to the last bit. An atom whose number
    is beyond 118 has no symbol, and fails its index.

    A run that is resumed does not notice that the content of an input file has changed: what is
    completed stays as it is. ``psnc reset`` has it run again.

    Parameters
    ----------
    output_dir : str or Path
        Directory of the files. It is created.
    columns : sequence of str
        Entries of ``info`` that are arrays with one row for each atom, to be written as columns
        beside the atoms; they come back as entries of ``info``.
    decimals : int, optional
        Digits after the point of the numbers in columns; by default as many as they have.
    on_unwritable : {"fail", "drop"}
        What to do about what the format cannot hold: fail the index, or leave it out.

    Raises
    ------
    psnc.StageError
        If a structure has what cannot be written, and it is not to be dropped.
    psnc.OutputError
        If a file cannot be written.
    """

    name = "extxyz-files"
    description = "An extended xyz file of each index"

    def __init__(
        self,
        output_dir: Annotated[str | Path, Param(description="Directory of the files")],
        columns: Annotated[
            Sequence[str], Param(description="Entries of info that are columns beside the atoms")
        ] = (),
        decimals: Annotated[
            int | None, Param(description="Digits after the point; by default all there are")
        ] = None,
        on_unwritable: Annotated[
            OnUnwritable, Param(description="fail or drop what the format cannot hold")
        ] = "fail",
    ) -> None:
        check_on_unwritable(on_unwritable)
        if isinstance(columns, str):
            raise StageError(f"columns is {columns!r}; give a list, [{columns!r}]")
        if decimals is not None and (not isinstance(decimals, int) or isinstance(decimals, bool)):
            raise StageError(
                f"decimals is {decimals!r}; give an integer, 0 or more, or None for all"
            )
        if decimals is not None and decimals < 0:
            raise StageError(f"decimals is {decimals}; give 0 or more, or None for all")
        self._directory = Path(output_dir)
        self._columns = tuple(columns)
        self._decimals = decimals
        self._on_unwritable: OnUnwritable = on_unwritable

    def __call__(self, items: Iterator[AtomicData], index: int) -> Path:
        """Write the structures of one index and return the file's path."""
        path = self._directory / f"{index:08}.extxyz"
        with atomic_write(path, "w", newline="\n") as file:
            for number, item in enumerate(items):
                place = f"index {index}, structure {number}"
                structure = require_structure(item, place)
                unwritable = Unwritable(place, "an extended xyz file", self._on_unwritable)
                file.write(extxyz_frame(structure, self._columns, self._decimals, unwritable))
        return path
