"""Writing one region of a preallocated array, beside others who write theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import zarr
from attrs import frozen
from numpy.typing import NDArray

from psnc_atm.region_lock import chunk_lock

__all__ = ["Piece", "pieces_of", "write_region"]


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
    """Cut the region ``start:stop`` of an array into what is shared with neighbours and not."""
    whole_from = -(-start // chunk) * chunk
    # Nobody comes after the end of the array, so that its last chunk has no other owner.
    whole_to = stop if stop == length else stop // chunk * chunk
    if start < min(whole_from, stop):
        yield Piece(start, min(whole_from, stop), start // chunk)
    if whole_from < whole_to:
        yield Piece(whole_from, whole_to)
    if max(whole_from, whole_to) < stop:
        yield Piece(max(whole_from, whole_to), stop, stop // chunk)


def write_region(store: Path, array: zarr.Array[Any], start: int, values: NDArray[Any]) -> None:
    """Write ``values`` at ``start`` of ``array``, which lies in the local store ``store``.

    Each lock is released before the next is taken, so that writers never wait in a circle.
    """
    written_together = (array.shards or array.chunks)[0]
    directory = store / array.path
    for piece in pieces_of(start, start + len(values), array.shape[0], written_together):
        shared = piece.shared_chunk
        with nullcontext() if shared is None else chunk_lock(directory, shared):
            array[piece.start : piece.stop] = values[piece.start - start : piece.stop - start]
