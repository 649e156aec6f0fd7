"""Every hook that psnc calls: the framework's table of contents.

Write a function of the same name, decorate it with ``psnc.hookimpl`` and take only the arguments
that you need::

    from psnc import hookimpl

    @hookimpl
    def psnc_index_done(context, record):
        if record.status == "error":
            alert(record.error)

**Processes.** The *driver* is the process that calls ``run_pipeline``. A *worker* is whatever runs
an index: the driver itself (sequential and thread backends, or a bare ``pipeline[i]``) or another
process. Every process loads the same plugins.

**Errors.** A hook that raises never changes an index's result and never stops a run by itself: the
error is logged once with the plugin's and the hook's name, and counted in the run's summary.
``--strict-plugins`` fails such a run at its end. One kind of error is not contained:
:class:`psnc.StoreError`, since a result that cannot be recorded must stop the run.
A hook marked *first result* asks plugin after plugin until one returns something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from psnc.backend import Backend
    from psnc.config import Config
    from psnc.execution import IndexContext
    from psnc.records import IndexRecord, LogRecord, RunSummary, StageRecord, WorkerInfo
    from psnc.run import Run
    from psnc.stages import Filter, Sink, Source, Stage
    from psnc.store import CheckpointStore

hookspec = pluggy.HookspecMarker("psnc")
hookimpl = pluggy.HookimplMarker("psnc")


# --- a process --------------------------------------------------------------------------------


@hookspec
def psnc_configure(config: Config) -> None:
    """Set up the plugin in this process, once, after every plugin is loaded.

    Fires in every process. An error here is contained like any other.
    """


@hookspec
def psnc_unconfigure(config: Config) -> None:
    """Clean up what ``psnc_configure`` set up, as the process ends.

    Fires in every process that ends in an orderly way; a killed one has no such moment.
    """


# --- what a plugin offers ---------------------------------------------------------------------


@hookspec
def psnc_sources() -> Mapping[str, type[Source[Any]] | str] | None:
    """Offer sources by name.

    Returns
    -------
    mapping
        Name to class, or to ``"module:Class"``, so that listing imports no heavy library.
    """


@hookspec
def psnc_filters() -> Mapping[str, type[Filter[Any, Any]] | str] | None:
    """Offer filters by name; see :func:`psnc_sources`."""


@hookspec
def psnc_sinks() -> Mapping[str, type[Sink[Any]] | str] | None:
    """Offer sinks by name; see :func:`psnc_sources`."""


@hookspec
def psnc_backends() -> Mapping[str, type[Backend] | str] | None:
    """Offer backends by name; see :func:`psnc_sources`. Asked in the driver.

    An error here is raised, since a run cannot start without its backend.
    """


@hookspec(firstresult=True)
def psnc_open_store(url: str, run: Run | None, create: bool) -> CheckpointStore | None:
    """Open the checkpoint store at a URL; *first result*. Fires in driver and worker.

    Parameters
    ----------
    url : str
        A path for the SQLite store; other stores answer to a scheme of their own, and return
        ``None`` for what is not theirs.
    run : Run, optional
        The run to record; ``None`` to look at what is there.
    create : bool
        Whether to make a store where there is none. A worker never does: what it cannot find is
        out of its reach, and its records go home to the driver.

    An error here is raised: it means that nothing could be recorded.
    """


# --- one run ----------------------------------------------------------------------------------


@hookspec
def psnc_run_start(run: Run, indices: Sequence[int], cached: int) -> None:
    """Fire in the driver before anything is dispatched.

    Parameters
    ----------
    run : Run
        The run.
    indices : sequence of int
        The indices about to run.
    cached : int
        How many of the requested indices were completed before.
    """


@hookspec
def psnc_run_done(run: Run, summary: RunSummary) -> None:
    """Fire in the driver when every index has been reported, or the run was cut short."""


@hookspec
def psnc_worker_start(run: Run, worker: WorkerInfo) -> None:
    """Fire in a worker, in each of its threads, before that thread's first index."""


@hookspec
def psnc_worker_done(run: Run, worker: WorkerInfo) -> None:
    """Fire in a worker that is released in an orderly way, once for each thread that worked."""


# --- one index --------------------------------------------------------------------------------


@hookspec(firstresult=True)
def psnc_index_lookup(run: Run, index: int) -> Sequence[str] | None:
    """Return the output paths of an earlier result, which ends the index; *first result*.

    Fires where the index would run. The built-in checkpoint answers from the store.
    """


@hookspec
def psnc_index_start(context: IndexContext) -> None:
    """Fire where the index runs, before its source is asked for anything."""


@hookspec
def psnc_stage_start(context: IndexContext, stage: Stage) -> None:
    """Fire where the index runs, once a stage and index, as the stage joins the chain.

    Stages are lazy: this is not the moment of a stage's first item.
    """


@hookspec
def psnc_stage_done(context: IndexContext, stage: Stage, record: StageRecord) -> None:
    """Fire where the index runs, once a stage and index, after the sink has returned or raised."""


@hookspec
def psnc_index_measure(context: IndexContext) -> Mapping[str, Any] | None:
    """Return named measurements of this index; fires where it runs, after its last stage.

    Returns
    -------
    mapping or None
        Names to JSON values. ``peak_memory_bytes`` and ``gpu_memory_bytes`` go to the database
        columns of that name, all others to ``measurements``. On equal names the plugin that
        was registered last wins.
    """


@hookspec
def psnc_log_record(context: IndexContext, record: LogRecord) -> None:
    """Fire where the index runs, for one captured log entry."""


@hookspec
def psnc_index_done(context: IndexContext, record: IndexRecord) -> None:
    """Fire where the index ran, after success or failure, with everything known of it.

    The built-in checkpoint writes the record here.
    """


@hookspec
def psnc_index_interrupted(context: IndexContext) -> None:
    """Fire where the index ran when ``KeyboardInterrupt`` or ``SystemExit`` ended it.

    That is no failure of the index: nothing of it is recorded, and it will run again.
    """


@hookspec
def psnc_index_reported(run: Run, record: IndexRecord) -> None:
    """Fire in the driver for each record that reaches it, in order of arrival.

    The place for progress and alerts. Results of earlier runs are not reported one by one.
    """
