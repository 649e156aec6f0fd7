"""What a worker does with a batch of indices, in whichever process it lives."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Sequence
from time import perf_counter, perf_counter_ns
from typing import Any, Self

import attrs
import cloudpickle
from attrs import Factory, define, field, frozen

from psnc import manager
from psnc.config import Config
from psnc.errors import INTERRUPTS, PipelineError, StoreError
from psnc.execution import error_text, execute, execute_untracked
from psnc.manager import PluginManager
from psnc.pipeline import Pipeline
from psnc.records import IndexRecord
from psnc.retries import RetryPolicy
from psnc.run import Run, adopt
from psnc.stages import stage_name
from psnc.stop_flag import StopFlag
from psnc.time_limit import LastWords, TimeLimit, last_words

__all__ = ["BatchResult", "Surroundings", "WorkerTask"]

# What every worker has to know of the run besides the pipeline.
_LIMITS = ("stop_on_error", "policy", "timeout", "max_failures", "group_ends")

# Twice as long as a batch should take.
_HAND_BACK_S = 0.2


@frozen
class BatchResult:
    """What came of one batch.

    Attributes
    ----------
    records : list of IndexRecord
        One for each index that ended, in order.
    plugin_errors : dict of str to int
        Hooks that raised in another process, by ``"plugin: hook"``.
    elapsed_s : float
        Wall-clock seconds of the whole batch, recording included.
    exception : BaseException, optional
        The error of the last record, for a run that ends on the first one.
    lasting_failures : frozenset of int
        Indices that failed, and would again: another attempt is not worth while.
    """

    records: list[IndexRecord]
    plugin_errors: dict[str, int] = Factory(dict)
    elapsed_s: float = 0.0
    exception: BaseException | None = None
    lasting_failures: frozenset[int] = frozenset()


@frozen
class Surroundings:
    """What another process must have of the driver's before it can import what is the user's.

    Attributes
    ----------
    environment : dict of str to str
        All variables: a worker may descend from a server process that was started under others.
    import_path : list of str
        From where the driver imports plugins and stages.
    config : Config
        The settings, which say what plugins there are.
    """

    environment: dict[str, str]
    import_path: list[str]
    config: Config

    @classmethod
    def here(cls, config: Config) -> Self:
        """Return those of this process."""
        return cls(dict(os.environ), list(sys.path), config)

    def take_on(self) -> PluginManager:
        """Make this process have them, plugins included."""
        global _taken_on
        if _taken_on != self:
            os.environ.clear()
            os.environ.update(self.environment)
            sys.path.extend(place for place in self.import_path if place not in sys.path)
            manager.activate(self.config)
            _taken_on = self
        return manager.plugin_manager()


# In a process that no run has begun in since.
_taken_on: Surroundings | None = None


@define
class WorkerTask:
    """A pipeline and the settings it runs under, brought to every worker once.

    Calling it with indices runs them in order in this process.

    Attributes
    ----------
    run : Run
        The pipeline at work in this process.
    stop_on_error : bool
        Whether the first error ends a batch.
    policy : RetryPolicy
        Which errors are worth another attempt.
    timeout : float, optional
        Seconds that an index may take, in another process.
    max_failures : int, optional
        After how many failures a batch is handed back, since they may have been too many.
    group_ends : frozenset of int, optional
        The indices after which a batch may be handed back unfinished, where not all are such.
    stop_requested : StopFlag
        Raised to have every worker end after its present index.
    away : bool
        Whether this is another process than the driver.
    """

    run: Run
    stop_on_error: bool
    policy: RetryPolicy = Factory(RetryPolicy)
    timeout: float | None = None
    max_failures: int | None = None
    group_ends: frozenset[int] | None = None
    stop_requested: StopFlag = field(factory=StopFlag)
    away: bool = False
    _time_limit: TimeLimit | None = None
    _directory: str | None = None

    def __call__(self, indices: Sequence[int]) -> BatchResult:
        """Run a batch; everything recorded is in the store when it returns.

        A batch that takes longer than the driver could foresee is handed back unfinished, so that
        other workers can have the rest, and an interrupt finds nothing that still waits.

        Raises
        ------
        StoreError
            If the store cannot take a record.
        """
        started = perf_counter()
        records: list[IndexRecord] = []
        exception = None
        failures = 0
        lasting_failures = set()
        for index in indices:
            if self.stop_requested.is_set() or self._is_long_enough(records, started):
                break
            if failures == self.max_failures:
                break
            record, exception = self._run_one(index)
            records.append(record)
            if exception is not None:
                failures += 1
                if not self.policy.is_worth_it(exception):
                    lasting_failures.add(index)
                if self.stop_on_error:
                    break
                _let_go(exception)
        if self.run.store is not None:
            self.run.store.flush()
        can_be_kept = not self.away or _can_travel(exception)
        kept = exception if self.stop_on_error and can_be_kept else None
        elapsed_s = perf_counter() - started
        plugin_errors = self._take_plugin_errors()
        return BatchResult(records, plugin_errors, elapsed_s, kept, frozenset(lasting_failures))

    def _is_long_enough(self, records: list[IndexRecord], started: float) -> bool:
        if not records or perf_counter() - started < _HAND_BACK_S:
            return False
        return self.group_ends is None or records[-1].index in self.group_ends

    def _run_one(self, index: int) -> tuple[IndexRecord, BaseException | None]:
        run_one = execute if self.run.pipeline.track_metrics else _execute_untracked
        if self._time_limit is None:
            return run_one(self.run, index)
        with self._time_limit.over(index):
            return run_one(self.run, index)

    def worker_died(self, pid: int | None) -> None:
        """Have it on record that a worker process is at no index any more."""
        if self.run.store is not None and pid is not None:
            self.run.store.worker_gone(self.run.invocation_id, pid)

    def last_words(self, pid: int | None) -> LastWords | None:
        """Return what a worker process left behind that its time limit ended."""
        if self._directory is None or pid is None:
            return None
        return last_words(self._directory, pid)

    def to_bytes(self) -> bytes:
        """Serialise for another process; classes of ``__main__`` and notebooks travel by value."""
        run = self.run
        settings = (run.invocation_id, run.verify)
        limits = attrs.asdict(self, recurse=False, filter=attrs.filters.include(*_LIMITS))
        try:
            pipeline_bytes = cloudpickle.dumps(run.pipeline)
        except Exception as error:
            raise PipelineError(
                f"{_culprit(run.pipeline)} cannot be sent to another process "
                f"({type(error).__name__}: {error}): open such things when they are first used, or "
                "run with backend='thread_pool'"
            ) from error
        # Exceptions of a script's own are among the limits.
        limits_bytes = cloudpickle.dumps(limits)
        where = (Surroundings.here(run.plugins.config), self._shared_directory())
        return pickle.dumps((where, settings, limits_bytes, pipeline_bytes))

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Set this process up as a worker: its plugins, its store, its copy of the pipeline."""
        where, settings, limits_bytes, pipeline_bytes = pickle.loads(content)
        surroundings, directory = where
        invocation_id, verify = settings
        global _taken_on
        plugins, _taken_on = surroundings.take_on(), None
        try:
            pipeline = cloudpickle.loads(pipeline_bytes)
        except Exception as error:
            raise PipelineError(
                f"a worker process cannot put the pipeline together ({type(error).__name__}: "
                f"{error}): see that what its stages need is there too"
            ) from error
        run = Run(pipeline, plugins, invocation_id)
        run.in_session = True
        run.verify = verify
        try:
            run.open_store(create=False)
        except StoreError:
            # Another host, or a directory that is not mounted here: the records go home with
            # the results, and the driver, which does reach the store, writes them.
            run.store = None
        adopt(run)
        limits = cloudpickle.loads(limits_bytes)
        task = cls(run, **limits, stop_requested=StopFlag.join(_flag_path(directory)), away=True)
        task._directory = directory
        if task.timeout is not None:
            task._time_limit = TimeLimit(task.timeout, directory)
        return task

    def share(self, directory: str | os.PathLike[str]) -> None:
        """Have the driver and its workers hear of each other by a directory of their own."""
        self._directory = os.fspath(directory)
        self.stop_requested.share(_flag_path(self._directory))

    def _shared_directory(self) -> str:
        if self._directory is None:
            self.share(tempfile.mkdtemp(prefix="psnc-run-"))
        assert self._directory is not None
        return self._directory

    def remove_shared_directory(self) -> None:
        """Leave nothing behind: for the driver once its workers have ended, or for its heirs."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def close(self) -> None:
        """Take leave: write what waits, let plugins clean up. For the end of another process."""
        self.run.close()
        manager.deactivate()

    def _take_plugin_errors(self) -> dict[str, int]:
        if not self.away:
            return {}
        taken = dict(self.run.plugins.errors)
        self.run.plugins.errors.clear()
        return taken


def _can_travel(exception: BaseException | None) -> bool:
    """Tell whether an exception arrives in another process as what it is."""
    try:
        return type(pickle.loads(pickle.dumps(exception))) is type(exception)
    except Exception:  # whatever its class does when it is pickled
        return False


def _let_go(exception: BaseException) -> None:
    """Free what the frames of a failed index hold, which may be much, without waiting for gc."""
    # Of exceptions that were raised from each other there are circles.
    seen: set[int] = set()
    left: list[BaseException | None] = [exception]
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            left += (each.__cause__, each.__context__)


def _flag_path(directory: str) -> str:
    return os.path.join(directory, "stop")


def _culprit(pipeline: Pipeline[Any]) -> str:
    """Name the stage that cannot be pickled."""
    for stage in (pipeline.source, *pipeline.filters, pipeline.sink):
        try:
            cloudpickle.dumps(stage)
        except Exception:
            return f"stage {stage_name(stage)}" if stage is not None else "the pipeline"
    return "the pipeline"


def _execute_untracked(run: Run, index: int) -> tuple[IndexRecord, BaseException | None]:
    started = perf_counter_ns()
    try:
        paths = execute_untracked(run, index)
    except INTERRUPTS:
        raise
    except BaseException as error:
        return IndexRecord(index, "error", error=error_text(error)), error
    elapsed_ns = perf_counter_ns() - started
    return IndexRecord(index, "completed", tuple(paths), "", elapsed_ns), None
