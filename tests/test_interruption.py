"""Ctrl-C: what is at work ends, nothing else starts, and the next run takes it from there."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drivers import BACKENDS, Driver, Start, integrity, only_database, start, wait_for_end
from stages_for_tests import read_journal, wait_until

__all__ = ["start"]

SCRIPT = """
import sys
import time
from pathlib import Path
from psnc import Filter, Pipeline, run_pipeline
from stages_for_tests import Discard, Journal, WaitFor

class Slow(Filter):
    def __call__(self, items):
        for item in items:
            if item < 4:
                time.sleep(0.12)
            yield item

backend, first_to_wait = sys.argv[1], int(sys.argv[2])
waiting = WaitFor(str(Path.cwd()), range(first_to_wait, 20))
pipeline = Pipeline(
    Journal(20, str(Path("journal").absolute())), [Slow(), waiting], Discard(),
    resume=True, db_dir="db",
)
try:
    run_pipeline(pipeline, 1 if backend == "sequential" else 2, backend)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    raise
print("complete")
"""


def _at_work(directory: Path) -> set[int]:
    return {int(path.name.removeprefix("reached-")) for path in directory.glob("reached-*")}


def _interrupted_once(start: Start, directory: Path, backend: str, first_to_wait: int) -> Driver:
    driver = start(SCRIPT, backend, first_to_wait)
    workers = 1 if backend == "sequential" else 2
    wait_until(lambda: len(_at_work(directory)) == workers)
    driver.interrupt()
    assert driver.process.stderr is not None
    # It says that it has understood.
    assert driver.process.stderr.readline() == "\n"
    assert "Ctrl-C again" in driver.process.stderr.readline()
    return driver


def _recorded(database: Path, query: Callable[..., Any]) -> dict[int, str]:
    return dict(query(database, "SELECT idx, status FROM index_results"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first_to_wait", [0, 4])
def test_ctrl_c_lets_running_indices_end_and_starts_no_others(
    backend: str, first_to_wait: int, start: Start, tmp_path: Path, query: Callable[..., Any]
) -> None:
    driver = _interrupted_once(start, tmp_path, backend, first_to_wait)
    at_work = _at_work(tmp_path)
    (tmp_path / "go").touch()
    status, out, errors = driver.finish()
    assert out == "interrupted\n"
    assert status == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    database = only_database(tmp_path / "db")
    expected = set(range(first_to_wait)) | at_work
    assert _recorded(database, query) == dict.fromkeys(expected, "completed")
    assert set(read_journal(tmp_path / "journal")) == expected


SIGNAL_IN_ANOTHER_THREAD = """
import signal, threading
from stages_for_tests import wait_until

def interrupt():
    wait_until(lambda: len(list(Path.cwd().glob("reached-*"))) == 2)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)

threading.Thread(target=interrupt).start()
"""


def test_an_interrupt_that_does_not_wake_the_driver_is_answered_while_indices_run(
    start: Start, tmp_path: Path, query: Callable[..., Any]
) -> None:
    imports, rest = SCRIPT.split("\nclass Slow", 1)
    driver = start(f"{imports}\n{SIGNAL_IN_ANOTHER_THREAD}\nclass Slow{rest}", "process_pool", 0)
    assert driver.process.stderr is not None
    assert driver.process.stderr.readline() == "\n"
    assert "Ctrl-C again" in driver.process.stderr.readline()
    (tmp_path / "go").touch()
    assert driver.finish()[1] == "interrupted\n"
    assert _recorded(only_database(tmp_path / "db"), query) == dict.fromkeys([0, 1], "completed")


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_run_leaves_idle_workers_and_resumes(
    backend: str, start: Start, tmp_path: Path, query: Callable[..., Any]
) -> None:
    driver = _interrupted_once(start, tmp_path, backend, 4)
    (tmp_path / "go").touch()
    driver.finish()
    database = only_database(tmp_path / "db")
    assert integrity(database) == "ok"
    assert query(database, "SELECT * FROM workers WHERE current_index IS NOT NULL") == []

    assert start(SCRIPT, backend, 4).finish() == (0, "complete\n", "")
    assert _recorded(database, query) == dict.fromkeys(range(20), "completed")
    # Every index has run exactly once, over both runs.
    assert sorted(read_journal(tmp_path / "journal")) == list(range(20))


@pytest.mark.parametrize("backend", ["sequential", "process_pool"])
def test_a_second_ctrl_c_ends_running_indices_and_records_nothing_of_them(
    backend: str, start: Start, tmp_path: Path, query: Callable[..., Any]
) -> None:
    driver = _interrupted_once(start, tmp_path, backend, 4)
    at_work = _at_work(tmp_path)
    processes = driver.descendants()
    driver.interrupt()
    status, out, _ = driver.finish()
    assert (status, out) == (-signal.SIGINT, "interrupted\n")
    wait_for_end(processes)
    database = only_database(tmp_path / "db")
    assert integrity(database) == "ok"
    recorded = _recorded(database, query)
    assert set(recorded) == set(range(4))
    assert not at_work & set(recorded)
    for table in ("stage_metrics", "output_files", "logs"):
        assert not at_work & {idx for (idx,) in query(database, f"SELECT idx FROM {table}")}

    (tmp_path / "go").touch()
    assert start(SCRIPT, backend, 4).finish() == (0, "complete\n", "")
    assert _recorded(database, query) == dict.fromkeys(range(20), "completed")


@pytest.mark.parametrize("backend", ["sequential", "process_pool"])
def test_after_a_second_ctrl_c_no_worker_is_said_to_be_at_work(
    backend: str, start: Start, tmp_path: Path, query: Callable[..., Any]
) -> None:
    driver = _interrupted_once(start, tmp_path, backend, 4)
    driver.interrupt()
    driver.finish()
    database = only_database(tmp_path / "db")
    assert query(database, "SELECT * FROM workers WHERE current_index IS NOT NULL") == []


def test_a_bare_loop_that_is_interrupted_can_be_resumed(
    start: Start, tmp_path: Path, query: Callable[..., Any]
) -> None:
    script = SCRIPT.replace(
        'run_pipeline(pipeline, 1 if backend == "sequential" else 2, backend)',
        "for index in range(20): pipeline[index]",
    )
    driver = start(script, "bare", 4)
    wait_until(lambda: _at_work(tmp_path) == {4})
    driver.interrupt()
    status, out, _ = driver.finish()
    assert (status, out) == (-signal.SIGINT, "interrupted\n")
    database = only_database(tmp_path / "db")
    assert set(_recorded(database, query)) == {0, 1, 2, 3}
    assert query(database, "SELECT * FROM workers WHERE current_index IS NOT NULL") == []
    (tmp_path / "go").touch()
    assert start(script, "bare", 4).finish() == (0, "complete\n", "")
    assert _recorded(database, query) == dict.fromkeys(range(20), "completed")


SKEWED = """
import time
from pathlib import Path
from psnc import Filter, Pipeline, run_pipeline
from stages_for_tests import Discard, Journal, wait_until

class Slow(Filter):
    def __call__(self, items):
        for item in items:
            if item >= 40:
                Path(f"reached-{item}").touch()
                wait_until(Path("go").exists)
                time.sleep(0.01)
            yield item

pipeline = Pipeline(
    Journal(400, str(Path("journal").absolute())), [Slow()], Discard(), resume=True, db_dir="db"
)
run_pipeline(pipeline, 2, "process_pool")
"""


def test_ctrl_c_starts_no_others_of_a_batch_that_is_with_a_worker(
    start: Start, tmp_path: Path
) -> None:
    # The first 40 are instant, so that dozens of the others are in batches that were sent out.
    driver = start(SKEWED)
    wait_until(lambda: len(_at_work(tmp_path)) == 2)
    driver.interrupt()
    assert driver.process.stderr is not None
    assert driver.process.stderr.readline() == "\n"
    at_work = _at_work(tmp_path)
    (tmp_path / "go").touch()
    assert driver.finish()[0] == -signal.SIGINT
    assert _at_work(tmp_path) == at_work


def test_a_program_keeps_its_own_way_with_ctrl_c(start: Start, tmp_path: Path) -> None:
    own = "signal.signal(signal.SIGINT, lambda *_: print('its own', flush=True))"
    script = SCRIPT.replace("backend, first", f"{own}\nbackend, first")
    driver = start(script, "process_pool", 0)
    wait_until(lambda: len(_at_work(tmp_path)) == 2)
    driver.interrupt()
    assert driver.process.stdout is not None
    assert driver.process.stdout.readline() == "its own\n"
    (tmp_path / "go").touch()
    assert driver.finish()[:2] == (0, "complete\n")


def test_ctrl_c_works_as_ever_once_a_run_has_ended(start: Start, tmp_path: Path) -> None:
    driver = start(
        SCRIPT + "\nPath('ended').touch()\nwhile True: time.sleep(0.01)\n", "thread_pool", 20
    )
    wait_until((tmp_path / "ended").exists)
    driver.interrupt()
    status, out, errors = driver.finish()
    assert (status, out) == (-signal.SIGINT, "complete\n")
    assert "Ctrl-C again" not in errors


# --- SIGTERM ----------------------------------------------------------------------------------


def _terminated_once(start: Start, directory: Path, backend: str, script: str = SCRIPT) -> Driver:
    driver = start(script, backend, 4)
    workers = 1 if backend == "sequential" else 2
    wait_until(lambda: len(_at_work(directory)) == workers)
    driver.process.send_signal(signal.SIGTERM)
    assert driver.process.stderr is not None
    assert driver.process.stderr.readline() == "\n"
    assert "a second signal ends them now" in driver.process.stderr.readline()
    return driver


@pytest.mark.parametrize("backend", BACKENDS)
def test_sigterm_lets_running_indices_end_and_exits_with_143(
    backend: str, start: Start, tmp_path: Path, query: Callable[..., Any]
) -> None:
    driver = _terminated_once(start, tmp_path, backend)
    at_work = _at_work(tmp_path)
    (tmp_path / "go").touch()
    status, out, _ = driver.finish()
    assert (status, out) == (143, "")
    database = only_database(tmp_path / "db")
    assert _recorded(database, query) == dict.fromkeys({0, 1, 2, 3} | at_work, "completed")
    assert query(database, "SELECT * FROM workers WHERE current_index IS NOT NULL") == []
    assert start(SCRIPT, backend, 4).finish() == (0, "complete\n", "")
    assert sorted(read_journal(tmp_path / "journal")) == list(range(20))


@pytest.mark.parametrize("backend", ["sequential", "process_pool"])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_after_sigterm_ends_running_indices(
    backend: str, second: signal.Signals, start: Start, tmp_path: Path, query: Callable[..., Any]
) -> None:
    driver = _terminated_once(start, tmp_path, backend)
    processes = driver.descendants()
    driver.process.send_signal(second)
    assert driver.finish()[0] == 143
    wait_for_end(processes)
    assert set(_recorded(only_database(tmp_path / "db"), query)) == {0, 1, 2, 3}


def test_workers_leave_a_sigterm_that_all_processes_get_to_the_driver(
    start: Start, tmp_path: Path, query: Callable[..., Any]
) -> None:
    driver = start(SCRIPT, "process_pool", 0)
    wait_until(lambda: len(_at_work(tmp_path)) == 2)
    for process in [*driver.descendants(), driver.process]:
        process.send_signal(signal.SIGTERM)
    assert driver.process.stderr is not None
    assert driver.process.stderr.readline() == "\n"
    (tmp_path / "go").touch()
    assert driver.finish()[0] == 143
    assert _recorded(only_database(tmp_path / "db"), query) == {0: "completed", 1: "completed"}


@pytest.mark.parametrize("backend", ["sequential", "process_pool"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_takes_longer_than_the_grace_is_ended(
    backend: str, number: signal.Signals, start: Start, tmp_path: Path, query: Callable[..., Any]
) -> None:
    script = SCRIPT.replace("2, backend)", "2, backend, grace=0.3)")
    driver = start(script, backend, 4)
    workers = 1 if backend == "sequential" else 2
    wait_until(lambda: len(_at_work(tmp_path)) == workers)
    processes = driver.descendants()
    driver.process.send_signal(number)
    status, _, errors = driver.finish()
    assert status == (143 if number == signal.SIGTERM else -signal.SIGINT)
    assert "letting the indices at work end, for 0.3 s at the most; " in errors
    wait_for_end(processes)
    database = only_database(tmp_path / "db")
    assert set(_recorded(database, query)) == {0, 1, 2, 3}
    assert integrity(database) == "ok"


def test_a_grace_that_was_not_needed_ends_nothing_afterwards(start: Start, tmp_path: Path) -> None:
    script = SCRIPT.replace("2, backend)", "2, backend, grace=0.5)").replace(
        "    raise\n", "    time.sleep(1)\n"
    )
    driver = start(script, "process_pool", 4)
    wait_until(lambda: len(_at_work(tmp_path)) == 2)
    driver.interrupt()
    assert driver.process.stderr is not None
    assert driver.process.stderr.readline() == "\n"
    (tmp_path / "go").touch()
    assert driver.finish()[:2] == (0, "interrupted\ncomplete\n")


def test_workers_that_hold_the_interpreter_are_ended_too(start: Start, tmp_path: Path) -> None:
    script = SCRIPT.replace(
        "waiting = ",
        """
class Deaf(Filter):
    def __call__(self, items):
        import ctypes
        for item in items:
            Path(f"reached-{item}").touch()
            ctypes.PyDLL(None).sleep(3600)

waiting = Deaf() if True else """,
    )
    driver = start(script, "process_pool", 0)
    wait_until(lambda: len(_at_work(tmp_path)) == 2)
    processes = driver.descendants()
    driver.interrupt()
    assert driver.process.stderr is not None
    assert driver.process.stderr.readline() == "\n"
    driver.interrupt()
    assert driver.finish()[0] == -signal.SIGINT
    wait_for_end(processes)
