"""One run: which indices, in which batches, on which backend; the driver of everything."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any, Literal, overload

import attrs

from psnc.backend import Backend
from psnc.claims import ALL
from psnc.code_change import OnCodeChange, answer_code_change, require_on_code_change
from psnc.dispatcher import Dispatcher
from psnc.driver_claim import DriverClaim
from psnc.errors import (
    BackendError,
    PipelineError,
    PluginError,
    PsncError,
    StoreError,
    TooManyFailuresError,
)
from psnc.index_ranges import ranges_text
from psnc.interruption import interruptible, terminable
from psnc.manager import PluginManager, plugin_manager
from psnc.output_facts import VerifyLevel
from psnc.partition import partition
from psnc.pipeline import Pipeline
from psnc.records import IndexRecord, RunSummary
from psnc.retries import RetryPolicy
from psnc.run import Run, adopt
from psnc.shards import Shard
from psnc.store import shown_url
from psnc.verification import require_level, reset_lost_indices
from psnc.worker import BatchResult, WorkerTask
from psnc.worker_map import lent_to_stages

__all__ = ["Session", "run_pipeline"]


@overload
def run_pipeline(
    pipeline: Pipeline[Any],
    n_jobs: int = 1,
    backend: str | None = None,
    indices: Iterable[int] | None = None,
    resume: bool | None = None,
    db_dir: str | os.PathLike[str] | None = None,
    store: str | None = None,
    retries: int = 0,
    retry_on: type[BaseException] | tuple[type[BaseException], ...] = BaseException,
    retry_delay: float = 1.0,
    timeout: float | None = None,
    max_failures: int | None = None,
    grace: float | None = None,
    verify: VerifyLevel | None = None,
    on_error: Literal["continue", "raise"] = "continue",
    on_code_change: OnCodeChange = "warn",
    progress: bool | None = None,
    shard: str | tuple[int, int] | None = None,
    *,
    collect: Literal[True] = True,
    **backend_options: Any,
) -> list[list[str]]: ...


@overload
def run_pipeline(
    pipeline: Pipeline[Any],
    n_jobs: int = 1,
    backend: str | None = None,
    indices: Iterable[int] | None = None,
    *,
    collect: Literal[False],
    **options: Any,
) -> RunSummary: ...


def run_pipeline(
    pipeline: Pipeline[Any],
    n_jobs: int = 1,
    backend: str | None = None,
    indices: Iterable[int] | None = None,
    resume: bool | None = None,
    db_dir: str | os.PathLike[str] | None = None,
    store: str | None = None,
    retries: int = 0,
    retry_on: type[BaseException] | tuple[type[BaseException], ...] = BaseException,
    retry_delay: float = 1.0,
    timeout: float | None = None,
    max_failures: int | None = None,
    grace: float | None = None,
    verify: VerifyLevel | None = None,
    on_error: Literal["continue", "raise"] = "continue",
    on_code_change: OnCodeChange = "warn",
    progress: bool | None = None,
    shard: str | tuple[int, int] | None = None,
    *,
    collect: bool = True,
    **backend_options: Any,
) -> list[list[str]] | RunSummary:
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
    retries : int
        How many more attempts an index has in this run that fails, or ends its worker.
    retry_on : exception class or tuple of them
        The errors that are worth another attempt, by default all. The end of a worker counts as
        :class:`psnc.WorkerDiedError`, that of an index by ``timeout`` as
        :class:`psnc.IndexTimeoutError`, which derives from it.
    retry_delay : float
        Seconds before the second attempt, less a random share of up to a half; twice as long before
        each further one, a minute at the most. Other indices run meanwhile.
    timeout : float, optional
        Seconds that an index may take. One that takes longer has failed, and its worker process is
        ended. With one job this makes ``"process_pool"`` the default backend.
    max_failures : int, optional
        End the run when so many indices have failed for good.
    grace : float, optional
        Seconds that the indices at work have after a Ctrl-C or SIGTERM, before they are ended. By
        default as long as they take.
    verify : {"exists", "size", "checksum"}, optional
        Run completed indices again whose outputs, or whose filters' files, are not there any more;
        or have another size than was recorded; or another content. Contents are recorded only in
        runs with ``"checksum"``.
    on_error : {"continue", "raise"}
        Whether a failing index leaves the others alone, or ends the run.
    on_code_change : {"warn", "error", "rerun", "ignore"}
        What to do if a stage's code is another than it was as completed indices ran: say so, raise
        :class:`psnc.CodeChangedError`, run them again, or nothing.
    progress : bool, optional
        Show progress on standard error; by default if that is a terminal.
    shard : str or tuple of int, optional
        Only a part of ``indices``, for several drivers that share them: ``"3/16"`` or ``(3, 16)``
        for the third of sixteen. The parts are as equal as possible, and part no indices that
        belong together.
    collect : bool
        Whether to return the output paths of every index. Without them the driver needs no more
        memory for a million finished indices than for ten.
    **backend_options
        What the backend takes besides.

    Returns
    -------
    list of list of str
        The sink's output paths in the order of ``indices``, or of those in the shard; empty for an
        index that failed. With ``collect=False`` a :class:`psnc.RunSummary` instead: how many ran,
        and which failed.

    Raises
    ------
    PsncError
        If the run cannot start, or cannot be recorded.
    DriverConflictError
        If another driver is at work on some of the indices, or has taken them over.
    OutputError
        If an output cannot be read that ``verify`` has to look at.
    TooManyFailuresError
        After ``max_failures``, once the indices at work have ended.
    KeyboardInterrupt
        After a Ctrl-C, once the indices at work have ended. A second Ctrl-C ends them.
    RunTerminated
        After SIGTERM likewise. It is a ``SystemExit`` with code 143.
    """
    session = Session(
        pipeline,
        n_jobs=n_jobs,
        backend=backend,
        indices=indices,
        resume=resume,
        db_dir=db_dir,
        store=store,
        policy=RetryPolicy(retries, retry_on, retry_delay),
        timeout=timeout,
        max_failures=max_failures,
        grace=grace,
        verify=verify,
        on_error=on_error,
        on_code_change=on_code_change,
        progress=progress,
        shard=shard,
        collect=collect,
        backend_options=backend_options,
    )
    summary = session.run()
    return session.results() if collect else summary


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
        policy: RetryPolicy | None = None,
        timeout: float | None = None,
        max_failures: int | None = None,
        grace: float | None = None,
        verify: VerifyLevel | None = None,
        on_error: Literal["continue", "raise"] = "continue",
        on_code_change: OnCodeChange = "warn",
        progress: bool | None = None,
        shard: str | tuple[int, int] | None = None,
        collect: bool = True,
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
        _require_limits(timeout, max_failures, grace)
        require_on_code_change(on_code_change)
        require_level(verify)
        self.plugins = plugin_manager()
        self._policy = policy or RetryPolicy()
        self._timeout = timeout
        self._max_failures = max_failures
        self._grace = grace
        self._on_error = on_error
        self._on_code_change = on_code_change
        if backend is None and timeout is not None:
            backend = "process_pool"
        self._backend = _make_backend(self.plugins, backend, n_jobs, backend_options or {})
        if timeout is not None and not self._backend.enforces_timeout:
            raise BackendError(
                f"backend {backend!r} cannot end an index that takes longer than timeout={timeout}"
                ": choose 'process_pool', or give no timeout"
            )
        # Before anything is made: what is asked for may not exist.
        self._asked_for = _normalised(pipeline, indices)
        self._requested = _in_shard(pipeline, self._asked_for, shard)
        self._distinct = _distinct(self._requested)
        self._claimed = ALL if indices is shard is None else ranges_text(self._distinct)
        self.run_state = _begin(pipeline, self.plugins, resume, db_dir, store)
        self.run_state.show_progress = progress
        self.run_state.verify = verify
        self.pipeline = self.run_state.pipeline
        self._collect = collect
        self._earlier: Mapping[int, list[str]] = {}
        self._outputs: dict[int, list[str]] = {}
        self._failed: dict[int, str] = {}
        self._completed = 0
        self._cached = 0
        self._retries = 0
        self._quarantined: dict[int, int] = {}
        self._lost_outputs: dict[int, str] = {}
        self._first_exception: BaseException | None = None
        # Whether the backend has workers that nobody has ended.
        self._has_workers = False
        self._errors_before = self.plugins.errors_told()
        self.summary: RunSummary | None = None

    def run(self) -> RunSummary:
        """Run what is not completed, and return how it went."""
        run = self.run_state
        run.in_session = True
        try:
            with self._claiming() as claim:
                self._run_claimed(claim)
        finally:
            run.in_session = False
        assert self.summary is not None
        if self._has_failed_too_often():
            raise TooManyFailuresError(
                f"{len(self._failed)} indices failed, and max_failures={self._max_failures}: see "
                "why (failed_indices, psnc errors), and resume"
            )
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
        """Return output paths in the order in which the indices were asked for.

        Raises
        ------
        PipelineError
            If they were not collected.
        """
        if not self._collect:
            raise PipelineError(
                "this run kept no output paths: ask the pipeline for them "
                "(output_paths_for_index), or run with collect=True"
            )
        earlier, own = self._earlier, self._outputs
        return [own[i] if i in own else earlier.get(i, []) for i in self._requested]

    def left_of_all_shards(self) -> int:
        """Return how many indices are not completed of those asked for, whatever the shard."""
        store = self.run_state.store
        completed = self._outputs.keys() if store is None else store.completed_indices()
        return len(set(self._asked_for) - completed)

    # --- before -------------------------------------------------------------------------------

    def _claiming(self) -> AbstractContextManager[DriverClaim | None]:
        run = self.run_state
        if run.store is None:
            return nullcontext()
        # Not every store can tell.
        run_id = getattr(run.store, "run_id", None)
        of_place = f"of {shown_url(self.pipeline.store_url)}"
        run_name = f"the run {of_place}" if run_id is None else f"run {run_id} {of_place}"
        return DriverClaim(run.store, run.invocation_id, self._claimed, run_name)

    def _take_completed(self) -> Sequence[int]:
        """Take earlier results over, and return the distinct indices that are left to run."""
        store = self.run_state.store
        if store is None:
            return self._distinct
        completed = store.completed_outputs() if self._collect else store.completed_indices()
        if not completed:
            return self._distinct
        left = [index for index in self._distinct if index not in completed]
        self._cached = len(self._distinct) - len(left)
        if isinstance(completed, Mapping):
            asked_for_all = self._cached == len(completed)
            self._earlier = completed if asked_for_all else _among(completed, self._distinct)
        return _as_range(left)

    def _answer_code_change(self) -> None:
        run = self.run_state
        if run.store is not None:
            answer_code_change(run.store, run.code, self._distinct, self._on_code_change)

    def _verify_completed(self) -> None:
        """Forget those indices whose outputs are gone or changed, if that is asked for."""
        level = self.run_state.verify
        if level is not None:
            self._lost_outputs = reset_lost_indices(self.run_state, self._distinct, level)

    # --- during -------------------------------------------------------------------------------

    def _run_claimed(self, claim: DriverClaim | None) -> None:
        started = perf_counter()
        interrupted = True
        try:
            self._drive(claim)
            interrupted = False
        finally:
            try:
                if self._has_workers:
                    self._backend.stop(now=True)
            finally:
                self._finish(started, interrupted)

    def _drive(self, claim: DriverClaim | None) -> None:
        try:
            self._answer_code_change()
            # Before the sink gets ready, which may lay out anew what is gone.
            self._verify_completed()
            # First, and also if nothing is left to run: a sink may know that what is recorded as
            # completed does not stand any more.
            with terminable(), lent_to_stages(self._map):
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
        task = WorkerTask(
            self.run_state,
            stop_on_error=self._on_error == "raise",
            policy=self._policy,
            timeout=self._timeout,
            max_failures=self._max_failures,
            group_ends=_ends_of(groups),
        )
        try:
            self._run_batches(task, groups, claim)
        finally:
            task.remove_shared_directory()

    def _map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        # One that calls here, as it was given to, has started nothing.
        self._has_workers = type(self._backend).map is not Backend.map
        return self._backend.map(function, items)

    def _run_batches(
        self, task: WorkerTask, groups: Collection[tuple[int, ...]], claim: DriverClaim | None
    ) -> None:
        self._backend.start(task)
        self._has_workers = True
        on_wake = _nothing if claim is None else claim.require
        dispatcher = Dispatcher(
            self._backend, task, groups, self._policy, self._take_retry, on_wake
        )
        self._quarantined = dispatcher.quarantined
        try:
            with interruptible(dispatcher.stop_dispatching, self._grace) as interruption:
                for result in dispatcher.results():
                    self._take(result)
                    if self._ends_early():
                        dispatcher.stop_dispatching()
        except BaseException as error:
            self._backend.stop(now=True)
            self._has_workers = False
            if interruption.is_set() and isinstance(error, Exception):
                if isinstance(error, StoreError):
                    raise
                # The same signal reached workers that were only starting, and the pool gave up.
                raise interruption.error() from error
            raise
        self._backend.stop()
        self._has_workers = False
        if interruption.is_set() and not dispatcher.done:
            raise interruption.error()

    def _ends_early(self) -> bool:
        return bool(self._on_error == "raise" and self._failed) or self._has_failed_too_often()

    def _has_failed_too_often(self) -> bool:
        return self._max_failures is not None and len(self._failed) >= self._max_failures

    def _take_retry(self, record: IndexRecord, attempt: int, pause_s: float) -> None:
        self._retries += 1
        self.plugins.call_contained(
            "psnc_index_retried",
            run=self.run_state,
            record=record,
            attempt=attempt,
            pause_s=pause_s,
        )

    def _take(self, result: BatchResult) -> None:
        self.plugins.count_errors(result.plugin_errors)
        for record in result.records:
            self._take_record(record)
        if self._first_exception is None:
            self._first_exception = result.exception or _stand_in(result.records)

    def _take_record(self, record: IndexRecord) -> None:
        if record.status == "completed":
            if self._collect:
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
            requested=len(self._distinct),
            completed=self._completed,
            cached=self._cached,
            failed=dict(sorted(self._failed.items())),
            elapsed_s=perf_counter() - started,
            interrupted=interrupted,
            plugin_errors=self.plugins.errors_since(self._errors_before),
            db_path=shown_url(self.pipeline.store_url) if run.store is not None else None,
            retries=self._retries,
            quarantined=dict(self._quarantined),
            lost_outputs=self._lost_outputs,
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


def _normalised(pipeline: Pipeline[Any], indices: Iterable[int] | None) -> Sequence[int]:
    total = len(pipeline.source)
    if indices is None:
        return range(total)
    if isinstance(indices, range) and all(
        0 <= end < total for end in (*indices[:1], *indices[-1:])
    ):
        return indices
    if not isinstance(indices, Iterable):
        raise PipelineError(f"indices={indices!r}: give a list or a range of indices")
    return [pipeline.normalise(index, total) for index in indices]


def _in_shard(
    pipeline: Pipeline[Any], indices: Sequence[int], shard: str | tuple[int, int] | None
) -> Sequence[int]:
    if shard is None:
        return indices
    own = Shard.of(shard)
    assert pipeline.sink is not None
    # Of all, whatever is completed, so that all drivers divide in the same way.
    distinct = _distinct(indices)
    chosen = own.indices(partition(pipeline.source, pipeline.sink, distinct)) if distinct else ()
    left = [index for index in indices if index in chosen]
    return _as_range(left) if indices is distinct else left


def _nothing() -> None:
    pass


def _distinct(indices: Sequence[int]) -> Sequence[int]:
    """Return indices in order and once each."""
    if isinstance(indices, range):
        return indices if indices.step > 0 else indices[::-1]
    return sorted(set(indices))


def _as_range(indices: list[int]) -> Sequence[int]:
    """Return sorted, distinct indices as a range, which takes no memory, if they are one."""
    if indices and indices[-1] - indices[0] == len(indices) - 1:
        return range(indices[0], indices[-1] + 1)
    return indices


def _among(outputs: Mapping[int, list[str]], indices: Sequence[int]) -> dict[int, list[str]]:
    return {index: outputs[index] for index in indices if index in outputs}


def _ends_of(groups: Collection[tuple[int, ...]]) -> frozenset[int] | None:
    """Return the last index of each group; ``None`` where each index is a group."""
    if all(len(group) == 1 for group in groups):
        return None
    return frozenset(group[-1] for group in groups)


def _require_limits(timeout: float | None, max_failures: int | None, grace: float | None) -> None:
    if timeout is not None and not (isinstance(timeout, (int, float)) and 0 < timeout < 1e8):
        raise PipelineError(f"timeout={timeout!r}: give seconds, more than 0")
    if grace is not None and not (isinstance(grace, (int, float)) and 0 <= grace < 1e8):
        raise PipelineError(f"grace={grace!r}: give seconds, 0 or more")
    if max_failures is None:
        return
    if not isinstance(max_failures, int) or isinstance(max_failures, bool) or max_failures < 1:
        raise PipelineError(f"max_failures={max_failures!r}: give a number of indices, at least 1")


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
