"""What a worker does with a batch of indices, in whichever process it lives."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Sequence
from time import perf_counter, perf_counter_ns
from typing import Any, Self

import cloudpickle
from attrs import Factory, define, field, frozen

from psnc import manager
from psnc.errors import INTERRUPTS, PipelineError, StoreError
from psnc.execution import error_text, execute, execute_untracked
from psnc.pipeline import Pipeline
from psnc.records import IndexRecord
from psnc.run import Run, adopt
from psnc.stages import stage_name

__all__ = ["BatchResult", "WorkerTask"]


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
    """

    records: list[IndexRecord]
    plugin_errors: dict[str, int] = Factory(dict)
    elapsed_s: float = 0.0
    exception: BaseException | None = None


@define
class WorkerTask:
    """A pipeline and the settings it runs under, brought to every worker once.

    Calling it with indices runs them in order in this process.
    """

    run: Run
    stop_on_error: bool
    stop_requested: threading.Event = field(factory=threading.Event)
    away: bool = False

    def __call__(self, indices: Sequence[int]) -> BatchResult:
        """Run a batch; everything recorded is in the store when it returns.

        Raises
        ------
        StoreError
            If the store cannot take a record.
        """
        started = perf_counter()
        records: list[IndexRecord] = []
        exception = None
        run_one = execute if self.run.pipeline.track_metrics else _execute_untracked
        for index in indices:
            if self.stop_requested.is_set():
                break
            record, exception = run_one(self.run, index)
            records.append(record)
            if exception is not None:
                if self.stop_on_error:
                    break
                _let_go(exception)
        if self.run.store is not None:
            self.run.store.flush()
        kept = exception if self.stop_on_error and self._can_travel(exception) else None
        elapsed_s = perf_counter() - started
        return BatchResult(records, self._take_plugin_errors(), elapsed_s, kept)

    def worker_died(self, pid: int | None) -> None:
        """Have it on record that a worker process is at no index any more."""
        if self.run.store is not None and pid is not None:
            self.run.store.worker_gone(self.run.invocation_id, pid)

    def to_bytes(self) -> bytes:
        """Serialise for another process; classes of ``__main__`` and notebooks travel by value."""
        run = self.run
        settings = (run.plugins.config, run.invocation_id, self.stop_on_error)
        try:
            pipeline_bytes = cloudpickle.dumps(run.pipeline)
        except Exception as error:
            raise PipelineError(
                f"{_culprit(run.pipeline)} cannot be sent to another process "
                f"({type(error).__name__}: {error}): open such things when they are first used, or "
                "run with backend='thread_pool'"
            ) from error
        return pickle.dumps((dict(os.environ), list(sys.path), settings, pipeline_bytes))

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Set this process up as a worker: its plugins, its store, its copy of the pipeline."""
        environment, path, settings, pipeline_bytes = pickle.loads(content)
        config, invocation_id, stop_on_error = settings
        # A worker may descend from a server process that was started under another environment.
        os.environ.clear()
        os.environ.update(environment)
        # Plugins and stages are imported by name, from wherever the driver finds them.
        sys.path.extend(place for place in path if place not in sys.path)
        plugins = manager.activate(config)
        try:
            pipeline = cloudpickle.loads(pipeline_bytes)
        except Exception as error:
            raise PipelineError(
                f"a worker process cannot put the pipeline together ({type(error).__name__}: "
                f"{error}): see that what its stages need is there too"
            ) from error
        run = Run(pipeline, plugins, invocation_id)
        run.in_session = True
        try:
            run.open_store(create=False)
        except StoreError:
            # Another host, or a directory that is not mounted here: the records go home with
            # the results, and the driver, which does reach the store, writes them.
            run.store = None
        adopt(run)
        return cls(run, stop_on_error, away=True)

    def close(self) -> None:
        """Take leave: write what waits, let plugins clean up. For the end of another process."""
        self.run.close()
        manager.deactivate()

    def _can_travel(self, exception: BaseException | None) -> bool:
        """Tell whether an exception arrives in the driver as what it is."""
        if not self.away:
            return True
        try:
            return type(pickle.loads(pickle.dumps(exception))) is type(exception)
        except Exception:  # whatever its class does when it is pickled
            return False

    def _take_plugin_errors(self) -> dict[str, int]:
        if not self.away:
            return {}
        taken = dict(self.run.plugins.errors)
        self.run.plugins.errors.clear()
        return taken


def _let_go(exception: BaseException | None) -> None:
    """Free what the frames of a failed index hold, which may be much, without waiting for gc."""
    while exception is not None:
        exception.__traceback__ = None
        exception = exception.__cause__ or exception.__context__


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
