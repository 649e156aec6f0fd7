"""What a plugin is called for, in which process, and what happens when it goes wrong."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from drivers import BACKENDS, jobs
from stages_for_tests import (
    Discard,
    Double,
    FailOn,
    Journal,
    Log,
    Numbers,
    numbers_pipeline,
    read_journal,
)

from psnc import (
    BackendError,
    CheckpointStore,
    Config,
    IndexRecord,
    Pipeline,
    PluginError,
    StoreError,
    TrackingDisabledError,
    WorkerInfo,
    hookimpl,
    run_pipeline,
)
from psnc.execution import IndexContext
from psnc.manager import PluginManager, activated
from psnc.records import RunSummary
from psnc.run import Run
from psnc.session import Session
from psnc.stages import stage_name
from psnc.store import Counts, IndexRow, RunRow, StageTotal

EXPECTED = [[f"out/{index}-0.bin"] for index in range(4)]

WriteModule = Callable[[str], str]
Activate = Callable[..., PluginManager]

_numbers = itertools.count()


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WriteModule]:
    """Write a module that can be imported here and in workers, and return its name."""
    directory = tmp_path / "modules"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    written: list[str] = []

    def write(source: str) -> str:
        name = f"plugin_for_test_{next(_numbers)}"
        (directory / f"{name}.py").write_text(textwrap.dedent(source))
        written.append(name)
        return name

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.fixture
def activate() -> Iterator[Activate]:
    """Load and install a plugin manager made from a configuration."""
    with ExitStack() as stack:

        def install(*choices: str, **settings: Any) -> PluginManager:
            manager = PluginManager(Config(plugins=choices, **settings))
            manager.load()
            stack.callback(manager.close)
            return stack.enter_context(activated(manager))

        yield install


class Diary:
    """Notes every hook of a run that it is called for."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    @hookimpl
    def psnc_run_start(self, run: Run, indices: Sequence[int], cached: int) -> None:
        self.entries.append(f"run_start {list(indices)} {cached}")

    @hookimpl
    def psnc_run_done(self, run: Run, summary: RunSummary) -> None:
        self.entries.append(f"run_done {summary.completed} {sorted(summary.failed)}")

    @hookimpl
    def psnc_worker_start(self, run: Run, worker: WorkerInfo) -> None:
        self.entries.append(f"worker_start {worker.pid == os.getpid()}")

    @hookimpl
    def psnc_worker_done(self, run: Run, worker: WorkerInfo) -> None:
        self.entries.append(f"worker_done {worker.pid == os.getpid()}")

    @hookimpl
    def psnc_index_lookup(self, run: Run, index: int) -> None:
        self.entries.append(f"index_lookup {index}")

    @hookimpl
    def psnc_index_start(self, context: IndexContext) -> None:
        self.entries.append(f"index_start {context.index}")

    @hookimpl
    def psnc_stage_start(self, context: IndexContext, stage: Any) -> None:
        self.entries.append(f"stage_start {stage_name(stage)}")

    @hookimpl
    def psnc_stage_done(self, context: IndexContext, stage: Any, record: Any) -> None:
        self.entries.append(f"stage_done {stage_name(stage)} {record.order} {record.name}")

    @hookimpl
    def psnc_index_measure(self, context: IndexContext) -> None:
        self.entries.append(f"index_measure {context.index}")

    @hookimpl
    def psnc_log_record(self, context: IndexContext, record: Any) -> None:
        self.entries.append(f"log_record {record.message}")

    @hookimpl
    def psnc_index_done(self, context: IndexContext, record: IndexRecord) -> None:
        self.entries.append(f"index_done {context.index} {record.status}")

    @hookimpl
    def psnc_index_interrupted(self, context: IndexContext) -> None:
        self.entries.append(f"index_interrupted {context.index}")

    @hookimpl
    def psnc_index_reported(self, run: Run, record: IndexRecord) -> None:
        self.entries.append(f"index_reported {record.index} {record.status}")


@pytest.fixture
def diary(plugins: PluginManager) -> Diary:
    diary = Diary()
    plugins.register(diary)
    return diary


ONE_INDEX = """\
index_lookup 0
index_start 0
stage_start Numbers
stage_start Log
stage_start Discard
log_record item 0
stage_done Numbers 0 Numbers
stage_done Log 1 Log
stage_done Discard 2 Discard
index_measure 0
index_done 0 completed""".splitlines()


# --- when hooks fire --------------------------------------------------------------------------


def test_hooks_of_a_run_fire_in_the_documented_order(diary: Diary) -> None:
    run_pipeline(Numbers(1).filter(Log(logging.WARNING)).write(Discard()))
    lookup, *rest = ONE_INDEX
    assert diary.entries == [
        "run_start [0] 0",
        lookup,
        "worker_start True",
        *rest,
        "index_reported 0 completed",
        "worker_done True",
        "run_done 1 []",
    ]


def test_a_bare_index_fires_the_hooks_of_an_index_and_none_of_a_run(diary: Diary) -> None:
    pipeline = Numbers(1).filter(Log(logging.WARNING)).write(Discard())
    _ = pipeline[0]
    lookup, *rest = ONE_INDEX
    assert diary.entries == [lookup, "worker_start True", *rest]


def test_a_failing_index_fires_every_hook_that_a_good_one_does(diary: Diary) -> None:
    run_pipeline(Numbers(1).filter(FailOn([0])).write(Discard()))
    kinds = [entry.split()[0] for entry in diary.entries]
    assert "index_done 0 error" in diary.entries
    assert "index_reported 0 error" in diary.entries
    assert kinds.count("stage_start") == kinds.count("stage_done") == 3
    assert diary.entries[-1] == "run_done 0 [0]"


def test_a_run_announces_only_what_is_left_to_do(diary: Diary) -> None:
    pipeline = numbers_pipeline(4)
    run_pipeline(pipeline, indices=[2])
    del diary.entries[:]
    run_pipeline(pipeline)
    assert diary.entries[0] == "run_start [0, 1, 3] 1"
    reported = [entry for entry in diary.entries if entry.startswith("index_reported")]
    assert reported == [f"index_reported {i} completed" for i in (0, 1, 3)]


def test_a_run_with_nothing_left_starts_and_ends(diary: Diary) -> None:
    pipeline = numbers_pipeline(2)
    run_pipeline(pipeline)
    del diary.entries[:]
    run_pipeline(pipeline)
    assert diary.entries == ["run_start [] 2", "run_done 0 []"]


def test_a_run_that_cannot_begin_is_said_to_start_and_to_be_done(diary: Diary) -> None:
    class CannotGetReady(Discard):
        def prepare(self, pipeline: Pipeline[Any]) -> None:
            raise OSError("no room at all")

    with pytest.raises(OSError, match="no room at all"):
        run_pipeline(Numbers(2).write(CannotGetReady()))
    assert diary.entries == ["run_start [0, 1] 0", "run_done 0 []"]


def test_a_run_that_is_cut_short_is_still_said_to_be_done(diary: Diary) -> None:
    class Interrupt(Double):
        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(Numbers(3).filter(Interrupt()).write(Discard()))
    assert "index_interrupted 0" in diary.entries
    assert "index_done 0 error" not in diary.entries
    assert diary.entries[-1] == "run_done 0 []"


def test_each_thread_is_a_worker_that_starts_and_is_done(diary: Diary) -> None:
    run_pipeline(numbers_pipeline(40), 2, "thread_pool")
    assert diary.entries.count("worker_start True") == diary.entries.count("worker_done True")
    assert 1 <= diary.entries.count("worker_start True") <= 2
    assert len([entry for entry in diary.entries if entry.startswith("index_done")]) == 40


def test_hooks_fire_where_the_index_runs_and_reports_reach_the_driver(
    tmp_path: Path, write_module: WriteModule, activate: Activate
) -> None:
    hooks = {
        "psnc_configure": "config",
        "psnc_unconfigure": "config",
        "psnc_run_start": "run",
        "psnc_run_done": "run",
        "psnc_worker_start": "run",
        "psnc_worker_done": "run",
        "psnc_index_start": "context",
        "psnc_stage_start": "context",
        "psnc_stage_done": "context",
        "psnc_index_measure": "context",
        "psnc_index_done": "context",
        "psnc_index_reported": "run",
    }
    functions = "".join(
        f"@hookimpl\ndef {hook}({argument}): note({hook!r})\n" for hook, argument in hooks.items()
    )
    name = write_module(
        "import os\n"
        "from psnc import hookimpl\n"
        "def note(hook):\n"
        f"    with open({str(tmp_path / 'calls')!r}, 'a') as file:\n"
        "        file.write(f'{os.getpid()} {hook}\\n')\n" + functions
    )
    activate(name)
    run_pipeline(numbers_pipeline(6), 2, "process_pool")
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    here = {hook for pid, hook in calls if int(pid) == os.getpid()}
    there = {hook for pid, hook in calls if int(pid) != os.getpid()}
    in_driver = {"psnc_run_start", "psnc_run_done", "psnc_index_reported"}
    assert here == in_driver | {"psnc_configure"}
    assert there == set(hooks) - in_driver
    counts = {hook: [h for _, h in calls].count(hook) for hook in hooks}
    assert counts["psnc_index_done"] == counts["psnc_index_reported"] == 6
    assert counts["psnc_stage_start"] == counts["psnc_stage_done"] == 18
    assert counts["psnc_worker_start"] == counts["psnc_worker_done"]
    assert counts["psnc_unconfigure"] == counts["psnc_configure"] - 1


# --- hooks that raise -------------------------------------------------------------------------

RAISES = [
    "psnc_run_start(run)",
    "psnc_run_done(run)",
    "psnc_worker_start(run)",
    "psnc_worker_done(run)",
    "psnc_index_lookup(run)",
    "psnc_index_start(context)",
    "psnc_stage_start(context)",
    "psnc_stage_done(context)",
    "psnc_index_measure(context)",
    "psnc_log_record(context)",
    "psnc_index_done(context)",
    "psnc_index_reported(run)",
]


def _raising(signature: str) -> Any:
    hook, _, argument = signature.rstrip(")").partition("(")
    namespace: dict[str, Any] = {"hookimpl": hookimpl}
    exec(f"@hookimpl\ndef {hook}(self, {argument}):\n    raise ZeroDivisionError('oh')", namespace)
    return type("Raising", (), {hook: namespace[hook]})()


@pytest.mark.parametrize("signature", RAISES)
def test_a_hook_that_raises_changes_no_result_and_is_logged_once(
    signature: str, plugins: PluginManager, caplog: pytest.LogCaptureFixture
) -> None:
    plugins.register(_raising(signature), name="bad")
    pipeline = Numbers(4).filter(Log(logging.WARNING)).write(Discard())
    assert run_pipeline(pipeline) == EXPECTED
    assert pipeline.completed_indices == {0, 1, 2, 3}
    hook = signature.partition("(")[0]
    logged = [r.getMessage() for r in caplog.records if r.name == "psnc.plugins"]
    (message,) = logged
    assert f"plugin bad raised in {hook} (ZeroDivisionError: oh)" in message


def test_hooks_that_raised_are_counted_in_the_summary(plugins: PluginManager) -> None:
    plugins.register(_raising("psnc_index_done(context)"), name="bad")
    summary = Session(numbers_pipeline(4)).run()
    assert summary.plugin_errors == {"bad: psnc_index_done": 4}


def test_the_errors_of_one_run_are_not_counted_in_the_next(plugins: PluginManager) -> None:
    bad = _raising("psnc_index_done(context)")
    plugins.register(bad, name="bad")
    Session(numbers_pipeline(4)).run()
    plugins.unregister(bad)
    assert Session(numbers_pipeline(4)).run().plugin_errors == {}


def test_hooks_that_raised_in_worker_processes_are_counted_too(
    write_module: WriteModule, activate: Activate
) -> None:
    name = write_module(
        """
        from psnc import hookimpl

        @hookimpl
        def psnc_index_start(context):
            if context.index % 2:
                raise ValueError("odd")
        """
    )
    activate(name)
    session = Session(numbers_pipeline(20), n_jobs=2, backend="process_pool")
    summary = session.run()
    assert summary.completed == 20
    assert summary.plugin_errors == {f"{name}: psnc_index_start": 10}


def test_a_hook_that_raises_is_logged_once_by_each_worker_process(
    write_module: WriteModule, activate: Activate, capfd: pytest.CaptureFixture[str]
) -> None:
    name = write_module(
        """
        from psnc import hookimpl

        @hookimpl
        def psnc_index_done(record):
            raise ValueError("again and again")
        """
    )
    activate(name)
    pipeline = numbers_pipeline(300)
    # Not from a fork server, which may hold the standard error of an earlier test.
    run_pipeline(pipeline, 2, "process_pool", start_method="spawn")
    said = capfd.readouterr().err.count(f"plugin {name} raised in psnc_index_done")
    assert 1 <= said <= len(pipeline.active_workers)


def test_a_plugin_that_fails_to_set_itself_up_stops_nothing(
    write_module: WriteModule, activate: Activate
) -> None:
    name = write_module(
        """
        from psnc import hookimpl

        @hookimpl
        def psnc_configure(config):
            raise OSError("no licence server")
        """
    )
    activate(name)
    assert run_pipeline(numbers_pipeline(4)) == EXPECTED


@pytest.mark.parametrize("backend", BACKENDS)
def test_strict_plugins_fail_the_run_at_its_end(
    backend: str, write_module: WriteModule, activate: Activate
) -> None:
    name = write_module(
        """
        from psnc import hookimpl

        @hookimpl
        def psnc_index_done(record):
            raise ValueError("never good")
        """
    )
    activate(name, strict_plugins=True)
    pipeline = numbers_pipeline(4)
    with pytest.raises(PluginError, match=f"{name}: psnc_index_done"):
        run_pipeline(pipeline, jobs(backend), backend)
    assert pipeline.completed_indices == {0, 1, 2, 3}


def test_strict_plugins_do_not_mind_those_that_behave(
    write_module: WriteModule, activate: Activate
) -> None:
    activate(write_module("import psnc"), strict_plugins=True)
    assert run_pipeline(numbers_pipeline(4)) == EXPECTED


@pytest.mark.parametrize("answer", ["out/0.txt", 7, [7], {"out/0.txt": 1}])
def test_a_lookup_that_answers_with_no_list_of_paths_is_an_error_of_its_plugin(
    plugins: PluginManager, answer: Any
) -> None:
    class Careless:
        @hookimpl
        def psnc_index_lookup(self, index: int) -> Any:
            return answer if index == 0 else None

    plugins.register(Careless(), name="careless")
    session = Session(numbers_pipeline(4))
    summary = session.run()
    assert session.results() == EXPECTED
    assert summary.plugin_errors == {"careless: psnc_index_lookup": 1}


@pytest.mark.parametrize("call", ["psnc_configure()", "psnc_run_done(summary)"])
def test_an_error_before_or_after_the_run_counts_and_fails_a_strict_one(
    call: str, activate: Activate, write_module: Callable[[str], str]
) -> None:
    hook = call.partition("(")[0]
    name = write_module(f"import psnc\n@psnc.hookimpl\ndef {call}:\n    raise RuntimeError('no')\n")
    activate(name)
    assert Session(numbers_pipeline(2)).run().plugin_errors == {f"{name}: {hook}": 1}
    activate(name, strict_plugins=True)
    with pytest.raises(PluginError, match=rf"{name}: {hook}"):
        run_pipeline(numbers_pipeline(2))


# --- wrappers ---------------------------------------------------------------------------------


class Around:
    """Wraps hooks in the present style of pluggy."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    @hookimpl(wrapper=True)
    def psnc_index_done(self, context: IndexContext, record: IndexRecord) -> Iterator[Any]:
        self.seen.append(f"before {record.index}")
        result = yield
        self.seen.append(f"after {record.index}")
        return result

    @hookimpl(wrapper=True)
    def psnc_index_measure(self, context: IndexContext) -> Iterator[Any]:
        results = yield
        return [*results, {"around": len(results)}]

    @hookimpl(wrapper=True)
    def psnc_index_lookup(self, index: int) -> Iterator[Any]:
        found = yield
        self.seen.append(f"lookup {index} {found and list(found)}")
        return found


class AroundInTheOldStyle:
    def __init__(self) -> None:
        self.seen: list[str] = []

    @hookimpl(hookwrapper=True)
    def psnc_index_done(self, record: IndexRecord) -> Iterator[Any]:
        self.seen.append(f"before {record.index}")
        yield
        self.seen.append(f"after {record.index}")


def test_wrappers_go_around_the_other_plugins(
    plugins: PluginManager, query: Callable[..., Any]
) -> None:
    around, old = Around(), AroundInTheOldStyle()
    plugins.register(old)
    plugins.register(around)
    pipeline = numbers_pipeline(1)
    run_pipeline(pipeline)
    assert pipeline[0] == EXPECTED[0]
    assert around.seen == ["lookup 0 None", "before 0", "after 0", f"lookup 0 {EXPECTED[0]}"]
    assert old.seen == ["before 0", "after 0"]
    assert pipeline.completed_indices == {0}
    ((measurements,),) = query(pipeline.db_path, "SELECT measurements FROM index_results")
    assert '"around": ' in measurements


def test_a_plugin_that_raises_inside_a_wrapper_keeps_nothing_from_being_recorded(
    plugins: PluginManager,
) -> None:
    plugins.register(Around())
    plugins.register(_raising("psnc_index_done(context)"), name="bad")
    pipeline = numbers_pipeline(4)
    summary = Session(pipeline).run()
    assert pipeline.completed_indices == {0, 1, 2, 3}
    assert sum(summary.plugin_errors.values()) == 4


def test_a_wrapper_that_raises_is_contained_like_any_other_plugin(plugins: PluginManager) -> None:
    class Broken:
        @hookimpl(wrapper=True)
        def psnc_index_done(self, record: IndexRecord) -> Iterator[Any]:
            result = yield
            raise ValueError("broken")
            return result

    plugins.register(Broken(), name="broken")
    pipeline = numbers_pipeline(4)
    assert run_pipeline(pipeline) == EXPECTED
    assert pipeline.completed_indices == {0, 1, 2, 3}


def _raises_before_it_yields(record: IndexRecord) -> Iterator[Any]:
    raise ValueError("broken")
    yield


def _yields_never(record: IndexRecord) -> Iterator[Any]:
    return
    yield


def _yields_twice(record: IndexRecord) -> Iterator[Any]:
    yield
    yield


@pytest.mark.parametrize("style", ["wrapper", "hookwrapper"])
@pytest.mark.parametrize("function", [_raises_before_it_yields, _yields_never, _yields_twice])
def test_a_wrapper_that_goes_wrong_keeps_nothing_from_being_recorded(
    plugins: PluginManager, function: Callable[..., Any], style: str
) -> None:
    class Broken:
        @hookimpl(**{style: True})
        def psnc_index_done(self, record: IndexRecord) -> Iterator[Any]:
            return (yield from function(record))

    plugins.register(Around())
    plugins.register(Broken(), name="broken")
    plugins.register(AroundInTheOldStyle())
    pipeline = numbers_pipeline(4)
    summary = Session(pipeline).run()
    assert pipeline.completed_indices == {0, 1, 2, 3}
    assert summary.plugin_errors == {"broken: psnc_index_done": 4}


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_hook_keeps_no_other_plugin_from_cleaning_up(
    plugins: PluginManager, interrupt: type[BaseException], is_wrapped: bool
) -> None:
    class Interrupted:
        @hookimpl(tryfirst=True)
        def psnc_index_done(self, record: IndexRecord) -> None:
            raise interrupt

    called: list[int] = []

    class Called:
        @hookimpl(trylast=True)
        def psnc_index_done(self, record: IndexRecord) -> None:
            called.append(record.index)

    plugins.register(Interrupted())
    plugins.register(Called())
    if is_wrapped:
        plugins.register(Around())
    pipeline = numbers_pipeline(2)
    with pytest.raises(interrupt):
        pipeline[0]
    assert called == [0]
    assert pipeline.completed_indices == {0}


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit, BaseException])
def test_a_hook_that_raises_what_is_no_exception_is_contained(
    plugins: PluginManager, error: type[BaseException], is_wrapped: bool
) -> None:
    class Broken:
        @hookimpl(tryfirst=True)
        def psnc_index_lookup(self, index: int) -> None:
            raise error

        @hookimpl(tryfirst=True)
        def psnc_index_done(self, record: IndexRecord) -> None:
            raise error

    plugins.register(Broken(), name="broken")
    if is_wrapped:
        plugins.register(Around())
    pipeline = numbers_pipeline(4)
    summary = Session(pipeline).run()
    assert pipeline.completed_indices == {0, 1, 2, 3}
    assert summary.plugin_errors == {"broken: psnc_index_lookup": 4, "broken: psnc_index_done": 4}


def test_a_wrapper_that_catches_everything_does_not_hide_that_nothing_is_recorded(
    plugins: PluginManager,
) -> None:
    class CatchesAll:
        @hookimpl(wrapper=True)
        def psnc_index_done(self, record: IndexRecord) -> Iterator[Any]:
            try:
                return (yield)
            except Exception:
                return None

    class Full:
        @hookimpl
        def psnc_index_done(self, record: IndexRecord) -> None:
            raise StoreError("no room")

    plugins.register(Full())
    plugins.register(CatchesAll())
    with pytest.raises(StoreError, match="no room"):
        run_pipeline(numbers_pipeline(4))


# --- which plugins ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_the_checkpoint_plugin_nothing_is_recorded(
    backend: str, activate: Activate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PSNC_CACHE_DIR", str(tmp_path / "cache"))
    activate("no:checkpoint")
    pipeline = numbers_pipeline(4)
    assert run_pipeline(pipeline, jobs(backend), backend) == EXPECTED
    assert not (tmp_path / "cache").exists()
    with pytest.raises(TrackingDisabledError, match=r"no loaded plugin"):
        _ = pipeline.completed_indices


def _column(pipeline: Pipeline[Any], column: str, query: Callable[..., Any]) -> list[Any]:
    return [value for (value,) in query(pipeline.db_path, f"SELECT {column} FROM index_results")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_the_memory_plugin_no_memory_is_recorded(
    backend: str, activate: Activate, query: Callable[..., Any]
) -> None:
    activate("no:memory")
    pipeline = numbers_pipeline(4)
    run_pipeline(pipeline, jobs(backend), backend)
    assert _column(pipeline, "peak_memory_bytes", query) == [None] * 4


def test_without_the_logcapture_plugin_no_log_entry_is_recorded(
    activate: Activate, query: Callable[..., Any]
) -> None:
    activate("no:logcapture")
    pipeline = Numbers(2).filter(Log(logging.ERROR)).write(Discard())
    run_pipeline(pipeline)
    assert query(pipeline.db_path, "SELECT * FROM logs") == []


def test_without_the_backends_plugin_there_is_no_backend(activate: Activate) -> None:
    activate("no:backends")
    with pytest.raises(BackendError, match="choose one of none"):
        run_pipeline(numbers_pipeline())


def test_of_two_choices_about_a_plugin_the_later_one_wins(activate: Activate) -> None:
    assert activate("no:memory", "memory").has_plugin("memory")
    assert not activate("memory", "no:memory").has_plugin("memory")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        pytest.param("import nothing_of_this_name", "nothing_of_this_name", id="import"),
        pytest.param("def (:", "SyntaxError", id="syntax"),
        pytest.param("raise ValueError('no licence')", "no licence", id="raises"),
        pytest.param(
            "from psnc import hookimpl\n@hookimpl\ndef psnc_index_dome(context): pass",
            "psnc_index_dome",
            id="unknown hook",
        ),
        pytest.param(
            "from psnc import hookimpl\n@hookimpl\ndef psnc_index_done(contest): pass",
            "contest",
            id="unknown argument",
        ),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_refused_in_one_line(
    source: str, complaint: str, write_module: WriteModule
) -> None:
    name = write_module(source)
    with pytest.raises(PluginError, match=complaint) as refused:
        PluginManager(Config(plugins=(name,))).load()
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_plugin_is_refused_by_name() -> None:
    with pytest.raises(PluginError, match="-p no_such_plugin: no installed plugin") as refused:
        PluginManager(Config(plugins=("no_such_plugin",))).load()
    assert "\n" not in str(refused.value)


def test_a_module_without_hooks_of_psncs_own_name_is_left_alone(
    write_module: WriteModule, activate: Activate
) -> None:
    # Only what is marked with hookimpl is a hook, so that helpers may be called as they like.
    activate(write_module("def psnc_index_dome(context): raise ValueError"))
    assert run_pipeline(numbers_pipeline(4)) == EXPECTED


# --- what a plugin can bring ------------------------------------------------------------------


class Measure:
    def __init__(self, figures: Mapping[str, Any]) -> None:
        self.figures = figures

    @hookimpl
    def psnc_index_measure(self, context: IndexContext) -> Mapping[str, Any]:
        return self.figures


def test_figures_of_a_plugin_are_recorded_with_the_index(
    plugins: PluginManager, query: Callable[..., Any]
) -> None:
    plugins.register(Measure({"rows": 7, "note": "ü", "peak_memory_bytes": 123}))
    plugins.register(Measure({"rows": 8}))
    pipeline = numbers_pipeline(2)
    run_pipeline(pipeline)
    ((measurements, peak),) = query(
        pipeline.db_path,
        "SELECT DISTINCT measurements, peak_memory_bytes FROM index_results",
    )
    # The plugin that was registered last has the last word.
    assert (json.loads(measurements), peak) == ({"rows": 8, "note": "ü"}, 123)


def test_an_index_without_figures_of_plugins_has_none(query: Callable[..., Any]) -> None:
    pipeline = numbers_pipeline(1)
    run_pipeline(pipeline)
    assert _column(pipeline, "measurements", query) == [None]


@pytest.mark.parametrize(
    "figures",
    [
        pytest.param({"path": Path("x")}, id="no JSON"),
        pytest.param({"peak_memory_bytes": [1]}, id="no number"),
        pytest.param({"peak_memory_bytes": 2**70}, id="too large"),
        pytest.param(7, id="no mapping"),
    ],
)
def test_figures_that_cannot_be_recorded_lose_no_result(
    figures: Any, plugins: PluginManager
) -> None:
    plugins.register(Measure(figures), name="careless")
    session = Session(numbers_pipeline(4))
    summary = session.run()
    assert session.results() == EXPECTED
    assert session.pipeline.completed_indices == {0, 1, 2, 3}
    assert summary.plugin_errors == {"careless: psnc_index_measure": 4}


def test_a_plugin_that_knows_a_result_ends_the_index(plugins: PluginManager, journal: str) -> None:
    class Elsewhere:
        @hookimpl
        def psnc_index_lookup(self, run: Run, index: int) -> Sequence[str] | None:
            return ["elsewhere/2"] if index == 2 else None

    plugins.register(Elsewhere())
    pipeline = Journal(4, journal).write(Discard())
    session = Session(pipeline)
    summary = session.run()
    assert session.results() == [EXPECTED[0], EXPECTED[1], ["elsewhere/2"], EXPECTED[3]]
    assert pipeline[2] == ["elsewhere/2"]
    assert read_journal(journal) == [0, 1, 3]
    assert (summary.completed, summary.cached) == (3, 1)


# --- a store of somebody else's ---------------------------------------------------------------


class MemoryStore(CheckpointStore):
    """Keeps one run in a dictionary."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.records: dict[int, IndexRecord] = {}
        self.idle: set[str] = set()
        self.run: Run | None = None

    def attach(self, run: Run) -> None:
        self.run = run

    def select(self, run_id: int) -> None: ...

    def runs(self) -> list[RunRow]:
        return []

    def lookup(self, index: int) -> tuple[str, ...] | None:
        record = self.records.get(index)
        return record.output_paths if record and record.status == "completed" else None

    def index_started(self, worker: WorkerInfo, index: int) -> None: ...

    def worker_idle(self, worker: WorkerInfo) -> None: ...

    def record(self, record: IndexRecord) -> None:
        self.records[record.index] = record

    def flush(self) -> None: ...

    def reset(self) -> None:
        self.records.clear()

    def reset_index(self, index: int) -> None:
        self.records.pop(index, None)

    def close(self) -> None: ...

    def completed_outputs(self) -> dict[int, list[str]]:
        return {i: list(self.records[i].output_paths) for i in self.completed_indices()}

    def completed_indices(self) -> set[int]:
        return {i for i, record in self.records.items() if record.status == "completed"}

    def failed_indices(self) -> dict[int, str]:
        return {i: str(r.error) for i, r in sorted(self.records.items()) if r.status == "error"}

    def counts(self, total: int) -> Counts:
        completed = len(self.completed_indices())
        return Counts(completed, len(self.records) - completed, 1, 0, 0.0)

    def workers(self) -> list[dict[str, Any]]:
        return []

    def index_for_path(self, path: str) -> int | None:
        return None

    def output_paths(self, index: int) -> list[str]:
        return list(self.records[index].output_paths)

    def artifacts(self, index: int | None = None) -> dict[int, list[Mapping[str, Any]]]:
        return {}

    def logs(self, index: int | None = None) -> list[dict[str, Any]]:
        return []

    def index_rows(self) -> Iterator[IndexRow]:
        return iter(())

    def stage_rows(self) -> Iterator[tuple[int, int, str, int]]:
        return iter(())

    def stage_totals(self) -> list[StageTotal]:
        return []


class OffersMemoryStore:
    def __init__(self) -> None:
        self.opened: list[MemoryStore] = []

    @hookimpl
    def psnc_open_store(self, url: str, run: Run | None, create: bool) -> MemoryStore | None:
        if not url.startswith("memory://"):
            return None
        if not create:
            raise StoreError(f"{url} is in another process")
        self.opened.append(MemoryStore(url))
        return self.opened[-1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_store_that_answers_to_a_scheme_is_recorded_to(
    backend: str, plugins: PluginManager, tmp_path: Path
) -> None:
    offer = OffersMemoryStore()
    plugins.register(offer)
    stages = Numbers(4).filter(FailOn([2]))
    pipeline = Pipeline(stages.source, stages.filters, Discard(), store="memory://run-7")
    results = run_pipeline(pipeline, jobs(backend), backend)
    assert results == [EXPECTED[0], EXPECTED[1], [], EXPECTED[3]]
    (store,) = offer.opened
    assert store.url == "memory://run-7"
    assert store.completed_indices() == pipeline.completed_indices == {0, 1, 3}
    assert pipeline.failed_indices == {2: "RuntimeError: bad item 2"}
    assert pipeline.summary()["remaining"] == 0
    assert list(tmp_path.rglob("*.db")) == []
    pipeline.reset_index(0)
    assert pipeline.remaining_indices() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_store_that_workers_cannot_reach_is_written_by_the_driver(
    backend: str, plugins: PluginManager
) -> None:
    class OnlyHere(OffersMemoryStore):
        @hookimpl
        def psnc_open_store(self, url: str, run: Run | None, create: bool) -> MemoryStore | None:
            self.opened.append(MemoryStore(url))
            return self.opened[-1]

    offer = OnlyHere()
    plugins.register(offer)
    # Worker processes do not have this plugin: the path is a file that they do not find.
    pipeline = Numbers(4).filter(FailOn([2])).write(Discard())
    run_pipeline(pipeline, jobs(backend), backend)
    (store,) = offer.opened
    assert store.completed_indices() == {0, 1, 3}
    assert store.failed_indices() == {2: "RuntimeError: bad item 2"}
    record = store.records[0]
    assert [stage.name for stage in record.stages] == ["Numbers", "FailOn", "Discard"]
    assert record.worker is not None
    assert (record.worker.pid == os.getpid()) == (backend != "process_pool")


def test_an_unknown_scheme_is_refused(tmp_path: Path) -> None:
    pipeline = Pipeline(Numbers(2), sink=Discard(), store="nowhere://at-all")
    with pytest.raises(StoreError, match="nowhere://at-all") as refused:
        run_pipeline(pipeline)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_store_to_which_nothing_would_record_is_refused(tmp_path: Path) -> None:
    manager = PluginManager(Config(plugins=("no:checkpoint",), load_installed=False))
    manager.load()
    manager.register(OffersMemoryStore())
    with activated(manager):
        with pytest.raises(StoreError, match="no loaded plugin records to memory://"):
            run_pipeline(numbers_pipeline(3, store="memory://somewhere"))
        assert run_pipeline(numbers_pipeline(3, store="memory://x", track_metrics=False))
        # Without a URL, nothing was asked for.
        assert run_pipeline(numbers_pipeline(3))
    assert not list(tmp_path.rglob("*.db"))


class BadShop:
    @hookimpl
    def psnc_open_store(self, url: str) -> Any:
        if url.startswith("raises://"):
            raise RuntimeError(f"no way to {url}")
        return "no store" if url.startswith("text://") else None


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_plugin_that_fails_to_open_a_store_is_named(
    plugins: PluginManager, is_wrapped: bool
) -> None:
    class Around:
        @hookimpl(wrapper=True)
        def psnc_open_store(self) -> Iterator[Any]:
            return (yield)

    if is_wrapped:
        plugins.register(Around())
    plugins.register(BadShop(), name="shop")
    with pytest.raises(PluginError, match=r"'shop'.*psnc_open_store.*RuntimeError") as caught:
        run_pipeline(numbers_pipeline(1, store="raises://ada:secret@host"))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_store_is_refused(plugins: PluginManager) -> None:
    plugins.register(BadShop(), name="shop")
    with pytest.raises(PluginError, match=r"text://ada:\*\*\*@host' with 'str'"):
        run_pipeline(numbers_pipeline(1, store="text://ada:secret@host"))
