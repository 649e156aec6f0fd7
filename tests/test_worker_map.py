"""What stages have the workers do while they get ready, before the first index runs."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil
import pytest
from drivers import BACKENDS, Driver, Start, jobs, start, wait_for_end, write_script
from stages_for_tests import Discard, Numbers, numbers_pipeline, wait_until

from psnc import (
    Backend,
    BackendError,
    BatchResult,
    Pipeline,
    PipelineError,
    WorkerDiedError,
    WorkerTask,
    hookimpl,
    map_on_workers,
    plugin_manager,
    run_pipeline,
)
from psnc.manager import PluginManager

__all__ = ["start"]

# Of two threads.
MEETING = threading.Barrier(2)

Call = Callable[[int], Any]


class Asks(Discard):
    """Asks the workers about every item before the first index runs, and keeps the answers."""

    def __init__(self, call: Call, items: Iterable[int] = range(8)) -> None:
        super().__init__()
        self.call = call
        self.items = items
        self.answers: list[Any] = []

    def prepare(self, pipeline: Pipeline[Any]) -> None:
        self.answers = map_on_workers(self.call, self.items)


class TwoArgumentsError(Exception):
    """An exception that cannot be unpickled."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")


def _square(item: int) -> int:
    return item * item


def _where(item: int) -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


def _environment(item: int) -> str:
    return os.environ["SET_BY_THE_TEST"]


def _fail(item: int) -> int:
    if item in (3, 5):
        raise ValueError(f"item {item}")
    return item


def _fail_oddly(item: int) -> int:
    raise TwoArgumentsError(f"item {item}", "negative mass")


def _die(item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def _die_once_in_pipe(item: int, place: str) -> int:
    """End the process, once, as it is given the next item, and so has a lock of the pool."""

    def die(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if code.co_name == "_recv_bytes" and code.co_filename == connection.__file__:
            Path(place).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    if item == 3 and not os.path.exists(place):
        sys.setprofile(die)
    return item


def _meet(item: int) -> int:
    MEETING.wait(30)
    return threading.get_ident()


def _note(item: int, place: str) -> int:
    with open(place, "a") as file:
        file.write(f"{item}\n")
    return item


def _fail_at_first(item: int, place: str) -> None:
    (Path(place) / f"reached-{item}").touch()
    if item == 0:
        raise ValueError
    wait_until((Path(place) / "caught").exists)


def _loads_installed(item: int) -> bool:
    return plugin_manager().config.load_installed


def _shared_files(item: int) -> list[bytes]:
    return [
        path.read_bytes()
        for directory in Path(tempfile.gettempdir()).glob("psnc-run-*")
        for path in directory.rglob("*")
    ]


def _nested(item: int) -> list[tuple[int, int]]:
    return [_where(item), *map_on_workers(_where, [item])]


def _lock(item: int) -> Any:
    return threading.Lock()


def _asked(call: Call, backend: str = "process_pool", **options: Any) -> list[Any]:
    sink = Asks(call)
    run_pipeline(Numbers(6).write(sink), jobs(backend), backend, **options)
    return sink.answers


def _left_behind() -> set[Path | int]:
    directories = Path(tempfile.gettempdir()).glob("psnc-run-*")
    return {*directories, *(process.pid for process in psutil.Process().children(recursive=True))}


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterable[None]:
    # The server that workers are forked from stays, and so does what it tracks resources with.
    run_pipeline(numbers_pipeline(2), 2, "process_pool")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    before = _left_behind()
    yield
    wait_until(lambda: _left_behind() == before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_come_in_the_order_of_the_items(backend: str) -> None:
    assert _asked(_square, backend) == [item * item for item in range(8)]


def test_without_a_run_calls_are_made_here() -> None:
    assert map_on_workers(_where, range(3)) == [_where(0)] * 3


def test_a_sequential_run_makes_the_calls_itself() -> None:
    assert set(_asked(_where, "sequential")) == {_where(0)}


def test_threads_share_the_calls() -> None:
    threads = set(_asked(_meet, "thread_pool"))
    assert len(threads) == 2
    assert threading.get_ident() not in threads


def test_the_processes_that_make_the_calls_run_the_indices_too(
    query: Callable[..., Any],
) -> None:
    sink = Asks(_where)
    pipeline = Numbers(6).write(sink)
    run_pipeline(pipeline, 2, "process_pool")
    called = {pid for pid, _ in sink.answers}
    recorded = {pid for (pid,) in query(pipeline.db_path, "SELECT pid FROM workers")}
    assert os.getpid() not in called
    assert recorded & called
    assert len(recorded | called) <= 2


def test_stages_may_ask_several_times_and_for_nothing() -> None:
    class AsksTwice(Asks):
        def prepare(self, pipeline: Pipeline[Any]) -> None:
            squares = map_on_workers(_square, range(4))
            self.answers = [*map_on_workers(lambda item: item + 1, squares), map_on_workers(id, [])]

    sink = AsksTwice(_square)
    run_pipeline(Numbers(6).write(sink), 2, "process_pool")
    assert sink.answers == [1, 2, 5, 10, []]


def test_calls_see_the_environment_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("first", "second"):
        monkeypatch.setenv("SET_BY_THE_TEST", value)
        assert set(_asked(_environment)) == {value}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_within_a_call_is_made_where_it_is(backend: str) -> None:
    assert all(outer == inner for outer, inner in _asked(_nested, backend))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_call_within_a_call_of_a_forked_process_is_made_there() -> None:
    assert all(outer == inner for outer, inner in _asked(_nested, start_method="fork"))


def test_workers_need_not_find_out_again_what_the_driver_has_found_out(tmp_path: Path) -> None:
    class AsksOnce(Asks):
        def prepare(self, pipeline: Pipeline[Any]) -> None:
            if not self.answers:
                super().prepare(pipeline)

    place = tmp_path / "calls"
    sink = AsksOnce(partial(_note, place=str(place)))
    run_pipeline(Numbers(6).write(sink), 2, "process_pool")
    assert sorted(place.read_text().split()) == sorted(map(str, range(8)))


def test_calls_are_made_under_the_settings_of_the_driver(plugins: PluginManager) -> None:
    assert plugins.config.load_installed is False
    assert _asked(_loads_installed) == [False] * 8


def test_neither_calls_nor_the_task_leave_the_environment_in_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Looks(Asks):
        def __call__(self, items: Iterable[Any], index: int) -> list[str]:
            self.found = _shared_files(index)
            assert self.found
            assert not any(b"a secret of the test" in content for content in self.found)
            return super().__call__(iter(items), index)

    monkeypatch.setenv("SET_BY_THE_TEST", "a secret of the test")
    # Workers find the directory where the driver has it.
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())
    sink = Looks(_shared_files)
    pipeline = Numbers(6).write(sink)
    run_pipeline(pipeline, 2, "process_pool")
    assert pipeline.failed_indices == {}
    assert not any(
        b"a secret of the test" in content for found in sink.answers for content in found
    )


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_processes_may_be_started_in_other_ways(start_method: str) -> None:
    assert _asked(_square, start_method=start_method) == [item * item for item in range(8)]


def test_nothing_is_left_where_nothing_is_left_to_run() -> None:
    pipeline = Numbers(6).write(Asks(_square))
    run_pipeline(pipeline, 2, "process_pool")
    run_pipeline(pipeline, 2, "process_pool", resume=True)
    assert pipeline.completed_indices == set(range(6))


# --- what can go wrong ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_error_of_the_first_item_ends_the_run(backend: str) -> None:
    pipeline = Numbers(6).write(Asks(_fail))
    with pytest.raises(ValueError, match="item 3"):
        run_pipeline(pipeline, jobs(backend), backend)
    assert pipeline.completed_indices == set()
    assert pipeline.failed_indices == {}


def test_an_error_says_where_it_was_raised_in_the_worker() -> None:
    with pytest.raises(ValueError, match="item 3") as raised:
        _asked(_fail)
    (note,) = raised.value.__notes__
    assert note.startswith("In a worker process:\n")
    assert "in _fail" in note


def test_of_an_error_that_cannot_be_sent_the_text_comes() -> None:
    with pytest.raises(PipelineError, match="TwoArgumentsError: item 0: negative mass"):
        _asked(_fail_oddly)


def test_what_cannot_be_sent_is_refused() -> None:
    class AsksAboutLocks(Discard):
        def prepare(self, pipeline: Pipeline[Any]) -> None:
            map_on_workers(repr, [threading.Lock()])

    class AsksByALock(Discard):
        def prepare(self, pipeline: Pipeline[Any]) -> None:
            map_on_workers(threading.Lock().acquire, [True])

    for sink, name in ((AsksAboutLocks(), "repr"), (AsksByALock(), "lock.acquire")):
        with pytest.raises(PipelineError, match=rf"{name}, which .* cannot be sent .*_thread.lock"):
            run_pipeline(Numbers(6).write(sink), 2, "process_pool")


def test_a_result_that_cannot_be_sent_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"what _lock returned .*_thread.lock"):
        _asked(_lock)


def test_an_error_of_the_items_themselves_arrives_as_it_is() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise KeyError("no such file in the list")

    class AsksAboutThem(Asks):
        def prepare(self, pipeline: Pipeline[Any]) -> None:
            map_on_workers(_square, items())

    with pytest.raises(KeyError, match="no such file in the list"):
        run_pipeline(Numbers(6).write(AsksAboutThem(_square)), 2, "process_pool")


def test_after_an_error_that_a_stage_catches_no_further_calls_are_made(tmp_path: Path) -> None:
    class Catches(Asks):
        def prepare(self, pipeline: Pipeline[Any]) -> None:
            with suppress(ValueError):
                map_on_workers(self.call, range(60))
            (tmp_path / "caught").touch()

    pipeline = Numbers(6).write(Catches(partial(_fail_at_first, place=str(tmp_path))))
    run_pipeline(pipeline, 2, "process_pool")
    assert pipeline.completed_indices == set(range(6))
    assert len([*tmp_path.glob("reached-*")]) < 60


def test_what_a_script_defines_comes_back_as_what_it_is(
    tmp_path: Path, run_python: Callable[..., Any]
) -> None:
    script = write_script(
        tmp_path / "script.py",
        """
        from dataclasses import dataclass
        from psnc import map_on_workers, run_pipeline
        from stages_for_tests import Discard, Numbers

        @dataclass
        class Size:
            lines: int

        class OddSize(Exception):
            pass

        def size(item):
            if item == 7:
                raise OddSize(item)
            return Size(item)

        class Asks(Discard):
            def prepare(self, pipeline):
                answers = map_on_workers(size, range(3))
                print(answers == [Size(0), Size(1), Size(2)])
                try:
                    map_on_workers(size, range(9))
                except OddSize as error:
                    print(repr(error))

        run_pipeline(Numbers(4).write(Asks()), 2, "process_pool")
        """,
    )
    assert run_python(script).stdout.splitlines()[:2] == ["True", "OddSize(7)"]


def test_without_room_for_temporary_files_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone").rmdir()
    for pipeline in (Numbers(6).write(Asks(_square)), numbers_pipeline(6)):
        with pytest.raises(BackendError, match=r"temporary files \(.*gone.*\): see to it, or set"):
            run_pipeline(pipeline, 2, "process_pool")


def test_a_worker_that_dies_ends_the_run_and_says_at_what() -> None:
    with pytest.raises(WorkerDiedError, match=r"SIGKILL.* it was at _die, which"):
        _asked(_die)


def test_a_worker_that_dies_with_a_lock_of_the_pool_costs_nothing(tmp_path: Path) -> None:
    place = tmp_path / "died"
    assert _asked(partial(_die_once_in_pipe, place=str(place))) == list(range(8))
    assert place.exists()


def test_a_pipeline_that_cannot_be_sent_leaves_no_worker() -> None:
    class Locked(Asks):
        def prepare(self, pipeline: Pipeline[Any]) -> None:
            super().prepare(pipeline)
            self.lock = threading.Lock()

    with pytest.raises(PipelineError, match="stage Locked cannot be sent"):
        run_pipeline(Numbers(6).write(Locked(_square)), 2, "process_pool")


def test_a_backend_that_knows_of_no_calls_is_not_stopped_before_it_was_started(
    plugins: PluginManager,
) -> None:
    class Plain(Backend):
        def start(self, task: WorkerTask) -> None:
            self.task = task

        def submit(self, indices: Sequence[int]) -> Future[BatchResult]:
            outcome: Future[BatchResult] = Future()
            outcome.set_result(self.task(indices))
            return outcome

        def stop(self, *, now: bool = False) -> None:
            del self.task

    class Offers:
        @hookimpl
        def psnc_backends(self) -> dict[str, type[Backend]]:
            return {"plain": Plain}

    plugins.register(Offers(), "offers")
    assert _asked(_square, "plain") == [item * item for item in range(8)]
    with pytest.raises(ValueError, match="item 3"):
        _asked(_fail, "plain")


SCRIPT = """
import time
from pathlib import Path
from psnc import map_on_workers, run_pipeline
from stages_for_tests import Discard, Numbers

class Asks(Discard):
    def prepare(self, pipeline):
        try:
            map_on_workers(wait, range(4))
        finally:
            Path("given-up").touch()

def wait(item):
    Path(f"reached-{item}").touch()
    time.sleep(60)

run_pipeline(Numbers(4).write(Asks()), 2, "process_pool")
"""


@pytest.mark.parametrize("how", ["interrupt", "terminate", "kill"])
def test_an_end_while_calls_are_made_leaves_nothing(
    how: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not in tmp_path: the path of a socket must be short.
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        _end(how, start(SCRIPT), tmp_path)
        assert [*Path(directory).glob("psnc-run-*")] == []


def _end(how: str, driver: Driver, tmp_path: Path) -> None:
    wait_until(lambda: len([*tmp_path.glob("reached-*")]) == 2)
    descendants = driver.descendants()
    if how == "interrupt":
        driver.interrupt()
        status, _, errors = driver.finish()
        assert status == -signal.SIGINT
        assert errors.rstrip().endswith("KeyboardInterrupt")
    elif how == "terminate":
        # As a scheduler does, and so to the workers too.
        os.killpg(driver.process.pid, signal.SIGTERM)
        assert driver.finish() == (143, "", "")
    else:
        driver.kill()
    wait_for_end(descendants)
    assert (tmp_path / "given-up").exists() == (how != "kill")
