"""Many processes and threads write to one database at once, and others ask and forget meanwhile."""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
import traceback
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from drivers import integrity
from stages_for_tests import Double, Numbers
from trials import Many, Tried

from psnc import Config, Filter, Pipeline, Sink
from psnc.builtin.checkpoint.check import check
from psnc.builtin.checkpoint.store import SQLiteStore

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

PROCESSES = 8
THREADS = 32
FILES = 3


class Keep(Filter[int, int]):
    """Stateful: its shard is what went through it."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            self.seen.append(item)
            yield item

    def flush(self, path: Path) -> None:
        path.write_text(str(self.seen))


class Name(Sink[int]):
    """Names files by what it was given, and writes none."""

    def __call__(self, items: Iterator[int], index: int) -> list[str]:
        return [f"out/{index}-{item}-{number}" for item in items for number in range(FILES)]


def pipeline_of(count: int, database: Path) -> Pipeline[int]:
    return Pipeline(
        source=Numbers(count), filters=[Double(), Keep()], sink=Name(), db_file=database
    )


# --- in each process --------------------------------------------------------------------------


def write(place: int, count: int, database: Path, begin: Any, said: Any) -> None:
    """Run this process's share of the indices in many threads; say what went wrong."""
    problems: list[str] = []
    pipeline = pipeline_of(count, database)

    def run(thread: int) -> None:
        for index in range(place * THREADS + thread, count, PROCESSES * THREADS):
            try:
                if pipeline[index] != expected(index):
                    problems.append(f"{index} has another result")
                if index % 50 == 0:
                    # It is forgotten, and run again.
                    pipeline.reset_index(index)
                    if pipeline[index] != expected(index):
                        problems.append(f"{index} has another result the second time")
            except BaseException:
                problems.append(traceback.format_exc())

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    begin.wait()
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    said.put(problems)


def ask(database: Path, stop: Any, said: Any) -> None:
    """Ask for as long as others write; each answer is whole, and nothing that was there is gone."""
    problems: list[str] = []
    asked = 0
    seen: set[int] = set()
    store = SQLiteStore(database, create=False, config=Config())
    store.select(1)
    try:
        while not stop.is_set():
            completed = store.completed_outputs()
            problems += [
                f"{index} has half of its result"
                for index, paths in completed.items()
                if paths != expected(index)
            ]
            # Every fiftieth is forgotten for a moment.
            problems += [f"{index} is gone" for index in seen - set(completed) if index % 50]
            seen = set(completed)
            asked += 1
    except BaseException:
        problems.append(traceback.format_exc())
    store.close()
    said.put((asked, problems))


def expected(index: int) -> list[str]:
    return [f"out/{index}-{2 * index}-{number}" for number in range(FILES)]


# --- the test ---------------------------------------------------------------------------------


def test_many_processes_of_many_threads_lose_no_record(
    tmp_path: Path, many: Many, tried: Tried
) -> None:
    count = many(4000)
    database = tmp_path / "run.db"
    # Somebody has begun; that several begin at once is another test's.
    assert pipeline_of(count, database)[0] == expected(0)
    context = multiprocessing.get_context("spawn")
    begin, stop = context.Barrier(PROCESSES), context.Event()
    written, answered = context.Queue(), context.Queue()
    writers = [
        context.Process(target=write, args=(place, count, database, begin, written))
        for place in range(PROCESSES)
    ]
    reader = context.Process(target=ask, args=(database, stop, answered))
    for process in (*writers, reader):
        process.start()
    problems = [problem for _ in writers for problem in written.get(timeout=1000)]
    stop.set()
    asked, problems_asking = answered.get(timeout=1000)
    for process in (*writers, reader):
        process.join()
    assert problems == []
    assert problems_asking == []
    assert asked > 0
    assert_each_is_there_once(database, count)
    tried("indices written by 8 processes of 32 threads", count)


def assert_each_is_there_once(database: Path, count: int) -> None:
    assert integrity(database) == "ok"
    assert check(database) == []
    everything = range(count)
    with closing(sqlite3.connect(database)) as connection:

        def rows(query: str) -> list[tuple[Any, ...]]:
            return connection.execute(query).fetchall()

        assert rows("SELECT idx, status FROM index_results ORDER BY idx") == [
            (index, "completed") for index in everything
        ]
        assert rows("SELECT idx, path FROM output_files ORDER BY idx, seq") == [
            (index, path) for index in everything for path in expected(index)
        ]
        assert rows("SELECT idx, stage_order FROM stage_metrics ORDER BY idx, stage_order") == [
            (index, order) for index in everything for order in range(4)
        ]
        shards = rows("SELECT idx, path FROM filter_artifacts ORDER BY idx")
        assert [index for index, _ in shards] == list(everything)
        ((completed,),) = rows("SELECT sum(completed_count) FROM workers")
    for index, path in shards:
        assert Path(path).read_text() == f"[{2 * index}]"
    # Those that were forgotten ran twice; the first index ran before.
    assert completed == count + len(range(0, count, 50))
