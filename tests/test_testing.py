"""What `psnc.testing` offers: checks that find broken stages, runs with chosen plugins, hooks."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import broken_stages as broken
import numpy as np
import pytest
import stages_for_tests as good
from broken_stages import Counting, Writing
from stages_for_tests import TESTS_FIRST, numbers_pipeline
from test_plugins import OffersMemoryStore

from psnc import (
    ConfigurationError,
    Filter,
    LogRecord,
    Pipeline,
    PluginError,
    Sink,
    Source,
    hookimpl,
    run_pipeline,
)
from psnc.manager import plugin_manager
from psnc.testing import HookRecorder, Runner, check_filter, check_sink, check_source
from psnc.testing.comparison import difference
from psnc.testing.file_comparison import same_figures

pytest_plugins = ["psnc.testing"]

ITEMS = [[1, 2, 3], [4, 5], [7]]


def complaint(check: Callable[..., None], *arguments: Any, **options: Any) -> str:
    """Return what a check says; it must be one line."""
    with pytest.raises(AssertionError) as raised:
        check(*arguments, **options)
    sentence = str(raised.value)
    assert "\n" not in sentence
    return sentence


# --- sources ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(good.Numbers(4, items=3), id="plain"),
        pytest.param(good.Pairs(5), id="groups"),
        pytest.param(good.Numbers(1000), id="only some are read"),
        pytest.param(Counting(1), id="one index"),
    ],
)
def test_a_good_source_passes(source: Source[Any]) -> None:
    check_source(source)


class Arrays(Source[Any]):
    def __init__(self, weights: np.ndarray[Any, Any], *names: str, scale: float = 1.0) -> None:
        self.weights = weights * scale
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Iterator[Any]:
        yield {"name": self.names[index], "weights": self.weights + index, "nan": float("nan")}


def test_a_source_of_arrays_with_every_kind_of_parameter_passes() -> None:
    check_source(Arrays(np.arange(3.0), "a", "b", scale=2.0))


BROKEN_SOURCES = {
    broken.GrowsLonger: "GrowsLonger: its length is first 4 and then 5",
    broken.GrowsAsItIsRead: "GrowsAsItIsRead: its length was 3 and is",
    broken.HasNothing: "HasNothing: it has no index to check",
    broken.ReturnsNone: "ReturnsNone: index 0 gives NoneType: a source yields its items",
    broken.CanBeReadOnce: "CanBeReadOnce: asked again, it gives other items (index 0: items: ",
    broken.RemembersTheHighest: "its items depend on which indices were read before",
    broken.SharesABuffer: "read in turns with another index, as threads do, it gives other items",
    broken.HoldsALock: "HoldsALock: it cannot go through pickle (TypeError: cannot pickle",
    broken.LocksWhenItIsRead: "LocksWhenItIsRead: it cannot go through cloudpickle (TypeError: ",
    broken.LosesItsDataInPickle: "a copy that went through pickle gives other items",
    broken.FollowsASet: "another process reads other items: sort what a directory or a set gives",
    broken.MakesAFunctionAsItIsRead: "it cannot go through pickle (AttributeError: "
    + ("Can't pickle" if sys.version_info < (3, 13) else "Can't get local object"),
    broken.TakesItsPlaceAlong: "a copy made after it was read gives other items",
    broken.ChangesItsHashInPickle: "its hash changes on a trip through pickle",
    broken.HidesAParameter: "params() leaves out 'count', which the constructor takes",
    broken.InventsAParameter: "params() lists 'speed', which the constructor does not take",
    broken.ClaimsAnotherDefault: "params() gives 'count' another default than the constructor",
    broken.ListsNoParams: "params() returns something else than psnc.Param values",
    broken.ListsAParameterTwice: "params() lists a parameter twice",
    broken.LeavesOutAnIndex: "LeavesOutAnIndex.partition_indices() leaves out index 0",
    broken.LeavesOutTheLastOfSome: "partition_indices() names index 1, which is not to be run",
    broken.ChangesItsMind: "partition_indices() changes its answer",
}


@pytest.mark.parametrize("source_class", BROKEN_SOURCES)
def test_a_broken_source_is_told_its_rule(source_class: type[Source[Any]]) -> None:
    assert BROKEN_SOURCES[source_class] in complaint(check_source, source_class())


def test_arguments_whose_form_is_an_accident_are_found() -> None:
    source = broken.TakesAnything(broken.ByIdentity())
    assert "it has two hashes" in complaint(check_source, source)
    source = broken.TakesAnything(broken.ByHash())
    assert "another process gives it another hash" in complaint(check_source, source)
    source = broken.TakesAnything(lambda: 1)
    assert "TakesAnything: its parameters have no canonical form" in complaint(check_source, source)
    check_source(broken.TakesAnything(broken.CannotBeCopied()))


def test_a_stage_that_changes_its_arguments_is_found() -> None:
    said = complaint(check_source, broken.ChangesItsArgument(np.zeros(3)))
    assert "reading it changes its hash: it changes an argument that it was given" in said
    said = complaint(check_filter, broken.FilterChangesItsArgument(np.zeros(3)), ITEMS)
    assert "filtering changes its hash: it changes an argument that it was given" in said

    def make(directory: Path) -> Sink[Any]:
        return broken.SinkChangesItsArgument(directory, np.zeros(3))

    said = complaint(check_sink, make, ITEMS)
    assert "writing changes its hash: it changes an argument that it was given" in said


def test_only_the_indices_that_were_asked_for_are_read(journal: str) -> None:
    check_source(good.Journal(100, journal), indices=[7, 50])
    assert set(good.read_journal(journal)) == {7, 50}


def test_what_is_no_stage_is_told_apart() -> None:
    assert complaint(check_source, Counting) == (
        "Counting is a class: construct it, and check that"
    )
    assert "a value of type list is no Filter" in complaint(check_filter, [], ITEMS)


def test_the_checks_work_in_a_script_without_pytest(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from psnc import Source\n"
        "from psnc.testing import check_source\n"
        "class Mine(Source):\n"
        "    def __init__(self, count=2): self.count = count\n"
        "    def __len__(self): return self.count\n"
        "    def __getitem__(self, index): return [index]\n"
        "check_source(Mine())\n"
        "assert 'pytest' not in sys.modules and 'numpy' not in sys.modules\n"
        "Mine.__getitem__ = lambda self, index: None\n"
        "check_source(Mine())\n"
    )
    finished = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert finished.stderr.splitlines()[-1] == (
        "AssertionError: Mine: index 0 gives NoneType: a source yields its items"
    )


# --- filters ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "filter",
    [
        pytest.param(good.Double(), id="plain"),
        pytest.param(good.Add(3), id="with a parameter"),
        pytest.param(good.Sum(), id="accumulates"),
        pytest.param(broken.Adding(), id="accumulates floats"),
    ],
)
def test_a_good_filter_passes(filter: Filter[Any, Any]) -> None:
    check_filter(filter, ITEMS, lazy=True)
    check_filter(filter, good.Numbers(3, items=2))


def test_sums_may_differ_by_rounding() -> None:
    check_filter(broken.Adding(), [[0.1, 0.2], [0.3], [1e16, -1e-3]])


BROKEN_FILTERS = {
    broken.FilterReturnsNone: "it returns NoneType: a filter yields its items",
    broken.NumbersItems: "given the same items again, it makes something else of them",
    broken.ComparesWithTheLast: "used for two indices in turns, as by two threads, it mixes them",
    broken.ForgetsInPickle: "a copy that went through pickle filters in another way",
    broken.DropsDoubles: "another process makes something else of the same items (items[0]",
    broken.SwallowsErrors: "it swallows an error of the stages before it",
    broken.FlushesUnderAnotherName: "flush() writes '0.npz', told to write '0': set artifact_suffi",
    broken.CannotMerge: "it has flush() and no merge()",
    broken.AddsUpEverywhere: "flush() writes what another index or attempt gathered too",
    broken.MergesOntoWhatIsThere: "merge() called again for the same file gives another",
    broken.KeepsTheLastShard: "what merge() gives depends on the order of the shards",
    broken.ConsumesTheShards: "merge() changes the shards, which it will be given again",
    broken.RemovesTheShards: "merge() changes the shards, which it will be given again",
    broken.AveragesAverages: "differ from one shard of all their items",
    broken.WritesNoMerge: "merge() does not write the file that it was told to",
}


@pytest.mark.parametrize("filter_class", BROKEN_FILTERS)
def test_a_broken_filter_is_told_its_rule(filter_class: type[Filter[Any, Any]]) -> None:
    said = complaint(check_filter, filter_class(), ITEMS)
    assert said.startswith(f"{filter_class.__name__}: ")
    assert BROKEN_FILTERS[filter_class] in said


def test_laziness_is_a_rule_for_those_who_ask_for_it() -> None:
    check_filter(broken.TakesAllFirst(), ITEMS)
    said = complaint(check_filter, broken.TakesAllFirst(), ITEMS, lazy=True)
    assert "it takes all 3 items of index 0 before it yields one" in said


def test_what_depends_on_indices_can_say_so() -> None:
    check_filter(broken.AveragesAverages(), ITEMS, additive=False)


def test_a_filter_without_items_to_check_with_is_a_mistake_of_the_test() -> None:
    with pytest.raises(ValueError, match="there is no index to check with"):
        check_filter(good.Double(), [])


# --- sinks ------------------------------------------------------------------------------------


def test_a_good_sink_passes(tmp_path: Path) -> None:
    check_sink(Writing, ITEMS)
    check_sink(lambda directory: good.WriteText(str(directory / "deep")), good.Numbers(3, items=4))
    assert list(tmp_path.iterdir()) == []


def test_a_sink_may_return_relative_paths() -> None:
    check_sink(ReturnsRelativePaths, ITEMS)


class ReturnsRelativePaths(Writing):
    def write(self, path: Path, items: Any) -> Any:
        return [os.path.relpath(each) for each in super().write(path, items)]


def test_a_sink_that_wants_groups_passes() -> None:
    check_sink(GroupedWriting, [[1], [2], [3], [4]])


class GroupedWriting(Writing):
    """Continues a file of two indices, and so needs both in order."""

    def partition_indices(self, indices: Any) -> Any:
        return good.grouped(indices, 2)

    def __call__(self, items: Any, index: int) -> Any:
        path = self.directory / f"{index // 2}.txt"
        earlier = path.read_text().splitlines()[:1] if index % 2 else []
        return self.write(path, iter([*earlier, *items]))


BROKEN_SINKS = {
    broken.ReturnsANumber: "index 0 returns int: a sink returns the paths that it wrote",
    broken.ReturnsWhatIsNotThere: "0.bin', which does not exist",
    broken.WritesElsewhere: "index 0 returns '0.txt', outside of the directory",
    broken.WritesOnlyOnce: "run again, index 0 raises FileExistsError: ",
    broken.LeavesADraftInItsWay: "run again after an error in the middle of it, index 0 raises",
    broken.NamesFilesByCount: "run again, index 0 returns",
    broken.NamesFilesByProcess: "another process returns other paths for the same index",
    broken.Appends: "running every index again leaves other files than running it once: 0.txt has",
    broken.OverwritesTheOthers: "what it writes depends on the order in which indices run: all.txt",
    broken.SinkSwallowsErrors: "it swallows an error of the stages before it",
    broken.LeavesDrafts: "is left over",
    broken.SkipsWhatExists: "after its process was ended in the middle of an index, running the "
    "index leaves other files: 0.txt has another content",
    broken.SharesAFile: "two threads that write different indices with it disturb each other",
    broken.WorksInOneThread: "disturb each other (OSError: the connection is another thread's)",
    broken.WorksInOneProcess: "it cannot write in other processes (OSError: the connection is",
    broken.KnowsOnlyItsOwn: "two processes that write different indices at once disturb each other",
    broken.GroupsWrongly: "partition_indices() names an index more than once",
}


@pytest.mark.parametrize("sink_class", BROKEN_SINKS)
def test_a_broken_sink_is_told_its_rule(sink_class: type[Any]) -> None:
    said = complaint(check_sink, sink_class, ITEMS)
    assert said.startswith(f"{sink_class.__name__}: ")
    assert BROKEN_SINKS[sink_class] in said


class Stamped(Writing):
    def write(self, path: Path, items: Any) -> Any:
        return super().write(path, iter([f"at {os.urandom(4).hex()}", *items]))


def test_files_that_say_the_same_need_not_be_equal() -> None:
    assert "0.txt has another content" in complaint(check_sink, Stamped, ITEMS)

    def same_but_for_the_stamp(one: Path, other: Path) -> bool:
        return one.read_text().splitlines()[1:] == other.read_text().splitlines()[1:]

    check_sink(Stamped, ITEMS, same_files=same_but_for_the_stamp)


# --- equality ---------------------------------------------------------------------------------


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x


class Table:
    """Answers == element by element, as tables do."""

    def __init__(self, *rows: int) -> None:
        self.rows = rows

    def __eq__(self, other: object) -> Any:
        return np.array(self.rows) == np.array(other.rows)  # type: ignore[attr-defined]

    def equals(self, other: Table) -> bool:
        return self.rows == other.rows


class Point:
    def __init__(self, x: Any) -> None:
        self.x = x
        self.itself = self


@pytest.mark.parametrize(
    ("one", "other", "where"),
    [
        ([1, {"a": np.arange(3)}], [1, {"a": np.array([0, 1, 5])}], "items[1]['a']: arrays of"),
        (np.zeros(2), np.zeros(2, dtype="f4"), "items: arrays of other type"),
        (Point([1]), Point([2]), "items.x[0]: 1 and then 2"),
        (1, True, "items: 1 and then True"),
        ([1], [1, 2], "items: [1] and then [1, 2]"),
        (np.array([1, "a"], object), np.array([1, "b"], object), "items.flat[1]: 'a' and then 'b'"),
        (float("nan"), 1.0, "items: nan and then 1.0"),
        (Slotted(1), Slotted(2), "items.x: 1 and then 2"),
        (LogRecord("", 1, "", "", "a"), LogRecord("", 1, "", "", "b"), "items.message: 'a'"),
        (Table(1, 2), Table(1, 3), "items: <"),
    ],
)
def test_differences_are_found_and_located(one: Any, other: Any, where: str) -> None:
    assert (difference(one, other, "items") or "").startswith(where)


def test_equal_values_have_no_difference() -> None:
    values = [
        lambda: [float("nan"), {"a": np.array([1.0, np.nan])}, {1, 2}, "text", b"bytes"],
        lambda: Point(Point(3)),
        lambda: np.array([{"a": 1}, None], dtype=object),
        lambda: SimpleNamespace(a=1),
        lambda: [Slotted(1), Table(1, 2), LogRecord("", 1, "", "", "a"), iter([1])],
    ]
    for make in values:
        assert difference(make(), make()) is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"mean": 0.1 + 0.2, "names": ["a"]}, {"mean": 0.3, "names": ["a"]}, True),
        ({"mean": 0.31}, {"mean": 0.3}, False),
        ({"count": 3}, {"count": 4}, False),
        ({"mean": float("nan")}, {"mean": float("nan"), "n": 1}, False),
        (np.array([0.1 + 0.2]), np.array([0.3]), True),
        (np.array([1.0]), np.array([2.0]), False),
        ({"a": np.array([0.1 + 0.2])}, {"a": np.array([0.3])}, True),
        (b"\x93one", b"\x93other", False),
    ],
)
def test_figures_are_compared_up_to_rounding(
    one: Any, other: Any, same: bool, tmp_path: Path
) -> None:
    for name, value in (("one", one), ("other", other)):
        with (tmp_path / name).open("wb") as file:
            if isinstance(value, bytes):
                file.write(value)
            elif isinstance(value, np.ndarray):
                np.save(file, value)
            elif isinstance(next(iter(value.values())), np.ndarray):
                np.savez(file, **value)
            else:
                file.write(json.dumps(value).encode())
    assert same_figures(tmp_path / "one", tmp_path / "other") is same


# --- the runner -------------------------------------------------------------------------------

MEASURING = """
    from psnc import hookimpl

    @hookimpl
    def psnc_index_measure(context):
        return {"twice": 2 * context.index}
"""


def test_a_run_gives_outputs_records_logs_and_summary(psnc_runner: Runner) -> None:
    stages = good.Numbers(3).filter(good.Log(logging.WARNING)).filter(good.FailOn([1]))
    result = psnc_runner.run(stages.write(good.Discard()))
    assert result.outputs == [["out/0-0.bin"], [], ["out/2-0.bin"]]
    assert result.failed == {1: "RuntimeError: bad item 1"}
    assert [record.index for record in result.records] == [0, 1, 2]
    assert [entry.message for entry in result.logs if entry.level == logging.WARNING] == [
        "item 0", "item 1", "item 2",
    ]  # fmt: skip
    assert (result.summary.completed, result.plugin_errors) == (2, {})


@pytest.mark.parametrize("kind", ["name", "module"])
def test_a_module_is_a_plugin_in_workers_too(psnc_runner: Runner, kind: str) -> None:
    name = psnc_runner.write_module("measuring", MEASURING)
    plugin = name if kind == "name" else __import__(name)
    psnc_runner.activate(plugin)
    result = psnc_runner.run(numbers_pipeline(4), n_jobs=2)
    assert [record.measurements["twice"] for record in result.records] == [0, 2, 4, 6]
    pids = {record.worker.pid for record in result.records if record.worker}
    assert os.getpid() not in pids


def test_an_object_is_a_plugin_in_this_process(psnc_runner: Runner) -> None:
    class Raising:
        @hookimpl
        def psnc_index_start(self, context: Any) -> None:
            raise ValueError("oh")

    psnc_runner.activate(Raising())
    result = psnc_runner.run(numbers_pipeline(2))
    assert list(result.plugin_errors.values()) == [2]
    psnc_runner.activate(Raising(), strict_plugins=True)
    with pytest.raises(PluginError, match="psnc_index_start"):
        psnc_runner.run(numbers_pipeline(2))
    psnc_runner.activate()
    assert psnc_runner.run(numbers_pipeline(2)).plugin_errors == {}


def test_built_in_plugins_can_be_kept_out(psnc_runner: Runner) -> None:
    psnc_runner.activate("no:memory")
    (record,) = psnc_runner.run(numbers_pipeline(1)).records
    assert "peak_memory_bytes" not in record.measurements


def test_options_of_plugins_can_be_given(psnc_runner: Runner) -> None:
    configured = []

    class Optional:
        @hookimpl
        def psnc_addoptions(self, parser: Any) -> None:
            parser.add_option("--loudness", type=int, default=1)

        @hookimpl
        def psnc_configure(self, config: Any) -> None:
            configured.append(config.option("loudness"))

    psnc_runner.activate(Optional())
    psnc_runner.activate(Optional(), options={"loudness": 11})
    assert configured == [1, 11]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"alert_chanel": "x"}, "declares an option 'alert_chanel': did you mean 'alert-channel'?"),
        ({"volume": 3}, "declares an option 'volume': there are alert-channel, alert-file, loud"),
        ({"loud": "11"}, "option 'loud' is '11': give a whole number"),
        ({"alert-channel": None}, "option 'alert-channel' is None: give text"),
        ({"alert_file": "a"}, "option 'alert_file' is 'a': give a list"),
    ],
)
def test_an_option_that_no_plugin_takes_so_is_refused(
    options: dict[str, Any], complaint: str, psnc_runner: Runner
) -> None:
    before = psnc_runner.plugins
    with pytest.raises(ConfigurationError) as refused:
        psnc_runner.activate(HasOptions(), options=options)
    assert complaint in str(refused.value)
    assert plugin_manager() is psnc_runner.plugins is before


def test_values_of_options_are_those_of_a_configuration_file(psnc_runner: Runner) -> None:
    options = {"alert-channel": "x", "--alert-file": ("a", Path("b")), "loud": 3}
    config = psnc_runner.activate(HasOptions(), options=options).config
    assert config.option("alert-channel") == "x"
    assert config.option("alert-file") == (Path("a"), Path("b"))
    assert config.option("loud") == 3


class HasOptions:
    @hookimpl
    def psnc_addoptions(self, parser: Any) -> None:
        parser.add_option("--alert-channel")
        parser.add_option("--alert-file", type=Path, multiple=True)
        parser.add_option("--loud", type=int)


def test_stores_that_a_plugin_opened_are_closed_in_the_end() -> None:
    closed = []

    class Offers(OffersMemoryStore):
        @hookimpl
        def psnc_open_store(self, url: str, run: Any, create: bool) -> Any:
            store = super().psnc_open_store(url, run, create)
            if store is not None:
                store.close = lambda: closed.append(store.url)  # type: ignore[method-assign]
            return store

    with Runner() as runner:
        runner.activate(Offers())
        pipeline = Pipeline(good.Numbers(2), sink=good.Discard(), store="memory://x")
        _ = pipeline[0]
        assert closed == []
    # By the run too: to close a store twice is to close it once.
    assert set(closed) == {"memory://x"}


def test_the_command_runs_in_a_process_of_its_own(psnc_runner: Runner) -> None:
    psnc_runner.write_module("measuring", MEASURING)
    psnc_runner.write_module(
        "some_pipelines",
        """
        from stages_for_tests import Discard, FailOn, Numbers

        pipeline = Numbers(4).filter(FailOn([3])).write(Discard())
        """,
    )
    result = psnc_runner.cli("run", "some_pipelines:pipeline", "-j", 2, plugins=["measuring"])
    assert result.exit_code == 1
    assert "3 completed, 1 failed, of 4" in result.stdout
    assert "Traceback" not in result.stderr
    listed = psnc_runner.cli("plugins", plugins=["measuring", "no:gpu"])
    assert "measuring" in listed.stdout
    assert "atm" not in listed.stdout


def test_a_module_must_have_a_free_name(psnc_runner: Runner) -> None:
    with pytest.raises(ValueError, match="there is a module 'json' already"):
        psnc_runner.write_module("json", "")
    with pytest.raises(ValueError, match=r"'my-module' is no name of a module"):
        psnc_runner.write_module("my-module", "")
    assert psnc_runner.write_module("mine", "value = 1") == "mine"
    assert psnc_runner.write_module("mine", "value = 2") == "mine"
    assert __import__("mine").value == 2


def test_a_modules_name_is_free_again_after_the_test(psnc_home: Path) -> None:
    # Several times, since one turn of the clock's second must not make it pass.
    for value in range(1, 6):
        with Runner() as runner:
            runner.write_module("mine", f"value = {value}")
            assert __import__("mine").value == value


# --- hooks ------------------------------------------------------------------------------------


def test_hooks_are_noted_with_their_arguments(psnc_hooks: HookRecorder) -> None:
    run_pipeline(numbers_pipeline(3))
    done = psnc_hooks.assert_called("psnc_index_done", times=3)
    assert [call.record.index for call in done] == [0, 1, 2]
    assert done[0].arguments.keys() == {"context", "record"}
    (start,) = psnc_hooks.calls("psnc_run_start")
    assert (list(start.indices), start.cached) == ([0, 1, 2], 0)
    psnc_hooks.assert_order(
        "psnc_run_start", "psnc_index_start", "psnc_index_done", "psnc_run_done"
    )
    psnc_hooks.assert_not_called("psnc_index_interrupted")


def test_hooks_are_noted_of_plugins_that_are_activated_later(
    psnc_runner: Runner, psnc_hooks: HookRecorder
) -> None:
    psnc_runner.activate("no:checkpoint")
    assert [call.hook for call in psnc_hooks.calls()][-1] == "psnc_configure"
    psnc_hooks.clear()
    psnc_runner.run(numbers_pipeline(1))
    psnc_hooks.assert_called("psnc_run_done", times=1)


def test_a_recorder_is_called_for_hooks_that_others_answer(psnc_hooks: HookRecorder) -> None:
    pipeline = numbers_pipeline(1, resume=True)
    run_pipeline(pipeline)
    assert pipeline[0] == ["out/0-0.bin"]
    lookups = psnc_hooks.calls("psnc_index_lookup")
    assert [call.index for call in lookups] == [0, 0]


def test_what_was_not_called_is_said(psnc_hooks: HookRecorder) -> None:
    _ = numbers_pipeline(1)[0]
    assert complaint(psnc_hooks.assert_called, "psnc_run_done").startswith(
        "psnc_run_done was not called; called were psnc_"
    )
    assert complaint(psnc_hooks.assert_called, "psnc_index_done", times=2) == (
        "psnc_index_done was called 1 times, not 2 times"
    )
    assert complaint(psnc_hooks.assert_not_called, "psnc_index_done") == (
        "psnc_index_done was called 1 times, not 0 times"
    )
    said = complaint(psnc_hooks.assert_order, "psnc_index_done", "psnc_index_start")
    assert said.startswith("psnc_index_start was not called in its place in psnc_index_done, ")
    with pytest.raises(ValueError, match="did you mean 'psnc_index_done'"):
        psnc_hooks.calls("psnc_index_donne")
    with pytest.raises(AttributeError, match="psnc_index_done has no argument 'indx'"):
        _ = psnc_hooks.calls("psnc_index_done")[0].indx


# --- isolation --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["beside", "suite/inside"])
def test_nothing_of_the_developers_settings_gets_in(place: str, tmp_path: Path) -> None:
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "conftest.py").write_text('pytest_plugins = ["psnc.testing"]\n')
    (suite / "psnc_plugins.py").write_text("raise RuntimeError('the developer has this')\n")
    (suite / "psnc.toml").write_text('plugins = ["a_plugin_of_the_developer"]\n')
    (suite / "test_it.py").write_text(
        "import os\n"
        "from pathlib import Path\n"
        "from psnc import run_pipeline\n"
        "from stages_for_tests import numbers_pipeline\n"
        "def test_it(psnc_runner, psnc_home, tmp_path):\n"
        "    assert Path.cwd() == tmp_path\n"
        "    pipeline = numbers_pipeline(2)\n"
        "    run_pipeline(pipeline)\n"
        "    assert pipeline.db_path.is_relative_to(psnc_home / '.cache' / 'psnc')\n"
        "    assert pipeline.completed_indices == {0, 1}\n"
        "    assert psnc_runner.cli('plugins').exit_code == 0\n"
    )
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / place}"]
    developer = {
        "PSNC_CACHE_DIR": str(tmp_path / "cache"),
        "PSNC_PLUGINS": "another_of_the_developer",
        "PSNC_STORE": "nowhere://",
        "XDG_CACHE_HOME": str(tmp_path / "xdg"),
        "PYTHONPATH": TESTS_FIRST,
    }
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-W", "error", suite],
        cwd=suite,
        env={**os.environ, **developer},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "xdg").exists()


def test_psnc_itself_does_not_import_its_testing_tools() -> None:
    code = "import sys, psnc, psnc.cli; assert 'psnc.testing' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tools_are_found_by_name() -> None:
    import psnc.testing

    assert isinstance(psnc.testing, ModuleType)
    for name in psnc.testing.__all__:
        assert getattr(psnc.testing, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'check_everything'"):
        _ = psnc.testing.check_everything  # type: ignore[attr-defined]
    assert issubclass(good.WriteText, Sink)
