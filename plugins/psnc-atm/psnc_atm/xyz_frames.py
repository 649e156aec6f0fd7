"""Where the frames of xyz and extended xyz files are.

A frame says in its first line how many lines it has, so that frames are found, and their atoms
counted, without looking at any number in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

from attrs import frozen

__all__ = ["XYZFrame", "xyz_frames"]

_CELL_VECTOR = b"VEC"
_MOST_CELL_VECTORS = 3
_SHOWN = 40


@frozen
class XYZFrame:
    """One frame as it stands in the file.

    Attributes
    ----------
    atoms : int
        Number of atoms.
    offset : int
        Where it begins, in bytes from where reading began.
    lines : list of bytes
        All lines of it.
    """

    atoms: int
    offset: int
    lines: list[bytes]


def xyz_frames(file: BinaryIO) -> Iterator[XYZFrame]:
    """Yield the frames of a file from where it stands.

    Raises
    ------
    ValueError
        If a frame's first line is no number, if the file ends within a frame, or if something
        follows an empty line, which other readers take for the end.
    """
    offset = 0
    head = file.readline()
    while head:
        if not head.strip():
            _require_end(file)
            return
        atoms = _atoms(head)
        lines = [head, *islice(file, atoms + 1)]
        if len(lines) < atoms + 2:
            raise ValueError(f"the file ends after {max(len(lines) - 2, 0)} of {atoms} atoms")
        head = file.readline()
        while head.lstrip().startswith(_CELL_VECTOR) and len(lines) < (
            atoms + 2 + _MOST_CELL_VECTORS
        ):
            lines.append(head)
            head = file.readline()
        yield XYZFrame(atoms, offset, lines)
        offset += sum(map(len, lines))


def _atoms(line: bytes) -> int:
    try:
        atoms = int(line)
    except ValueError:
        atoms = -1
    if atoms < 0:
        shown = line.strip()[:_SHOWN].decode("ascii", "backslashreplace")
        raise ValueError(f"its first line is {shown!r}, not a number of atoms")
    return atoms


def _require_end(file: BinaryIO) -> None:
    for line in file:
        if line.strip():
            raise ValueError("an empty line comes before it, which ends an xyz file")
