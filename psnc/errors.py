"""Every error that psnc raises on purpose, and the exit code each gives the command line.

The message of each is one line for a person: what is wrong, where, and what to do.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BackendError",
    "CodeChangedError",
    "ConfigurationError",
    "DriverConflictError",
    "IndexRangeError",
    "IndexTimeoutError",
    "OutputError",
    "PartitionError",
    "PipelineError",
    "PluginError",
    "PsncError",
    "RunTerminated",
    "SourceError",
    "StageError",
    "StoreError",
    "TooManyFailuresError",
    "TrackingDisabledError",
    "WorkerDiedError",
]


# What ends a program, and is no failure of the index, stage or plugin that it comes through.
INTERRUPTS = (KeyboardInterrupt, SystemExit)


class PsncError(Exception):
    """Base of every error that psnc raises on purpose."""

    exit_code: ClassVar[int] = 2


class ConfigurationError(PsncError):
    """A stage's parameters have no canonical form, so that the pipeline has no hash."""


class PipelineError(PsncError):
    """A pipeline is incomplete, or what was named is no pipeline."""


class StageError(PsncError):
    """A stage broke its contract: a sink that returns no paths, say."""


class SourceError(PsncError):
    """The input of a source is missing, empty or unreadable."""


class CodeChangedError(PsncError):
    """Earlier results are of other code of a stage, and ``on_code_change="error"`` was given."""


class IndexRangeError(PsncError, IndexError):
    """An index lies outside the source."""


class OutputError(PsncError, OSError):
    """A file or directory cannot be written, or an output not be read to verify it."""

    exit_code = 74


class PartitionError(PsncError):
    """A stage's ``partition_indices`` does not cover each index exactly once."""


class BackendError(PsncError):
    """A backend is unknown, or refuses the options it was given."""


class PluginError(PsncError):
    """A plugin cannot be found, loaded or called."""


class TrackingDisabledError(PsncError):
    """The pipeline records nothing (``track_metrics=False``), so there is nothing to ask it."""


class StoreError(PsncError):
    """The checkpoint store cannot be opened, read or written."""

    exit_code = 3


class DriverConflictError(StoreError):
    """Another driver is at work on the same indices of the same run, or has taken them over."""


class WorkerDiedError(PsncError):
    """The process that ran an index ended before the index did.

    Attributes
    ----------
    pid : int or None
        The process, where the backend knows it.
    """

    def __init__(self, message: str, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class IndexTimeoutError(WorkerDiedError):
    """An index took longer than ``timeout`` allows, and its worker was ended."""


class TooManyFailuresError(PsncError):
    """As many indices failed as ``max_failures`` allows, and the run ended."""

    exit_code = 1


class RunTerminated(SystemExit):  # no error, as SystemExit is none
    """SIGTERM ended a run; what was recorded resumes. Uncaught, it exits with code 143."""

    exit_code: ClassVar[int] = 143

    def __init__(self) -> None:
        super().__init__(self.exit_code)
