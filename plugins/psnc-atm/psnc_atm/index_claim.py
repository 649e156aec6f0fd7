"""Who is writing an index, while its rows are written in several steps."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from psnc_atm.region_lock import chunk_lock
from psnc_atm.zarr_array import replace_file

__all__ = ["IndexClaim", "carry_claims"]

# A file for each index that is begun and not done; one that a killed process left is replaced. In
# the directory of an array nobody looks for other arrays.
_DIRECTORY = "psnc/written"
# An array whose own chunks are written only while nobody writes an index.
_LOCKED = "psnc/rows_before"


class IndexClaim:
    """What tells the one who began to write an index from anybody who did so later."""

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex.encode()

    @contextmanager
    def held(self, store: Path, index: int) -> Iterator[None]:
        """Keep others from a step of the same index."""
        with chunk_lock(store / _LOCKED, index):
            yield

    def take(self, store: Path, index: int, *, keep: bool) -> None:
        """Take the index from whoever had begun it, for further steps if ``keep``."""
        if keep:
            replace_file(_path(store, index), self._name)
        else:
            _path(store, index).unlink(missing_ok=True)

    def is_mine(self, store: Path, index: int) -> bool:
        """Whether nobody else has taken it since."""
        try:
            return _path(store, index).read_bytes() == self._name
        except FileNotFoundError:
            return False

    def release(self, store: Path, index: int) -> None:
        """Say that the index is done."""
        _path(store, index).unlink(missing_ok=True)


def carry_claims(old: Path, new: Path) -> None:
    """Have those who are at work on an index go on in the store ``new``."""
    for path in (old / _DIRECTORY).glob("writing.*"):
        shutil.copy(path, new / _DIRECTORY / path.name)


def _path(store: Path, index: int) -> Path:
    return store / _DIRECTORY / f"writing.{index}"
