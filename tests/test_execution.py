"""One index through the chain: its time, its outcome, and what stages may and may not do."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from drivers import BACKENDS, jobs
from stages_for_tests import Add, Discard, Double, FailOn, Numbers, Sum, WriteText

from psnc import Filter, Pipeline, Sink, Source, StageError, run_pipeline

NAP_S = 0.02


class SlowNumbers(Numbers):
    def __getitem__(self, index: int) -> Iterator[int]:
        for item in super().__getitem__(index):
            time.sleep(NAP_S)
            yield item


class EagerNumbers(Numbers):
    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]
        time.sleep(NAP_S)
        return list(super().__getitem__(index))


class SlowAdd(Add):
    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in super().__call__(items):
            time.sleep(NAP_S)
            yield item


class EagerAdd(Add):
    """Takes in all items before it gives any: no generator."""

    def __call__(self, items: Iterator[int]) -> list[int]:  # type: ignore[override]
        added = [item + self.amount for item in items]
        time.sleep(NAP_S)
        return added


class SlowSum(Sum):
    """Takes its time when it writes its shard."""

    def flush(self, path: Path) -> None:
        time.sleep(NAP_S)
        super().flush(path)


class SlowDiscard(Discard):
    def __call__(self, items: Iterator[Any], index: int) -> list[str]:
        for _ in items:
            time.sleep(NAP_S)
        return super().__call__(iter(()), index)


class SlowWithoutItems(Discard):
    """Works before it asks for its first item."""

    def __call__(self, items: Iterator[Any], index: int) -> list[str]:
        time.sleep(NAP_S)
        return super().__call__(items, index)


class LazySink(Sink[Any]):
    """A generator: it works as its paths are asked for."""

    def __call__(self, items: Iterator[Any], index: int) -> Iterator[str]:
        for item in items:
            time.sleep(NAP_S)
            yield f"{index}-{item}"


class Returns(Sink[Any]):
    """Returns what it is told to."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, items: Iterator[Any], index: int) -> Any:
        list(items)
        return {
            "text": "one.txt",
            "path": Path("out") / "one.txt",
            "none": None,
            "tuple": ("a", Path("b")),
            "generator": (name for name in "ab"),
            "set": {"a"},
            "empty": [],
            "number": 7,
            "numbers": [7],
            "bytes": b"a",
            "list of bytes": [b"a"],
        }[self.what]


class Nothing(Filter[int, int]):
    """Forgets to return."""

    def __call__(self, items: Iterator[int]) -> Iterable[int]:
        list(items)
        return None  # type: ignore[return-value]


class NotIterable(Filter[int, int]):
    def __call__(self, items: Iterator[int]) -> Iterable[int]:
        return 5  # type: ignore[return-value]


class EmptyHanded(Numbers):
    """A source that forgets to return."""

    def __getitem__(self, index: int) -> Iterator[int]:
        return None  # type: ignore[return-value]


class Drop(Filter[int, int]):
    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        return (item for item in items if False)


class Interrupt(Filter[int, int]):
    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item == self.at:
                raise KeyboardInterrupt
            yield item


class PanicError(BaseException):
    """Derives as Rust's panics do, and cannot be pickled."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class Panic(Filter[int, int]):
    def __init__(self, at: int, kind: type[BaseException]) -> None:
        self.at = at
        self.kind = kind

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item == self.at:
                raise self.kind("so be it")
            yield item


class BreaksInFlush(Sum):
    """Fails half way through writing its shard."""

    def flush(self, path: Path) -> None:
        path.write_text("half a sh")
        raise OSError("quota exceeded")


class KeepsNothing(Sum):
    """Has nothing to write for odd indices."""

    def flush(self, path: Path) -> None:
        if self.total % 2 == 0:
            super().flush(path)


class SavesArrays(Sum):
    """Leaves it to NumPy to end the name of its shard."""

    artifact_suffix = ""

    def flush(self, path: Path) -> None:
        np.savez(path, total=self.total)


class Overlap(Sum):
    """Gives threads every chance to mix up one another's items."""

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in super().__call__(items):
            time.sleep(0.001)
            yield item


def _shares(pipeline: Pipeline[Any], query: Callable[..., Any]) -> list[float]:
    """Return each stage's part of the time of all stages, in their order."""
    rows = query(
        pipeline.db_path,
        "SELECT sum(wall_time_ns) FROM stage_metrics GROUP BY stage_order ORDER BY stage_order",
    )
    times = [row[0] for row in rows]
    return [each / sum(times) for each in times]


# --- time -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "slow"),
    [
        ((SlowNumbers(1, 3), Add(), Double(), Discard()), 0),
        ((EagerNumbers(1, 3), Add(), Double(), Discard()), 0),
        ((Numbers(1, 3), SlowAdd(), Double(), Discard()), 1),
        ((Numbers(1, 3), Add(), EagerAdd(), Discard()), 2),
        ((Numbers(1, 3), SlowSum(), Double(), Discard()), 1),
        ((Numbers(1, 3), Add(), Double(), SlowDiscard()), 3),
        ((Numbers(1, 3), Add(), Double(), SlowWithoutItems()), 3),
        ((Numbers(1, 3), Add(), Double(), LazySink()), 3),
    ],
    ids=lambda value: (
        "-".join(type(stage).__name__ for stage in value) if isinstance(value, tuple) else ""
    ),
)
def test_time_is_that_of_the_stage_that_spent_it(
    stages: Any, slow: int, query: Callable[..., Any]
) -> None:
    source, *filters, sink = stages
    pipeline = Pipeline(source, filters, sink)
    run_pipeline(pipeline)
    shares = _shares(pipeline, query)
    assert shares.index(max(shares)) == slow
    assert shares[slow] > 0.7


def test_the_time_of_an_index_is_that_of_its_stages_together(query: Callable[..., Any]) -> None:
    pipeline = SlowNumbers(1).filter(SlowAdd()).write(SlowDiscard())
    run_pipeline(pipeline)
    ((whole, parts),) = query(
        pipeline.db_path,
        "SELECT r.wall_time_ns, sum(s.wall_time_ns) FROM index_results r, stage_metrics s",
    )
    assert 3 * NAP_S * 1e9 <= parts <= whole


def test_a_failed_index_tells_the_time_of_its_stages_too(query: Callable[..., Any]) -> None:
    pipeline = SlowNumbers(1).filter(FailOn([0])).filter(Add()).write(Discard())
    run_pipeline(pipeline)
    rows = query(pipeline.db_path, "SELECT stage_name FROM stage_metrics ORDER BY stage_order")
    assert [name for (name,) in rows] == ["SlowNumbers", "FailOn", "Add", "Discard"]
    shares = _shares(pipeline, query)
    assert shares[0] > 0.7


# --- what stages return -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "paths"),
    [
        ("text", ["one.txt"]),
        ("path", ["out/one.txt"]),
        ("none", []),
        ("tuple", ["a", "b"]),
        ("generator", ["a", "b"]),
        ("set", ["a"]),
        ("empty", []),
    ],
)
@pytest.mark.parametrize("track_metrics", [True, False])
def test_a_sink_may_return_its_paths_in_many_forms(
    what: str, paths: list[str], track_metrics: bool
) -> None:
    pipeline = Pipeline(Numbers(1), sink=Returns(what), track_metrics=track_metrics)
    assert pipeline[0] == paths
    if track_metrics:
        assert pipeline.output_paths_for_index(0) == paths


@pytest.mark.parametrize("what", ["number", "numbers", "bytes", "list of bytes"])
def test_a_sink_that_returns_no_paths_fails_the_index_and_says_so(what: str) -> None:
    pipeline = Numbers(1).write(Returns(what))
    with pytest.raises(StageError, match=r"Returns returned .*a sink returns the paths"):
        _ = pipeline[0]
    assert pipeline.failed_indices[0].startswith("StageError: Returns returned")


@pytest.mark.parametrize("track_metrics", [True, False])
def test_a_filter_that_returns_none_fails_the_index_and_says_so(track_metrics: bool) -> None:
    pipeline = Pipeline(Numbers(1), [Nothing()], Discard(), track_metrics=track_metrics)
    with pytest.raises(StageError, match="Nothing returned None: a filter yields its items"):
        _ = pipeline[0]


def test_a_filter_that_returns_no_items_is_blamed_for_it(query: Callable[..., Any]) -> None:
    pipeline = Numbers(1).filter(NotIterable()).filter(Add()).write(Discard())
    run_pipeline(pipeline)
    assert "NotIterable" in _traceback(pipeline, query).splitlines()[0]


def test_a_source_that_returns_none_is_blamed_for_it(query: Callable[..., Any]) -> None:
    pipeline = EmptyHanded(1).filter(Add()).write(Discard())
    run_pipeline(pipeline)
    assert "EmptyHanded" in _traceback(pipeline, query).splitlines()[0]


def test_an_error_inside_a_sink_that_yields_is_that_error() -> None:
    class Broken(Sink[Any]):
        def __call__(self, items: Iterator[Any], index: int) -> Iterator[str]:
            for item in items:
                yield "a" + item

    pipeline = Numbers(1).write(Broken())
    with pytest.raises(TypeError, match="can only concatenate str"):
        _ = pipeline[0]


def test_a_filter_that_drops_everything_completes_the_index() -> None:
    pipeline = Numbers(2).filter(Drop()).write(LazySink())
    assert run_pipeline(pipeline) == [[], []]
    assert pipeline.completed_indices == {0, 1}


def test_stages_that_return_lists_work_like_lazy_ones(tmp_path: Path) -> None:
    pipeline = EagerNumbers(2, 3).filter(EagerAdd(5)).write(WriteText(str(tmp_path)))
    run_pipeline(pipeline)
    assert (tmp_path / "1.txt").read_text() == "6\n6\n6\n"


# --- failure ----------------------------------------------------------------------------------


def _traceback(pipeline: Pipeline[Any], query: Callable[..., Any], index: int = 0) -> str:
    ((message,),) = query(
        pipeline.db_path, "SELECT message FROM logs WHERE level_name = 'ERROR' AND idx = ?", index
    )
    return str(message)


def test_a_failing_index_records_its_error_and_raises_it() -> None:
    pipeline = Numbers(2).filter(FailOn([1])).write(Discard())
    with pytest.raises(RuntimeError, match="bad item 1"):
        _ = pipeline[1]
    assert pipeline.failed_indices == {1: "RuntimeError: bad item 1"}
    assert pipeline[0] == ["out/0-0.bin"]


def test_the_traceback_of_a_failure_is_in_the_log_with_the_stage_that_raised(
    query: Callable[..., Any],
) -> None:
    pipeline = Numbers(2).filter(Add(0)).filter(FailOn([1])).filter(Add(0)).write(Discard())
    run_pipeline(pipeline)
    message = _traceback(pipeline, query, 1)
    assert message.startswith("index 1 failed in FailOn\nTraceback (most recent call last)")
    assert message.endswith("RuntimeError: bad item 1")
    assert "stages_for_tests.py" in message
    ((worker, level),) = query(pipeline.db_path, "SELECT worker_id, level FROM logs")
    assert (worker, level) == (pipeline.active_workers[0]["worker_id"], logging.ERROR)


def test_an_index_that_failed_once_completes_when_it_is_run_again(tmp_path: Path) -> None:
    mended = tmp_path / "mended"
    pipeline = Numbers(1).filter(FailOn([0], str(mended))).write(Discard())
    with pytest.raises(RuntimeError):
        _ = pipeline[0]
    mended.touch()
    assert pipeline[0] == ["out/0-0.bin"]
    assert (pipeline.failed_indices, pipeline.completed_indices) == ({}, {0})


@pytest.mark.parametrize(
    "message",
    ["no file b\udcffd", "a\0b", "100 %s {} \n second line", "☃", "x" * 100_000],
    ids=["odd byte", "nul", "placeholders", "symbol", "long"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_of_any_text_is_recorded(backend: str, message: str) -> None:
    class Fail(Filter[int, int]):
        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            for item in items:
                if item == 1:
                    logging.getLogger("tests").warning(message.replace("%", "%%"))
                    raise FileNotFoundError(message)
                yield item

    pipeline = Numbers(3).filter(Fail()).write(Discard())
    run_pipeline(pipeline, jobs(backend), backend)
    assert pipeline.completed_indices == {0, 2}
    error = pipeline.failed_indices[1]
    expected = f"FileNotFoundError: {message}"
    assert error == expected or error == expected.replace("\udcff", "\\udcff")


def test_paths_that_are_no_unicode_are_recorded(tmp_path: Path) -> None:
    class Odd(Sink[Any]):
        def __call__(self, items: Iterator[Any], index: int) -> list[str]:
            path = os.path.join(os.fsencode(tmp_path), b"caf\xe9-%d" % index)
            Path(os.fsdecode(path)).touch()
            return [os.fsdecode(path)]

    pipeline = Numbers(2).write(Odd())
    results = run_pipeline(pipeline)
    assert all(Path(path).exists() for (path,) in results)
    assert pipeline.completed_indices == {0, 1}
    assert run_pipeline(pipeline) == results


def test_an_exception_whose_text_cannot_be_made_is_recorded_all_the_same() -> None:
    class SpeechlessError(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    class Fail(Filter[int, int]):
        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            raise SpeechlessError

    pipeline = Numbers(2).filter(Fail()).write(Discard())
    assert run_pipeline(pipeline) == [[], []]
    assert all("SpeechlessError" in error for error in pipeline.failed_indices.values())


BASE_EXCEPTIONS = [asyncio.CancelledError, GeneratorExit, BaseException, PanicError]


@pytest.mark.parametrize("kind", BASE_EXCEPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_exception_fails_its_index_alone(
    backend: str, kind: type[BaseException], query: Callable[..., Any]
) -> None:
    pipeline = Numbers(6).filter(Panic(2, kind)).write(Discard())
    results = run_pipeline(pipeline, jobs(backend), backend)
    assert [index for index, paths in enumerate(results) if not paths] == [2]
    assert pipeline.failed_indices == {2: f"{kind.__name__}: so be it"}
    assert pipeline.completed_indices == {0, 1, 3, 4, 5}
    assert _traceback(pipeline, query, 2).startswith("index 2 failed in Panic\nTraceback")
    assert {worker["current_index"] for worker in pipeline.active_workers} == {None}


@pytest.mark.parametrize("kind", BASE_EXCEPTIONS)
def test_what_is_no_exception_is_recorded_and_raised_as_it_is(kind: type[BaseException]) -> None:
    pipeline = Numbers(3).filter(Panic(1, kind)).write(Discard())
    with pytest.raises(kind, match="so be it") as caught:
        _ = pipeline[1]
    assert type(caught.value) is kind
    assert pipeline.failed_indices == {1: f"{kind.__name__}: so be it"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_that_is_to_end_with_it_raises_what_is_no_exception(backend: str) -> None:
    pipeline = Numbers(3).filter(Panic(1, asyncio.CancelledError)).write(Discard())
    with pytest.raises(asyncio.CancelledError):
        run_pipeline(pipeline, jobs(backend), backend, on_error="raise")
    assert list(pipeline.failed_indices) == [1]


@pytest.mark.parametrize("kind", BASE_EXCEPTIONS)
def test_what_is_no_exception_stops_no_run_without_a_record(kind: type[BaseException]) -> None:
    filters = [Panic(1, kind)]
    pipeline = Pipeline(Numbers(3), filters, Discard(), track_metrics=False)
    assert run_pipeline(pipeline) == [["out/0-0.bin"], [], ["out/2-0.bin"]]


def test_an_interrupt_inside_a_stage_records_nothing_and_leaves_the_worker_idle() -> None:
    pipeline = Numbers(4).filter(Interrupt(1)).write(Discard())
    assert pipeline[0] == ["out/0-0.bin"]
    with pytest.raises(KeyboardInterrupt):
        _ = pipeline[1]
    assert pipeline.completed_indices == {0}
    assert pipeline.failed_indices == {}
    assert pipeline.remaining_indices() == [1, 2, 3]
    (worker,) = pipeline.active_workers
    assert (worker["current_index"], worker["completed_count"]) == (None, 1)
    assert pipeline[2] == ["out/2-0.bin"]


@pytest.mark.parametrize("backend", ["sequential", "thread_pool"])
def test_an_interrupt_inside_a_stage_ends_the_run(backend: str) -> None:
    pipeline = Numbers(40).filter(Interrupt(5)).write(Discard())
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(pipeline, jobs(backend), backend)
    assert 5 not in pipeline.completed_indices
    assert pipeline.failed_indices == {}
    assert {worker["current_index"] for worker in pipeline.active_workers} == {None}


# --- state ------------------------------------------------------------------------------------


def _shards(pipeline: Pipeline[Any]) -> dict[int, str]:
    artifacts = pipeline.all_filter_artifacts()
    return {index: Path(files[0]["path"]).read_text() for index, files in artifacts.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_index_has_the_filters_state_to_itself(backend: str) -> None:
    pipeline = Numbers(20, items=5).filter(Overlap()).write(Discard())
    run_pipeline(pipeline, 1 if backend == "sequential" else 4, backend)
    assert _shards(pipeline) == {i: f'{{"count": 5, "total": {5 * i}}}' for i in range(20)}


def test_the_callers_own_filter_is_not_changed_by_a_run() -> None:
    own = Sum()
    run_pipeline(Numbers(3).filter(own).write(Discard()))
    assert (own.count, own.total) == (0, 0)


def test_an_artifact_is_recorded_with_its_filter() -> None:
    pipeline = Numbers(2).filter(Add()).filter(Sum()).write(Discard())
    run_pipeline(pipeline)
    (artifact,) = pipeline.filter_artifacts_for_index(1)
    assert (artifact["filter_name"], artifact["filter_order"]) == ("Sum", 2)
    assert Path(artifact["path"]).read_text() == '{"count": 1, "total": 2}'


def test_an_index_that_fails_leaves_no_shard(tmp_path: Path) -> None:
    pipeline = Pipeline(Numbers(3), [Sum(), FailOn([1])], Discard(), db_dir=tmp_path)
    run_pipeline(pipeline)
    assert set(_shards(pipeline)) == {0, 2}
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_a_shard_that_cannot_be_written_fails_the_index_and_leaves_nothing(tmp_path: Path) -> None:
    pipeline = Pipeline(Numbers(2), [BreaksInFlush()], Discard(), db_dir=tmp_path)
    assert run_pipeline(pipeline) == [[], []]
    assert pipeline.failed_indices == dict.fromkeys((0, 1), "OSError: quota exceeded")
    assert [path for path in tmp_path.rglob("*") if "half" in _text(path)] == []


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() and path.suffix != ".db" else ""


def test_a_filter_that_fails_after_another_has_flushed_records_neither(tmp_path: Path) -> None:
    pipeline = Pipeline(Numbers(1), [Sum(), BreaksInFlush()], Discard(), db_dir=tmp_path)
    run_pipeline(pipeline)
    assert pipeline.all_filter_artifacts() == {}


def test_a_filter_may_have_nothing_to_keep_of_an_index() -> None:
    pipeline = Numbers(4).filter(KeepsNothing()).write(Discard())
    run_pipeline(pipeline)
    assert set(_shards(pipeline)) == {0, 2}


def test_a_shard_under_another_name_is_not_lost_in_silence(tmp_path: Path) -> None:
    pipeline = Pipeline(Numbers(1), [SavesArrays()], Discard(), db_dir=tmp_path)
    run_pipeline(pipeline)
    assert pipeline.failed_indices == {
        0: "StageError: SavesArrays.flush() wrote a file with '.npz' added to the name that it was "
        "given: write artifact_suffix = '.npz' in the class"
    }
    assert list(tmp_path.rglob("*.npz")) == []


def test_a_retried_index_replaces_its_shard() -> None:
    pipeline = Numbers(3).filter(Sum()).write(Discard())
    run_pipeline(pipeline)
    pipeline.reset_index(1)
    run_pipeline(pipeline)
    assert _shards(pipeline) == {i: f'{{"count": 1, "total": {i}}}' for i in range(3)}


def test_a_filter_without_state_is_shared_by_threads_as_it_is() -> None:
    threads: set[int] = set()

    class Who(Filter[int, int]):
        def __init__(self) -> None:
            self.calls: list[int] = []

        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            self.calls.append(threading.get_ident())
            return items

    who = Who()
    run_pipeline(Numbers(20).filter(who).write(Discard()), 2, "thread_pool")
    threads.update(who.calls)
    assert len(who.calls) == 20
    assert threading.get_ident() not in threads


def test_a_stage_sees_the_index_as_a_plain_number_from_zero() -> None:

    class Watch(Source[int]):
        seen: ClassVar[list[int]] = []

        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Iterator[int]:
            self.seen.append(index)
            yield index

    pipeline = Watch().write(Discard())
    assert pipeline[-1] == ["out/4-0.bin"]
    assert run_pipeline(pipeline, indices=[True, -5]) == [["out/1-0.bin"], ["out/0-0.bin"]]
    assert [(type(index), index) for index in Watch.seen] == [(int, 4), (int, 0), (int, 1)]


class HoldsALock(Sum):
    """Accumulates, and cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_a_stateful_filter_that_cannot_be_copied_fails_the_index() -> None:
    pipeline = Numbers(2).filter(HoldsALock()).write(Discard())
    assert run_pipeline(pipeline) == [[], []]
    assert "cannot pickle '_thread.lock'" in pipeline.failed_indices[0]
