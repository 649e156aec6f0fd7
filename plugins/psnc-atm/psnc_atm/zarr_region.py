"""Writing one region of a preallocated array, beside others who write theirs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from psnc_atm.region_lock import chunk_lock
from psnc_atm.zarr_array import LocalArray

__all__ = ["Piece", "clear_region", "pieces_of", "write_region"]


@frozen
class Piece:
    """Part of a region that is written in one go.

    Attributes
    ----------
    start, stop : int
        Rows of the array.
    shared_chunk : int, optional
        The chunk that it shares with a neighbouring region; ``None`` when its chunks are whole.
    """

    start: int
    stop: int
    shared_chunk: int | None = None


def pieces_of(start: int, stop: int, length: int, chunk: int) -> Iterator[Piece]:
    """Cut the region ``start:stop`` of an array into what is shared with neighbours and not.

    A chunk is here what is replaced as a whole: a shard, in an array that has shards.
    """
    whole_from = -(-start // chunk) * chunk
    # Nobody comes after the end of the array, so that its last chunk has no other owner.
    whole_to = stop if stop == length else stop // chunk * chunk
    if start < min(whole_from, stop):
        yield Piece(start, min(whole_from, stop), start // chunk)
    if whole_from < whole_to:
        yield Piece(whole_from, whole_to)
    if max(whole_from, whole_to) < stop:
        yield Piece(max(whole_from, whole_to), stop, stop // chunk)


def write_region(array: LocalArray, start: int, values: NDArray[np.generic]) -> None:
    """Write ``values`` at ``start`` of ``array``.

    Each lock is released before the next is taken, so that writers never wait in a circle.
    """
    values = np.ascontiguousarray(values, dtype=array.dtype)
    for piece in pieces_of(start, start + len(values), array.length, array.file_rows):
        part = values[piece.start - start : piece.stop - start]
        if piece.shared_chunk is not None:
            _change(array, piece.shared_chunk, piece.start, part)
            continue
        for first in range(0, len(part), array.file_rows):
            number = (piece.start + first) // array.file_rows
            array.write_file(number, part[first : first + array.file_rows])


def clear_region(array: LocalArray, start: int, stop: int) -> None:
    """Set the rows from ``start`` to ``stop`` to zero, which takes no memory for whole chunks."""
    for piece in pieces_of(start, stop, array.length, array.file_rows):
        if piece.shared_chunk is not None:
            zeros = np.zeros((piece.stop - piece.start, *array.shape), array.dtype)
            _change(array, piece.shared_chunk, piece.start, zeros)
            continue
        nothing = np.zeros((0, *array.shape), array.dtype)
        for number in range(piece.start // array.file_rows, -(-piece.stop // array.file_rows)):
            array.write_file(number, nothing)


def _change(array: LocalArray, number: int, start: int, values: NDArray[np.generic]) -> None:
    with chunk_lock(array.directory, number):
        rows = array.read_file(number)
        if rows is None:
            whole = np.zeros((array.file_rows, *array.shape), array.dtype)
        else:
            whole = rows if rows.flags.writeable else rows.copy()
        first = start - number * array.file_rows
        whole[first : first + len(values)] = values
        array.write_file(number, whole)
