"""One index through the chain, measured: the only place that calls the index and stage hooks.

It runs wherever ``pipeline[i]`` is called: in psnc's own workers, in a bare loop, or in somebody
else's pool.
"""

from __future__ import annotations

import copy
import json
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Self, TypeVar

from attrs import define, evolve, field

from psnc.atomic import atomic_path
from psnc.errors import INTERRUPTS, StageError
from psnc.masking import masked
from psnc.output_facts import facts_to_record
from psnc.records import (
    ArtifactRecord,
    IndexRecord,
    LogRecord,
    OutputFacts,
    StageRecord,
    WorkerInfo,
    utc_timestamp,
)
from psnc.stages import Filter, Sink, Source, Stage, is_stateful, stage_name

if TYPE_CHECKING:
    from psnc.pipeline import Pipeline
    from psnc.run import Run

__all__ = [
    "IndexContext",
    "OpenIndex",
    "chain",
    "earlier_record",
    "execute",
    "execute_untracked",
    "output_paths",
    "take_longer_suffix",
]

T = TypeVar("T")

_ERROR_LEVEL = 40
_OWN_FIGURES = frozenset({"peak_memory_bytes", "gpu_memory_bytes"})


@define(eq=False)
class IndexContext:
    """What hooks are given as ``context``: one index at work.

    Attributes
    ----------
    run : Run
        The run that it belongs to.
    index : int
        The source index.
    worker : WorkerInfo
        The thread that runs it.
    logs : list of LogRecord
        Log entries so far; they are recorded with the index.
    """

    run: Run
    index: int
    worker: WorkerInfo
    logs: list[LogRecord] = field(factory=list)


def execute(run: Run, index: int) -> tuple[IndexRecord, BaseException | None]:
    """Run one index, or find its earlier result, and have it recorded.

    Returns
    -------
    record, exception
        What is known of the index, and the exception that ended it, if one did.

    Raises
    ------
    StoreError
        If the outcome cannot be recorded.
    """
    plugins = run.plugins
    earlier = _standing_record(run, index)
    if earlier is not None:
        return earlier, None
    context = IndexContext(run, index, run.worker())
    try:
        plugins.call_contained("psnc_index_start", context=context)
        record, exception = _measured(context)
    except BaseException:
        plugins.call_contained("psnc_index_interrupted", context=context)
        raise
    plugins.call_contained("psnc_index_done", context=context, record=record)
    return record, exception


def earlier_record(run: Run, index: int) -> IndexRecord | None:
    """Find the earlier result of an index that is not to run again."""
    paths = run.plugins.first_result("psnc_index_lookup", _require_paths, run=run, index=index)
    if paths is None:
        return None
    return IndexRecord(index, "completed", tuple(paths), cached=True, recorded=True)


def _standing_record(run: Run, index: int) -> IndexRecord | None:
    """Find the earlier result of an index, if the sink does not know better."""
    earlier = earlier_record(run, index)
    if earlier is None or run.prepared:
        return earlier
    try:
        run.prepare()
    except Exception:
        return None  # the index runs, and fails with that
    return earlier_record(run, index)


def _require_paths(answer: Any) -> None:
    """Refuse what is no list of output paths; text would be taken for a list of its letters."""
    if not isinstance(answer, (list, tuple)) or not all(isinstance(each, str) for each in answer):
        raise TypeError(f"psnc_index_lookup returned {answer!r}, not a list of paths as text")


def execute_untracked(run: Run, index: int) -> list[str]:
    """Run one index and return its output paths: no timing, no hooks, no record."""
    if not run.prepared:
        run.prepare()
    pipeline = run.pipeline
    sink = pipeline.sink
    assert sink is not None
    return output_paths(sink, sink(iter(chain(pipeline, index)), index))


def chain(pipeline: Pipeline[Any], index: int) -> Iterable[Any]:
    """Join the source and the filters for one index, lazily."""
    items = _require_items(pipeline.source, pipeline.source[index])
    for filter in _filters_of_one_index(pipeline):
        items = _require_items(filter, filter(iter(items)))
    return items


def _require_items(stage: Stage, produced: Any) -> Iterable[Any]:
    if produced is None:
        kind = "source" if isinstance(stage, Source) else "filter"
        raise StageError(f"{stage_name(stage)} returned None: a {kind} yields its items")
    return produced  # type: ignore[no-any-return]


class _StageClock:
    """Time spent in one stage and everything before it."""

    __slots__ = ("elapsed_ns", "failed", "order", "stage")

    def __init__(self, order: int, stage: Stage) -> None:
        self.order = order
        self.stage = stage
        self.elapsed_ns = 0
        self.failed = False

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        started = perf_counter_ns()
        try:
            return function(*arguments)
        except BaseException:
            self.failed = True
            raise
        finally:
            self.elapsed_ns += perf_counter_ns() - started

    def watch(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield what the stage yields; two clock reads an item are all that it costs."""
        iterator = self.call(iter, items)
        while True:
            started = perf_counter_ns()
            try:
                item = next(iterator)
            except StopIteration:
                self.elapsed_ns += perf_counter_ns() - started
                return
            except BaseException:
                self.elapsed_ns += perf_counter_ns() - started
                self.failed = True
                raise
            self.elapsed_ns += perf_counter_ns() - started
            yield item


class OpenIndex:
    """An index whose work is done by the code in a ``with`` block, not by a chain of stages.

    What :meth:`fetch` calls counts as the pipeline's source, all else in the block as its sink. An
    exception fails the index, and goes on. When ``KeyboardInterrupt``, ``SystemExit`` or
    ``GeneratorExit`` leave the block, nothing is recorded of it.

    Parameters
    ----------
    run : Run
        The run, of a pipeline without filters.
    index : int
        The index.

    Attributes
    ----------
    record : IndexRecord or None
        What is known of the index, once it has ended and is recorded.
    """

    def __init__(self, run: Run, index: int) -> None:
        self.record: IndexRecord | None = None
        self._context = IndexContext(run, index, run.worker())
        self._source, self._sink = self._clocks = _clocks_of(run.pipeline)
        self._withdrawn = False

    def __enter__(self) -> Self:
        try:
            self._call("psnc_index_start")
            self._call("psnc_stage_start", stage=self._source.stage)
        except BaseException:
            self._call("psnc_index_interrupted")
            raise
        self._started = perf_counter_ns()
        return self

    def fetch(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call the function that gets the item of this index."""
        item: T = self._source.call(function, *arguments)
        self._call("psnc_stage_start", stage=self._sink.stage)
        return item

    def withdraw(self) -> None:
        """Have it that there is no such index after all."""
        self._withdrawn = True

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if os.getpid() != self._context.run.pid:
            # A child that was forked in the block leaves the index to its parent.
            return
        # A generator that the block is in ends so, as a loop over it is left.
        if self._withdrawn or isinstance(error, (*INTERRUPTS, GeneratorExit)):
            self._call("psnc_index_interrupted")
            return
        self._sink.elapsed_ns = perf_counter_ns() - self._started
        try:
            if error is not None:
                _log_failure(self._context, self._clocks, error)
            record = _record_of(self._context, self._clocks, self._sink.elapsed_ns, error)
        except BaseException:
            self._call("psnc_index_interrupted")
            raise
        self._call("psnc_index_done", record=record)
        self.record = record

    def _call(self, hook_name: str, **arguments: Any) -> None:
        self._context.run.plugins.call_contained(hook_name, context=self._context, **arguments)


def _clocks_of(pipeline: Pipeline[Any]) -> list[_StageClock]:
    assert pipeline.sink is not None
    stages: list[Stage] = [pipeline.source, *pipeline.filters, pipeline.sink]
    return [_StageClock(order, stage) for order, stage in enumerate(stages)]


def _measured(context: IndexContext) -> tuple[IndexRecord, BaseException | None]:
    run = context.run
    clocks = _clocks_of(run.pipeline)
    exception: BaseException | None = None
    outputs: list[str] = []
    facts: tuple[OutputFacts, ...] = ()
    artifacts: list[ArtifactRecord] = []
    name: str | None = None
    started = perf_counter_ns()
    try:
        if not run.prepared:
            run.prepare()
        own_filters = _filters_of_one_index(run.pipeline)
        for clock, own in zip(clocks[1:-1], own_filters, strict=True):
            clock.stage = own
        outputs = _timed_chain(context, clocks)
        facts = facts_to_record(clocks[-1].stage, outputs, run.verify)
        artifacts = _flush_stateful(context, clocks)
        # From the source that was read: elsewhere there may be other files meanwhile.
        name = _index_name(run.pipeline.source, context.index)
    except INTERRUPTS:
        raise
    except BaseException as error:
        exception = error
        outputs, facts, artifacts = [], (), []
        _log_failure(context, clocks, error)
    wall_time_ns = perf_counter_ns() - started
    record = _record_of(context, clocks, wall_time_ns, exception, outputs, facts, artifacts, name)
    return record, exception


def _record_of(
    context: IndexContext,
    clocks: list[_StageClock],
    wall_time_ns: int,
    exception: BaseException | None,
    outputs: Sequence[str] = (),
    facts: tuple[OutputFacts, ...] = (),
    artifacts: Sequence[ArtifactRecord] = (),
    name: str | None = None,
) -> IndexRecord:
    secrets = context.run.secrets
    error = None if exception is None else error_text(exception)
    logs = context.logs
    if secrets:
        error = error and masked(error, secrets)
        logs = [evolve(each, message=masked(each.message, secrets)) for each in logs]
    return IndexRecord(
        index=context.index,
        status="completed" if exception is None else "error",
        output_paths=tuple(outputs),
        wall_time_ns=wall_time_ns,
        worker=context.worker,
        error=error,
        stages=_stage_records(context, clocks),
        artifacts=tuple(artifacts),
        measurements=_measurements(context) | ({"index_name": name} if name else {}),
        logs=tuple(logs),
        recorded=context.run.store is not None,
        code_digest=context.run.code.digest,
        output_facts=facts,
    )


def error_text(error: BaseException) -> str:
    """Return ``"{type}: {message}"``, which is how an error is recorded."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as problem:
        return f"{type(error).__name__}: (no text: {type(problem).__name__} while making it)"


def _timed_chain(context: IndexContext, clocks: list[_StageClock]) -> list[str]:
    plugins = context.run.plugins
    announce = plugins.implements("psnc_stage_start")
    source, *filters, sink = clocks
    index = context.index
    if announce:
        plugins.call_contained("psnc_stage_start", context=context, stage=source.stage)
    items = source.watch(source.call(_items_of, source.stage, index))
    for clock in filters:
        if announce:
            plugins.call_contained("psnc_stage_start", context=context, stage=clock.stage)
        items = clock.watch(clock.call(_filtered, clock.stage, items))
    if announce:
        plugins.call_contained("psnc_stage_start", context=context, stage=sink.stage)
    paths: list[str] = sink.call(_written, sink.stage, items, index)
    return paths


def _items_of(source: Source[Any], index: int) -> Iterable[Any]:
    return _require_items(source, source[index])


def _filtered(filter: Filter[Any, Any], items: Iterator[Any]) -> Iterable[Any]:
    return _require_items(filter, filter(items))


def _written(sink: Sink[Any], items: Iterator[Any], index: int) -> list[str]:
    return output_paths(sink, sink(items, index))


def _stage_records(context: IndexContext, clocks: list[_StageClock]) -> tuple[StageRecord, ...]:
    records = []
    upstream_ns = 0
    for clock in clocks:
        # A stage that never got to run has nothing upstream to subtract.
        own_ns = max(clock.elapsed_ns - upstream_ns, 0)
        records.append(StageRecord(clock.order, stage_name(clock.stage), own_ns))
        upstream_ns = clock.elapsed_ns
    plugins = context.run.plugins
    if plugins.implements("psnc_stage_done"):
        for clock, record in zip(clocks, records, strict=True):
            plugins.call_contained(
                "psnc_stage_done", context=context, stage=clock.stage, record=record
            )
    return tuple(records)


def _measurements(context: IndexContext) -> dict[str, Any]:
    measurements: dict[str, Any] = {}
    answers = context.run.plugins.call_contained(
        "psnc_index_measure", _require_recordable, context=context
    )
    for answer in reversed(answers):
        measurements.update(answer)
    return measurements


def _index_name(source: Source[Any], index: int) -> str | None:
    name: Any = source.index_name(index)
    if name is not None and not isinstance(name, str):
        raise StageError(
            f"index_name of {stage_name(source)} returned {type(name).__qualname__}: a name is text"
        )
    return name


def _require_recordable(answer: Any) -> None:
    """Refuse figures that no store could take, while it is known which plugin they are of."""
    if not isinstance(answer, Mapping):
        raise TypeError(f"psnc_index_measure returned {type(answer).__qualname__}, not a mapping")
    for name in ("peak_memory_bytes", "gpu_memory_bytes"):
        size = answer.get(name)
        if size is not None and not (type(size) is int and 0 <= size < 2**63):
            raise ValueError(f"{name} is {size!r}, not a number of bytes")
    if not _OWN_FIGURES.issuperset(answer):
        json.dumps(dict(answer), allow_nan=False)


def output_paths(sink: Sink[Any] | Stage, returned: Any) -> list[str]:
    """Return as a list of text what a sink returned in one of the forms that it may."""
    if type(returned) is list and {str}.issuperset(map(type, returned)):
        return returned
    if returned is None:
        return []
    if isinstance(returned, (str, bytes, os.PathLike)):
        returned = [returned]
    if not isinstance(returned, Iterable):
        raise _no_paths(sink, returned)
    paths = []
    for path in returned:
        text = os.fspath(path) if isinstance(path, os.PathLike) else path
        if not isinstance(text, str):
            raise _no_paths(sink, returned)
        paths.append(str(text))
    return paths


def _no_paths(sink: Sink[Any] | Stage, returned: Any) -> StageError:
    return StageError(
        f"{stage_name(sink)} returned {type(returned).__qualname__}: a sink returns the paths "
        "that it wrote, as a list of text"
    )


def _log_failure(context: IndexContext, clocks: list[_StageClock], error: BaseException) -> None:
    culprit = next((clock.stage for clock in clocks if clock.failed), clocks[-1].stage)
    text = "".join(traceback.format_exception(error)).rstrip()
    message = f"index {context.index} failed in {stage_name(culprit)}\n{text}"
    context.logs.append(
        LogRecord(utc_timestamp(), _ERROR_LEVEL, "ERROR", "psnc.execution", message)
    )


def _filters_of_one_index(pipeline: Pipeline[Any]) -> Sequence[Filter[Any, Any]]:
    """Give each index its stateful filters as they were constructed."""
    if not pipeline.has_state:
        return pipeline.filters
    return [copy.deepcopy(each) if is_stateful(each) else each for each in pipeline.filters]


def _flush_stateful(context: IndexContext, clocks: list[_StageClock]) -> list[ArtifactRecord]:
    records = []
    for clock in clocks[1:-1]:
        if not is_stateful(clock.stage):  # type: ignore[arg-type]
            continue
        path = context.run.pipeline.artifact_path(clock.order, clock.stage, context.index)
        if clock.call(_flush_atomically, clock.stage, path):
            records.append(ArtifactRecord(str(path), stage_name(clock.stage), clock.order))
    return records


def _flush_atomically(filter: Any, path: Path) -> bool:
    with atomic_path(path) as draft:
        filter.flush(draft)
        if not draft.exists():
            suffix = take_longer_suffix(draft)
            if suffix:
                raise StageError(
                    f"{stage_name(filter)}.flush() wrote a file with {suffix!r} added to the name "
                    f"that it was given: write artifact_suffix = {suffix!r} in the class"
                )
            return False
    return True


def take_longer_suffix(path: Path) -> str | None:
    """Remove what was written under a longer name, as NumPy does, and return what it added."""
    for suffix in (".npy", ".npz"):
        longer = path.with_name(f"{path.name}{suffix}")
        if longer.exists():
            longer.unlink()
            return suffix
    return None
