"""Measure the peak memory of each index.

By default that is the process's high-water mark, which Linux lets a process reset: exact, C
extensions included, for a few microseconds an index. Elsewhere it is the larger of the resident
sizes before and after the index. ``track_memory="python"`` asks ``tracemalloc`` instead, which
sees Python's own allocations only and slows Python code down several times.

All of these are figures of the whole process: threads that run indices side by side share them.
"""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Mapping

from psnc.execution import IndexContext
from psnc.hookspecs import hookimpl
from psnc.run import Run

_RESET_HIGH_WATER_MARK = b"5"


class _HighWaterMark:
    """The kernel's record of this process's largest resident size."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._reset = os.open("/proc/self/clear_refs", os.O_WRONLY)
        self._status = os.open("/proc/self/status", os.O_RDONLY)

    def start(self) -> None:
        os.write(self._reset, _RESET_HIGH_WATER_MARK)

    def peak_bytes(self) -> int:
        status = os.pread(self._status, 4096, 0)
        return int(status.split(b"VmHWM:", 1)[1].split(None, 1)[0]) * 1024


class _ResidentSize:
    """Samples at both ends of an index, where the kernel keeps no record that can be reset."""

    def __init__(self) -> None:
        import psutil

        self.pid = os.getpid()
        self._process = psutil.Process()
        self._before = 0

    def start(self) -> None:
        self._before = self._process.memory_info().rss

    def peak_bytes(self) -> int:
        return max(self._before, int(self._process.memory_info().rss))


_meter: _HighWaterMark | _ResidentSize | None = None
_started_tracing = False


@hookimpl
def psnc_index_start(context: IndexContext) -> None:
    """Begin a new peak."""
    global _started_tracing
    mode = context.run.pipeline.track_memory
    if mode == "python":
        if not tracemalloc.is_tracing():
            tracemalloc.start()
            _started_tracing = True
        tracemalloc.reset_peak()
    elif mode:
        _process_meter().start()


@hookimpl
def psnc_index_measure(context: IndexContext) -> Mapping[str, int] | None:
    """Report the peak since the index began, in bytes."""
    mode = context.run.pipeline.track_memory
    if mode == "python":
        return {"peak_memory_bytes": tracemalloc.get_traced_memory()[1]}
    if mode:
        return {"peak_memory_bytes": _process_meter().peak_bytes()}
    return None


@hookimpl
def psnc_worker_done(run: Run) -> None:
    """Stop ``tracemalloc``, which slows everything down, if this plugin started it."""
    global _started_tracing
    if _started_tracing:
        tracemalloc.stop()
        _started_tracing = False


def _process_meter() -> _HighWaterMark | _ResidentSize:
    global _meter
    if _meter is None or _meter.pid != os.getpid():
        try:
            _meter = _HighWaterMark()
        except OSError:
            _meter = _ResidentSize()
    return _meter
