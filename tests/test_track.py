"""Somebody's own loop, recorded item by item and resumed."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from drivers import Start, integrity, only_database, start
from stages_for_tests import Numbers, read_journal, wait_until

import psnc
from psnc import (
    Config,
    PipelineError,
    PluginError,
    SourceError,
    StageError,
    StoreError,
    hookimpl,
    run_pipeline,
    track,
)
from psnc.manager import PluginManager, activated

__all__ = ["start"]


class Lookups(Sequence[int]):
    """A sequence that notes which of its items were looked up."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.count:
            raise IndexError(index)
        self.seen.append(index)
        return index * 10


class Dataset:
    """As Torch's: positions, and no way of its own to iterate."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> str:
        return "abc"[index]


class Loader:
    """As Torch's DataLoader: a length, and items in turn only."""

    def __init__(self, items: Sequence[Any], length: int | None) -> None:
        self.items = items
        self.length = length
        self.fetched: list[Any] = []
        self.closed = False

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("no length")
        return self.length

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            self.fetched.append(item)
            yield item
        self.closed = True


def loop(iterable: Any, stop: Any = None, **options: Any) -> list[Any]:
    """Loop as a user does, and leave the loop in the item `stop`."""
    done = []
    for item in track(iterable, "loop", **options):
        if stop is not None and item == stop:
            break
        done.append(item)
    return done


def resumed(iterable: Any, stop: Any = None, **options: Any) -> list[Any]:
    return loop(iterable, stop, resume=True, **options)


def numbers(count: int) -> Iterator[int]:
    yield from range(count)


# --- recording --------------------------------------------------------------------------------


def test_every_item_comes_and_is_on_record() -> None:
    tracked = track(["a", None, "c"], "letters")
    assert list(tracked) == ["a", None, "c"]
    assert tracked.pipeline.completed_indices == {0, 1, 2}
    summary = tracked.pipeline.summary()
    assert (summary["total"], summary["completed"], summary["remaining"]) == (3, 3, 0)
    assert summary["workers"] == 1
    assert tracked.pipeline.failed_indices == {}


def test_time_memory_logs_and_worker_are_those_of_the_body(query: Any) -> None:
    tracked = track([1, 2], "logged")
    for item in tracked:
        logging.getLogger("mine").warning("at %d", item)
        threading.Event().wait(0.01)
    path = tracked.pipeline.db_path
    assert query(path, "SELECT idx, message FROM logs ORDER BY id") == [(0, "at 1"), (1, "at 2")]
    rows = query(path, "SELECT wall_time_ns >= 10000000, peak_memory_bytes > 0 FROM index_results")
    assert rows == [(1, 1), (1, 1)]
    stages = "SELECT stage_name, wall_time_ns >= 10000000 FROM stage_metrics WHERE idx = 0"
    assert query(path, stages) == [("LoopItems", 0), ("LoopBody", 1)]
    (worker,) = tracked.pipeline.active_workers
    assert (worker["pid"], worker["completed_count"]) == (os.getpid(), 2)
    assert worker["current_index"] is None


def test_an_item_is_done_when_the_next_is_asked_for() -> None:
    tracked = track(range(3), "steps")
    completed = []
    for _ in tracked:
        completed.append(tracked.pipeline.completed_indices)
        (worker,) = tracked.pipeline.active_workers
        assert worker["current_index"] == len(completed) - 1
    assert completed == [set(), {0}, {0, 1}]


def test_a_fresh_loop_runs_every_item_again() -> None:
    assert loop([1, 2]) == loop([1, 2]) == [1, 2]


def test_items_are_not_fetched_before_their_turn() -> None:
    loader = Loader("abc", 3)
    fetched = []
    for _ in track(loader, "lazy"):
        fetched.append("".join(loader.fetched))
    assert fetched == ["a", "ab", "abc"]
    assert loader.closed


@pytest.mark.parametrize("length", [3, 2, 5, None])
def test_an_iterable_is_followed_to_its_true_end(length: int | None) -> None:
    tracked = track(Loader([None, "b", "c"], length), "end")
    assert list(tracked) == [None, "b", "c"]
    assert tracked.pipeline.summary()["total"] == 3
    assert tracked.pipeline.completed_indices == {0, 1, 2}


def test_a_dataset_is_looped_over_by_position() -> None:
    assert loop(Dataset()) == ["a", "b", "c"]
    assert resumed(Dataset(), "b") == ["a"]
    assert resumed(Dataset()) == ["b", "c"]


@pytest.mark.parametrize("empty", [[], iter([]), {}])
def test_a_loop_over_nothing_is_over(empty: Any) -> None:
    assert resumed(empty) == []
    assert resumed(empty) == []


def test_a_list_that_grows_while_looping_is_followed() -> None:
    todo = [1]
    tracked = track(todo, "growing")
    for item in tracked:
        if item < 4:
            todo.append(item + 1)
    assert todo == [1, 2, 3, 4]
    assert tracked.pipeline.summary()["total"] == 4


def test_a_generator_s_length_grows_with_what_is_known(query: Any) -> None:
    tracked = track(numbers(10), "unknown")
    for item in tracked:
        assert tracked.pipeline.summary()["total"] == item
        if item == 4:
            break
    assert tracked.pipeline.summary()["total"] == 4
    recorded = "SELECT total_indices FROM pipeline_runs"
    assert query(tracked.pipeline.db_path, recorded) == [(4,)]


def test_total_says_how_many_a_generator_has_until_it_is_known() -> None:
    tracked = track(numbers(3), "guess", total=5)
    totals = [tracked.pipeline.summary()["total"] for _ in tracked]
    assert totals == [5, 5, 5]
    assert tracked.pipeline.summary()["total"] == 3


# --- resuming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, iter, numbers])
def test_a_resumed_loop_goes_on_where_it_was_left(kind: Any) -> None:
    def items() -> Any:
        return numbers(5) if kind is numbers else kind(range(5))

    assert resumed(items(), stop=2) == [0, 1]
    assert resumed(items(), stop=2) == []
    assert resumed(items()) == [2, 3, 4]
    assert resumed(items()) == []


def test_completed_items_of_a_sequence_are_not_looked_up() -> None:
    resumed(Lookups(5), stop=30)
    lookups = Lookups(5)
    assert resumed(lookups) == [30, 40]
    assert lookups.seen == [3, 4]


def test_completed_items_of_an_iterator_are_taken_from_it() -> None:
    resumed(iter("abcd"), stop="c")
    iterator = iter("abcd")
    assert resumed(iterator, stop="d") == ["c"]
    assert list(iterator) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_item_whose_body_raises_runs_again(error: type[BaseException]) -> None:
    def work() -> None:
        for item in tracked:
            if item == 2:
                raise error

    tracked = track(range(4), "raising", resume=True)
    with pytest.raises(error):
        work()
    assert tracked.pipeline.completed_indices == {0, 1}
    assert tracked.pipeline.failed_indices == {}
    (worker,) = tracked.pipeline.active_workers
    assert worker["current_index"] is None
    assert list(track(range(4), "raising", resume=True)) == [2, 3]


def test_an_item_that_cannot_be_fetched_is_a_failure_and_is_tried_again() -> None:
    class Broken(Lookups):
        def __getitem__(self, index: Any) -> Any:
            if index == 1 and not Path("mended").exists():
                raise OSError("unreadable")
            return super().__getitem__(index)

    tracked = track(Broken(3), "broken", resume=True)
    with pytest.raises(OSError, match="unreadable"):
        list(tracked)
    assert tracked.pipeline.completed_indices == {0}
    assert tracked.pipeline.failed_indices == {1: "OSError: unreadable"}
    Path("mended").touch()
    again = track(Broken(3), "broken", resume=True)
    assert list(again) == [10, 20]
    assert again.pipeline.failed_indices == {}


def test_more_items_at_the_end_are_done_and_the_others_left_alone() -> None:
    assert resumed(["a", "b"]) == ["a", "b"]
    assert resumed(["a", "b", "c"]) == ["c"]


def test_fewer_items_are_refused() -> None:
    assert resumed("abc", stop="b") == ["a"]
    with pytest.raises(SourceError, match=r"'loop' was recorded with 3 items and now has 2"):
        resumed("ab")
    assert resumed("abc") == ["b", "c"]


def test_fewer_items_than_before_are_welcome_once_the_record_is_forgotten() -> None:
    tracked = track("abc", "loop", resume=True)
    list(tracked)
    tracked.pipeline.reset()
    assert resumed("ab") == ["a", "b"]


def test_an_iterator_that_ends_before_what_is_recorded_is_refused() -> None:
    assert resumed(numbers(5)) == [0, 1, 2, 3, 4]
    with pytest.raises(SourceError, match="recorded with 5 items and now has 3"):
        resumed(numbers(3))


def test_a_loop_does_not_go_on_with_an_iterator_that_has_given_items_away() -> None:
    loop = track(iter("abcdef"), "letters", resume=True)
    for letter in loop:
        if letter == "c":
            break
    with pytest.raises(PipelineError, match="begin the iterator anew"):
        list(loop)
    assert list(track(iter("abcdef"), "letters", resume=True)) == list("cdef")


def test_a_question_before_the_loop_changes_nothing() -> None:
    assert resumed(numbers(3), stop=2) == [0, 1]
    tracked = track(numbers(3), "loop", resume=True)
    assert tracked.pipeline.completed_indices == {0, 1}
    assert list(tracked) == [2]


def test_iterating_again_begins_anew_or_goes_on() -> None:
    fresh = track([1, 2], "fresh")
    assert list(fresh) == list(fresh) == [1, 2]
    first = fresh.pipeline.db_path
    assert list(fresh) == [1, 2]
    assert fresh.pipeline.db_path != first
    going_on = track([1, 2], "going on", resume=True)
    assert (list(going_on), list(going_on)) == ([1, 2], [])


# --- the name ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_a_loop_needs_a_name(name: Any) -> None:
    with pytest.raises(PipelineError, match="give the loop a name"):
        track([1], name)


@pytest.mark.parametrize("total", [-1, "many"])
def test_a_total_must_be_a_number(total: Any) -> None:
    with pytest.raises(PipelineError, match="give a number of items"):
        track([1], "loop", total=total)


def test_a_name_belongs_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resumed([1, 2]) == [1, 2]
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert resumed([1, 2]) == [1, 2]
    monkeypatch.chdir(tmp_path)
    assert resumed([1, 2]) == []


def test_with_a_place_of_its_own_a_loop_is_the_same_in_every_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not even a directory of that name makes a path of it.
    (tmp_path / "loop").mkdir()
    assert resumed([1, 2], db_dir=tmp_path / "db") == [1, 2]
    monkeypatch.chdir(tmp_path / "loop")
    assert resumed([1, 2], db_dir=tmp_path / "db") == []
    only_database(tmp_path / "db")


def test_a_database_can_be_named(tmp_path: Path) -> None:
    assert resumed([1, 2], stop=2, store=str(tmp_path / "mine.db")) == [1]
    assert resumed([1, 2], store=str(tmp_path / "mine.db")) == [2]
    assert only_database(tmp_path).name == "mine.db"


def test_a_set_cannot_be_resumed() -> None:
    with pytest.raises(PipelineError, match=r"a set has another order .* sorted"):
        track({"a", "b"}, "loop", resume=True)
    assert sorted(loop({"a", "b"})) == ["a", "b"]


# --- several loops ----------------------------------------------------------------------------


def test_loops_can_be_nested() -> None:
    done = []
    outer = track("ab", "outer", resume=True)
    for letter in outer:
        inner = track(range(2), f"inner {letter}", resume=True)
        done += [(letter, number) for number in inner]
        assert inner.pipeline.completed_indices == {0, 1}
    assert done == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert outer.pipeline.completed_indices == {0, 1}


def test_log_entries_go_to_the_innermost_loop(query: Any) -> None:
    logger = logging.getLogger("nested")
    outer, inner = track("a", "outer"), track("b", "inner")
    for letter in outer:
        logger.warning("before")
        for other in inner:
            logger.warning("%s in %s", other, letter)
        logger.warning("after")
    logs = "SELECT message FROM logs ORDER BY id"
    assert query(outer.pipeline.db_path, logs) == [("before",), ("after",)]
    assert query(inner.pipeline.db_path, logs) == [("b in a",)]


def test_two_loops_of_one_name_at_once_are_refused() -> None:
    with pytest.raises(PipelineError, match="'same' is at work in this process already"):
        [list(track([1], "same", resume=True)) for _ in track([1], "same", resume=True)]
    # The one that was left is not at work any more.
    assert list(track([1], "same", resume=True)) == [1]


def test_fresh_loops_of_one_name_do_not_meet() -> None:
    pairs = [(a, b) for a in track([1, 2], "same") for b in track([3, 4], "same")]
    assert pairs == [(1, 3), (1, 4), (2, 3), (2, 4)]


def test_a_pipeline_runs_in_the_body_of_a_loop() -> None:
    outer = track(range(2), "outer")
    for number in outer:
        inner = Numbers(3).write(psnc.sink(discard)())
        assert inner[number] == []
        assert inner.completed_indices == {number}
    assert outer.pipeline.completed_indices == {0, 1}


def discard(items: Iterator[Any], index: int) -> None:
    list(items)


def test_each_thread_may_have_a_loop_of_its_own() -> None:
    def run(name: str) -> None:
        results[name] = list(track(range(50), name, resume=True))

    results: dict[str, list[int]] = {}
    threads = [threading.Thread(target=run, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: list(range(50)) for name in "abc"}
    assert list(track(range(50), "a", resume=True)) == []


def test_many_loops_leave_no_open_files() -> None:
    process = psutil.Process()
    loop([1])
    before = process.num_fds()
    for number in range(20):
        list(track([1], f"loop {number}", db_dir="db"))
    assert process.num_fds() <= before


# --- plugins and commands ---------------------------------------------------------------------


class Witness:
    """Notes every event of a run."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    @hookimpl
    def psnc_run_start(self, run: Any, indices: Sequence[int], cached: int) -> None:
        self.events.append(("run", list(indices), cached))

    @hookimpl
    def psnc_run_done(self, run: Any, summary: Any) -> None:
        assert summary.db_path == str(run.pipeline.db_path)
        counts = (summary.requested, summary.completed, summary.cached, len(summary.failed))
        self.events.append(("over", counts, summary.interrupted))

    @hookimpl
    def psnc_worker_start(self, run: Any, worker: Any) -> None:
        self.events.append("worker")

    @hookimpl
    def psnc_worker_done(self, run: Any, worker: Any) -> None:
        self.events.append("worker over")

    @hookimpl
    def psnc_index_start(self, context: Any) -> None:
        self.events.append(context.index)

    @hookimpl
    def psnc_stage_start(self, context: Any, stage: Any) -> None:
        self.events.append(type(stage).__name__)

    @hookimpl
    def psnc_stage_done(self, context: Any, stage: Any, record: Any) -> None:
        self.events.append(f"{type(stage).__name__} over")

    @hookimpl
    def psnc_index_interrupted(self, context: Any) -> None:
        self.events.append(("interrupted", context.index))

    @hookimpl
    def psnc_index_reported(self, run: Any, record: Any) -> None:
        self.events.append((record.index, record.status))


@pytest.fixture
def witness(plugins: PluginManager) -> Witness:
    witness = Witness()
    plugins.register(witness, "witness")
    return witness


STAGES = ["LoopItems", "LoopBody", "LoopItems over", "LoopBody over"]


def test_plugins_see_a_loop_as_any_run(witness: Witness) -> None:
    resumed("ab")
    first, witness.events = witness.events, []
    resumed("abc")
    assert first == [
        ("run", [0, 1], 0),
        "worker",
        *(0, *STAGES, (0, "completed")),
        *(1, *STAGES, (1, "completed")),
        "worker over",
        ("over", (2, 2, 0, 0), False),
    ]
    assert witness.events == [
        ("run", [2], 2),
        "worker",
        *(2, *STAGES, (2, "completed")),
        "worker over",
        ("over", (3, 1, 2, 0), False),
    ]


def test_plugins_see_that_a_loop_was_left(witness: Witness) -> None:
    loop("ab", stop="b")
    end = [1, "LoopItems", "LoopBody", ("interrupted", 1)]
    assert witness.events[-6:] == [*end, "worker over", ("over", (2, 1, 0, 0), True)]


def test_a_plugin_s_earlier_result_leaves_an_item_out(plugins: PluginManager) -> None:
    class Knows:
        @hookimpl
        def psnc_index_lookup(self, run: Any, index: int) -> list[str] | None:
            return ["elsewhere"] if index == 1 else None

    plugins.register(Knows(), "knows")
    assert loop("abc") == ["a", "c"]


def test_a_loop_runs_without_a_store() -> None:
    manager = PluginManager(Config(plugins=("no:checkpoint",)))
    manager.load()
    with activated(manager):
        assert resumed("ab") == resumed("ab") == ["a", "b"]


def test_strict_plugins_fail_a_loop_at_its_end() -> None:
    class Faulty:
        @hookimpl
        def psnc_index_done(self) -> None:
            raise ValueError("faulty")

    manager = PluginManager(Config(strict_plugins=True))
    manager.load()
    manager.register(Faulty(), "faulty")
    tracked = track("ab", "loop")
    with activated(manager):
        with pytest.raises(PluginError, match="faulty: psnc_index_done"):
            list(tracked)
        assert tracked.pipeline.completed_indices == {0, 1}


def test_progress_is_shown_where_it_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    loop(range(3), progress=True)
    assert "psnc: 3/3 indices, 0 failed" in capfd.readouterr().err
    loop(numbers(3), progress=True, total=3)
    assert "psnc: 3/3 indices, 0 failed" in capfd.readouterr().err
    loop(range(3))
    assert capfd.readouterr().err == ""


def test_a_place_that_cannot_be_written_ends_the_loop_at_once() -> None:
    Path("file").touch()
    with pytest.raises(StoreError):
        loop([1], db_dir="file/db")


def test_a_loop_s_pipeline_answers_but_does_not_run() -> None:
    tracked = track("ab", "loop")
    list(tracked)
    tracked.pipeline.reset_index(1)
    with pytest.raises(StageError, match="item 1 of the loop 'loop' is in a program's own loop"):
        run_pipeline(tracked.pipeline, on_error="raise")
    assert tracked.pipeline.completed_indices == {0}


# --- other processes --------------------------------------------------------------------------


class EndOfRuns:
    """Notes in a file which process says that a run is over."""

    @hookimpl
    def psnc_run_done(self) -> None:
        with open("ends", "a") as file:
            file.write(f"{os.getpid()}\n")


def test_a_child_that_is_forked_in_the_body_leaves_the_loop_to_its_parent(
    plugins: PluginManager,
) -> None:
    plugins.register(EndOfRuns(), "ends")
    tracked = track(range(2), "forking", resume=True)
    items = iter(tracked)
    for item in items:
        child = os.fork()
        if child == 0:
            # As the end of a child's program does.
            items.close()  # type: ignore[attr-defined]
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        (worker,) = tracked.pipeline.active_workers
        assert worker["current_index"] == item
    assert tracked.pipeline.completed_indices == {0, 1}
    assert read_journal("ends") == [os.getpid()]


def test_a_child_cannot_go_on_with_its_parent_s_loop() -> None:
    def body_of_child() -> int:
        for item in tracked:
            if item == 1:
                return 1
            if os.fork() == 0:
                continue
            os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
        return 2

    tracked = track(range(3), "forking", resume=True)
    child = os.fork()
    if child == 0:
        try:
            os._exit(body_of_child())
        except PipelineError as error:
            os._exit(7 if "forked from" in str(error) else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert tracked.pipeline.completed_indices == set()


SCRIPT = """
import sys
import time
from pathlib import Path
import psnc
from stages_for_tests import wait_until

def process(item):
    with open("journal", "a") as journal:
        journal.write(f"{item}\\n")

count, pause = int(sys.argv[1]), sys.argv[2] == "pause"
for item in psnc.track(range(count), "killed", resume=True, db_dir="db"):
    process(item)
    if pause and item == 300:
        Path("reached").touch()
        wait_until(Path("go").exists)
print("complete")
"""


def recorded(database: Path, query: Any) -> set[int]:
    return {index for (index,) in query(database, "SELECT idx FROM index_results")}


def test_a_killed_loop_resumes_with_what_was_not_recorded(
    start: Start, tmp_path: Path, query: Any
) -> None:
    driver = start(SCRIPT, 400, "run on")
    journal = tmp_path / "journal"
    wait_until(lambda: len(read_journal(journal)) > 20)
    driver.kill()
    database = only_database(tmp_path / "db")
    assert integrity(database) == "ok"
    on_record = recorded(database, query)
    processed = read_journal(journal)
    assert on_record <= set(processed)
    journal.unlink()

    assert start(SCRIPT, 400, "run on").finish() == (0, "complete\n", "")
    assert read_journal(journal) == [item for item in range(400) if item not in on_record]
    assert recorded(database, query) == set(range(400))


def test_what_was_done_a_while_before_a_kill_is_on_record(
    start: Start, tmp_path: Path, query: Any
) -> None:
    driver = start(SCRIPT, 400, "pause")
    wait_until((tmp_path / "reached").exists)
    database = only_database(tmp_path / "db")
    # Nothing but time passes: the items before the present one are written by themselves.
    wait_until(lambda: recorded(database, query) == set(range(300)))
    driver.kill()
    (tmp_path / "go").touch()
    assert start(SCRIPT, 400, "pause").finish() == (0, "complete\n", "")
    assert sorted(read_journal(tmp_path / "journal")) == sorted([*range(400), 300])


def test_ctrl_c_leaves_a_record_that_resumes(start: Start, tmp_path: Path, query: Any) -> None:
    driver = start(SCRIPT, 400, "pause")
    wait_until((tmp_path / "reached").exists)
    driver.interrupt()
    status, out, errors = driver.finish()
    assert (status, out) == (-signal.SIGINT, "")
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "ignored" not in errors
    database = only_database(tmp_path / "db")
    assert recorded(database, query) == set(range(300))
    assert query(database, "SELECT * FROM workers WHERE current_index IS NOT NULL") == []
    (tmp_path / "go").touch()
    assert start(SCRIPT, 400, "pause").finish() == (0, "complete\n", "")
    assert sorted(read_journal(tmp_path / "journal")) == sorted([*range(400), 300])


def test_a_loop_that_is_left_unfinished_makes_no_noise_at_exit(
    tmp_path: Path, run_python: Any, query: Any
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import psnc\n"
        "items = iter(psnc.track(range(5), 'left', resume=True, db_dir='db'))\n"
        "print(next(items), next(items))\n"
    )
    finished = run_python(script)
    assert (finished.stdout, finished.stderr) == ("0 1\n", "")
    assert recorded(only_database(tmp_path / "db"), query) == {0}
    assert run_python(script).stdout == "1 2\n"


# In a module of its own: what a thread's frame refers to, the script's names, would not be cleared.
HOLDER = """
import threading

at_work, go, taken = threading.Event(), threading.Event(), threading.Event()

def hold_for_ever(gate):
    at_work.set()
    go.wait()
    with gate:
        taken.set()
        while True:
            pass
"""

# What is registered first is called last, after whatever psnc has to do at the end of the process.
LEFT = """
import atexit
import threading
import holder

@atexit.register
def after_psnc():
    print(sorted(each.name for each in threading.enumerate()))
    holder.go.set()
    holder.taken.wait()

import psnc
tracked = psnc.track(range(5), "left", resume=True, db_dir="db")
items = iter(tracked)
print(next(items), next(items))
store = tracked.pipeline.__dict__["_run"].store
threading.Thread(
    target=holder.hold_for_ever, args=(store.gate,), name="holder", daemon=True
).start()
holder.at_work.wait()

class LooksAtTheEnd:
    def __init__(self):
        self.store = store

    def __del__(self):
        for call in (self.store.flush, self.store.completed_indices, self.store.gate.acquire):
            try:
                call()
                print("no error", flush=True)
            except Exception as error:
                print(str(error).replace(self.store.place, "the store"), flush=True)

looks = LooksAtTheEnd()
"""


def test_nobody_waits_at_the_end_of_the_process_for_a_thread_that_stopped_with_the_store(
    start: Start, tmp_path: Path, query: Any
) -> None:
    (tmp_path / "holder.py").write_text(HOLDER)
    status, out, errors = start(LEFT).finish()
    closed = "the store was closed: open the store again"
    ending = "the process is ending, so that the store is out of reach"
    assert (status, errors) == (0, "")
    # The thread that writes was waited for; the program's own stops with the store in its hands.
    said = out.splitlines()
    assert said[:2] == ["0 1", "['MainThread', 'holder']"]
    # Python does not promise that what is there at the end is destroyed at all.
    assert said[2:] in ([], [closed, ending, ending])
    database = only_database(tmp_path / "db")
    assert recorded(database, query) == {0}
    assert query(database, "SELECT * FROM workers WHERE current_index IS NOT NULL") == []


def test_a_loop_that_is_left_unfinished_is_over_before_plugins_take_leave(
    tmp_path: Path, run_python: Any
) -> None:
    (tmp_path / "own_plugin.py").write_text(
        "from psnc import hookimpl\n"
        "@hookimpl\n"
        "def psnc_index_interrupted(context): print('interrupted', context.index)\n"
        "@hookimpl\n"
        "def psnc_worker_done(run, worker): print('worker over', run.store is not None)\n"
        "@hookimpl\n"
        "def psnc_run_done(run, summary): print('run over', summary.completed)\n"
        "@hookimpl\n"
        "def psnc_unconfigure(config): print('unconfigure')\n"
    )
    script = tmp_path / "script.py"
    script.write_text(
        "import psnc\n"
        "psnc.activate(psnc.Config(plugins=('own_plugin',)))\n"
        "items = iter(psnc.track(range(5), 'left', db_dir='db'))\n"
        "print(next(items), next(items))\n"
    )
    told = run_python(script).stdout.splitlines()
    assert told == ["0 1", "interrupted 1", "worker over True", "run over 1", "unconfigure"]


def test_psnc_status_tells_how_far_a_loop_is(tmp_path: Path, run_python: Any) -> None:
    tracked = track(numbers(10), "status", db_dir=tmp_path)
    for item in tracked:
        if item == 7:
            break
    told = run_python("-m", "psnc", "status", "--json", tracked.pipeline.db_path).stdout
    (status,) = json.loads(told)
    assert status["stages"] == ["LoopItems", "LoopBody"]
    assert (status["total"], status["completed"], status["remaining"]) == (7, 7, 0)
    assert status["working"] == []
