from __future__ import annotations

import multiprocessing
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr

from psnc_atm.region_lock import chunk_lock
from psnc_atm.zarr_array import open_array
from psnc_atm.zarr_region import pieces_of, write_region


@pytest.mark.parametrize("chunk", [1, 3, 7, 10, 100])
def test_pieces_cover_the_region_and_know_which_chunks_are_shared(chunk: int) -> None:
    length = 20
    for start in range(length + 1):
        for stop in range(start, length + 1):
            pieces = list(pieces_of(start, stop, length, chunk))
            assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(
                range(start, stop)
            )
            for piece in pieces:
                chunks = {row // chunk for row in range(piece.start, piece.stop)}
                rows = {row for row in range(length) if row // chunk in chunks}
                if piece.shared_chunk is None:
                    assert rows == set(range(piece.start, piece.stop))
                else:
                    assert chunks == {piece.shared_chunk}
                    assert rows - set(range(start, stop))


def _holds_lock(directory: str, chunk: int, connection: object) -> None:
    with chunk_lock(Path(directory), chunk):
        connection.send("held")  # type: ignore[attr-defined]
        threading.Event().wait()


def test_a_lock_keeps_out_processes_and_threads_and_dies_with_its_holder(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "array", shape=(10,), chunks=(2,), dtype="int64")
    before = sorted(path.name for path in (tmp_path / "array").iterdir())
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    holder = context.Process(target=_holds_lock, args=(str(tmp_path / "array"), 3, theirs))
    holder.start()
    assert ours.recv() == "held"
    got: list[int] = []

    def take(chunk: int) -> None:
        with chunk_lock(tmp_path / "array", chunk):
            got.append(chunk)

    waiting = threading.Thread(target=take, args=(3,))
    waiting.start()
    take(2)  # another chunk's is free
    waiting.join(0.2)
    assert got == [2]
    holder.kill()
    waiting.join(30)
    assert got == [2, 3]
    holder.join()
    assert sorted(path.name for path in (tmp_path / "array").iterdir()) == before


@pytest.mark.parametrize("shards", [None, (12,)])
def test_threads_that_write_neighbouring_regions_lose_nothing(tmp_path: Path, shards) -> None:
    root = zarr.create_group(tmp_path / "store")
    array = root.create_array("x", shape=(300,), chunks=(4,), shards=shards, dtype="int64")
    values = np.arange(1, 301)
    local = open_array(tmp_path / "store" / "x")

    def write(first: int) -> None:
        for start in range(first * 5, 300, 20):
            write_region(local, start, values[start : start + 5])

    threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(array[:], values)
