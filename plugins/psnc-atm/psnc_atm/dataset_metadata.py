"""``metadata.npz``: the number of atoms of all rows, beside the ``.aselmdb`` files of a dataset.

fairchem's datasets have it: an array ``natoms`` with an integer for each row of each file, the
files in the order of their names and the rows in that of their ids. Other arrays are not read.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psnc.errors import SourceError

__all__ = ["DatasetMetadata", "find_metadata"]

_NAME = "metadata.npz"
_UNREADABLE = (
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError),
    *(ValueError, KeyError, TypeError, AttributeError),
)


def find_metadata(
    directory: Path,
    row_counts: Callable[[], Sequence[int | None]],
    id_counts: Callable[[], Sequence[int | None]],
) -> DatasetMetadata | None:
    """Return what ``metadata.npz`` of a directory says; rows are counted only if it is there.

    Where it is of another number of rows, files may have keys that are no rows: then ids are
    counted.

    Raises
    ------
    psnc.SourceError
        If it cannot be read, or is not of as many rows as there are.
    """
    path = directory / _NAME
    if not path.exists():
        return None
    try:
        return DatasetMetadata(path, row_counts())
    except SourceError:
        return DatasetMetadata(path, id_counts())


class DatasetMetadata:
    """The numbers of atoms by file.

    Parameters
    ----------
    path : Path
        The ``metadata.npz``.
    row_counts : sequence of int or None
        The number of rows of each file, ``None`` of one that is damaged. If that is one alone, the
        rest of the entries is its; of more, and of the files between them, nothing is known.
    """

    def __init__(self, path: Path, row_counts: Sequence[int | None]) -> None:
        self.path = path
        self._entries = len(self._counts)
        self._spans = self._spans_of(row_counts)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the numbers behind: each process reads them when it needs them."""
        return {name: value for name, value in self.__dict__.items() if name != "_counts"}

    def of_rows(self, position: int, rows: slice) -> NDArray[np.int64] | None:
        """Return the number of atoms of some rows of a file, ``None`` where that is not known."""
        span = self._spans[position]
        if span is None:
            return None
        if len(self._counts) != self._entries:
            raise SourceError(f"{self.path} changed while it was in use; run again")
        return self._counts[span[0] : span[1]][rows].astype(np.int64)

    def digest(self) -> str:
        """Return a digest of all numbers of atoms."""
        content = self._counts.dtype.str.encode() + self._counts.tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    @cached_property
    def _counts(self) -> NDArray[Any]:
        """The numbers of atoms of all rows, in as few bytes as they need."""
        try:
            with self.path.open("rb") as file, np.load(file) as content:
                counts: NDArray[Any] = content["natoms"]
        except _UNREADABLE as error:
            # Of what is no archive NumPy says to load it with pickle, which is no advice.
            told = (str(error) or repr(error)).splitlines()[0]
            is_garbage = "pickle" in told and not zipfile.is_zipfile(self.path)
            cause = f"cannot be read ({'it is no .npz archive' if is_garbage else told})"
            raise self._unfit(cause) from error
        if counts.ndim != 1 or counts.dtype.kind not in "iu" or (counts < 0).any():
            raise self._unfit("natoms is not a list of numbers of atoms")
        return counts.astype(np.min_scalar_type(int(counts.max(initial=0))))

    def _spans_of(self, row_counts: Sequence[int | None]) -> list[tuple[int, int] | None]:
        known = sum(count for count in row_counts if count is not None)
        unknown = [position for position, count in enumerate(row_counts) if count is None]
        if self._entries < known or (not unknown and self._entries > known):
            raise self._unfit(f"is of {self._entries} rows, and the files have {known}")
        if len(unknown) > 1:
            return self._spans_around(row_counts, unknown)
        rest = self._entries - known
        ends = list(accumulate(rest if count is None else count for count in row_counts))
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def _spans_around(
        self, row_counts: Sequence[int | None], unknown: Sequence[int]
    ) -> list[tuple[int, int] | None]:
        first, last = unknown[0], unknown[-1]
        counts = [count or 0 for count in row_counts]
        ends = list(accumulate(counts[:first]))
        before = list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []
        starts = [self._entries - sum(counts[place:]) for place in range(last + 1, len(counts))]
        after = [
            (start, start + count) for start, count in zip(starts, counts[last + 1 :], strict=True)
        ]
        return [*before, *[None] * (last - first + 1), *after]

    def _unfit(self, cause: str) -> SourceError:
        return SourceError(
            f"{self.path} {cause}; delete it, make it anew, or read without it (metadata=False)"
        )
