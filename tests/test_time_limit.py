"""An index that takes longer than it may is ended, whatever it is at, and the others are not."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from drivers import integrity, write_script
from stages_for_tests import Discard, FailOn, Journal, Numbers, numbers_pipeline, read_journal

from psnc import BackendError, Filter, IndexTimeoutError, Pipeline, hookimpl, run_pipeline
from psnc.manager import PluginManager, activated
from psnc.retries import RetryPolicy
from psnc.session import Session


class Stuck(Filter[int, int]):
    """Sleeps for very long at some items: in Python, or in C code that keeps the GIL."""

    def __init__(self, items: list[int], how: str = "python") -> None:
        self.items = items
        self.how = how

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item in self.items:
                self.hang()
            yield item

    def hang(self) -> None:
        if self.how == "holding the GIL":
            ctypes.PyDLL(None).sleep(3600)
        elif self.how == "deaf to signals":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
            time.sleep(3600)
        elif self.how == "swallowing everything":
            while True:
                try:
                    time.sleep(3600)
                except BaseException:
                    continue
        else:
            time.sleep(3600)


class StuckOnce(Stuck):
    """Is stuck as long as no file is there that it makes as it gets stuck."""

    def __init__(self, items: list[int], marker: str) -> None:
        super().__init__(items)
        self.marker = marker

    def hang(self) -> None:
        if not Path(self.marker).exists():
            Path(self.marker).touch()
            super().hang()


def out(count: int) -> list[list[str]]:
    return [[f"out/{index}-0.bin"] for index in range(count)]


@pytest.mark.parametrize(
    "how", ["python", "holding the GIL", "deaf to signals", "swallowing everything"]
)
def test_only_the_index_that_takes_too_long_fails(how: str) -> None:
    pipeline = Numbers(12).filter(Stuck([5], how)).write(Discard())
    results = run_pipeline(pipeline, 2, timeout=2)
    assert results == [[] if i == 5 else paths for i, paths in enumerate(out(12))]
    assert pipeline.failed_indices == {
        5: "IndexTimeoutError: it took longer than 2 s, and its worker was ended"
    }
    assert pipeline.completed_indices == set(range(12)) - {5}
    assert {each["current_index"] for each in pipeline.active_workers} == {None}
    assert integrity(pipeline.db_path) == "ok"


def test_the_log_says_where_it_was() -> None:
    pipeline = Numbers(3).filter(Stuck([1])).write(Discard())
    run_pipeline(pipeline, 1, timeout=2)
    (entry,) = pipeline.__dict__["_run"].store.logs(1)
    assert entry["message"].startswith("index 1 took longer than 2 s\n")
    assert "in hang" in entry["message"]
    assert (entry["level_name"], entry["logger_name"]) == ("ERROR", "psnc.execution")


def test_a_time_limit_is_for_one_index_and_not_for_a_batch_or_the_time_between(
    journal: str,
) -> None:
    class Nap(Filter[int, int]):
        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            for item in items:
                time.sleep(0.02)
                yield item

    class Slow:
        @hookimpl
        def psnc_index_reported(self) -> None:
            time.sleep(0.05)

    manager = PluginManager()
    manager.load()
    manager.register(Slow(), "slow")
    pipeline = Journal(60, journal).filter(Nap()).write(Discard())
    with activated(manager):
        assert run_pipeline(pipeline, 2, timeout=4) == out(60)
    assert sorted(read_journal(journal)) == list(range(60))


def test_one_among_many_tiny_indices_is_found_at_once(journal: str, tmp_path: Path) -> None:
    pipeline = Journal(1500, journal).filter(Stuck([777])).write(Discard())
    results = run_pipeline(pipeline, 2, timeout=4)
    assert [i for i, paths in enumerate(results) if not paths] == [777]
    assert read_journal(journal).count(777) == 1


def test_nothing_recorded_is_needed_to_know_which_it_was() -> None:
    pipeline = Pipeline(Numbers(300), [Stuck([150])], Discard(), track_metrics=False)
    results = run_pipeline(pipeline, 2, timeout=2)
    assert [i for i, paths in enumerate(results) if not paths] == [150]


def test_it_can_have_another_attempt(tmp_path: Path) -> None:
    stuck = StuckOnce([3], str(tmp_path / "marker"))
    pipeline = Numbers(8).filter(stuck).write(Discard())
    session = Session(pipeline, policy=RetryPolicy(1, IndexTimeoutError, 0), timeout=2)
    summary = session.run()
    assert session.results() == out(8)
    assert (summary.retries, summary.failed, summary.quarantined) == (1, {}, {})


def test_one_that_is_stuck_each_time_is_set_aside_and_named() -> None:
    pipeline = Numbers(4).filter(Stuck([3])).write(Discard())
    session = Session(pipeline, policy=RetryPolicy(1, retry_delay=0), timeout=2)
    assert session.run().quarantined == {3: 2}


@pytest.mark.parametrize("start_method", ["spawn", "fork", "forkserver"])
def test_it_holds_however_workers_start(start_method: str) -> None:
    pipeline = Numbers(4).filter(Stuck([1])).write(Discard())
    run_pipeline(pipeline, 1, timeout=2, start_method=start_method)
    assert list(pipeline.failed_indices) == [1]


@pytest.mark.parametrize("backend", ["sequential", "thread_pool"])
def test_backends_that_cannot_end_an_index_refuse_a_time_limit(backend: str, journal: str) -> None:
    pipeline = Journal(3, journal).write(Discard())
    with pytest.raises(BackendError, match=rf"backend '{backend}' cannot end .* timeout=5"):
        run_pipeline(pipeline, 1, backend, timeout=5)
    assert not Path(journal).exists()


def test_one_job_with_a_time_limit_runs_in_a_process() -> None:
    pipeline = numbers_pipeline(3)
    run_pipeline(pipeline, timeout=60)
    (worker,) = pipeline.active_workers
    assert worker["pid"] != pipeline.__dict__["_run"].pid


def test_other_failures_stay_what_they_are() -> None:
    pipeline = Numbers(4).filter(FailOn([2])).write(Discard())
    run_pipeline(pipeline, timeout=60)
    assert pipeline.failed_indices == {2: "RuntimeError: bad item 2"}


def test_the_driver_says_nothing_and_leaves_nothing_behind(
    tmp_path: Path,
    run_python: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = write_script(
        tmp_path / "script.py",
        """
        from psnc import run_pipeline
        from stages_for_tests import Discard, Numbers
        from test_time_limit import Stuck

        pipeline = Numbers(3).filter(Stuck([1])).write(Discard(0))
        run_pipeline(pipeline, 2, timeout=2)
        print(list(pipeline.failed_indices))
        """,
    )
    # Not in pytest's own directory: the sockets of processes have short names.
    with tempfile.TemporaryDirectory() as place:
        monkeypatch.setenv("TMPDIR", place)
        finished = run_python(script, timeout=60)
        left = [each for each in Path(place).rglob("*") if each.is_file()]
    assert (finished.stdout, finished.stderr, left) == ("[1]\n", "", [])
