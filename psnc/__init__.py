"""Run pipelines over indexed datasets, with every index recorded so that a run can be resumed."""

from psnc.backend import Backend
from psnc.config import Config
from psnc.errors import (
    BackendError,
    ConfigurationError,
    IndexRangeError,
    PartitionError,
    PipelineError,
    PluginError,
    PsncError,
    SourceError,
    StageError,
    StoreError,
    TrackingDisabledError,
    WorkerDiedError,
)
from psnc.execution import IndexContext
from psnc.hookspecs import hookimpl, hookspec
from psnc.metrics import PipelineMetrics
from psnc.pipeline import Pipeline
from psnc.records import IndexRecord, LogRecord, RunSummary, StageRecord, WorkerInfo
from psnc.run import Run
from psnc.session import run_pipeline
from psnc.stages import Filter, Param, Sink, Source, StatefulFilter
from psnc.store import CheckpointStore
from psnc.worker import BatchResult, WorkerTask

__all__ = [
    "Backend",
    "BackendError",
    "BatchResult",
    "CheckpointStore",
    "Config",
    "ConfigurationError",
    "Filter",
    "IndexContext",
    "IndexRangeError",
    "IndexRecord",
    "LogRecord",
    "Param",
    "PartitionError",
    "Pipeline",
    "PipelineError",
    "PipelineMetrics",
    "PluginError",
    "PsncError",
    "Run",
    "RunSummary",
    "Sink",
    "Source",
    "SourceError",
    "StageError",
    "StageRecord",
    "StatefulFilter",
    "StoreError",
    "TrackingDisabledError",
    "WorkerDiedError",
    "WorkerInfo",
    "WorkerTask",
    "hookimpl",
    "hookspec",
    "run_pipeline",
]
