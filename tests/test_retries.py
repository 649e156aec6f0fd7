"""Indices that fail are tried again, as often and after such errors as the caller says."""

from __future__ import annotations

import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from drivers import BACKENDS, Start, jobs, start, wait_for_end
from stages_for_tests import (
    Die,
    Discard,
    FailOn,
    Journal,
    Numbers,
    Pairs,
    Sum,
    WriteText,
    read_journal,
    wait_until,
)

from psnc import (
    Filter,
    Pipeline,
    PipelineError,
    PsncError,
    TooManyFailuresError,
    hookimpl,
    run_pipeline,
)
from psnc.manager import PluginManager, activated
from psnc.retries import RetryPolicy
from psnc.session import Session

__all__ = ["start"]

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


class BusyError(OSError):
    """A server has no time."""


class FailAtFirst(Filter[int, int]):
    """Raises for some items as often as it is told, each time noted in a directory."""

    def __init__(
        self, items: list[int], times: int, directory: str, error: type[Exception] = BusyError
    ) -> None:
        self.items = items
        self.times = times
        self.directory = directory
        self.error = error

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item in self.items and self.attempts(item) < self.times:
                Path(self.directory, f"{item}-{time.monotonic_ns()}").touch()
                self.fail(item)
            yield item

    def attempts(self, item: int) -> int:
        return len(list(Path(self.directory).glob(f"{item}-*")))

    def fail(self, item: int) -> None:
        raise self.error(f"not yet {item}")


class DieAtFirst(FailAtFirst):
    """Kills its process instead."""

    def fail(self, item: int) -> None:
        list(Die([item], signal=signal.SIGKILL)(iter([item])))


class Recorder:
    """Writes down what the driver is told."""

    def __init__(self) -> None:
        self.retried: list[tuple[int, int, str | None]] = []
        self.pauses: list[float] = []
        self.reported: list[tuple[int, str]] = []

    @hookimpl
    def psnc_index_retried(self, record: Any, attempt: int, pause_s: float) -> None:
        self.retried.append((record.index, attempt, record.error))
        self.pauses.append(pause_s)

    @hookimpl
    def psnc_index_reported(self, record: Any) -> None:
        self.reported.append((record.index, record.status))


@pytest.fixture
def attempts(tmp_path: Path) -> str:
    (tmp_path / "attempts").mkdir()
    return str(tmp_path / "attempts")


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    manager = PluginManager()
    manager.load()
    recorder = Recorder()
    manager.register(recorder, "recorder")
    with activated(manager):
        yield recorder


def out(count: int) -> list[list[str]]:
    return [[f"out/{index}-0.bin"] for index in range(count)]


@on_every_backend
def test_an_index_that_fails_for_a_while_completes(backend: str, attempts: str) -> None:
    pipeline = Numbers(12).filter(FailAtFirst([3, 4], 2, attempts)).write(Discard())
    results = run_pipeline(pipeline, jobs(backend), backend, retries=2, retry_delay=0)
    assert results == out(12)
    assert (pipeline.failed_indices, len(pipeline.completed_indices)) == ({}, 12)
    tried = {each.index: each.attempts for each in pipeline.metrics.indices}
    assert tried == {index: 3 if index in (3, 4) else 1 for index in range(12)}


@on_every_backend
def test_an_index_that_keeps_failing_is_reported_once_with_its_last_error(
    backend: str, recorder: Recorder
) -> None:
    pipeline = Numbers(6).filter(FailOn([2])).write(Discard())
    results = run_pipeline(pipeline, jobs(backend), backend, retries=3, retry_delay=0)
    assert results == [[] if i == 2 else paths for i, paths in enumerate(out(6))]
    assert recorder.retried == [(2, attempt, "RuntimeError: bad item 2") for attempt in (1, 2, 3)]
    assert sorted(recorder.reported) == [(i, "error" if i == 2 else "completed") for i in range(6)]


def test_without_retries_there_is_one_attempt(journal: str) -> None:
    pipeline = Journal(4, journal).filter(FailOn([2])).write(Discard())
    run_pipeline(pipeline)
    assert sorted(read_journal(journal)) == [0, 1, 2, 3]


def test_attempts_of_all_runs_are_counted_also_where_the_worker_died() -> None:
    pipeline = Numbers(3).filter(Die([1])).write(Discard())
    run_pipeline(pipeline, 2, "process_pool", retries=1, retry_delay=0)
    run_pipeline(pipeline, 2, "process_pool")
    assert [each.attempts for each in pipeline.metrics.indices] == [1, 3, 1]


def test_every_attempt_leaves_its_log_entry(attempts: str) -> None:
    pipeline = Numbers(3).filter(FailAtFirst([1], 2, attempts)).write(Discard())
    run_pipeline(pipeline, retries=5, retry_delay=0)
    store = pipeline.__dict__["_run"].store
    entries = [each["message"] for each in store.logs(1)]
    assert len(entries) == 2
    assert all("BusyError: not yet 1" in entry for entry in entries)


@on_every_backend
@pytest.mark.parametrize(
    ("retry_on", "completed"),
    [
        pytest.param(BusyError, {0, 1, 2}, id="the class"),
        pytest.param(OSError, {0, 1, 2}, id="a base class"),
        pytest.param((ValueError, OSError), {0, 1, 2}, id="one of several"),
        pytest.param(ValueError, {0, 2}, id="another"),
        pytest.param((), {0, 2}, id="none"),
    ],
)
def test_only_such_errors_are_worth_another_attempt(
    backend: str, retry_on: Any, completed: set[int], attempts: str
) -> None:
    pipeline = Numbers(3).filter(FailAtFirst([1], 1, attempts)).write(Discard())
    run_pipeline(pipeline, jobs(backend), backend, retries=1, retry_on=retry_on, retry_delay=0)
    assert pipeline.completed_indices == completed


def test_a_resume_has_all_its_attempts_again(journal: str) -> None:
    pipeline = Pipeline(Journal(1, journal), [FailOn([0])], Discard(), resume=True)
    for _ in range(2):
        run_pipeline(pipeline, retries=2, retry_delay=0)
    assert read_journal(journal) == [0] * 6


@pytest.mark.parametrize("track_metrics", [True, False])
def test_a_worker_that_dies_at_first_costs_nothing(track_metrics: bool, attempts: str) -> None:
    die = DieAtFirst([5, 6, 30], 2, attempts)
    pipeline = Pipeline(Numbers(60), [die], Discard(), track_metrics=track_metrics)
    session = Session(pipeline, n_jobs=2, policy=RetryPolicy(2, retry_delay=0))
    summary = session.run()
    assert session.results() == out(60)
    assert (summary.completed, summary.failed, summary.quarantined) == (60, {}, {})
    # Of a death in a batch of several nobody knows whose it was.
    assert 2 <= summary.retries <= 6


def test_an_index_that_ends_its_worker_each_time_is_set_aside_and_named(recorder: Recorder) -> None:
    pipeline = Numbers(20).filter(Die([7], signal=signal.SIGSEGV)).write(Discard())
    session = Session(pipeline, n_jobs=2, policy=RetryPolicy(2, retry_delay=0))
    summary = session.run()
    assert summary.quarantined == {7: 3}
    assert list(summary.failed) == [7]
    assert "SIGSEGV" in pipeline.failed_indices[7]
    assert [(index, attempt) for index, attempt, _ in recorder.retried] == [(7, 1), (7, 2)]


def test_the_end_of_a_worker_is_an_error_like_others() -> None:
    pipeline = Numbers(6).filter(Die([2])).write(Discard())
    session = Session(pipeline, n_jobs=2, policy=RetryPolicy(5, OSError, 0))
    assert session.run().quarantined == {2: 1}


def test_others_run_while_one_waits_for_its_next_attempt(attempts: str) -> None:
    # A pause of half a minute at the least: nothing but the interrupt below ends the wait.
    pipeline = Numbers(50).filter(FailAtFirst([0], 1, attempts)).write(Discard())

    class EndWhenAllElseIsDone:
        left = 49

        @hookimpl
        def psnc_index_reported(self) -> None:
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)

    manager = PluginManager()
    manager.load()
    manager.register(EndWhenAllElseIsDone(), "end")
    with activated(manager), pytest.raises(KeyboardInterrupt):
        run_pipeline(pipeline, retries=1, retry_delay=60)
    assert pipeline.completed_indices == set(range(1, 50))
    assert pipeline.failed_indices == {0: "BusyError: not yet 0"}


def test_an_interrupted_wait_counts_as_failed_and_resumes(
    attempts: str, start: Start, tmp_path: Path, query: Callable[..., Any]
) -> None:
    script = """
    from psnc import Pipeline, hookimpl, plugin_manager, run_pipeline
    from stages_for_tests import Discard, FailOn, Numbers

    class Tell:
        @hookimpl
        def psnc_index_retried(self):
            open("waits", "w").close()

    plugin_manager().register(Tell(), name="tell")
    pipeline = Pipeline(Numbers(4), [FailOn([1], "mended")], Discard(), resume=True, db_dir="db")
    run_pipeline(pipeline, 2, retries=1, retry_delay=60)
    """
    driver = start(textwrap.dedent(script))
    wait_until(lambda: any((tmp_path / "db").glob("*.db")))
    database = next((tmp_path / "db").glob("*.db"))
    wait_until(lambda: len(query(database, "SELECT idx FROM index_results")) == 4)
    # It is on record a moment before the driver knows of it.
    wait_until((tmp_path / "waits").exists)
    processes = driver.descendants()
    driver.interrupt()
    assert driver.finish()[0] == -signal.SIGINT
    wait_for_end(processes)
    rows = dict(query(database, "SELECT idx, status FROM index_results"))
    assert rows == {0: "completed", 1: "error", 2: "completed", 3: "completed"}
    (tmp_path / "mended").touch()
    assert start(textwrap.dedent(script)).finish()[0] == 0
    rows = dict(query(database, "SELECT idx, status FROM index_results"))
    assert set(rows.values()) == {"completed"}


def test_pauses_double_and_are_never_alike(recorder: Recorder) -> None:
    policy = RetryPolicy(retry_delay=4)
    for attempt, longest in [(1, 4), (2, 8), (3, 16), (4, 32), (5, 60), (500, 60)]:
        pauses = {policy.pause_s(attempt) for _ in range(200)}
        assert len(pauses) > 1
        assert longest / 2 <= min(pauses) <= max(pauses) <= longest


@on_every_backend
def test_indices_of_one_group_are_never_at_work_side_by_side(
    backend: str, attempts: str, journal: str
) -> None:
    class Exclusive(Filter[int, int]):
        def __init__(self, directory: str) -> None:
            self.directory = directory

        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            for item in items:
                lock = Path(self.directory, f"group {item // 2}")
                lock.mkdir()
                try:
                    time.sleep(0.01)
                    yield item
                finally:
                    lock.rmdir()

    flaky = FailAtFirst(list(range(20)), 2, attempts)
    pipeline = Pairs(20).filter(Exclusive(attempts)).filter(flaky).write(Discard())
    results = run_pipeline(
        pipeline, jobs(backend), backend, retries=2, retry_on=BusyError, retry_delay=0
    )
    assert results == out(20)


def test_shards_of_attempts_that_failed_count_for_nothing(attempts: str, tmp_path: Path) -> None:
    total = Sum()
    flaky = FailAtFirst(list(range(10)), 1, attempts)
    pipeline = Numbers(10, items=3).filter(total).filter(flaky).write(WriteText(str(tmp_path)))
    run_pipeline(pipeline, 2, retries=1, retry_delay=0)
    artifacts = pipeline.all_filter_artifacts()
    shards = [Path(each["path"]) for index in artifacts for each in artifacts[index]]
    total.merge(shards, tmp_path / "merged.json")
    assert (tmp_path / "merged.json").read_text() == '{"count": 30, "total": 135}'


@on_every_backend
def test_on_error_raise_raises_after_the_last_attempt(
    backend: str, attempts: str, journal: str
) -> None:
    pipeline = Journal(40, journal).filter(FailAtFirst([1], 9, attempts)).write(Discard())
    with pytest.raises(Exception, match="not yet 1"):
        run_pipeline(pipeline, jobs(backend), backend, on_error="raise", retries=2, retry_delay=0)
    assert read_journal(journal).count(1) == 3


@on_every_backend
def test_on_error_raise_leaves_nothing_out_after_an_attempt_that_failed(
    backend: str, attempts: str
) -> None:
    pipeline = Numbers(400).filter(FailAtFirst([100, 300], 1, attempts)).write(Discard())
    results = run_pipeline(
        pipeline, jobs(backend), backend, on_error="raise", retries=1, retry_delay=0
    )
    assert results == out(400)


# --- an end to failures -----------------------------------------------------------------------


@on_every_backend
def test_so_many_failures_end_the_run(backend: str, journal: str, tmp_path: Path) -> None:
    pipeline = Pipeline(
        Journal(4000, journal), [FailOn(range(5, 4000))], Discard(), resume=True, db_dir=tmp_path
    )
    with pytest.raises(TooManyFailuresError, match=r"max_failures=3"):
        run_pipeline(pipeline, jobs(backend), backend, max_failures=3)
    assert len(pipeline.failed_indices) >= 3
    assert len(set(read_journal(journal))) < 4000
    # Where there are two workers, one may have failed so often before the other began.
    assert pipeline.completed_indices <= set(range(5))
    run_pipeline(pipeline, jobs(backend), backend, indices=range(5))
    assert pipeline.completed_indices == set(range(5))


def test_fewer_failures_do_not(journal: str) -> None:
    pipeline = Journal(10, journal).filter(FailOn([2, 3])).write(Discard())
    assert len(run_pipeline(pipeline, max_failures=3)) == 10


def test_attempts_that_succeed_later_are_no_failures(attempts: str) -> None:
    pipeline = Numbers(10).filter(FailAtFirst(list(range(10)), 1, attempts)).write(Discard())
    assert run_pipeline(pipeline, max_failures=1, retries=1, retry_delay=0) == out(10)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"retries": -1}, "retries=-1: give a number of attempts, 0 or more"),
        ({"retries": 1.5}, "retries=1.5: give a number of attempts"),
        ({"retries": True}, "retries=True: give a number of attempts"),
        ({"retry_on": "OSError"}, "retry_on: 'O' is no class of exceptions"),
        ({"retry_on": KeyboardInterrupt}, "retry_on: .* is no class of exceptions"),
        ({"retry_on": (OSError, 3)}, "retry_on: 3 is no class of exceptions"),
        ({"retry_delay": -1}, "retry_delay=-1: give seconds, 0 or more"),
        ({"retry_delay": float("nan")}, "retry_delay=nan: give seconds"),
        ({"retry_delay": "1"}, "retry_delay='1': give seconds"),
        ({"max_failures": 0}, "max_failures=0: give a number of indices, at least 1"),
        ({"timeout": 0}, "timeout=0: give seconds, more than 0"),
        ({"timeout": float("inf")}, "timeout=inf: give seconds"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(
    options: dict[str, Any], complaint: str, journal: str
) -> None:
    with pytest.raises(PipelineError, match=complaint):
        run_pipeline(Journal(3, journal).write(Discard()), **options)
    assert not Path(journal).exists() or read_journal(journal) == []


def test_psncs_own_errors_are_worth_no_less() -> None:
    assert RetryPolicy(1).is_worth_it(PsncError("any"))
