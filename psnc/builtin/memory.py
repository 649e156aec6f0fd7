"""Measure the peak memory of each index.

By default that is the process's high-water mark, which Linux lets a process reset: exact, C
extensions and mapped files included, for a few microseconds an index. Where it cannot be reset, it
is exact for an index that raises it, and else the larger of the resident sizes before and after.
``track_memory="python"`` asks ``tracemalloc`` instead, which sees Python's own allocations only and
slows Python code down several times.

All of these are figures of the whole process: threads that run indices side by side share them,
and what a stage's child processes use is not in them.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import tracemalloc
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from psnc import hookimpl
from psnc.builtin.peaks import Figures, SharedPeaks

if TYPE_CHECKING:
    from psnc import IndexContext

_RESET_FILE = "/proc/self/clear_refs"
_RESET_HIGH_WATER_MARK = b"5"

# Enough for the line that is looked for, behind the list of a user's groups.
_STATUS_BYTES = 8192


class _HighWaterMark:
    """The kernel's record of this process's largest resident size."""

    def __init__(self) -> None:
        self._reset = os.open(_RESET_FILE, os.O_WRONLY)
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self._floor: int | None = None

    def reset(self) -> None:
        os.write(self._reset, _RESET_HIGH_WATER_MARK)
        if self._floor is None:
            self._floor = _highest_ever()

    def read(self) -> Figures:
        # A tenth of what it costs to read the file. It is the larger of this mark and of the size
        # that the process had before it became this program, which is no more than the floor.
        highest = _highest_ever()
        if self._floor is not None and highest > self._floor:
            return (highest,)
        return (self._read_mark(),)

    def _read_mark(self) -> int:
        status = os.pread(self._status, _STATUS_BYTES, 0)
        begin = status.index(b"VmHWM:") + len("VmHWM:")
        return int(status[begin : status.index(b"kB", begin)]) * 1024

    def close(self) -> None:
        os.close(self._reset)
        os.close(self._status)


class _RisingMark:
    """A record that only ever rises, and samples at both ends for what stays below it."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()

    def reset(self) -> None:
        self._highest = _highest_ever()
        self._before = self._size()

    def read(self) -> Figures:
        highest = _highest_ever()
        return (highest if highest > self._highest else max(self._before, self._size()),)

    def close(self) -> None:
        pass

    def _size(self) -> int:
        return int(self._process.memory_info().rss)


def _highest_ever() -> int:
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


class _Tracing:
    """What ``tracemalloc`` counts, started here unless the program traces by itself.

    A program that does finds its traces and its peak as if nobody else had looked.
    """

    def __init__(self) -> None:
        self.ours = False
        self._peak_of_others = 0

    def reset(self) -> None:
        if not tracemalloc.is_tracing():
            tracemalloc.start()
            self.ours = True
        if not self.ours:
            self._peak_of_others = max(self._peak_of_others, tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()

    def read(self) -> Figures:
        # A stage may have stopped it.
        return tracemalloc.get_traced_memory()[1:] if tracemalloc.is_tracing() else ()

    def leave(self, *, for_now: bool) -> None:
        """Leave no trace of this plugin; ``for_now`` if more indices are about to follow."""
        if not self.ours:
            self._give_back_peak()
        elif not for_now:
            tracemalloc.stop()
            self.ours = False

    def _give_back_peak(self) -> None:
        missing = self._peak_of_others - tracemalloc.get_traced_memory()[0]
        self._peak_of_others = 0
        if missing > 0 and tracemalloc.is_tracing():
            # A peak cannot be set. It can be reached, by memory that is never touched.
            with suppress(MemoryError):
                bytes(missing)


_Meter = _HighWaterMark | _RisingMark

_meter: _Meter | None = None
_process: SharedPeaks | None = None
_tracing = _Tracing()
_python = SharedPeaks(_tracing)
_lock = threading.Lock()


@hookimpl
def psnc_index_start(context: IndexContext) -> None:
    """Begin a new peak."""
    mode = context.run.pipeline.track_memory
    if mode == "python":
        _python.begin(context)
    elif mode:
        (_process or _process_peaks()).begin(context)


@hookimpl
def psnc_index_measure(context: IndexContext) -> Mapping[str, int] | None:
    """Report the peak since the index began, in bytes."""
    mode = context.run.pipeline.track_memory
    if mode == "python":
        peak = _python.end(context)
        _leave_tracing(for_now=context.run.in_session)
    elif mode:
        peak = (_process or _process_peaks()).end(context)
    else:
        return None
    return {"peak_memory_bytes": peak[0]} if peak else None


@hookimpl
def psnc_index_interrupted(context: IndexContext) -> None:
    """Forget the index."""
    _python.forget(context)
    if _process is not None:
        _process.forget(context)
    _leave_tracing(for_now=context.run.in_session)


@hookimpl
def psnc_worker_done() -> None:
    """Stop ``tracemalloc``, which slows everything down, if this plugin started it."""
    _leave_tracing(for_now=False)


@hookimpl
def psnc_unconfigure() -> None:
    """Close what is open."""
    global _meter, _process
    with _lock:
        if _meter is not None and _process is not None and not _process.in_use:
            _meter.close()
            _meter = _process = None


def _leave_tracing(*, for_now: bool) -> None:
    with _python.lock:
        if not _python.in_use:
            _tracing.leave(for_now=for_now)


def _process_peaks() -> SharedPeaks:
    global _meter, _process
    with _lock:
        if _process is None:
            _meter = _make_meter()
            _process = SharedPeaks(_meter)
        return _process


def _make_meter() -> _Meter:
    try:
        meter = _HighWaterMark()
    except OSError:
        return _RisingMark()
    try:
        meter.reset()
    except OSError:
        meter.close()
        return _RisingMark()
    return meter


def _renew_after_fork() -> None:
    """Let go of the parent's files, and of indices that run in the parent."""
    global _lock, _meter, _process, _python
    _lock = threading.Lock()
    _python = SharedPeaks(_tracing)
    if _meter is not None:
        _meter.close()
    _meter = _process = None


os.register_at_fork(after_in_child=_renew_after_fork)
