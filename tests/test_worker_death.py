"""A worker process that dies costs the index that it was at; a driver that dies costs nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil
import pytest
from drivers import Start, integrity, only_database, start, wait_for_end, write_script
from pebble import ProcessPool
from pebble.pool.base_pool import Task
from pebble.pool.process import TaskManager
from stages_for_tests import (
    Die,
    Discard,
    FailOn,
    Journal,
    Numbers,
    Sum,
    WriteText,
    grouped,
    numbers_pipeline,
    read_journal,
    wait_until,
)

from psnc import Filter, Pipeline, PsncError, run_pipeline
from psnc.builtin.backends import process_pool
from psnc.session import Session

__all__ = ["start"]

EXPECTED = [[f"out/{index}-0.bin"] for index in range(12)]


class DieOnce(Filter[int, int]):
    """Kills its process for some items, as long as no file ``mended`` exists."""

    def __init__(self, bad: list[int], mended: str) -> None:
        self.die = Die(bad)
        self.mended = mended

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        return items if Path(self.mended).exists() else self.die(items)


class Pause(Filter[int, int]):
    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            time.sleep(0.2)
            yield item


def is_of_pipe(frame: Any, function: str) -> bool:
    """Tell whether a frame is one of a function by which a worker talks with the pool."""
    return (frame.f_code.co_name, frame.f_code.co_filename) == (function, connection.__file__)


class DieTelling(Filter[int, int]):
    """Kills its process for one item, once: as the process tells the pool of a batch."""

    def __init__(self, bad: int, function: str) -> None:
        self.bad = bad
        self.function = function

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item == self.bad and not os.path.exists("died"):
                sys.setprofile(self._die_in_pipe)
            yield item

    def _die_in_pipe(self, frame: Any, event: str, argument: Any) -> None:
        if is_of_pipe(frame, self.function):
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)


class DieHalfTold(Filter[int, int]):
    """Forks a process and kills its own, once, between the two parts of what it tells the pool."""

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        if not os.path.exists("heir"):
            sys.setprofile(self._die_in_pipe)
        return items

    def _die_in_pipe(self, frame: Any, event: str, argument: Any) -> None:
        is_sent = event == "call" and is_of_pipe(frame, "_send")
        if is_sent and len(frame.f_locals["buf"]) > 16_384:
            sys.setprofile(None)
            with suppress(FileExistsError), open("heir", "x") as file:
                heir = os.fork()
                if heir == 0:
                    time.sleep(300)
                    os._exit(0)
                file.write(str(heir))
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)


class BeAtWork(Filter[int, int]):
    """Is at one item until a file exists, and a bit longer."""

    def __init__(self, busy: int, file: str) -> None:
        self.busy = busy
        self.file = file

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item == self.busy:
                wait_until(Path(self.file).exists)
                time.sleep(1)
            yield item


class PairedJournal(Journal):
    def partition_indices(self, indices: Any) -> Any:
        return grouped(indices, 4)


@pytest.mark.parametrize(
    ("die", "cause"),
    [
        pytest.param(Die([5], exit_code=7), "code 7", id="os._exit"),
        pytest.param(Die([5], signal=signal.SIGKILL), "SIGKILL", id="SIGKILL"),
        pytest.param(Die([5], signal=signal.SIGSEGV), "SIGSEGV", id="SIGSEGV"),
        pytest.param(Die([5], signal=signal.SIGABRT), "SIGABRT", id="SIGABRT"),
    ],
)
def test_a_dying_worker_costs_the_index_it_was_at_and_says_why(die: Die, cause: str) -> None:
    pipeline = Numbers(12).filter(die).write(Discard())
    results = run_pipeline(pipeline, 2, "process_pool")
    assert results == [[] if i == 5 else EXPECTED[i] for i in range(12)]
    assert pipeline.completed_indices == set(range(12)) - {5}
    (error,) = pipeline.failed_indices.values()
    assert error.startswith("WorkerDiedError: ")
    assert cause in error
    assert integrity(pipeline.db_path) == "ok"


@pytest.mark.parametrize("exit_code", [0, 1])
def test_a_worker_that_leaves_quietly_does_not_hang_the_run(
    exit_code: int, tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    script = write_script(
        tmp_path / "script.py",
        """
        import sys
        from psnc import run_pipeline
        from stages_for_tests import Die, Discard, Numbers

        pipeline = Numbers(6).filter(Die([2], int(sys.argv[1]))).write(Discard(0))
        run_pipeline(pipeline, 2, "process_pool")
        print(sorted(pipeline.completed_indices), pipeline.failed_indices)
        """,
    )
    printed = run_python(script, str(exit_code), timeout=90).stdout
    assert printed.startswith("[0, 1, 3, 4, 5] {2: 'WorkerDiedError: ")
    assert f"code {exit_code}" in printed


def test_sys_exit_in_a_stage_is_no_failure_of_the_index(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    script = write_script(
        tmp_path / "script.py",
        """
        import sys
        from psnc import Filter, run_pipeline
        from stages_for_tests import Discard, Numbers

        class Leave(Filter):
            def __call__(self, items):
                for item in items:
                    if item == 2:
                        sys.exit(5)
                    yield item

        for backend in ("sequential", "thread_pool", "process_pool"):
            pipeline = Numbers(4).filter(Leave()).write(Discard(0))
            try:
                run_pipeline(pipeline, 1, backend)
            except SystemExit as exit:
                idle = [w["current_index"] for w in pipeline.active_workers]
                print(exit.code, 2 in pipeline.completed_indices, pipeline.failed_indices, idle)
        """,
    )
    assert run_python(script, timeout=90).stdout == "5 False {} [None]\n" * 3


def test_every_worker_may_die_over_and_over() -> None:
    pipeline = Numbers(8).filter(Die(range(8))).write(Discard())
    assert run_pipeline(pipeline, 2, "process_pool") == [[]] * 8
    assert set(pipeline.failed_indices) == set(range(8))


def test_one_killer_among_many_tiny_indices_is_the_only_one_lost(journal: str) -> None:
    pipeline = Journal(800, journal).filter(Die([555])).write(Discard())
    session = Session(pipeline, n_jobs=2, backend="process_pool")
    summary = session.run()
    assert [i for i, paths in enumerate(session.results()) if not paths] == [555]
    assert list(pipeline.failed_indices) == [555]
    assert len(pipeline.completed_indices) == 799
    # All of them ran in this call, and in no earlier one.
    assert (summary.completed, summary.cached) == (799, 0)


@pytest.mark.parametrize(("start_method", "jobs"), [("forkserver", 2), ("fork", 1)])
@pytest.mark.parametrize("function", ["_send", "_recv_bytes"])
def test_a_worker_that_dies_with_a_lock_of_the_pool_costs_nothing(
    function: str, start_method: str, jobs: int
) -> None:
    # The one dies as it says what has become of its batch, the other as it is given the next one.
    pipeline = Numbers(40).filter(DieTelling(5, function)).write(Discard())
    results = run_pipeline(pipeline, jobs, "process_pool", start_method=start_method)
    assert os.path.exists("died")
    assert results == [[f"out/{index}-0.bin"] for index in range(40)]
    assert pipeline.failed_indices == {}


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list of all pools of processes that are made."""
    made: list[Any] = []

    class Pool(ProcessPool):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            made.append(self)

    monkeypatch.setattr(process_pool, "ProcessPool", Pool)
    return made


def workers_of(pool: Any) -> set[int]:
    return set(pool._pool_manager.worker_manager.workers)


@pytest.fixture
def heir() -> Iterator[None]:
    yield
    os.kill(int(Path("heir").read_text()), signal.SIGKILL)


# Python 3.13 says so of its own buffer for a message that was cut off.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.BytesIO:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("start_method", ["forkserver", "fork"])
@pytest.mark.usefixtures("heir")
def test_a_worker_that_dies_half_way_through_a_result_and_leaves_an_heir_costs_nothing(
    start_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_pool, "_LOCK_S", 0.5)
    # It holds the pipe, so that what the driver waits for seems to be still to come.
    pipeline = Numbers(12).filter(DieHalfTold()).write(Discard(files=1_500))
    results = run_pipeline(pipeline, 2, "process_pool", start_method=start_method)
    assert [paths[0] for paths in results] == [path for [path] in EXPECTED]


def test_a_pool_that_breaks_as_it_is_given_its_next_batch_costs_nothing(
    pools: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_pool(*arguments: Any) -> Task:
        # The pool has been found well, and is not told of the batch yet. Nor has it another one,
        # without which it gives up when a worker ends.
        if len(pools) == 1:
            os.kill(workers_of(pools[0]).pop(), signal.SIGKILL)
            wait_until(lambda: not pools[0].active)
        return Task(*arguments)

    monkeypatch.setattr("pebble.pool.process.Task", break_pool)
    assert run_pipeline(numbers_pipeline(12), 1, "process_pool") == EXPECTED
    assert len(pools) == 2


def test_a_death_that_the_pool_hears_of_before_the_batch_costs_nothing(
    pools: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    note = TaskManager.task_start

    def note_late(self: TaskManager, task_id: int, worker: int | None) -> None:
        is_of_killer = self.tasks[task_id].payload.args[-1] == (1,) and len(pools) == 1

        def wait_and_note() -> None:
            wait_until(lambda: worker not in workers_of(pools[0]))
            Path("mended").touch()
            note(self, task_id, worker)

        if is_of_killer:
            threading.Thread(target=wait_and_note).start()
        else:
            note(self, task_id, worker)

    monkeypatch.setattr(TaskManager, "task_start", note_late)
    # Else the pool would give up, since no worker had a batch.
    pipeline = Numbers(2).filter(BeAtWork(0, "mended")).filter(DieOnce([1], "mended"))
    assert run_pipeline(pipeline.write(Discard()), 2, "process_pool") == EXPECTED[:2]
    assert len(pools) == 2


def test_a_killer_without_a_database_costs_only_itself() -> None:
    pipeline = Pipeline(Numbers(200), [Die([150])], Discard(), track_metrics=False)
    results = run_pipeline(pipeline, 2, "process_pool")
    assert [i for i, paths in enumerate(results) if not paths] == [150]


def test_a_group_that_must_stay_together_goes_on_in_order_after_a_death(journal: str) -> None:
    pipeline = PairedJournal(12, journal).filter(Die([5])).write(Discard())
    results = run_pipeline(pipeline, 2, "process_pool")
    assert results == [[] if i == 5 else EXPECTED[i] for i in range(12)]
    last_runs = list(dict.fromkeys(reversed(read_journal(journal))))[::-1]
    for group in grouped(range(12), 4):
        assert [index for index in last_runs if index in group] == group


def test_an_index_that_only_failed_beside_a_killer_keeps_its_own_error() -> None:
    pipeline = Numbers(60).filter(FailOn([50])).filter(Die([51])).write(Discard())
    run_pipeline(pipeline, 2, "process_pool")
    failed = pipeline.failed_indices
    assert failed[50] == "RuntimeError: bad item 50"
    assert failed[51].startswith("WorkerDiedError: ")
    assert set(failed) == {50, 51}


def test_a_resume_tries_the_index_that_killed_its_worker_again(
    tmp_path: Path, journal: str
) -> None:
    mended = tmp_path / "mended"

    def run() -> Pipeline[int]:
        filters = [DieOnce([3], str(mended))]
        pipeline = Pipeline(Journal(8, journal), filters, Discard(), resume=True, db_dir=tmp_path)
        run_pipeline(pipeline, 2, "process_pool")
        return pipeline

    assert list(run().failed_indices) == [3]
    ran = len(read_journal(journal))
    mended.touch()
    pipeline = run()
    assert read_journal(journal)[ran:] == [3]
    assert (pipeline.failed_indices, len(pipeline.completed_indices)) == ({}, 8)


def test_on_error_raise_ends_with_the_cause_of_death() -> None:
    pipeline = Numbers(8).filter(Die([2], signal=signal.SIGSEGV)).write(Discard())
    with pytest.raises(PsncError, match=r"index 2 .*SIGSEGV"):
        run_pipeline(pipeline, 2, "process_pool", on_error="raise")


def test_a_dead_worker_is_at_no_index_any_more() -> None:
    # Long enough at the index for the database to know that the worker is at it.
    pipeline = Numbers(4).filter(Pause()).filter(Die([2])).write(Discard())
    run_pipeline(pipeline, 2, "process_pool")
    assert {worker["current_index"] for worker in pipeline.active_workers} == {None}


def test_a_finished_run_leaves_no_process_behind() -> None:
    before = set(psutil.Process().children(recursive=True))
    run_pipeline(numbers_pipeline(12), 2, "process_pool")
    left = set(psutil.Process().children(recursive=True)) - before
    names = [" ".join(process.cmdline()) for process in left]
    # The two servers of multiprocessing serve the next run, too.
    assert [n for n in names if "forkserver" not in n and "resource_tracker" not in n] == []


# --- the driver is killed ---------------------------------------------------------------------

KILLED = """
import sys
from pathlib import Path
from psnc import Pipeline, run_pipeline
from stages_for_tests import Journal, Sum, WaitFor, WriteText

backend, count = sys.argv[1], int(sys.argv[2])

pipeline = Pipeline(
    Journal(count, str(Path("journal.txt").absolute())),
    [Sum(), WaitFor(str(Path.cwd()), [40, 41])],
    WriteText(str(Path("out").absolute())),
    resume=True,
    db_dir="db",
)
run_pipeline(pipeline, 1 if backend == "sequential" else 2, backend)
"""


@pytest.mark.parametrize("backend", ["sequential", "thread_pool", "process_pool"])
def test_a_killed_driver_leaves_no_worker_and_a_database_that_resumes_exactly(
    backend: str, start: Start, tmp_path: Path, query: Callable[..., Any]
) -> None:
    driver = start(KILLED, backend, 80)
    wait_until(lambda: any(tmp_path.glob("reached-*")))
    workers = driver.descendants()
    assert bool(workers) == (backend == "process_pool")
    driver.kill()
    wait_for_end(workers)
    database = only_database(tmp_path / "db")
    assert integrity(database) == "ok"

    (tmp_path / "go").touch()
    ran_before = read_journal(tmp_path / "journal.txt")
    status, _, errors = start(KILLED, backend, 80).finish()
    assert (status, errors) == (0, "")
    assert integrity(database) == "ok"
    ran_again = read_journal(tmp_path / "journal.txt")[len(ran_before) :]
    assert set(ran_before + ran_again) == set(range(80))
    # What was committed before the kill was not run again.
    assert len(ran_again) < 80
    for index in range(80):
        assert (tmp_path / "out" / f"{index}.txt").read_text() == f"{index}\n"
    shards = [Path(path) for (path,) in query(database, "SELECT path FROM filter_artifacts")]
    Sum().merge(shards, tmp_path / "merged.json")
    assert (tmp_path / "merged.json").read_text() == '{"count": 80, "total": 3160}'


def test_a_resume_shows_only_what_is_recorded_after_a_kill(
    start: Start, tmp_path: Path, query: Callable[..., Any]
) -> None:
    driver = start(KILLED, "sequential", 80)
    wait_until((tmp_path / "reached-40").exists)
    driver.kill()
    database = only_database(tmp_path / "db")
    for table in ("stage_metrics", "output_files", "filter_artifacts"):
        missing = query(
            database,
            f"SELECT idx FROM index_results EXCEPT SELECT idx FROM {table}"
            f" UNION SELECT idx FROM {table} EXCEPT SELECT idx FROM index_results",
        )
        assert missing == [], table


def test_output_of_a_killed_and_resumed_run_equals_that_of_a_clean_one(
    start: Start, tmp_path: Path
) -> None:
    driver = start(KILLED, "process_pool", 80)
    wait_until(lambda: any(tmp_path.glob("reached-*")))
    driver.kill()
    (tmp_path / "go").touch()
    assert start(KILLED, "process_pool", 80).finish()[0] == 0
    clean = Numbers(80).write(WriteText(str(tmp_path / "clean")))
    run_pipeline(clean)
    for index in range(80):
        again = (tmp_path / "out" / f"{index}.txt").read_bytes()
        assert again == (tmp_path / "clean" / f"{index}.txt").read_bytes()
