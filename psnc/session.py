"""One run: which indices, in which batches, on which backend; the driver of everything."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import Any, Literal

import attrs

from psnc.backend import Backend
from psnc.errors import (
    BackendError,
    PipelineError,
    PluginError,
    PsncError,
    StoreError,
    WorkerDiedError,
)
from psnc.execution import error_text
from psnc.manager import PluginManager, plugin_manager
from psnc.partition import partition
from psnc.pipeline import Pipeline
from psnc.records import IndexRecord, RunSummary
from psnc.run import Run, adopt
from psnc.store import shown_url
from psnc.worker import BatchResult, WorkerTask

__all__ = ["Session", "run_pipeline"]

# A batch should take about this long: tiny indices share the cost of one message, and a run that
# is interrupted waits no longer than this for them.
_BATCH_S = 0.1

# A signal that arrives just before the driver falls asleep does not wake it: Python would answer it
# only when the next batch ends.
_ANSWER_SIGNALS_S = 0.5

# Batches in flight for each worker: one that runs and one that waits, so that none sits idle.
_BATCHES_PER_WORKER = 2


def run_pipeline(
    pipeline: Pipeline[Any],
    n_jobs: int = 1,
    backend: str | None = None,
    indices: Iterable[int] | None = None,
    resume: bool | None = None,
    db_dir: str | os.PathLike[str] | None = None,
    store: str | None = None,
    on_error: Literal["continue", "raise"] = "continue",
    progress: bool | None = None,
    **backend_options: Any,
) -> list[list[str]]:
    """Run a pipeline over many indices.

    Indices that the pipeline's database holds as completed are not run again. Failed ones are.

    Parameters
    ----------
    pipeline : Pipeline
        The pipeline, with a sink.
    n_jobs : int
        Number of workers; -1 for one a CPU.
    backend : str, optional
        ``"sequential"``, ``"thread_pool"``, ``"process_pool"``, or one that a plugin offers.
        By default sequential for one job, and a process pool for more.
    indices : iterable of int, optional
        Which indices; by default all.
    resume, db_dir, store : optional
        In place of the pipeline's own. The pipeline's questions (``pipeline.summary()``, …) are
        then about the database of this run.
    on_error : {"continue", "raise"}
        Whether a failing index leaves the others alone, or ends the run.
    progress : bool, optional
        Show progress on standard error; by default if that is a terminal.
    **backend_options
        What the backend takes besides.

    Returns
    -------
    list of list of str
        The sink's output paths in the order of ``indices``; empty for an index that failed.

    Raises
    ------
    PsncError
        If the run cannot start, or cannot be recorded.
    KeyboardInterrupt
        After a Ctrl-C, once the indices at work have ended. A second Ctrl-C ends them.
    """
    session = Session(
        pipeline,
        n_jobs=n_jobs,
        backend=backend,
        indices=indices,
        resume=resume,
        db_dir=db_dir,
        store=store,
        on_error=on_error,
        progress=progress,
        backend_options=backend_options,
    )
    session.run()
    return session.results()


class Session:
    """One call of :func:`run_pipeline`, with its arguments.

    Attributes
    ----------
    summary : RunSummary or None
        How the run ended, once it has, in whatever way.
    """

    def __init__(
        self,
        pipeline: Pipeline[Any],
        *,
        n_jobs: int = 1,
        backend: str | None = None,
        indices: Iterable[int] | None = None,
        resume: bool | None = None,
        db_dir: str | os.PathLike[str] | None = None,
        store: str | None = None,
        on_error: Literal["continue", "raise"] = "continue",
        progress: bool | None = None,
        backend_options: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(pipeline, Pipeline):
            raise PipelineError(
                f"{type(pipeline).__qualname__!r} is no pipeline: build one with "
                "Source.filter(…).write(…)"
            )
        if on_error not in ("continue", "raise"):
            raise PipelineError(f"on_error={on_error!r}: choose 'continue' or 'raise'")
        pipeline.require_sink()
        self.plugins = plugin_manager()
        self._on_error = on_error
        self._backend = _make_backend(self.plugins, backend, n_jobs, backend_options or {})
        # Before anything is made: what is asked for may not exist.
        self._requested = _normalised(pipeline, indices)
        self.run_state = _begin(pipeline, self.plugins, resume, db_dir, store)
        self.run_state.show_progress = progress
        self.pipeline = self.run_state.pipeline
        self._outputs: dict[int, list[str]] = {}
        self._failed: dict[int, str] = {}
        self._completed = 0
        self._cached = 0
        self._first_exception: BaseException | None = None
        self._errors_before = self.plugins.errors_told()
        self.summary: RunSummary | None = None

    def run(self) -> RunSummary:
        """Run what is not completed, and return how it went."""
        self.run_state.in_session = True
        started = perf_counter()
        interrupted = True
        try:
            self._drive()
            interrupted = False
        finally:
            self._finish(started, interrupted)
        assert self.summary is not None
        if self._on_error == "raise" and self._first_exception is not None:
            raise self._first_exception
        if self.plugins.config.strict_plugins and self.summary.plugin_errors:
            where = ", ".join(self.summary.plugin_errors)
            raise PluginError(
                f"the run is complete, but plugins raised ({where}): the logger psnc.plugins has "
                "said each one's first error"
            )
        return self.summary

    def results(self) -> list[list[str]]:
        """Return output paths in the order in which the indices were asked for."""
        return [self._outputs.get(index, []) for index in self._requested]

    # --- before -------------------------------------------------------------------------------

    def _take_completed(self) -> list[int]:
        """Take earlier results over, and return the distinct indices that are left to run."""
        requested = sorted(set(self._requested))
        store = self.run_state.store
        if store is None:
            return requested
        completed = store.completed_outputs()
        left = [index for index in requested if index not in completed]
        self._cached = len(requested) - len(left)
        if self._cached:
            self._outputs = {i: completed[i] for i in requested if i in completed}
        return left

    # --- during -------------------------------------------------------------------------------

    def _drive(self) -> None:
        try:
            # First, and also if nothing is left to run: a sink may know that what is recorded as
            # completed does not stand any more.
            self.run_state.prepare()
        finally:
            # Whoever is told that a run is over has been told that it began.
            left = self._take_completed()
            self.plugins.call_contained(
                "psnc_run_start", run=self.run_state, indices=left, cached=self._cached
            )
        if not left:
            return
        assert self.pipeline.sink is not None
        groups = partition(self.pipeline.source, self.pipeline.sink, left)
        task = WorkerTask(self.run_state, stop_on_error=self._on_error == "raise")
        self._backend.start(task)
        dispatcher = _Dispatcher(self._backend, task, groups)
        try:
            with _graceful_interrupt(dispatcher.stop_dispatching) as interrupted:
                for result in dispatcher.results():
                    self._take(result)
                    if self._on_error == "raise" and self._failed:
                        dispatcher.stop_dispatching()
        except BaseException as error:
            self._backend.stop(now=True)
            if interrupted.is_set() and not isinstance(error, (StoreError, KeyboardInterrupt)):
                # The same Ctrl-C reached workers that were only starting, and the pool gave up.
                raise KeyboardInterrupt from error
            raise
        self._backend.stop()
        if interrupted.is_set() and not dispatcher.done:
            raise KeyboardInterrupt

    def _take(self, result: BatchResult) -> None:
        self.plugins.count_errors(result.plugin_errors)
        for record in result.records:
            self._take_record(record)
        if self._first_exception is None:
            self._first_exception = result.exception or _stand_in(result.records)

    def _take_record(self, record: IndexRecord) -> None:
        if record.status == "completed":
            self._outputs[record.index] = list(record.output_paths)
            self._completed += not record.cached
            self._cached += record.cached
        else:
            assert record.error is not None
            self._failed[record.index] = record.error
        self.plugins.call_contained("psnc_index_reported", run=self.run_state, record=record)

    # --- after --------------------------------------------------------------------------------

    def _finish(self, started: float, interrupted: bool) -> None:
        run = self.run_state
        run.release_workers()
        run.in_session = False
        failure = self._write_out(interrupted)
        self.summary = RunSummary(
            requested=len(set(self._requested)),
            completed=self._completed,
            cached=self._cached,
            failed=dict(sorted(self._failed.items())),
            elapsed_s=perf_counter() - started,
            interrupted=interrupted,
            plugin_errors=self.plugins.errors_since(self._errors_before),
            db_path=shown_url(self.pipeline.store_url) if run.store is not None else None,
        )
        self.plugins.call_contained("psnc_run_done", run=run, summary=self.summary)
        # Those of psnc_run_done itself too.
        self.summary = attrs.evolve(
            self.summary, plugin_errors=self.plugins.errors_since(self._errors_before)
        )
        if failure is not None and not isinstance(sys.exc_info()[1], StoreError):
            raise failure

    def _write_out(self, interrupted: bool) -> StoreError | None:
        """Have everything in the store, and return the error if that cannot be."""
        run = self.run_state
        if run.store is None:
            return None
        try:
            run.store.flush()
            if interrupted:
                run.store.invocation_over(run.invocation_id)
        except StoreError as error:
            return error
        return None


@attrs.frozen
class _Flight:
    """A batch on its way, those of its indices that run after it, and whether it ran before."""

    batch: tuple[int, ...]
    after: tuple[int, ...] = ()
    again: bool = False


class _Dispatcher:
    """Feeds batches to a backend and yields what comes back, until all is done.

    A batch grows with the measured speed of its indices, and shrinks towards the end of the run
    so that the workers end together. A group that must stay together is never split, except
    after a worker died over it: what is left of that batch then runs one index at a time, so
    that only the index that kills its worker is lost.
    """

    def __init__(
        self, backend: Backend, task: WorkerTask, groups: Sequence[tuple[int, ...]]
    ) -> None:
        self._backend = backend
        self._task = task
        self._groups = deque(groups)
        self._left = sum(len(group) for group in groups)
        self._suspects: deque[tuple[int, ...]] = deque()
        self._running: dict[Future[BatchResult], _Flight] = {}
        self._seconds_per_index: float | None = None
        self._stopping = False
        self._cut_short = False

    def results(self) -> Iterable[BatchResult]:
        """Yield results as they come."""
        self._dispatch()
        while self._running:
            done, _ = wait(self._running, _ANSWER_SIGNALS_S, return_when=FIRST_COMPLETED)
            for future in done:
                yield self._outcome(future, self._running.pop(future))
                self._dispatch()

    @property
    def done(self) -> bool:
        """Whether every index has come back."""
        return not (self._groups or self._suspects or self._running or self._cut_short)

    def stop_dispatching(self) -> None:
        """Start nothing more, and let workers of this process end after their present index."""
        self._stopping = True
        self._task.stop_requested.set()

    def _dispatch(self) -> None:
        while not self._stopping and len(self._running) < self._capacity():
            if self._suspects:
                first, *rest = self._suspects.popleft()
                self._submit(_Flight((first,), after=tuple(rest), again=True))
            elif self._groups:
                self._submit(_Flight(self._next_batch()))
            else:
                return

    def _submit(self, flight: _Flight) -> None:
        self._running[self._backend.submit(flight.batch)] = flight

    def _capacity(self) -> int:
        # Before the first result nothing is known of the indices: one batch a worker.
        # Long ones need none waiting either, and an interrupt should find none.
        known_and_short = (self._seconds_per_index or _BATCH_S) < _BATCH_S
        in_flight = _BATCHES_PER_WORKER if known_and_short else 1
        return 1 if self._backend.n_jobs == 1 else self._backend.n_jobs * in_flight

    def _next_batch(self) -> tuple[int, ...]:
        batch = list(self._groups.popleft())
        size = self._batch_size()
        while self._groups and len(batch) + len(self._groups[0]) <= size:
            batch += self._groups.popleft()
        self._left -= len(batch)
        return tuple(batch)

    def _batch_size(self) -> int:
        if self._seconds_per_index is None:
            return 1
        by_time = int(_BATCH_S / max(self._seconds_per_index, 1e-7))
        by_share = self._left // (self._backend.n_jobs * _BATCHES_PER_WORKER)
        return max(1, min(by_time, by_share))

    def _outcome(self, future: Future[BatchResult], flight: _Flight) -> BatchResult:
        error = future.exception()
        if isinstance(error, WorkerDiedError):
            return self._after_death(error, flight)
        if error is not None:
            raise error
        result = future.result()
        self._require_result_of(flight.batch, result)
        self._learn(result)
        self._cut_short |= len(result.records) < len(flight.batch)
        if flight.after:
            self._suspects.append(flight.after)
        if flight.again:
            # What the store knew by now was done by the worker that died, in this very run.
            records = [attrs.evolve(record, cached=False) for record in result.records]
            result = attrs.evolve(result, records=records)
        return result

    def _require_result_of(self, batch: tuple[int, ...], result: Any) -> None:
        """Refuse what would pass for a run of all indices, and is not."""
        name = type(self._backend).__qualname__
        if not isinstance(result, BatchResult):
            raise BackendError(
                f"backend {name} answers a batch with {type(result).__qualname__!r}: give its "
                "future what the task returned"
            )
        ended = tuple(record.index for record in result.records)
        may_be_cut_short = self._stopping or self._task.stop_on_error
        if ended != (batch[: len(ended)] if may_be_cut_short else batch):
            raise BackendError(
                f"backend {name} answers a batch of {len(batch)} indices with the records of "
                f"{len(ended)}, or of others: call the task once, with all indices of the batch"
            )

    def _after_death(self, error: WorkerDiedError, flight: _Flight) -> BatchResult:
        self._task.worker_died(error.pid)
        if len(flight.batch) > 1:
            self._suspects.append(flight.batch)
            return BatchResult([])
        if flight.after:
            self._suspects.append(flight.after)
        index = flight.batch[0]
        store = self._task.run.store
        paths = None if store is None else store.lookup(index)
        if paths is not None:
            # The worker died between recording the index and handing it in.
            return BatchResult([IndexRecord(index, "completed", tuple(paths), recorded=True)])
        return BatchResult([IndexRecord(index, "error", error=error_text(error))])

    def _learn(self, result: BatchResult) -> None:
        """Follow the speed of the indices, the latest batch counting half."""
        if result.records:
            latest = result.elapsed_s / len(result.records)
            earlier = self._seconds_per_index
            self._seconds_per_index = latest if earlier is None else (latest + earlier) / 2


@contextmanager
def _graceful_interrupt(stop: Callable[[], None]) -> Iterator[threading.Event]:
    """Have the first Ctrl-C call ``stop``, and only the second raise ``KeyboardInterrupt``.

    Nothing changes in other threads than the main one, which alone may handle signals, nor where
    the caller has a way of its own with Ctrl-C.
    """
    interrupted = threading.Event()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupted
        return

    def handle(signal_number: int, frame: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        stop()
        # Not print: a signal may arrive while that very stream is being written to.
        with suppress(OSError):  # nobody to tell
            os.write(2, b"\npsnc: letting the indices at work end; Ctrl-C again ends them now\n")

    earlier = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, earlier)


def _normalised(pipeline: Pipeline[Any], indices: Iterable[int] | None) -> list[int]:
    total = len(pipeline.source)
    if indices is None:
        return list(range(total))
    if not isinstance(indices, Iterable):
        raise PipelineError(f"indices={indices!r}: give a list or a range of indices")
    return [pipeline.normalise(index, total) for index in indices]


def _make_backend(
    plugins: PluginManager, name: str | None, n_jobs: int, options: dict[str, Any]
) -> Backend:
    if not isinstance(n_jobs, int) or (n_jobs < 1 and n_jobs != -1):
        raise BackendError(f"n_jobs={n_jobs!r}: give a number of workers, or -1 for one a CPU")
    if n_jobs == -1:
        n_jobs = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    if name is None:
        name = "sequential" if n_jobs == 1 else "process_pool"
    backend_class = plugins.backend_class(name)
    if not (isinstance(backend_class, type) and issubclass(backend_class, Backend)):
        raise BackendError(
            f"backend {name!r} is {backend_class!r}, which is no psnc.Backend: derive it from "
            "that, in the plugin that offers it (psnc backends)"
        )
    try:
        backend: Backend = backend_class(n_jobs, **options)
    except TypeError as error:
        given = ", ".join(sorted(options)) or "none"
        raise BackendError(
            f"backend {name!r} does not take these options ({given}): {error}"
        ) from error
    return backend


def _begin(
    pipeline: Pipeline[Any],
    plugins: PluginManager,
    resume: bool | None,
    db_dir: str | os.PathLike[str] | None,
    store: str | None,
) -> Run:
    """Open the run, and have the caller's pipeline object ask its questions of it."""
    overrides: dict[str, Any] = {}
    if resume is not None and resume != pipeline.resume:
        overrides["resume"] = resume
    if db_dir is not None:
        overrides |= {"db_dir": db_dir, "db_file": None, "store": None}
    if store is not None:
        overrides |= {"store": store, "db_file": None}
    chosen = attrs.evolve(pipeline, **overrides) if overrides else pipeline
    earlier: Run | None = pipeline.__dict__.get("_run")
    if earlier is not None and earlier.pid == os.getpid():
        if earlier.in_session:
            raise PipelineError(
                "this pipeline is running in another thread already: wait for it, or run a copy"
            )
        earlier.close()
    run = Run(chosen, plugins)
    run.open_store(create=True)
    adopt(run)
    pipeline.__dict__["_run"] = run
    return run


def _stand_in(records: Sequence[IndexRecord]) -> BaseException | None:
    """Make an exception of a recorded error whose own exception stayed in another process."""
    for record in records:
        if record.error is not None:
            return PsncError(f"index {record.index} failed: {record.error}")
    return None
