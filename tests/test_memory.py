"""The peak memory of each index: its own, and no earlier one's."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from drivers import BACKENDS, jobs
from stages_for_tests import Discard, Numbers, numbers_pipeline

from psnc import Filter, Pipeline, run_pipeline

MB = 1_000_000
Query = Callable[..., Any]


class Allocate(Filter[int, int]):
    """Holds 200 MB for a moment at one item."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item == self.at:
                block = bytearray(200 * MB)
                # A page counts once it is written to.
                block[::4096] = b"x" * len(block[::4096])
                del block
            yield item


def _peaks(pipeline: Pipeline[Any], query: Query) -> list[int | None]:
    rows = query(pipeline.db_path, "SELECT peak_memory_bytes FROM index_results ORDER BY idx")
    return [peak for (peak,) in rows]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is Linux's")
@pytest.mark.parametrize("backend", ["sequential", "process_pool"])
def test_a_large_allocation_shows_in_its_index_and_in_no_other(backend: str, query: Query) -> None:
    pipeline = Numbers(3).filter(Allocate(1)).write(Discard())
    run_pipeline(pipeline, 1, backend)
    before, during, after = _peaks(pipeline, query)
    assert before is not None
    assert during is not None
    assert after is not None
    assert during - before > 190 * MB
    assert during - after > 190 * MB


def test_memory_of_a_failed_index_is_recorded_too(query: Query) -> None:
    class Fail(Filter[int, int]):
        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            raise RuntimeError

    pipeline = Numbers(1).filter(Fail()).write(Discard())
    run_pipeline(pipeline)
    (peak,) = _peaks(pipeline, query)
    assert peak is not None
    assert peak > MB


@pytest.mark.parametrize("backend", ["sequential", "process_pool"])
def test_pythons_own_allocations_can_be_measured_instead(backend: str, query: Query) -> None:
    pipeline = Pipeline(Numbers(3), [Allocate(1)], Discard(), track_memory="python")
    try:
        run_pipeline(pipeline, 1, backend)
    finally:
        tracemalloc.stop()
    before, during, after = _peaks(pipeline, query)
    assert before is not None
    assert during is not None
    assert after is not None
    assert before < 50 * MB
    assert during > 200 * MB
    assert after < 50 * MB


def test_measuring_pythons_allocations_ends_with_the_run() -> None:
    pipeline = Pipeline(Numbers(3), sink=Discard(), track_memory="python")
    try:
        run_pipeline(pipeline)
        assert not tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()


def test_a_program_that_traces_memory_itself_goes_on_doing_so() -> None:
    tracemalloc.start()
    try:
        run_pipeline(Pipeline(Numbers(3), sink=Discard(), track_memory="python"))
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_that_is_not_tracked_is_null(backend: str, query: Query) -> None:
    pipeline = numbers_pipeline(4, track_memory=False)
    run_pipeline(pipeline, jobs(backend), backend)
    assert _peaks(pipeline, query) == [None] * 4


def test_memory_is_measured_after_a_fork_as_well(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sqlite3\n"
        "from stages_for_tests import Discard, Numbers\n"
        "from test_memory import Allocate\n"
        "pipeline = Numbers(2).filter(Allocate(1)).write(Discard())\n"
        "pipeline[0]\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    pipeline[1]\n"
        "    pipeline.summary()\n"
        "    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
        "pipeline.summary()\n"
        "rows = sqlite3.connect(pipeline.db_path).execute(\n"
        "    'SELECT peak_memory_bytes FROM index_results ORDER BY idx').fetchall()\n"
        "(first,), (second,) = rows\n"
        "print(second - first > 190_000_000)\n"
    )
    assert run_python(script).stdout == "True\n"
