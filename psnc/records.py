"""What is known of a run, as small immutable values that cross processes and reach every hook."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import chain, repeat
from operator import attrgetter
from typing import Any, Literal, TypeVar

from attrs import Factory, fields, frozen

__all__ = [
    "ArtifactRecord",
    "IndexRecord",
    "LogRecord",
    "OutputFacts",
    "RunSummary",
    "StageRecord",
    "Status",
    "WorkerInfo",
    "utc_timestamp",
]

Status = Literal["completed", "error"]

T = TypeVar("T")


def _travels_light(record_class: type[T]) -> type[T]:
    """Have a record pickled as its class and its values.

    A record of each index comes home from another process, with one for each stage: attrs' own way
    takes twice as long on either side.
    """
    made_of: Any = record_class
    values = attrgetter(*(each.name for each in fields(made_of)))
    made_of.__reduce__ = lambda self: (made_of, values(self))
    return record_class


def utc_timestamp(seconds: float | None = None) -> str:
    """Return a moment, by default the present, as ISO-8601 text in UTC, to the microsecond.

    Parameters
    ----------
    seconds : float, optional
        Seconds since 1970, as ``time.time()`` gives them.
    """
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="microseconds")


@frozen
class WorkerInfo:
    """One thread of one process that runs indices.

    Attributes
    ----------
    worker_id : str
        UUID4 in hexadecimal, stable for the thread's life.
    pid : int
        Process ID on ``hostname``.
    hostname : str
        The machine's name.
    started_at : str
        ISO-8601 time in UTC.
    invocation_id : str
        Shared by all workers of one ``run_pipeline`` call.
    """

    worker_id: str
    pid: int
    hostname: str
    started_at: str
    invocation_id: str


@_travels_light
@frozen
class StageRecord:
    """What one stage did for one index.

    Attributes
    ----------
    order : int
        0 for the source, 1 to N for the filters, N+1 for the sink.
    name : str
        The stage's class name.
    wall_time_ns : int
        Time spent in the stage itself, without the stages before it, in nanoseconds.
    """

    order: int
    name: str
    wall_time_ns: int


@frozen
class ArtifactRecord:
    """A file that a filter produced for an index."""

    path: str
    filter_name: str
    filter_order: int


@frozen
class OutputFacts:
    """What an output file was as its index ended.

    Attributes
    ----------
    size_bytes : int, optional
        Its size.
    content_digest : str, optional
        SHA-256 of its content, in hexadecimal.
    """

    size_bytes: int | None = None
    content_digest: str | None = None


@frozen
class LogRecord:
    """One log entry captured while an index ran."""

    timestamp: str
    level: int
    level_name: str
    logger_name: str
    message: str


@_travels_light
@frozen
class IndexRecord:
    """The outcome of one index, with everything known of it.

    Attributes
    ----------
    index : int
        The source index.
    status : {"completed", "error"}
        Whether the sink returned.
    output_paths : tuple of str
        What the sink returned, in its order; empty after an error.
    completed_at : str
        ISO-8601 time in UTC at which the index ended.
    wall_time_ns : int
        Wall-clock time in nanoseconds; 0 for a cached result.
    worker : WorkerInfo, optional
        Who ran it; ``None`` for a record that the driver made of a dead worker's index.
    error : str, optional
        ``"{type}: {message}"`` after an error.
    stages, artifacts, logs : tuple
        One record a stage, file and log entry.
    measurements : dict
        Named figures from ``psnc_index_measure``. ``peak_memory_bytes`` and
        ``gpu_memory_bytes`` have database columns of their own. ``index_name`` is what the source
        calls the index.
    cached : bool
        The result is an earlier one: nothing ran, nothing is to be recorded.
    recorded : bool
        The store has it. A worker out of the store's reach sends home records that are not
        recorded, and the driver records them.
    output_facts : tuple of OutputFacts
        One for each of ``output_paths``, in their order; empty where nobody looked.
    code_digest : str, optional
        What the stages' code was: a key of the run's ``code_versions``.
    """

    index: int
    status: Status
    output_paths: tuple[str, ...] = ()
    completed_at: str = Factory(utc_timestamp)
    wall_time_ns: int = 0
    worker: WorkerInfo | None = None
    error: str | None = None
    stages: tuple[StageRecord, ...] = ()
    artifacts: tuple[ArtifactRecord, ...] = ()
    logs: tuple[LogRecord, ...] = ()
    measurements: dict[str, Any] = Factory(dict)
    cached: bool = False
    recorded: bool = False
    output_facts: tuple[OutputFacts, ...] = ()
    code_digest: str | None = None

    def outputs(self) -> Iterator[tuple[str, OutputFacts]]:
        """Yield each output path with what is known of the file."""
        return zip(self.output_paths, chain(self.output_facts, repeat(OutputFacts())), strict=False)


@frozen
class RunSummary:
    """How one ``run_pipeline`` call ended.

    Attributes
    ----------
    requested : int
        Distinct indices asked for.
    completed : int
        Indices that this call ran to their end.
    cached : int
        Indices that an earlier run had completed.
    failed : dict of int to str
        Error by index.
    elapsed_s : float
        Wall-clock seconds of the call.
    interrupted : bool
        Whether it ended before every index had run.
    plugin_errors : dict of str to int
        How often each plugin's hook raised, by ``"plugin: hook"``.
    db_path : str, optional
        Where it was recorded.
    retries : int
        Attempts that failed and had another one.
    quarantined : dict of int to int
        Failed indices each of whose last attempts ended its worker process, and how many attempts
        they had.
    lost_outputs : dict of int to str
        Indices that an earlier run had completed, and whose outputs ``verify`` found gone or
        changed, each with the reason. They count among those to be run.
    """

    requested: int
    completed: int
    cached: int
    failed: dict[int, str]
    elapsed_s: float
    interrupted: bool = False
    plugin_errors: dict[str, int] = Factory(dict)
    db_path: str | None = None
    retries: int = 0
    quarantined: dict[int, int] = Factory(dict)
    lost_outputs: dict[int, str] = Factory(dict)
