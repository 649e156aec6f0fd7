"""Where indices run: threads, processes, and programs that no module can be imported from."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from drivers import BACKENDS, TESTS, jobs, only_database, write_script
from stages_for_tests import Discard, Numbers, WriteText, numbers_pipeline

from psnc import Backend, BackendError, Filter, PsncError, Source, hookimpl, run_pipeline
from psnc.manager import PluginManager
from psnc.worker import BatchResult, WorkerTask

Run = Callable[..., subprocess.CompletedProcess[str]]

EXPECTED = [[f"out/{index}-0.bin"] for index in range(6)]


class Surroundings(Filter[int, str]):
    """Yields what a stage can see of the process that it runs in."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, items: Iterator[int]) -> Iterator[str]:
        for _ in items:
            yield {
                "directory": os.getcwd,
                "environment": lambda: os.environ.get("SET_BY_THE_TEST", "unset"),
                "thread": lambda: str(threading.get_ident()),
            }[self.what]()


class HoldsALock(Numbers):
    """Cannot be sent to another process."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.lock = threading.Lock()


class Unwelcome(Numbers):
    """Can be sent to another process, and not be put together there."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise FileNotFoundError("the calibration table is not on this machine")


class TwoArgumentsError(Exception):
    """An exception that cannot be unpickled, as many cannot."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")


class Fails(Filter[int, int]):
    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item == 3:
                raise TwoArgumentsError("row 3", "negative mass")
            yield item


def _seen(what: str, backend: str, out: Path, **options: Any) -> set[str]:
    pipeline = Numbers(4).filter(Surroundings(what)).write(WriteText(str(out)))
    results = run_pipeline(pipeline, jobs(backend), backend, **options)
    return {Path(path).read_text().strip() for (path,) in results}


# --- what a stage finds there -----------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_stages_run_in_the_working_directory_of_the_caller(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert _seen("directory", backend, tmp_path / "out") == {str(tmp_path / "here")}


@pytest.mark.parametrize("backend", BACKENDS)
def test_stages_see_the_environment_of_the_caller(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("first", "second"):
        monkeypatch.setenv("SET_BY_THE_TEST", value)
        assert _seen("environment", backend, tmp_path / value) == {value}


def test_sequential_runs_in_the_calling_thread(tmp_path: Path) -> None:
    assert _seen("thread", "sequential", tmp_path) == {str(threading.get_ident())}


def test_thread_pool_runs_in_other_threads_of_this_process(tmp_path: Path) -> None:
    assert str(threading.get_ident()) not in _seen("thread", "thread_pool", tmp_path)


def test_a_thread_pool_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    run_pipeline(numbers_pipeline(6, track_metrics=False), 2, "thread_pool")
    assert threading.active_count() == before


# --- process pool -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("start_method", ["forkserver", "spawn", "fork"])
def test_processes_can_be_started_in_every_way(start_method: str) -> None:
    pipeline = numbers_pipeline(6)
    assert run_pipeline(pipeline, 2, "process_pool", start_method=start_method) == EXPECTED
    assert pipeline.completed_indices == set(range(6))


SLOW_SECOND_WORKER = """
import os, sys, time

if "spawn_main" in " ".join(sys.orig_argv):
    try:
        os.close(os.open("first", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        deadline = time.monotonic() + 20
        while not os.path.exists("first-is-leaving") and time.monotonic() < deadline:
            time.sleep(0.01)
"""

LEAVING_SLOWLY = """
import time
from multiprocessing.util import Finalize
from pathlib import Path
from psnc import Pipeline, Source, run_pipeline
from stages_for_tests import Discard

def leave():
    Path("first-is-leaving").touch()
    time.sleep(0.7)

class Leaving(Source):
    def __len__(self):
        return 2
    def __getitem__(self, index):
        Finalize(None, leave, exitpriority=1)
        yield index

run_pipeline(Pipeline(Leaving(), sink=Discard(1)), 2, "process_pool", start_method="spawn")
"""


def test_a_worker_that_is_still_starting_when_the_run_ends_leaves_in_silence(
    tmp_path: Path, run_python: Run
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_SECOND_WORKER, encoding="utf-8")
    script = write_script(tmp_path / "script.py", LEAVING_SLOWLY)
    finished = run_python(script, PYTHONPATH=os.pathsep.join([str(tmp_path), str(TESTS)]))
    assert (tmp_path / "first-is-leaving").exists()
    assert finished.stderr == ""


def test_an_unknown_start_method_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(BackendError, match=r"'teleport'.*fork.*spawn"):
        run_pipeline(numbers_pipeline(), 2, start_method="teleport")


def test_one_process_is_a_process_pool_too() -> None:
    pipeline = numbers_pipeline(6)
    assert run_pipeline(pipeline, 1, "process_pool") == EXPECTED
    (worker,) = pipeline.active_workers
    assert worker["pid"] != os.getpid()
    assert worker["completed_count"] == 6


def test_a_pipeline_that_cannot_travel_is_refused_in_one_line_that_says_why() -> None:
    with pytest.raises(PsncError, match=r"HoldsALock.*|.*lock") as refused:
        run_pipeline(HoldsALock(4).write(Discard()), 2, "process_pool")
    assert "\n" not in str(refused.value)


def test_a_pipeline_that_cannot_travel_still_runs_in_threads() -> None:
    pipeline = HoldsALock(6).write(Discard())
    assert run_pipeline(pipeline, 2, "thread_pool") == EXPECTED


def test_a_pipeline_that_workers_cannot_put_together_ends_the_run_with_the_reason() -> None:
    with pytest.raises(PsncError, match="calibration table is not on this machine"):
        run_pipeline(Unwelcome(4).write(Discard()), 2, "process_pool")


def test_an_error_that_cannot_travel_is_recorded_like_any_other() -> None:
    pipeline = Numbers(6).filter(Fails()).write(Discard())
    results = run_pipeline(pipeline, 2, "process_pool")
    assert results == [[] if i == 3 else EXPECTED[i] for i in range(6)]
    assert pipeline.failed_indices == {3: "TwoArgumentsError: row 3: negative mass"}


def test_on_error_raise_says_what_failed_even_if_the_error_cannot_travel() -> None:
    pipeline = Numbers(6).filter(Fails()).write(Discard())
    with pytest.raises(Exception, match="row 3: negative mass"):
        run_pipeline(pipeline, 2, "process_pool", on_error="raise")
    assert pipeline.failed_indices == {3: "TwoArgumentsError: row 3: negative mass"}


def test_on_error_raise_with_an_error_that_breaks_as_it_arrives_does_not_hang(
    tmp_path: Path, run_python: Run
) -> None:
    (tmp_path / "bombs.py").write_text(
        "class Bomb(Exception):\n"
        "    def __reduce__(self):\n"
        "        return (explode, ())\n"
        "def explode():\n"
        "    raise ValueError('no such thing here')\n"
    )
    script = write_script(
        tmp_path / "script.py",
        """
        from bombs import Bomb
        from psnc import Filter, run_pipeline
        from stages_for_tests import Discard, Numbers

        class Throw(Filter):
            def __call__(self, items):
                raise Bomb("tick")

        run_pipeline(Numbers(3).filter(Throw()).write(Discard()), 2, on_error="raise")
        """,
    )
    finished = run_python(script, check=False, timeout=20)
    assert finished.returncode == 1
    assert "tick" in finished.stderr


# --- pipelines that no module holds -----------------------------------------------------------

SCRIPT = """
from psnc import Filter, Sink, Source, run_pipeline, Pipeline

print("script runs")

class MySource(Source):
    def __init__(self, count):
        self.count = count
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        yield index + SHIFT

SHIFT = 100

class MyFilter(Filter):
    def __call__(self, items):
        for item in items:
            if item == 103:
                raise MyError("of my own")
            yield item

class MyError(Exception):
    pass

class MySink(Sink):
    def __call__(self, items, index):
        return [f"{index}-{item}" for item in items]

pipeline = Pipeline(MySource(5), [MyFilter()], MySink(), resume=True, db_dir="db")
print(run_pipeline(pipeline, n_jobs=2, backend="process_pool", **OPTIONS))
print(sorted(pipeline.completed_indices), pipeline.failed_indices)
"""

PRINTED = """script runs
[['0-100'], ['1-101'], ['2-102'], [], ['4-104']]
[0, 1, 2, 4] {3: 'MyError: of my own'}
"""


def _hash_in(directory: Path, query: Callable[..., Any]) -> str:
    ((config_hash,),) = query(only_database(directory), "SELECT config_hash FROM pipeline_runs")
    return str(config_hash)


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"])
def test_a_script_needs_no_main_guard_and_runs_once(
    start_method: str, tmp_path: Path, run_python: Run, query: Callable[..., Any]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("**OPTIONS", f"start_method={start_method!r}"))
    assert run_python(script).stdout == PRINTED
    # Workers and script agree on the hash: the workers recorded to the run that the script began.
    assert len(_hash_in(tmp_path / "db", query)) == 64


def test_a_script_resumes_what_it_ran_before(tmp_path: Path, run_python: Run) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("**OPTIONS", ""))
    first = run_python(script)
    script.write_text(script.read_text().replace("SHIFT = 100", "SHIFT = 200"))
    again = run_python(script)
    assert first.stdout == PRINTED
    # Only what failed has run again, and no longer fails.
    assert "[['0-100'], ['1-101'], ['2-102'], ['3-203'], ['4-104']]" in again.stdout


def test_a_pipeline_typed_at_a_prompt_runs_in_processes(run_python: Run) -> None:
    assert run_python("-c", SCRIPT.replace("**OPTIONS", "")).stdout == PRINTED


def test_a_pipeline_of_a_notebook_cell_runs_in_processes(tmp_path: Path, run_python: Run) -> None:
    script = tmp_path / "notebook.py"
    script.write_text(
        "import sys, types\n"
        "main = types.ModuleType('__main__')\n"
        "sys.modules['__main__'] = main\n"
        f"cell = {SCRIPT.replace('**OPTIONS', '')!r}\n"
        "exec(compile(cell, '<ipython-input-1>', 'exec'), main.__dict__)\n"
    )
    assert run_python(script).stdout == PRINTED


def test_a_pipeline_of_a_nameless_namespace_runs_in_processes(
    tmp_path: Path, run_python: Run
) -> None:
    script = tmp_path / "embedded.py"
    script.write_text(
        f"cell = {SCRIPT.replace('**OPTIONS', '')!r}\nexec(cell, {{'__name__': '__main__'}})\n"
    )
    assert run_python(script).stdout == PRINTED


def test_a_module_run_by_name_runs_in_processes(tmp_path: Path, run_python: Run) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "job.py").write_text(SCRIPT.replace("**OPTIONS", ""))
    assert run_python("-m", "package.job").stdout == PRINTED


def test_a_stage_class_made_inside_a_function_runs_in_processes() -> None:
    class Local(Source[int]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Iterator[int]:
            yield index

    assert run_pipeline(Local().write(Discard()), 2, "process_pool") == EXPECTED


# --- a backend of a plugin's own --------------------------------------------------------------


class BackwardsBackend(Backend):
    """Keeps what is submitted until two batches wait, and runs the later one first."""

    def __init__(self, n_jobs: int, greeting: str = "") -> None:
        super().__init__(n_jobs)
        self.log = [greeting]
        self._waiting: list[tuple[Sequence[int], Future[BatchResult]]] = []
        opened.append(self)

    def start(self, task: WorkerTask) -> None:
        self._task = task
        self.log.append("start")

    def submit(self, indices: Sequence[int]) -> Future[BatchResult]:
        future: Future[BatchResult] = Future()
        self._waiting.append((indices, future))
        threading.Timer(0.01, self._run_latest).start()
        return future

    def _run_latest(self) -> None:
        indices, future = self._waiting.pop()
        future.set_result(self._task(indices))

    def stop(self, *, now: bool = False) -> None:
        self.log.append("stop now" if now else "stop")


opened: list[BackwardsBackend] = []


class OffersBackends:
    @hookimpl
    def psnc_backends(self) -> Mapping[str, type[Backend] | str]:
        return {"backwards": BackwardsBackend, "lazy": f"{__name__}:BackwardsBackend"}


@pytest.mark.parametrize("name", ["backwards", "lazy"])
def test_a_backend_that_a_plugin_offers_runs_pipelines(name: str, plugins: PluginManager) -> None:
    plugins.register(OffersBackends())
    pipeline = numbers_pipeline(6)
    assert run_pipeline(pipeline, 2, name, greeting="hello") == EXPECTED
    assert pipeline.completed_indices == set(range(6))
    assert opened.pop().log == ["hello", "start", "stop"]


def test_the_backends_of_plugins_are_among_the_names_there_are(plugins: PluginManager) -> None:
    plugins.register(OffersBackends())
    with pytest.raises(BackendError, match="backwards, lazy, process_pool"):
        run_pipeline(numbers_pipeline(), backend="forwards")


def test_a_plugin_can_take_the_place_of_a_built_in_backend(plugins: PluginManager) -> None:
    class Replacement:
        @hookimpl
        def psnc_backends(self) -> Mapping[str, type[Backend]]:
            return {"sequential": BackwardsBackend}

    plugins.register(Replacement())
    assert run_pipeline(numbers_pipeline(6)) == EXPECTED
    assert opened.pop().log == ["", "start", "stop"]


class CarelessBackend(Backend):
    """Runs batches in the driver, and not as it is asked to."""

    def __init__(self, n_jobs: int, answer: Callable[[WorkerTask, Sequence[int]], Any]) -> None:
        super().__init__(n_jobs)
        self._answer = answer

    def start(self, task: WorkerTask) -> None:
        self._task = task

    def submit(self, indices: Sequence[int]) -> Future[BatchResult]:
        future: Future[BatchResult] = Future()
        future.set_result(self._answer(self._task, indices))
        return future

    def stop(self, *, now: bool = False) -> None: ...


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda task, indices: task(indices[1:]), "a batch of 1 indices with the records of 0"),
        (lambda task, indices: task([*indices, *indices]), "1 indices with the records of 2"),
        (lambda task, indices: task([5 - each for each in indices]), "records of 1, or of others"),
        (lambda task, indices: task(indices).records, "with .list.: give its future"),
    ],
    ids=["fewer", "twice", "others", "no result"],
)
def test_a_backend_that_does_not_run_what_it_is_given_is_found_out(
    answer: Callable[[WorkerTask, Sequence[int]], Any], complaint: str, plugins: PluginManager
) -> None:
    class Offers:
        @hookimpl
        def psnc_backends(self) -> Mapping[str, type[Backend]]:
            return {"careless": CarelessBackend}

    plugins.register(Offers())
    with pytest.raises(BackendError, match=f"backend CarelessBackend answers .*{complaint}"):
        run_pipeline(numbers_pipeline(6), backend="careless", answer=answer)


@pytest.mark.parametrize("offered", [dict, "os:getcwd"])
def test_what_is_no_backend_is_refused(offered: Any, plugins: PluginManager) -> None:
    class Offers:
        @hookimpl
        def psnc_backends(self) -> Mapping[str, Any]:
            return {"odd": offered}

    plugins.register(Offers())
    with pytest.raises(BackendError, match=r"'odd' is .*, which is no psnc\.Backend"):
        run_pipeline(numbers_pipeline(6), backend="odd")


def test_pipelines_run_with_a_pool_that_is_not_psncs_own(query: Callable[..., Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    pipeline = numbers_pipeline(6)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(pipeline.__getitem__, range(6))) == EXPECTED
    assert pipeline.completed_indices == set(range(6))


def test_pipelines_run_in_somebody_elses_processes(tmp_path: Path, run_python: Run) -> None:
    script = write_script(
        tmp_path / "script.py",
        """
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        from stages_for_tests import numbers_pipeline

        if __name__ == "__main__":
            for method in ("spawn", "forkserver", "fork"):
                pipeline = numbers_pipeline(6)
                with ProcessPoolExecutor(2, mp_context=get_context(method)) as pool:
                    results = list(pool.map(pipeline.__getitem__, range(6)))
                print(results == [[f"out/{i}-0.bin"] for i in range(6)])
                print(sorted(pipeline.completed_indices))
        """,
    )
    assert run_python(script).stdout == "True\n[0, 1, 2, 3, 4, 5]\n" * 3


def test_workers_that_cannot_be_started_are_one_line(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    script = write_script(
        tmp_path / "script.py",
        """
        import sys, tempfile
        from psnc import BackendError, run_pipeline
        from stages_for_tests import Discard, Numbers

        # Longer than the name of a socket may be.
        tempfile.tempdir = sys.argv[1]
        try:
            run_pipeline(Numbers(3).write(Discard(0)), 2)
        except BackendError as error:
            print(error)
        """,
    )
    place = tmp_path / ("long" * 30)
    place.mkdir()
    finished = run_python(script, str(place), timeout=60)
    assert finished.stdout.startswith("worker processes cannot be started (OSError: AF_UNIX path")
    assert finished.stdout.count("\n") == 1
