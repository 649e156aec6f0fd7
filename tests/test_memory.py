"""The peak memory of each index: its own, and no earlier one's."""

from __future__ import annotations

import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from drivers import BACKENDS, jobs
from stages_for_tests import Discard, Numbers, numbers_pipeline, wait_until

from psnc import Filter, Pipeline, run_pipeline
from psnc.builtin import memory

MB = 1_000_000
Query = Callable[..., Any]


class Allocate(Filter[int, int]):
    """Holds 200 MB for a moment at one item."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item == self.at:
                hold_200_mb()
            yield item


class AllocateBeforeOthersBegin(Filter[int, int]):
    """Index 0 holds 200 MB, lets them go, and then waits until index 1 is at work."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        let_go, begun = (Path(self.directory, name) for name in ("let-go", "begun"))
        for item in items:
            if item == 0:
                hold_200_mb()
                let_go.touch()
                wait_until(begun.exists)
            else:
                begun.touch()
            yield item


def hold_200_mb() -> None:
    block = bytearray(200 * MB)
    # A page counts once it is written to.
    block[::4096] = b"x" * len(block[::4096])


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


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is Linux's")
def test_what_the_process_was_before_it_was_this_program_is_not_its_peak(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sqlite3, subprocess, sys\n"
        "from stages_for_tests import Discard, Numbers\n"
        "from test_memory import Allocate\n"
        "if len(sys.argv) == 1:\n"
        "    block = bytearray(400_000_000)\n"
        "    block[::4096] = b'x' * len(block[::4096])\n"
        "    subprocess.run([sys.executable, __file__, 'child'], check=True)\n"
        "else:\n"
        "    pipeline = Numbers(3).filter(Allocate(1)).write(Discard())\n"
        "    list(pipeline)\n"
        "    rows = sqlite3.connect(pipeline.db_path).execute(\n"
        "        'SELECT peak_memory_bytes FROM index_results ORDER BY idx').fetchall()\n"
        "    (first,), (second,), (third,) = rows\n"
        "    print(max(first, third) < 190_000_000 < second < 390_000_000)\n"
    )
    assert run_python(script).stdout == "True\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark is Linux's")
def test_the_short_way_to_the_mark_and_the_long_one_agree() -> None:
    mark = memory._HighWaterMark()
    try:
        for begin in range(3):
            mark.reset()
            if begin == 1:
                hold_200_mb()
            (short,), long = mark.read(), mark._read_mark()
            assert abs(short - long) < 2 * MB
    finally:
        mark.close()


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


def test_a_program_that_traces_memory_itself_finds_its_traces_and_its_peak() -> None:
    tracemalloc.start()
    try:
        block = bytearray(30 * MB)
        del block
        kept = bytearray(10 * MB)
        run_pipeline(Pipeline(Numbers(3), sink=Discard(), track_memory="python"))
        size, peak = tracemalloc.get_traced_memory()
        assert len(kept) <= size
        assert 30 * MB < peak < 31 * MB
        traces = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, __file__)])
        assert any(trace.size >= len(kept) for trace in traces.traces)
    finally:
        tracemalloc.stop()


def test_the_peak_of_an_index_is_part_of_that_of_a_program_that_traces_itself() -> None:
    tracemalloc.start()
    try:
        run_pipeline(Pipeline(Numbers(3), [Allocate(1)], Discard(), track_memory="python"))
        assert tracemalloc.get_traced_memory()[1] > 200 * MB
    finally:
        tracemalloc.stop()


def test_outside_of_a_run_memory_is_traced_only_while_an_index_runs() -> None:
    class IsTracing(Filter[int, int]):
        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            assert tracemalloc.is_tracing()
            if next(items) == 1:
                raise KeyboardInterrupt
            return items

    pipeline = Pipeline(Numbers(2), [IsTracing()], Discard(), track_memory="python")
    try:
        _ = pipeline[0]
        assert not tracemalloc.is_tracing()
        with pytest.raises(KeyboardInterrupt):
            _ = pipeline[1]
        assert not tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()


def test_a_stage_that_stops_tracing_leaves_its_index_without_a_figure(query: Query) -> None:
    class Stop(Filter[int, int]):
        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            for item in items:
                if item == 1:
                    tracemalloc.stop()
                yield item

    pipeline = Pipeline(Numbers(3), [Stop()], Discard(), track_memory="python")
    run_pipeline(pipeline, on_error="raise")
    before, during, after = _peaks(pipeline, query)
    assert before is not None
    assert during is None
    assert after is not None


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                sys.platform != "linux", reason="the kernel's high-water mark is Linux's"
            ),
        ),
        "python",
    ],
)
def test_an_index_keeps_its_peak_when_another_begins_beside_it(
    mode: bool | Literal["python"], tmp_path: Path, query: Query
) -> None:
    stage = AllocateBeforeOthersBegin(str(tmp_path))
    pipeline = Pipeline(Numbers(2), [stage], Discard(), track_memory=mode)
    first = threading.Thread(target=pipeline.__getitem__, args=(0,))
    first.start()
    wait_until((tmp_path / "let-go").exists)
    _ = pipeline[1]
    first.join()
    pipeline.summary()  # what is recorded is in the database once the pipeline is asked
    early, late = _peaks(pipeline, query)
    assert early is not None
    assert late is not None
    assert early - late > 190 * MB


def test_an_index_that_runs_another_pipeline_has_its_peak_too(query: Query) -> None:
    class Nest(Filter[int, int]):
        inner = Numbers(1).filter(Allocate(0)).write(Discard())

        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            for item in items:
                if item == 1:
                    _ = self.inner[0]
                yield item

    outer = Numbers(2).filter(Nest()).write(Discard())
    run_pipeline(outer)
    without, with_inner = _peaks(outer, query)
    assert without is not None
    assert with_inner is not None
    assert with_inner - without > 190 * MB


def test_where_the_mark_cannot_be_reset_an_index_that_raises_it_is_exact(
    monkeypatch: pytest.MonkeyPatch, query: Query
) -> None:
    monkeypatch.setattr(memory, "_RESET_FILE", "/nowhere/at/all")
    memory.psnc_unconfigure()
    reached = memory._highest_ever()

    class RaiseTheMark(Filter[int, int]):
        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            for item in items:
                if item == 1:
                    size = reached + 50 * MB
                    block = bytearray(size)
                    block[::4096] = b"x" * len(block[::4096])
                yield item

    pipeline = Numbers(3).filter(RaiseTheMark()).write(Discard())
    run_pipeline(pipeline)
    before, during, after = _peaks(pipeline, query)
    assert before is not None
    assert during is not None
    assert after is not None
    assert 0 < before < reached + 50 * MB < during
    assert 0 < after < during


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
