"""`pipeline[i]` in somebody's own pool: recorded, resumed, and with the driver's plugins."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import joblib
import pytest
from stages_for_tests import (
    Add,
    Discard,
    FailOn,
    Journal,
    Numbers,
    numbers_pipeline,
    read_journal,
)

from psnc import Pipeline, Run, hookimpl
from psnc.manager import PluginManager

PROCESSES = (
    "joblib loky",
    "joblib multiprocessing",
    "pool fork",
    "pool spawn",
    "pool forkserver",
    "executor fork",
    "executor spawn",
    "executor forkserver",
)
METHODS = ("fork", "spawn", "forkserver")
THREADS = ("joblib threading", "threads", "executor threads")

OWN_POOLS = '''
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import joblib


def map_in_pool(kind, function, items):
    """Return what the function makes of the items, in a pool with two workers."""
    family, name = kind.split() if " " in kind else (kind, "")
    if family == "joblib":
        return joblib.Parallel(2, backend=name)(joblib.delayed(function)(item) for item in items)
    if family == "executor":
        context = None if name == "threads" else multiprocessing.get_context(name)
        pool = ThreadPoolExecutor(2) if context is None else ProcessPoolExecutor(2, context)
        with pool:
            return list(pool.map(function, items))
    pool = ThreadPool(2) if family == "threads" else multiprocessing.get_context(name).Pool(2)
    with pool:
        return pool.map(function, items)
'''

SCRIPT = """
from pathlib import Path
from own_pools import *
import psnc
from psnc import Filter, Pipeline
from stages_for_tests import Discard, FailOn, Journal

class Own(Filter):
    '''Of the script itself.'''

    def __call__(self, items):
        return (item + 10 for item in items)

@psnc.filter
def shifted(item, by):
    return item - by

pipeline = Pipeline(
    Journal(6, str(Path("journal").absolute())),
    [FailOn([3], mended=str(Path("mended").absolute())), Own(), shifted(10)],
    Discard(),
    resume=True,
    db_dir="db",
)

def outcome(index):
    try:
        return pipeline[index]
    except RuntimeError as error:
        return str(error)

if __name__ == "__main__":
    kind = sys.argv[1]
    # So that the driver has a connection of its own as the pool starts.
    pipeline.completed_indices
    print(json.dumps({
        "results": map_in_pool(kind, outcome, range(6)),
        "completed": sorted(pipeline.completed_indices),
        "failed": pipeline.failed_indices,
        "workers": sorted({worker["pid"] for worker in pipeline.active_workers}),
        "at_work": [w for w in pipeline.active_workers if w["current_index"] is not None],
        "driver": os.getpid(),
    }))
"""


@pytest.fixture
def run_script(tmp_path: Path, run_python: Any) -> Callable[..., Any]:
    """Write a script beside the pools, run it, and return the JSON that it prints."""

    def run(text: str, *arguments: str, **environment: str) -> Any:
        (tmp_path / "own_pools.py").write_text(OWN_POOLS)
        script = tmp_path / "script.py"
        script.write_text(textwrap.dedent(text))
        # Memory-mapped arrays and the like of joblib stay in the test's own directory.
        environment = {"JOBLIB_TEMP_FOLDER": str(tmp_path), **environment}
        return json.loads(run_python(script, *arguments, **environment).stdout)

    return run


def paths(indices: Any) -> list[list[str]]:
    return [[f"out/{index}-0.bin"] for index in indices]


# --- recorded and resumed ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*PROCESSES, *THREADS])
def test_indices_are_recorded_and_only_what_failed_runs_again(
    kind: str, tmp_path: Path, run_script: Callable[..., Any]
) -> None:
    first = run_script(SCRIPT, kind)
    assert first["results"] == [*paths(range(3)), "bad item 3", *paths([4, 5])]
    assert first["completed"] == [0, 1, 2, 4, 5]
    assert first["failed"] == {"3": "RuntimeError: bad item 3"}
    assert first["at_work"] == []
    in_driver = kind in THREADS
    assert (first["workers"] == [first["driver"]]) == in_driver
    assert sorted(read_journal(tmp_path / "journal")) == list(range(6))

    (tmp_path / "mended").touch()
    again = run_script(SCRIPT, kind)
    assert again["results"] == paths(range(6))
    assert (again["completed"], again["failed"]) == (list(range(6)), {})
    assert sorted(read_journal(tmp_path / "journal")) == [0, 1, 2, 3, 3, 4, 5]


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_a_pipeline_is_sent_along_with_each_task(backend: str, journal: str) -> None:
    pipeline = Pipeline(Journal(8, journal), [FailOn([2])], Discard())
    results = joblib.Parallel(2, backend=backend)(
        joblib.delayed(outcome_of)(pipeline, index) for index in range(8)
    )
    assert results == [*paths(range(2)), "bad item 2", *paths(range(3, 8))]
    assert pipeline.completed_indices == {0, 1, 3, 4, 5, 6, 7}
    assert pipeline.failed_indices == {2: "RuntimeError: bad item 2"}
    assert sorted(read_journal(journal)) == list(range(8))


def test_a_pool_may_outlive_the_directory_that_it_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: str
) -> None:
    place = tmp_path / "gone"
    place.mkdir()
    monkeypatch.chdir(place)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(os.getpid)
        monkeypatch.chdir(tmp_path)
        place.rmdir()
        pipeline = Pipeline(Journal(3, journal), sink=Discard())
        assert pool.map(pipeline.__getitem__, range(3)) == paths(range(3))
    assert pipeline.completed_indices == {0, 1, 2}


def outcome_of(pipeline: Pipeline[Any], index: int) -> list[str] | str:
    try:
        return pipeline[index]
    except RuntimeError as error:
        return str(error)


def test_a_pool_s_error_is_the_stage_s_own() -> None:
    pipeline = Pipeline(Numbers(2), [FailOn([1])], Discard())
    with (
        multiprocessing.get_context("fork").Pool(1) as pool,
        pytest.raises(RuntimeError, match="bad item 1"),
    ):
        pool.map(pipeline.__getitem__, [0, 1])


def test_two_pipelines_share_a_pool_and_not_a_record(tmp_path: Path) -> None:
    pipelines = [Pipeline(Numbers(4), [Add(amount)], Discard()) for amount in (1, 2)]
    tasks = [(pipeline, index) for index in range(4) for pipeline in pipelines]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.starmap(outcome_of, tasks, chunksize=1)
    assert [pipeline.completed_indices for pipeline in pipelines] == [set(range(4))] * 2
    assert pipelines[0].db_path != pipelines[1].db_path


def test_what_is_completed_in_the_driver_is_found_in_the_pool(journal: str) -> None:
    pipeline = Pipeline(Journal(3, journal), sink=Discard())
    pipeline[1]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(pipeline.__getitem__, range(3)) == paths(range(3))
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(pipeline.__getitem__, range(3))) == paths(range(3))
    assert sorted(read_journal(journal)) == [0, 1, 2]


def test_a_pool_without_records_leaves_none(own_home: Path) -> None:
    pipeline = Pipeline(Numbers(3), sink=Discard(), track_metrics=False)
    results = joblib.Parallel(2)(joblib.delayed(pipeline.__getitem__)(index) for index in range(3))
    assert results == paths(range(3))
    assert list(own_home.rglob("*.db")) == []


# --- plugins ----------------------------------------------------------------------------------

PLUGIN = """
import os
from psnc import hookimpl

@hookimpl
def psnc_index_done(context, record):
    with open("seen", "a") as file:
        file.write(f"{record.index} {os.getpid()}\\n")

@hookimpl
def psnc_index_measure(context):
    return {"seen_by": %r}
"""

WITH_PLUGIN = """
from own_pools import *
from psnc import Config, activate
from stages_for_tests import numbers_pipeline

if __name__ == "__main__":
    kind = sys.argv[1]
    if len(sys.argv) > 2:
        activate(Config(plugins=tuple(sys.argv[2:])))
    pipeline = numbers_pipeline(4)
    pipeline.completed_indices
    map_in_pool(kind, pipeline.__getitem__, range(4))
    print(json.dumps({"driver": os.getpid(), "db": str(pipeline.db_path)}))
"""


def seen(directory: Path) -> dict[int, int]:
    lines = (directory / "seen").read_text().splitlines()
    return {int(index): int(pid) for index, pid in map(str.split, lines)}


def seen_by(told: Any, query: Any) -> set[str]:
    rows = query(told["db"], "SELECT measurements FROM index_results")
    return {json.loads(text)["seen_by"] for (text,) in rows}


@pytest.mark.parametrize("kind", PROCESSES)
def test_plugins_of_the_driver_are_at_work_in_a_pool(
    kind: str, tmp_path: Path, run_script: Callable[..., Any], query: Any
) -> None:
    (tmp_path / "own_plugin.py").write_text(PLUGIN % "named")
    told = run_script(WITH_PLUGIN, kind, "own_plugin")
    assert set(seen(tmp_path)) == {0, 1, 2, 3}
    assert told["driver"] not in seen(tmp_path).values()
    assert seen_by(told, query) == {"named"}


@pytest.mark.parametrize("kind", ["joblib loky", "pool fork", "pool spawn", "executor forkserver"])
def test_the_plugin_beside_a_script_is_at_work_in_a_pool(
    kind: str, tmp_path: Path, run_script: Callable[..., Any], query: Any
) -> None:
    (tmp_path / "psnc_plugins.py").write_text(PLUGIN % "local")
    told = run_script(WITH_PLUGIN, kind)
    assert set(seen(tmp_path)) == {0, 1, 2, 3}
    assert seen_by(told, query) == {"local"}


@pytest.mark.parametrize("kind", ["joblib loky", "pool spawn"])
def test_a_plugin_that_the_driver_keeps_out_stays_out_in_a_pool(
    kind: str, tmp_path: Path, run_script: Callable[..., Any], query: Any
) -> None:
    told = run_script(WITH_PLUGIN, kind, "no:memory")
    peaks = query(told["db"], "SELECT DISTINCT peak_memory_bytes FROM index_results")
    assert peaks == [(None,)]


@pytest.mark.parametrize("kind", ["joblib loky", "executor spawn"])
def test_plugins_named_by_the_environment_are_at_work_in_a_pool(
    kind: str, tmp_path: Path, run_script: Callable[..., Any], query: Any
) -> None:
    (tmp_path / "own_plugin.py").write_text(PLUGIN % "environment")
    told = run_script(
        WITH_PLUGIN,
        kind,
        PSNC_PLUGINS="own_plugin",
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(__file__).parent)]),
    )
    assert set(seen(tmp_path)) == {0, 1, 2, 3}
    assert seen_by(told, query) == {"environment"}


REUSED = """
from own_pools import *
from psnc import Config, activate
from stages_for_tests import numbers_pipeline

if __name__ == "__main__":
    databases, pids = [], []
    for name in ("first_plugin", "second_plugin"):
        activate(Config(plugins=(name,)))
        pipeline = numbers_pipeline(4)
        map_in_pool("joblib loky", pipeline.__getitem__, range(4))
        databases.append(str(pipeline.db_path))
        pids.append({worker["pid"] for worker in pipeline.active_workers})
    print(json.dumps({"databases": databases, "reused": bool(pids[0] & pids[1])}))
"""


def test_workers_that_are_used_again_load_the_plugins_of_the_present_pipeline(
    tmp_path: Path, run_script: Callable[..., Any], query: Any
) -> None:
    for name in ("first", "second"):
        (tmp_path / f"{name}_plugin.py").write_text(PLUGIN % name)
    told = run_script(REUSED)
    assert told["reused"]
    assert [seen_by({"db": each}, query) for each in told["databases"]] == [{"first"}, {"second"}]


NOTES_PLUGINS = """
import os
import psnc

@psnc.hookimpl
def psnc_configure(config):
    note("configure")

@psnc.hookimpl
def psnc_worker_start(run, worker):
    note("start")

@psnc.hookimpl
def psnc_worker_done(run, worker):
    note("done" if run.store is not None else "done too late")

@psnc.hookimpl
def psnc_unconfigure():
    note("unconfigure")

def note(event):
    with open("seen", "a") as file:
        file.write(f"{os.getpid()} {__name__} {event}\\n")
"""


def noted(directory: Path) -> dict[str, list[str]]:
    """Return what the plugins noted in each process, in order."""
    events: dict[str, list[str]] = {}
    for line in (directory / "seen").read_text().splitlines():
        pid, event = line.split(" ", 1)
        events.setdefault(pid, []).append(event)
    return events


IN_TURN = """
import copy, pickle
from own_pools import *
from psnc import Config, activate
from stages_for_tests import numbers_pipeline

def of_copy(content):
    pipeline, index = pickle.loads(content)
    return pipeline[index]

if __name__ == "__main__":
    kind = sys.argv[1]
    pipeline = numbers_pipeline(4)
    for turn, name in enumerate(("first", "second")):
        activate(Config(plugins=(name,)))
        indices = (2 * turn, 2 * turn + 1)
        if kind == "itself":
            [pipeline[index] for index in indices]
        else:
            tasks = [pickle.dumps((pipeline, index)) for index in indices]
            if name == "first":
                pool = ProcessPoolExecutor(1, multiprocessing.get_context(kind))
            list(pool.map(of_copy, tasks))
    if kind != "itself":
        pool.shutdown()
    print(json.dumps({"driver": os.getpid()}))
"""


@pytest.mark.parametrize("kind", ["itself", "spawn", "fork"])
def test_a_pipeline_has_the_plugins_that_are_active_now(
    kind: str, tmp_path: Path, run_script: Callable[..., Any]
) -> None:
    for name in ("first", "second"):
        (tmp_path / f"{name}.py").write_text(NOTES_PLUGINS)
    driver = str(run_script(IN_TURN, kind)["driver"])
    events = noted(tmp_path)
    in_driver = events.pop(driver)
    at_work = in_driver if kind == "itself" else next(iter(events.values()))
    assert [event for event in at_work if event.split()[1] in ("start", "done")] == [
        "first start",
        "first done",
        "second start",
        "second done",
    ]
    # Whoever takes leave does so while its plugin is set up.
    assert at_work[-1] == "second unconfigure"
    assert "first unconfigure" in at_work or kind == "fork"


ORDERLY = """
from own_pools import *
from psnc import Config, activate
from stages_for_tests import numbers_pipeline

def run(pipeline, index):
    return pipeline[index]

if __name__ == "__main__":
    family, name = sys.argv[1].split()
    activate(Config(plugins=("notes",)))
    pipeline = numbers_pipeline(4)
    tasks = [(pipeline, index) for index in range(4)]
    if family == "pool":
        pool = multiprocessing.get_context(name).Pool(2)
        pool.starmap(run, tasks)
        pool.close()
        pool.join()
    elif family == "bare":
        pipeline[0], pipeline[1]
    else:
        map_in_pool(sys.argv[1], pipeline.__getitem__, range(4))
    print(json.dumps({"workers": [worker["pid"] for worker in pipeline.active_workers]}))
"""


@pytest.mark.parametrize(
    "kind",
    [
        "bare loop",
        "joblib loky",
        *(f"{family} {method}" for family in ("pool", "executor") for method in METHODS),
    ],
)
def test_workers_of_a_process_that_ends_in_order_take_leave(
    kind: str, tmp_path: Path, run_script: Callable[..., Any]
) -> None:
    (tmp_path / "notes.py").write_text(NOTES_PLUGINS)
    workers = {str(pid) for pid in run_script(ORDERLY, kind)["workers"]}
    events = {
        pid: [event.removeprefix("notes ") for event in events]
        for pid, events in noted(tmp_path).items()
        if pid in workers
    }
    assert len(events) == len(workers)
    for of_process in events.values():
        # A forked process has the plugins that its parent has set up.
        own = [each for each in of_process if each in ("start", "done")]
        assert own == ["start", "done"]
        if "unconfigure" in of_process:
            assert of_process[-1] == "unconfigure"


def test_workers_of_a_run_that_makes_room_for_others_take_leave(
    plugins: PluginManager, tmp_path: Path
) -> None:
    class Notes:
        def __init__(self) -> None:
            self.done: list[str] = []

        @hookimpl
        def psnc_worker_done(self, run: Run, worker: Any) -> None:
            assert run.store is not None
            self.done.append(run.pipeline.instance_id)

    notes = Notes()
    plugins.register(notes)
    pipelines = [numbers_pipeline(2, db_dir=tmp_path / str(each)) for each in range(6)]
    for pipeline in pipelines:
        pickle.loads(pickle.dumps(pipeline))[0]
    assert notes.done == [pipeline.instance_id for pipeline in pipelines[:2]]
    for pipeline in pipelines:
        assert pipeline.completed_indices == {0}


class Nested(Discard):
    """Runs an index of other pipelines before it ends its own."""

    def __init__(self, others: list[bytes]) -> None:
        super().__init__()
        self.others = others

    def __call__(self, items: Any, index: int) -> list[str]:
        for other in self.others:
            pickle.loads(other)[0]
        return super().__call__(items, index)


def test_an_index_is_recorded_whose_run_makes_room_meanwhile(tmp_path: Path) -> None:
    others = [pickle.dumps(numbers_pipeline(2, db_dir=tmp_path / str(each))) for each in range(6)]
    pipeline = Pipeline(Numbers(2), sink=Nested(others), db_dir=tmp_path / "outer")
    pickle.loads(pickle.dumps(pipeline))[1]
    assert pipeline.completed_indices == {1}


# --- one worker a process ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_is_one_worker_however_many_tasks_it_is_given(method: str) -> None:
    pipeline = Pipeline(Numbers(20), sink=Preparing())
    with multiprocessing.get_context(method).Pool(2) as pool:
        pool.map(pipeline.__getitem__, range(20), chunksize=1)
        pids = {worker["pid"] for worker in pipeline.active_workers}
    assert os.getpid() not in pids
    assert len(pipeline.active_workers) == len(pids) <= 2
    # The sink was prepared once in each.
    assert {int(pid) for pid in Path("prepared").read_text().split()} == pids
    assert len(Path("prepared").read_text().split()) == len(pids)


class Preparing(Discard):
    def prepare(self, pipeline: Pipeline[Any]) -> None:
        with open("prepared", "a") as file:
            file.write(f"{os.getpid()}\n")
