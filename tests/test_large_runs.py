"""Long runs: what the driver keeps, and what it takes to ask about very many indices."""

from __future__ import annotations

import gc
import json
import sqlite3
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from drivers import BACKENDS, jobs
from stages_for_tests import Discard, FailOn, Numbers, numbers_pipeline

from psnc import Config, IndexRecord, Pipeline, PipelineError, StoreError, hookimpl, run_pipeline
from psnc.builtin.checkpoint.store import SQLiteStore
from psnc.manager import PluginManager
from psnc.session import Session
from psnc.sql_store import CHUNK

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def failing_pipeline(count: int, bad: int) -> Pipeline[int]:
    return Pipeline(Numbers(count), [FailOn([bad])], Discard())


# --- a run that returns no list ---------------------------------------------------------------


@on_every_backend
def test_a_run_that_collects_nothing_returns_its_summary(backend: str) -> None:
    pipeline = failing_pipeline(9, 4)
    summary = run_pipeline(pipeline, jobs(backend), backend, collect=False)
    assert (summary.requested, summary.completed, summary.cached) == (9, 8, 0)
    assert list(summary.failed) == [4]
    assert pipeline.completed_indices == set(range(9)) - {4}
    assert pipeline.output_paths_for_index(3) == ["out/3-0.bin"]


def test_a_resume_that_collects_nothing_runs_only_what_is_left(tmp_path: Path) -> None:
    for indices, expected in ((range(3, 6), (3, 0)), (None, (6, 3)), ([8, 2], (0, 2))):
        pipeline = numbers_pipeline(9, db_file=tmp_path / "run.db")
        summary = run_pipeline(pipeline, indices=indices, collect=False)
        assert (summary.completed, summary.cached) == expected


def test_a_resume_that_collects_nothing_does_not_rely_on_what_is_damaged(tmp_path: Path) -> None:
    run_pipeline(numbers_pipeline(3, db_file=tmp_path / "run.db"))
    with closing(sqlite3.connect(tmp_path / "run.db")) as connection:
        connection.execute("UPDATE index_results SET output_paths = '[]' WHERE idx = 1")
        connection.commit()
    with pytest.raises(StoreError, match="the result of index 1 is not as it was written"):
        run_pipeline(numbers_pipeline(3, db_file=tmp_path / "run.db"), collect=False)


def test_a_run_that_collects_nothing_raises_as_any_other() -> None:
    with pytest.raises(RuntimeError, match="bad item 2"):
        run_pipeline(failing_pipeline(3, 2), on_error="raise", collect=False)


def test_a_session_that_collected_nothing_has_no_results() -> None:
    session = Session(numbers_pipeline(3), collect=False)
    session.run()
    with pytest.raises(PipelineError, match="kept no output paths"):
        session.results()


def test_earlier_and_new_results_come_in_the_order_asked_for(tmp_path: Path) -> None:
    run_pipeline(numbers_pipeline(9, db_file=tmp_path / "run.db"), indices=[1, 5, 7])
    pipeline = numbers_pipeline(9, db_file=tmp_path / "run.db")
    paths = run_pipeline(pipeline, indices=[7, 6, 5, -2])
    assert paths == [[f"out/{index}-0.bin"] for index in (7, 6, 5, 7)]


@pytest.mark.parametrize("indices", [range(2, 7, 2), range(6, -1, -3), range(4, 4), range(-2, 2)])
def test_a_range_is_taken_as_the_list_of_its_indices(indices: range) -> None:
    results = run_pipeline(numbers_pipeline(8), indices=indices)
    assert results == [[f"out/{index % 8}-0.bin"] for index in indices]


# --- the memory of the driver -----------------------------------------------------------------


class Scales:
    """Notes what Python has allocated as the last index of a run is reported."""

    def __init__(self) -> None:
        self.left = 0
        self.bytes = 0

    @hookimpl
    def psnc_run_start(self, indices: Any) -> None:
        self.left = len(indices)

    @hookimpl
    def psnc_index_reported(self) -> None:
        self.left -= 1
        if not self.left:
            self.bytes = allocated()


def allocated() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@contextmanager
def tracing() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def unwatched_pipeline(count: int) -> Pipeline[int]:
    return Pipeline(Numbers(count), [], Discard(), track_memory=False)


FEW, MANY = 400, 2400


def bytes_of_one_more(weigh: Callable[[int, bool], int], collect: bool) -> float:
    """Return by how much the driver is heavier for each further index."""
    # One of them may meet the moment in which Python's table of interned strings is made anew,
    # a block of megabytes in a process that has run many tests. The next moment is far off.
    more = [weigh(MANY, collect) - weigh(FEW, collect) for _ in range(3)]
    return median(more) / (MANY - FEW)


# Imports and caches take some. The number of an index would take more, and a place to keep it.
NOTHING = 32
# A list and a path take more.
SOMETHING = 100


@on_every_backend
def test_the_driver_has_kept_nothing_of_the_indices_of_a_run(backend: str) -> None:
    def weigh(count: int, collect: bool) -> int:
        before = allocated()
        session = Session(
            unwatched_pipeline(count), n_jobs=jobs(backend), backend=backend, collect=collect
        )
        session.run()
        return allocated() - before

    with tracing():
        weigh(MANY, False)
        assert bytes_of_one_more(weigh, collect=False) < NOTHING
        assert bytes_of_one_more(weigh, collect=True) > SOMETHING


def test_the_driver_keeps_nothing_of_indices_that_have_ended(plugins: PluginManager) -> None:
    scales = Scales()
    plugins.register(scales)

    def weigh(count: int, collect: bool) -> int:
        before = allocated()
        run_pipeline(unwatched_pipeline(count), collect=collect)
        return scales.bytes - before

    with tracing():
        weigh(MANY, False)
        assert bytes_of_one_more(weigh, collect=False) < NOTHING
        assert bytes_of_one_more(weigh, collect=True) > SOMETHING


# --- questions about very many indices --------------------------------------------------------

# Enough for several chunks, the last one not full. Every fourth index has failed.
COUNT = 8 * CHUNK + 7


@pytest.fixture
def large(tmp_path: Path) -> Iterator[SQLiteStore]:
    """A store with many indices, written as an earlier psnc did: without checksums."""
    path = tmp_path / "large.db"
    run_pipeline(numbers_pipeline(1, db_file=path))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM index_results")
        connection.execute(
            """
            WITH RECURSIVE numbers (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers LIMIT ?)
            INSERT INTO index_results
                (idx, run_id, status, output_paths, completed_at, wall_time_ns, error)
            SELECT n, 1, iif(n % 4, 'completed', 'error'),
                iif(n % 4, '["out/' || n || '.bin"]', '[]'), '2026-01-01', 1,
                iif(n % 4, NULL, 'ValueError: ' || n)
            FROM numbers
            """,
            (COUNT,),
        )
        connection.commit()
    store = SQLiteStore(path, create=False, config=Config())
    store.select(1)
    yield store
    store.close()


def paths_of(index: int) -> list[str]:
    return [f"out/{index}.bin"]


def test_every_index_of_a_large_run_is_in_the_answer(large: SQLiteStore) -> None:
    completed = [index for index in range(COUNT) if index % 4]
    assert large.completed_outputs() == {index: paths_of(index) for index in completed}
    assert large.completed_indices() == set(completed)
    failed = large.failed_indices()
    assert list(failed.items()) == [(n, f"ValueError: {n}") for n in range(0, COUNT, 4)]


@pytest.mark.parametrize(
    "ask",
    [SQLiteStore.completed_outputs, SQLiteStore.completed_indices, SQLiteStore.failed_indices],
)
def test_an_answer_takes_little_more_memory_than_itself(
    ask: Callable[[SQLiteStore], Any], large: SQLiteStore
) -> None:
    ask(large)
    with tracing():
        answer = ask(large)
        size, peak = tracemalloc.get_traced_memory()
    assert len(answer) > CHUNK
    # A table of hashes is copied as it grows, and a chunk of rows is there besides.
    assert peak < 1.5 * size + 500 * CHUNK


def test_the_rows_of_an_answer_are_of_one_moment(large: SQLiteStore) -> None:
    query = "SELECT idx FROM {schema}.index_results ORDER BY idx"
    with large.read_in_chunks(query) as chunks:
        rows = iter(chunks)
        indices = [index for (index,) in next(rows)]
        with closing(sqlite3.connect(large.path)) as other:
            other.execute("DELETE FROM index_results")
            other.commit()
        indices += [index for chunk in rows for (index,) in chunk]
    assert indices == list(range(COUNT))
    assert large.completed_indices() == set()


def test_damage_in_a_late_chunk_is_an_error_and_leaves_the_store_of_use(
    large: SQLiteStore,
) -> None:
    with closing(sqlite3.connect(large.path)) as connection:
        connection.execute("UPDATE index_results SET checksum = 1 WHERE idx = ?", (COUNT - 2,))
        connection.commit()
    with pytest.raises(StoreError, match=f"index {COUNT - 2} is not as it was written") as raised:
        large.completed_outputs()
    # The error is still held, and with it all that was at work.
    assert raised.value.__traceback__ is not None
    found: list[Any] = []
    other = threading.Thread(target=lambda: found.append(large.lookup(1)), daemon=True)
    other.start()
    other.join(60)
    assert found == [("out/1.bin",)]
    large.record(IndexRecord(0, "completed", ("late.bin",)))
    large.flush()
    assert large.lookup(0) == ("late.bin",)


@pytest.mark.parametrize("enabled", [True, False])
def test_pythons_search_for_cycles_is_left_as_it_was(enabled: bool, large: SQLiteStore) -> None:
    (gc.enable if enabled else gc.disable)()
    try:
        large.completed_outputs()
        assert gc.isenabled() is enabled
        with closing(sqlite3.connect(large.path)) as connection:
            connection.execute("UPDATE index_results SET checksum = 1")
            connection.commit()
        with pytest.raises(StoreError):
            large.completed_outputs()
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_paths_that_are_several_arrays_are_damage(large: SQLiteStore) -> None:
    with closing(sqlite3.connect(large.path)) as connection:
        twice = ",".join([json.dumps(paths_of(1))] * 2)
        connection.execute("UPDATE index_results SET output_paths = ? WHERE idx = 1", (twice,))
        connection.commit()
    with pytest.raises(StoreError, match="output_paths are no JSON arrays"):
        large.completed_outputs()


def test_many_indices_are_forgotten_and_no_others(large: SQLiteStore) -> None:
    gone = {0, COUNT - 1, *range(10, 2 * CHUNK), *range(2 * CHUNK, 4 * CHUNK, 3)}
    large.reset_indices([*gone, 0, 12])
    left = set(range(COUNT)) - gone
    assert large.completed_indices() | large.failed_indices().keys() == left
    large.reset_indices([])
    assert len(large.completed_outputs()) == sum(index % 4 != 0 for index in left)
