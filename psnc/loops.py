"""Somebody's own loop as a run: each item is an index, and on record when it is done."""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import Any, Generic, NoReturn, Protocol, Self, TypeVar
from weakref import WeakSet

from psnc.errors import PipelineError, PluginError, SourceError, StageError, StoreError
from psnc.execution import OpenIndex, earlier_record
from psnc.manager import before_leave
from psnc.pipeline import Pipeline
from psnc.provenance import Name
from psnc.records import IndexRecord, RunSummary
from psnc.run import run_of
from psnc.stages import Sink, Source
from psnc.store import open_store, shown_url

__all__ = ["LoopBody", "LoopItems", "TrackedLoop", "track"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# How far a loop over an iterable without a length has come is on record this often, in seconds.
_PUBLISH_S = 1.0


def track(
    iterable: Iterable[T],
    name: str,
    *,
    resume: bool = False,
    total: int | None = None,
    db_dir: str | os.PathLike[str] | None = None,
    store: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> TrackedLoop[T]:
    """Record a loop item by item, and go on where it was left.

    Write ``for item in psnc.track(items, name="convert", resume=True):`` in place of
    ``for item in items:``. The position of an item is its index. Time, memory and log entries of
    the loop's body are recorded as those of a pipeline's index.

    An item counts as done when the loop asks for the next one. It does not when the loop is left in
    it, by ``break``, an exception or the end of the program: then it runs again. So do not hand
    the tracked loop to what asks for items ahead of the work, such as ``list`` or a pool's ``map``.

    Parameters
    ----------
    iterable : iterable
        The items, the same ones in the same order each time: what is remembered is positions.
        More items at the end are welcome. Completed items of a sequence are not looked up again;
        those of another iterable are taken from it and left out.
    name : str
        What the loop is known by. Without ``db_dir`` and ``store`` a name belongs to the working
        directory, so that another project's loop may have the same.
    resume : bool
        Leave out the items that an earlier loop of this name completed.
    total : int, optional
        How many items there are, where the iterable does not tell, for the display of progress.
    db_dir : path, optional
        Directory of the database, as of :class:`psnc.Pipeline`.
    store : URL or path, optional
        Where to record instead, as of :class:`psnc.Pipeline`.
    progress : bool, optional
        Show progress on standard error; by default if that is a terminal.

    Returns
    -------
    TrackedLoop
        The items that are left to do.

    Examples
    --------
    >>> for number in track([3, 1, 2], "squares"):
    ...     square = number * number
    """
    return TrackedLoop(
        iterable,
        name,
        resume=resume,
        total=total,
        db_dir=db_dir,
        store=store,
        progress=progress,
    )


class LoopItems(Source[Any]):
    """Stands for a tracked loop's items in its pipeline.

    Parameters
    ----------
    name : str
        The loop's name.
    directory : str, optional
        The directory that the name belongs to.

    Attributes
    ----------
    length : int
        How many items there are, as far as is known.
    """

    def __init__(self, name: str, directory: str | None = None) -> None:
        self._name = name
        self._directory = directory
        self.length = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> NoReturn:
        raise StageError(
            f"item {index} of the loop {self._name!r} is in a program's own loop: run that program"
        )

    def psnc_config(self) -> dict[str, Any]:
        """Return what stands for the arguments in the pipeline's hash."""
        return {"name": Name(self._name), "directory": self._directory}


class LoopBody(Sink[Any]):
    """Stands for what a tracked loop does with an item."""

    def __call__(self, items: Iterator[Any], index: int) -> None:
        """Never called: the loop does the work."""


class TrackedLoop(Generic[T]):
    """What :func:`track` returns: iterate over it.

    To iterate again begins another run, or with ``resume`` goes on with what is left.

    Attributes
    ----------
    name : str
        The loop's name.
    pipeline : Pipeline
        Answers questions about the latest run: ``pipeline.summary()``, ``pipeline.metrics``.
    """

    def __init__(
        self,
        iterable: Iterable[T],
        name: str,
        *,
        resume: bool = False,
        total: int | None = None,
        db_dir: str | os.PathLike[str] | None = None,
        store: str | os.PathLike[str] | None = None,
        progress: bool | None = None,
    ) -> None:
        if not isinstance(name, str) or not name.strip():
            raise PipelineError(f"track(name={name!r}): give the loop a name in text")
        if total is not None and (not isinstance(total, int) or total < 0):
            raise PipelineError(f"track(total={total!r}): give a number of items")
        if resume and isinstance(iterable, (set, frozenset)):
            raise PipelineError(
                f"track({name!r}): a set has another order in another process, so that positions "
                "mean other items: give sorted(…) of it"
            )
        self.name = name
        self._iterable = iterable
        self._total = total
        self.progress = progress
        self._resume, self._db_dir, self._store = resume, db_dir, store
        self._directory = os.getcwd() if db_dir is None and store is None else None
        self._begun = False
        self.pipeline = self._new_pipeline()

    def __iter__(self) -> Iterator[T]:
        """Yield the items that are left to do, each one on record when the next is asked for."""
        if self._begun:
            self._refuse_used_iterator()
            self.pipeline = self._new_pipeline()
        self._begun = True
        items = self._run_through()
        _unfinished.add(items)
        return items

    def _refuse_used_iterator(self) -> None:
        if self._resume and isinstance(self._iterable, Iterator):
            raise PipelineError(
                f"the loop {self.name!r} has taken items from its {type(self._iterable).__name__}, "
                "whose next item is not its first, so that positions mean other items: begin the "
                "iterator anew and track that"
            )

    def _new_pipeline(self) -> Pipeline[Any]:
        source = LoopItems(self.name, self._directory)
        pipeline = Pipeline[Any](
            source, sink=LoopBody(), resume=self._resume, db_dir=self._db_dir, store=self._store
        )
        recorded = _recorded_length(pipeline)
        length = _length_of(self._iterable)
        if length is not None and length < recorded:
            raise _fewer_items(pipeline, self.name, recorded, length)
        source.length = max(recorded, self._total or 0) if length is None else length
        return pipeline

    def _run_through(self) -> Generator[T, None, None]:
        length = _length_of(self._iterable)
        items = _items_of(self._iterable, len(self.pipeline) or -1 if length is None else length)
        with _alone(self.pipeline, self.name), _Pass(self, items) as this_pass:
            yield from this_pass.items()


class _Pass(Generic[T]):
    """One run of a tracked loop."""

    def __init__(self, loop: TrackedLoop[T], items: _Items[T]) -> None:
        self._items = items
        self._name = loop.name
        self._pipeline = loop.pipeline
        self._source: LoopItems = loop.pipeline.source  # type: ignore[assignment]
        self.run = run_of(loop.pipeline)
        self.run.show_progress = loop.progress
        store = self.run.store
        self._before = set() if store is None else store.completed_indices()
        self._completed = self._cached = 0
        self._failed: dict[int, str] = {}
        self._errors_before = dict(self.run.plugins.errors)
        self._published = self._started = perf_counter()

    def __enter__(self) -> Self:
        self.run.in_session = True
        known = range(len(self._source))
        left = [each for each in known if each not in self._before] if self._before else known
        self.run.plugins.call_contained(
            "psnc_run_start", run=self.run, indices=left, cached=len(known) - len(left)
        )
        return self

    def items(self) -> Iterator[T]:
        """Yield the items that are left to do."""
        for position in itertools.count():
            if self._items.is_over(position):
                return self._end_at(position)
            if self._is_done(position):
                if not self._items.skip(position):
                    return self._end_at(position)
                continue
            index = OpenIndex(self.run, position)
            try:
                with index:
                    item = index.fetch(self._items.take, position)
                    if isinstance(item, _End):
                        index.withdraw()
                        return self._end_at(position)
                    yield item
                    self._refuse_children()
            finally:
                if index.record is not None:
                    self._report(index.record)
        return None

    def _is_done(self, position: int) -> bool:
        if position in self._before:
            self._cached += 1
            return True
        earlier = earlier_record(self.run, position)
        if earlier is not None:
            self._report(earlier)
        return earlier is not None

    def _report(self, record: IndexRecord) -> None:
        if record.error is not None:
            self._failed[record.index] = record.error
        elif record.cached:
            self._cached += 1
        else:
            self._completed += 1
        if record.index >= self._source.length:
            self._source.length = record.index + 1
            if perf_counter() - self._published >= _PUBLISH_S:
                self._publish_length()
        self.run.plugins.call_contained("psnc_index_reported", run=self.run, record=record)

    def _publish_length(self) -> None:
        self._published = perf_counter()
        if self.run.total_indices != self._source.length:
            self.run.total_indices = self._source.length
            if self.run.store is not None:
                self.run.store.attach(self.run)

    def _end_at(self, length: int) -> None:
        recorded = max(self._before, default=-1) + 1
        if length < recorded:
            raise _fewer_items(self._pipeline, self._name, recorded, length)
        self._source.length = length

    def _refuse_children(self) -> None:
        if os.getpid() != self.run.pid:
            raise PipelineError(
                f"the loop {self._name!r} belongs to the process that this one was forked from: "
                "end the child in the loop's body"
            )

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        run = self.run
        if os.getpid() != run.pid:
            return
        run.release_workers()
        run.in_session = False
        failure = self._write_out(interrupted=error is not None)
        summary = self._summary(interrupted=error is not None)
        run.plugins.call_contained("psnc_run_done", run=run, summary=summary)
        # Another question opens the store again; a program may have thousands of loops.
        self._pipeline.__dict__.pop("_run", None)
        run.close()
        if error is not None:
            return
        if failure is not None:
            raise failure
        if run.plugins.config.strict_plugins and summary.plugin_errors:
            where = ", ".join(summary.plugin_errors)
            raise PluginError(
                f"the loop is complete, but plugins raised ({where}): the logger psnc.plugins has "
                "said each one's first error"
            )

    def _write_out(self, *, interrupted: bool) -> StoreError | None:
        """Have everything in the store, and return the error if that cannot be."""
        store = self.run.store
        if store is None:
            return None
        try:
            store.flush()
            self._publish_length()
            if interrupted:
                store.invocation_over(self.run.invocation_id)
        except StoreError as error:
            return error
        return None

    def _summary(self, *, interrupted: bool) -> RunSummary:
        return RunSummary(
            requested=self._source.length,
            completed=self._completed,
            cached=self._cached,
            failed=dict(self._failed),
            elapsed_s=perf_counter() - self._started,
            interrupted=interrupted,
            plugin_errors=self.run.plugins.errors_since(self._errors_before),
            db_path=None if self.run.store is None else shown_url(self._pipeline.store_url),
        )


class _End:
    """What is fetched where there is no further item."""


_END = _End()


class _Items(Protocol[T_co]):
    """How a pass gets at the items."""

    def is_over(self, position: int) -> bool:
        """Tell whether there is known to be no item at a position."""
        ...

    def take(self, position: int) -> T_co | _End:
        """Return the item at a position."""
        ...

    def skip(self, position: int) -> bool:
        """Leave out the item at a position, if there is one."""
        ...


class _ItemsByPosition(Generic[T]):
    """The items of a sequence, which may still grow, as in any loop."""

    def __init__(self, sequence: Sequence[T]) -> None:
        self._sequence = sequence

    def is_over(self, position: int) -> bool:
        return position >= len(self._sequence)

    def take(self, position: int) -> T:
        return self._sequence[position]

    def skip(self, position: int) -> bool:
        return True


class _ItemsInTurn(Generic[T]):
    """The items of an iterable, one after the other."""

    def __init__(self, iterable: Iterable[T], expected: int) -> None:
        self._expected = expected
        self._iterator = iter(iterable)
        self._held: T | _End = _END

    def is_over(self, position: int) -> bool:
        if position != self._expected:
            return False
        # Where the end is expected, the item is asked for before an index begins.
        self._held = next(self._iterator, _END)
        return self._held is _END

    def take(self, position: int) -> T | _End:
        held, self._held = self._held, _END
        return next(self._iterator, _END) if held is _END else held

    def skip(self, position: int) -> bool:
        return self.take(position) is not _END


def _items_of(iterable: Iterable[T], expected: int) -> _Items[T]:
    # A dataset as Torch's is no Sequence, but has no way of its own to iterate either.
    in_positions = not hasattr(iterable, "__iter__") and hasattr(iterable, "__len__")
    if isinstance(iterable, Sequence) or in_positions:
        return _ItemsByPosition(iterable)  # type: ignore[arg-type]
    return _ItemsInTurn(iterable, expected)


def _length_of(iterable: Iterable[Any]) -> int | None:
    try:
        return len(iterable)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        # A DataLoader has a __len__ whatever it loads, and raises.
        return None


def _recorded_length(pipeline: Pipeline[Any]) -> int:
    """Return how many items the loop had when it was recorded last; 0 if nothing is recorded."""
    url = pipeline.configured_store_url
    if not pipeline.resume if "://" in url else not os.path.exists(url):
        return 0
    try:
        store = open_store(url)
    except StoreError:
        # The run says so, when it opens the store to write to it.
        return 0
    if store is None:
        return 0
    try:
        rows = [row for row in store.runs() if row.config_hash == pipeline.config_hash]
        if not rows:
            return 0
        store.select(rows[-1].run_id)
        is_recorded = store.completed_indices() or store.failed_indices()
        return rows[-1].total_indices if is_recorded else 0
    finally:
        store.close()


def _fewer_items(pipeline: Pipeline[Any], name: str, recorded: int, length: int) -> SourceError:
    return SourceError(
        f"the loop {name!r} was recorded with {recorded} items and now has {length}, so that "
        "positions may mean other items: give it another name, or forget its record with "
        f"psnc reset {shown_url(pipeline.configured_store_url)}"
    )


_unfinished: WeakSet[Generator[Any, None, None]] = WeakSet()


@before_leave
def _leave_unfinished() -> None:
    """Leave the loops of which the program keeps an iterator, while that can be recorded."""
    for items in list(_unfinished):
        # A thread that is not waited for may be asking for an item.
        with suppress(ValueError):
            items.close()


_at_work: dict[tuple[str, str, str], object] = {}


@contextmanager
def _alone(pipeline: Pipeline[Any], name: str) -> Iterator[None]:
    """Refuse a second loop that would record to the same rows at the same time."""
    url = pipeline.configured_store_url
    # On a server a fresh run has rows of its own, and there may be any number.
    instance = pipeline.instance_id if "://" in url and not pipeline.resume else ""
    key, token = (url, pipeline.config_hash, instance), object()
    if _at_work.setdefault(key, token) is not token:
        raise PipelineError(
            f"a loop of the name {name!r} is at work in this process already: give each its own"
        )
    try:
        yield
    finally:
        del _at_work[key]
