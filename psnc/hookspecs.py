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

**Errors.** A hook's error is *contained* where its text says so: it changes no index's result and
stops no run; it is logged once with the plugin's and the hook's name, and counted in the run's
summary. ``--strict-plugins`` fails such a run at its end. Elsewhere it is *raised*: it ends the
command or the run with one line that names the plugin. One kind of error is raised by every hook:
:class:`psnc.StoreError`, since a result that cannot be recorded must stop the run.

**Order.** A plugin that was loaded later is called first; ``@hookimpl(tryfirst=True)`` and
``trylast`` change that. A hook marked *first result* asks plugin after plugin until one returns
something other than ``None``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from psnc.backend import Backend
    from psnc.config import Config
    from psnc.execution import IndexContext
    from psnc.options import OptionParser
    from psnc.records import IndexRecord, LogRecord, RunSummary, StageRecord, WorkerInfo
    from psnc.run import Run
    from psnc.stages import Filter, Sink, Source, Stage
    from psnc.store import CheckpointStore

hookspec = pluggy.HookspecMarker("psnc")
hookimpl = pluggy.HookimplMarker("psnc")


# --- a process --------------------------------------------------------------------------------


@hookspec
def psnc_addoptions(parser: OptionParser) -> None:
    """Declare the plugin's own options.

    ``psnc run --help`` shows them under the plugin's name, and the configuration file takes them as
    keys. Their values are in ``config.option(name)`` from ``psnc_configure`` on, in workers too.

    When: after every plugin is loaded, before the command line is read. A worker is given the
        values, and does not ask again.
    Process: driver.
    Result: none.
    Errors: raised.

    Parameters
    ----------
    parser : OptionParser
        Collects this plugin's options: ``parser.add_option("--alert-channel", default="#runs")``.
    """


@hookspec
def psnc_add_commands(cli: click.Group) -> None:
    """Add sub-commands to ``psnc``.

    When: when ``psnc`` lists its commands, or is given one that is not its own.
    Process: driver, under the ``psnc`` command only.
    Result: none.
    Errors: raised, but in ``psnc --help``, which says that the plugin failed.

    Parameters
    ----------
    cli : click.Group
        Takes a command by ``cli.add_command(command)``, or a function by ``@cli.command()``.
    """


@hookspec
def psnc_configure(config: Config) -> None:
    """Set the plugin up in this process.

    When: once, when every plugin is loaded and every option is known. A child that somebody else's
        code forks goes on with what its parent has set up.
    Process: driver and worker.
    Result: none.
    Errors: contained.

    Parameters
    ----------
    config : Config
        The settings, the same in every process of a run.
    """


@hookspec
def psnc_unconfigure(config: Config) -> None:
    """Clean up what ``psnc_configure`` set up.

    When: as the process ends in an orderly way; a killed one has no such moment.
    Process: driver and worker.
    Result: none.
    Errors: contained; logged, and too late for the run's summary.

    Parameters
    ----------
    config : Config
        The settings that ``psnc_configure`` was given.
    """


# --- what a plugin offers ---------------------------------------------------------------------


@hookspec
def psnc_sources() -> Mapping[str, type[Source[Any]] | str] | None:
    """Offer sources by name, for pipeline files and ``psnc stages``.

    When: when a source is looked up or listed by name.
    Process: driver and worker.
    Result: a mapping of names to classes, or to ``"module:Class"``, so that listing imports no
        heavy library. Of equal names the plugin loaded last wins.
    Errors: raised.
    """


@hookspec
def psnc_filters() -> Mapping[str, type[Filter[Any, Any]] | str] | None:
    """Offer filters by name, for pipeline files and ``psnc stages``.

    When: when a filter is looked up or listed by name.
    Process: driver and worker.
    Result: a mapping, as of ``psnc_sources``.
    Errors: raised.
    """


@hookspec
def psnc_sinks() -> Mapping[str, type[Sink[Any]] | str] | None:
    """Offer sinks by name, for pipeline files and ``psnc stages``.

    When: when a sink is looked up or listed by name.
    Process: driver and worker.
    Result: a mapping, as of ``psnc_sources``.
    Errors: raised.
    """


@hookspec
def psnc_backends() -> Mapping[str, type[Backend] | str] | None:
    """Offer backends by name, for ``run_pipeline(backend=…)`` and ``--backend``.

    When: as a run begins, or when backends are listed.
    Process: driver.
    Result: a mapping, as of ``psnc_sources``.
    Errors: raised.
    """


@hookspec(firstresult=True)
def psnc_open_store(url: str, run: Run | None, create: bool) -> CheckpointStore | None:
    """Open the checkpoint store at a URL.

    When: as a run begins, in each process, and when a command looks into a store.
    Process: driver and worker.
    Result: the store; ``None`` for a URL that is not this plugin's to open. First result.
    Errors: raised, since nothing could be recorded.

    Parameters
    ----------
    url : str
        A path for the SQLite store; other stores answer to a scheme of their own.
    run : Run, optional
        The run to record; ``None`` to look at what is there.
    create : bool
        Whether to make a store where there is none. A worker never does: what it cannot find is
        out of its reach, and its records go home to the driver.
    """


# --- one run ----------------------------------------------------------------------------------


@hookspec
def psnc_run_start(run: Run, indices: Sequence[int], cached: int) -> None:
    """Know that a run begins.

    When: once the sink is ready, before anything is dispatched.
    Process: driver.
    Result: none.
    Errors: contained.

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
    """Know that a run is over.

    When: when every index has been reported, or the run was cut short.
    Process: driver.
    Result: none.
    Errors: contained.

    Parameters
    ----------
    run : Run
        The run.
    summary : RunSummary
        How it went.
    """


@hookspec
def psnc_worker_start(run: Run, worker: WorkerInfo) -> None:
    """Know that a thread begins to run indices.

    When: before the thread's first index.
    Process: worker.
    Result: none.
    Errors: contained.

    Parameters
    ----------
    run : Run
        The run.
    worker : WorkerInfo
        The thread's identity in the database.
    """


@hookspec
def psnc_worker_done(run: Run, worker: WorkerInfo) -> None:
    """Know that a thread will run no more indices.

    When: once for each thread that worked, as it is released in an orderly way. Of somebody's own
        ``pipeline[i]`` that is when the process ends, before ``psnc_unconfigure``, or when the
        process turns to other plugins.
    Process: worker.
    Result: none.
    Errors: contained. Those of another process than the driver's are only logged.

    Parameters
    ----------
    run : Run
        The run.
    worker : WorkerInfo
        The thread's identity in the database.
    """


# --- one index --------------------------------------------------------------------------------


@hookspec(firstresult=True)
def psnc_index_lookup(run: Run, index: int) -> Sequence[str] | None:
    """Answer with an earlier result, which ends the index.

    The built-in checkpoint answers from the store.

    When: before an index runs.
    Process: worker.
    Result: the output paths of the earlier result, a list of text; ``None`` if there is none.
        First result.
    Errors: contained; the next plugin is asked. So is an answer that is no such list.

    Parameters
    ----------
    run : Run
        The run.
    index : int
        The source index.
    """


@hookspec
def psnc_index_start(context: IndexContext) -> None:
    """Know that an index begins.

    When: before its source is asked for anything.
    Process: worker.
    Result: none.
    Errors: contained.

    Parameters
    ----------
    context : IndexContext
        The index at work: its run, number and worker.
    """


@hookspec
def psnc_stage_start(context: IndexContext, stage: Stage) -> None:
    """Know that a stage joins the chain of an index.

    When: once a stage and index. Stages are lazy: this is not the moment of the first item.
    Process: worker.
    Result: none.
    Errors: contained.

    Parameters
    ----------
    context : IndexContext
        The index at work.
    stage : Source, Filter or Sink
        The stage.
    """


@hookspec
def psnc_stage_done(context: IndexContext, stage: Stage, record: StageRecord) -> None:
    """Know how long a stage took.

    When: once a stage and index, after the sink has returned or raised.
    Process: worker.
    Result: none.
    Errors: contained.

    Parameters
    ----------
    context : IndexContext
        The index at work.
    stage : Source, Filter or Sink
        The stage.
    record : StageRecord
        Its order, name and own time.
    """


@hookspec
def psnc_index_measure(context: IndexContext) -> Mapping[str, Any] | None:
    """Measure an index.

    When: after its last stage, also if it failed.
    Process: worker.
    Result: names to JSON values. ``peak_memory_bytes`` and ``gpu_memory_bytes`` go to the database
        columns of that name, all others to ``measurements``. Of equal names the plugin loaded
        last wins.
    Errors: contained, a result that cannot be recorded included.

    Parameters
    ----------
    context : IndexContext
        The index at work.
    """


@hookspec
def psnc_log_record(context: IndexContext, record: LogRecord) -> None:
    """See a log entry of an index.

    When: as the entry is captured.
    Process: worker.
    Result: none.
    Errors: contained.

    Parameters
    ----------
    context : IndexContext
        The index at work.
    record : LogRecord
        The entry.
    """


@hookspec
def psnc_index_done(context: IndexContext, record: IndexRecord) -> None:
    """Know what became of an index; the built-in checkpoint records it here.

    When: after success or failure.
    Process: worker.
    Result: none.
    Errors: contained.

    Parameters
    ----------
    context : IndexContext
        The index that was at work.
    record : IndexRecord
        Everything that is known of it.
    """


@hookspec
def psnc_index_interrupted(context: IndexContext) -> None:
    """Know that an index was cut short, which is no failure: nothing of it is recorded.

    When: as ``KeyboardInterrupt`` or ``SystemExit`` ends it, or a tracked loop is left in it. It
        will run again.
    Process: worker.
    Result: none.
    Errors: contained.

    Parameters
    ----------
    context : IndexContext
        The index that was at work.
    """


@hookspec
def psnc_index_reported(run: Run, record: IndexRecord) -> None:
    """See each record of a run in one place: for progress and alerts.

    When: as the record reaches the driver, in order of arrival. Results of earlier runs are not
        reported one by one.
    Process: driver.
    Result: none.
    Errors: contained.

    Parameters
    ----------
    run : Run
        The run.
    record : IndexRecord
        Everything that is known of the index.
    """


@hookspec
def psnc_index_retried(run: Run, record: IndexRecord, attempt: int, pause_s: float) -> None:
    """Know that an index failed and will have another attempt.

    ``psnc_index_reported`` sees only how an index ends for good.

    When: as the record of the failed attempt reaches the driver.
    Process: driver.
    Result: none.
    Errors: contained.

    Parameters
    ----------
    run : Run
        The run.
    record : IndexRecord
        Everything that is known of the failed attempt.
    attempt : int
        Its number in this run, from 1.
    pause_s : float
        Seconds until the next one.
    """


# --- looking at runs --------------------------------------------------------------------------


@hookspec
def psnc_dashboard_panels(run: Run) -> Mapping[str, Callable[[], str]] | None:
    """Offer views of a run to a dashboard.

    psnc has no dashboard of its own: a plugin that is one calls this hook.

    When: as a dashboard shows a run.
    Process: the dashboard's.
    Result: titles to functions that take nothing and return HTML.
    Errors: contained.

    Parameters
    ----------
    run : Run
        The run that is looked at.
    """
