"""Run pipelines over indexed datasets, with every index recorded so that a run can be resumed.

The names below are imported from their modules when they are first used: `psnc --help` and listings
then need not wait for the machinery of runs and databases.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psnc.atomic import atomic_directory, atomic_write
    from psnc.backend import Backend
    from psnc.code_versions import CodeVersion, StageCode
    from psnc.config import Config
    from psnc.errors import (
        BackendError,
        CodeChangedError,
        ConfigurationError,
        IndexRangeError,
        IndexTimeoutError,
        OutputError,
        PartitionError,
        PipelineError,
        PluginError,
        PsncError,
        RunTerminated,
        SourceError,
        StageError,
        StoreError,
        TooManyFailuresError,
        TrackingDisabledError,
        WorkerDiedError,
    )
    from psnc.execution import IndexContext
    from psnc.functions import filter as filter
    from psnc.functions import sink
    from psnc.gather import gather_pipeline
    from psnc.hookspecs import hookimpl, hookspec
    from psnc.loops import track
    from psnc.manager import PluginManager, activate, plugin_manager
    from psnc.metrics import PipelineMetrics
    from psnc.options import OptionParser
    from psnc.pipeline import Pipeline
    from psnc.records import (
        ArtifactRecord,
        IndexRecord,
        LogRecord,
        OutputFacts,
        RunSummary,
        StageRecord,
        WorkerInfo,
    )
    from psnc.run import Run
    from psnc.session import run_pipeline
    from psnc.sources import FilesSource, SequenceSource, as_source
    from psnc.stages import Filter, Param, Sink, Source, StatefulFilter
    from psnc.store import CheckpointStore, Counts, IndexRow, RecordedFile, RunRow, StageTotal
    from psnc.worker import BatchResult, WorkerTask
    from psnc.worker_map import map_on_workers

_HOMES = {
    "ArtifactRecord": "records",
    "Backend": "backend",
    "BackendError": "errors",
    "BatchResult": "worker",
    "CheckpointStore": "store",
    "Claim": "claims",
    "CodeChangedError": "errors",
    "CodeVersion": "code_versions",
    "Config": "config",
    "ConfigurationError": "errors",
    "Counts": "store",
    "DriverConflictError": "errors",
    "FilesSource": "sources",
    "Filter": "stages",
    "IndexContext": "execution",
    "IndexRangeError": "errors",
    "IndexTimeoutError": "errors",
    "IndexRecord": "records",
    "IndexRow": "store",
    "LogRecord": "records",
    "OptionParser": "options",
    "OutputError": "errors",
    "OutputFacts": "records",
    "Param": "stages",
    "PartitionError": "errors",
    "Pipeline": "pipeline",
    "PipelineError": "errors",
    "PipelineMetrics": "metrics",
    "PluginError": "errors",
    "PluginManager": "manager",
    "PsncError": "errors",
    "RecordedFile": "store",
    "RunTerminated": "errors",
    "Run": "run",
    "RunRow": "store",
    "RunSummary": "records",
    "SequenceSource": "sources",
    "Sink": "stages",
    "Source": "stages",
    "SourceError": "errors",
    "StageCode": "code_versions",
    "StageError": "errors",
    "StageRecord": "records",
    "StageTotal": "store",
    "StatefulFilter": "stages",
    "StoreError": "errors",
    "TooManyFailuresError": "errors",
    "TrackingDisabledError": "errors",
    "WorkerDiedError": "errors",
    "WorkerInfo": "records",
    "WorkerTask": "worker",
    "activate": "manager",
    "as_source": "sources",
    "atomic_directory": "atomic",
    "atomic_write": "atomic",
    "filter": "functions",
    "gather_pipeline": "gather",
    "hookimpl": "hookspecs",
    "hookspec": "hookspecs",
    "map_on_workers": "worker_map",
    "plugin_manager": "manager",
    "run_pipeline": "session",
    "sink": "functions",
    "track": "loops",
}

# Not `filter`: a star would hide Python's own.
__all__ = [
    "ArtifactRecord",
    "Backend",
    "BackendError",
    "BatchResult",
    "CheckpointStore",
    "Claim",
    "CodeChangedError",
    "CodeVersion",
    "Config",
    "ConfigurationError",
    "Counts",
    "DriverConflictError",
    "FilesSource",
    "Filter",
    "IndexContext",
    "IndexRangeError",
    "IndexRecord",
    "IndexRow",
    "IndexTimeoutError",
    "LogRecord",
    "OptionParser",
    "OutputError",
    "OutputFacts",
    "Param",
    "PartitionError",
    "Pipeline",
    "PipelineError",
    "PipelineMetrics",
    "PluginError",
    "PluginManager",
    "PsncError",
    "RecordedFile",
    "Run",
    "RunRow",
    "RunSummary",
    "RunTerminated",
    "SequenceSource",
    "Sink",
    "Source",
    "SourceError",
    "StageCode",
    "StageError",
    "StageRecord",
    "StageTotal",
    "StatefulFilter",
    "StoreError",
    "TooManyFailuresError",
    "TrackingDisabledError",
    "WorkerDiedError",
    "WorkerInfo",
    "WorkerTask",
    "activate",
    "as_source",
    "atomic_directory",
    "atomic_write",
    "gather_pipeline",
    "hookimpl",
    "hookspec",
    "map_on_workers",
    "plugin_manager",
    "run_pipeline",
    "sink",
    "track",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module, once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'psnc' has no attribute {name!r}")
    value = getattr(import_module(f"psnc.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *_HOMES})
