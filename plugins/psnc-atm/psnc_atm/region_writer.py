"""Writing the columns of one index to its region, a file at a time, while more structures come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from psnc.errors import StageError
from psnc_atm.index_claim import IndexClaim
from psnc_atm.joined_edges import withdraw_edges
from psnc_atm.region_buffer import RegionBuffer
from psnc_atm.zarr_store import WRITTEN, ZarrStore

__all__ = ["RegionWriter"]


class RegionWriter:
    """Empties a buffer into a store: whole files while it fills, and the rest in the end.

    The store is locked for each of these steps and not in between, so that somebody who lays it out
    anew, or enlarges it, need not wait until an index is done. What is written by then is moved
    with the rest, and the writer goes on in the new layout. If another run writes the index in
    between, the rows of both would be mixed: the one that began first gives up.

    Parameters
    ----------
    buffer : RegionBuffer
        The structures.
    store : ZarrStore
        The layout that the buffer was made for.
    part : int
        The source's number in the store.
    """

    def __init__(self, buffer: RegionBuffer, store: ZarrStore, part: int) -> None:
        self._buffer = buffer
        self._store = store
        self._part = part
        self._claim = IndexClaim()
        self._has_written = False
        self._rows_at_a_time = store.file_rows("meta/samples_mask")
        self._atoms_at_a_time = store.file_rows("core/positions")
        self._done = (0, 0)

    def has_whole_files(self) -> bool:
        """Whether enough has come to be worth while."""
        rows, atoms = self._done
        return (
            self._buffer.kept_atoms - atoms >= self._atoms_at_a_time
            or self._buffer.kept_rows - rows >= self._rows_at_a_time
        )

    def write_whole_files(self) -> None:
        """Write what fills files; what others will share, or more structures, stays behind."""
        with self._begun(last=False) as index:
            self._write_columns(index, whole_files=True)
        self._done = (self._buffer.kept_rows, self._buffer.kept_atoms)

    def finish(self, mark: int) -> ZarrStore:
        """Write the rest, and then that the index is whole; return the current layout."""
        with self._begun(last=True) as index:
            self._write_columns(index, whole_files=False)
            self._clear_rest(index)
            if self._buffer.edges is not None:
                withdraw_edges(self._store)
                self._buffer.edges.write(self._store.path, index, mark)
            self._write_masks(index, mark)
        return self._store

    @contextmanager
    def _begun(self, *, last: bool) -> Iterator[int]:
        """Find the index in the current layout, and mask it before the first row changes."""
        with self._store.lock():
            index = self._find()
            with self._claim.held(self._store.path, index):
                if not self._has_written:
                    self._store.mask_out(index)
                    self._claim.take(self._store.path, index, keep=not last)
                    self._has_written = True
                elif not self._claim.is_mine(self._store.path, index):
                    raise StageError(
                        f"{self._store.path}: another run began to write index "
                        f"{self._buffer.index} meanwhile; run it again when that has ended"
                    )
                yield index
                if last:
                    self._claim.release(self._store.path, index)

    def _find(self) -> int:
        current = self._store.current()
        index = current.parts[self._part].index_in_store(self._buffer.index)
        if current.room(index) != (self._buffer.rows, self._buffer.atoms):
            raise StageError(
                f"index {self._buffer.index} was changed in the source while it was read; "
                "run it again"
            )
        replaced = current.made != self._store.made and self._store.made not in current.follows
        if self._has_written and replaced:
            raise StageError(
                f"{current.path} was replaced while it was written to; run index "
                f"{self._buffer.index} again"
            )
        self._store = current
        return index

    def _write_columns(self, index: int, *, whole_files: bool) -> None:
        origins = self._origins(index)
        for column in self._buffer.columns:
            start = origins[column.spec.level] + column.start
            stop = start + column.held
            if whole_files:
                rows = self._store.file_rows(column.spec.path)
                stop = stop // rows * rows
            if stop > start:
                self._store.write(column.spec.path, start, column.take(stop - start))

    def _clear_rest(self, index: int) -> None:
        """Empty the rows of what a filter dropped, whatever was there before."""
        origins = self._origins(index)
        kept = {"system": self._buffer.kept_rows, "atom": self._buffer.kept_atoms}
        room = {"system": self._buffer.rows, "atom": self._buffer.atoms}
        for column in self._buffer.columns:
            level = column.spec.level
            start, stop = origins[level] + kept[level], origins[level] + room[level]
            if stop > start:
                self._store.clear(column.spec.path, start, stop)

    def _write_masks(self, index: int, mark: int) -> None:
        origins, buffer, store = self._origins(index), self._buffer, self._store
        row, atom = origins["system"], origins["atom"]
        store.write("meta/atoms_mask", atom, _first_true(buffer.kept_atoms, buffer.atoms))
        # The last entry is where the next index begins, which never changes.
        store.write("meta/atoms_ptr", row + 1, atom + buffer.atoms_ends()[:-1])
        store.write("meta/samples_mask", row, _first_true(buffer.kept_rows, buffer.rows))
        # That no rows are there can also mean that a filter dropped them all.
        store.write(WRITTEN, index, np.array([mark], dtype=np.uint64))

    def _origins(self, index: int) -> dict[str, int]:
        return {
            "system": int(self._store.rows_before[index]),
            "atom": int(self._store.atoms_before[index]),
        }


def _first_true(count: int, length: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    mask = np.zeros(length, dtype=bool)
    mask[:count] = True
    return mask
