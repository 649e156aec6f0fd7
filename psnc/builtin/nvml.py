"""Read what this process holds on NVIDIA's GPUs while indices run.

NVIDIA's management library knows the present figure only, so that a peak takes readings: as an
index begins and ends, and in between by a thread, which sleeps while no index runs.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from attrs import define

if TYPE_CHECKING:
    from psnc import IndexContext

_INTERVAL_S = 0.025

# A process that holds no GPU memory is looked at less often, and so are GPUs that it is not on.
_QUIET_INTERVAL_S = 0.5

# Time between readings, in times of what the last one took.
_REST = 20

# A call into the driver of a broken GPU may not return. It is not waited for any longer.
_PATIENCE_S = 2.0

logger = logging.getLogger("psnc.gpu")


def open_monitor() -> Monitor | None:
    """Return a monitor of the GPUs that tell this process what it holds; ``None`` without any."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        devices = _find_devices(pynvml)
    except pynvml.NVMLError:
        return None
    reader = _Reader(pynvml, devices)
    if devices:
        return Monitor(reader)
    reader.leave()
    return None


# One GPU, or one of the parts that it is divided into: the questions that it answers.
_Device = tuple[Callable[[], Any], ...]

# Processes that compute, draw, or share a context; each in the versions that drivers know.
_QUESTIONS = tuple(
    (f"nvmlDeviceGet{kind}RunningProcesses_v3", f"nvmlDeviceGet{kind}RunningProcesses_v2")
    for kind in ("Compute", "Graphics", "MPSCompute")
)


def _find_devices(pynvml: Any) -> list[_Device]:
    """Return what tells its processes to this process; what does not is left alone."""
    devices = []
    for number in range(pynvml.nvmlDeviceGetCount()):
        with suppress(pynvml.NVMLError):  # a GPU that is broken, or another's
            whole = pynvml.nvmlDeviceGetHandleByIndex(number)
            for handle in _parts_of(pynvml, whole) or [whole]:
                questions = (_answered(pynvml, names, handle) for names in _QUESTIONS)
                devices.append(tuple(each for each in questions if each is not None))
    return [device for device in devices if device]


def _parts_of(pynvml: Any, whole: Any) -> list[Any]:
    """Return the instances that a GPU is divided into; in such a one they know the processes."""
    parts: list[Any] = []
    with suppress(pynvml.NVMLError):
        if pynvml.nvmlDeviceGetMigMode(whole)[0] == pynvml.NVML_DEVICE_MIG_ENABLE:
            for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(whole)):
                with suppress(pynvml.NVMLError):
                    parts.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, number))
    return parts


def _answered(pynvml: Any, names: tuple[str, ...], handle: Any) -> Callable[[], Any] | None:
    for name in names:
        with suppress(AttributeError, pynvml.NVMLError):
            question = partial(getattr(pynvml, name), handle)
            question()
            return question
    return None


class _Pace:
    """How long to rest between readings, so that they take a small share of the time."""

    def __init__(self) -> None:
        # The quickest of the last few: a GPU that has to wake up first says little.
        self._took_s: deque[float] = deque(maxlen=3)

    def took(self, seconds: float) -> None:
        self._took_s.append(seconds)

    @property
    def rest_s(self) -> float:
        return _REST * min(self._took_s, default=0.0)


@define(eq=False)
class _Watched:
    """An index at work: when it began, and the most that was read since."""

    began: float
    peak: int | None = None

    def see(self, size: int | None) -> None:
        if size is not None and (self.peak is None or size > self.peak):
            self.peak = size


class _Reader:
    """Asks the driver what this process holds."""

    def __init__(self, pynvml: Any, devices: list[_Device]) -> None:
        self._pynvml = pynvml
        self._devices = devices
        self._pid = os.getpid()
        self._trouble: Exception | None = None
        self._told = False
        self.occupied: list[_Device] = []

    def held_bytes(self, *, everywhere: bool) -> int | None:
        """Return the bytes on all devices, or on those that were occupied a moment ago."""
        sizes = [
            (device, size)
            for device in (self._devices if everywhere else self.occupied)
            if (size := self._held_on(device)) is not None
        ]
        self.occupied = [device for device, _ in sizes]
        return sum(size for _, size in sizes) if sizes else None

    def _held_on(self, device: _Device) -> int | None:
        try:
            sizes = [self._own_bytes(question()) for question in device]
        except self._pynvml.NVMLError as error:
            self._trouble = self._trouble or error
            return None
        # A process that computes and draws is in both lists, each time with all that it holds.
        return max((size for size in sizes if size is not None), default=None)

    def _own_bytes(self, processes: list[Any]) -> int | None:
        own = [
            int(process.usedGpuMemory)
            for process in processes
            # The driver withholds the figure from processes in some containers.
            if process.pid == self._pid and process.usedGpuMemory is not None
        ]
        return sum(own) if own else None

    def tell_once(self) -> None:
        """Say what went wrong, if anything did and nothing was said of it."""
        error, self._trouble = self._trouble, None
        if error is None or self._told:
            return
        if isinstance(error, self._pynvml.NVMLError_InsufficientSize):
            return  # processes began while they were counted
        self._told = True
        logger.warning(
            "a GPU does not tell its memory (%s): what is on it is not measured until it does, "
            "and this is said only once",
            error,
        )

    def leave(self) -> None:
        """Leave the driver to others."""
        with suppress(self._pynvml.NVMLError):
            self._pynvml.nvmlShutdown()


class Monitor:
    """Watches this process's GPU memory while indices run."""

    def __init__(self, reader: _Reader) -> None:
        self._reader = reader
        # Held during calls into the driver, of which a fork must find none half done.
        self._reading = threading.RLock()
        self._look_pace, self._glance_pace = _Pace(), _Pace()
        self._latest: int | None = None
        self._read_at = self._looked_at = float("-inf")
        self._watched: dict[IndexContext, _Watched] = {}
        self._asleep = self._closed = False
        # Held for moments only, since indices wait for it.
        self._changed = threading.Condition(threading.Lock())
        self._thread = threading.Thread(target=self._sample, name="psnc-gpu", daemon=True)
        self._thread.start()

    def begin(self, context: IndexContext) -> None:
        """Watch an index from here on."""
        now = perf_counter()
        if now - self._read_at > self._look_pace.rest_s:
            self._read(everywhere=True)
        with self._changed:
            watched = self._watched[context] = _Watched(now)
            watched.see(self._latest)
            if self._asleep:
                self._changed.notify()

    def end(self, context: IndexContext) -> int | None:
        """Return the most that was read while an index ran; ``None`` if it held nothing."""
        watched = self._watched.get(context)
        if watched is None:
            return None
        if perf_counter() - watched.began > self._look_pace.rest_s:
            self._read(everywhere=True)
        self.forget(context)
        return watched.peak

    def forget(self, context: IndexContext) -> None:
        """Watch an index no longer."""
        with self._changed:
            self._watched.pop(context, None)

    def close(self) -> None:
        """End the thread and leave the driver."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(_PATIENCE_S)
        if self.pause():
            self._reader.leave()
            self.resume()

    def pause(self) -> bool:
        """Keep from the driver until ``resume``; false if a call into it does not come back."""
        return self._reading.acquire(timeout=_PATIENCE_S)

    def resume(self) -> None:
        """Let readings go on."""
        self._reading.release()

    def _sample(self) -> None:
        while True:
            with self._changed:
                self._asleep = not self._watched
                self._changed.wait(None if self._asleep else self._interval_s())
                if self._closed:
                    return
                anybody = bool(self._watched) and not self._asleep
            if anybody:
                self._read(everywhere=False)

    def _interval_s(self) -> float:
        if self._reader.occupied:
            return max(_INTERVAL_S, self._glance_pace.rest_s)
        return max(_QUIET_INTERVAL_S, self._look_pace.rest_s)

    def _read(self, *, everywhere: bool) -> None:
        with self._reading:
            if self._closed:
                return
            began = perf_counter()
            if not self._reader.occupied or began - self._looked_at > _QUIET_INTERVAL_S:
                everywhere = True
            size = self._reader.held_bytes(everywhere=everywhere)
            ended = perf_counter()
            (self._look_pace if everywhere else self._glance_pace).took(ended - began)
            self._looked_at = began if everywhere else self._looked_at
        # Not above: whoever handles the entry may be waiting for a fork, and that for this lock.
        self._reader.tell_once()
        with self._changed:
            self._latest, self._read_at = size, ended
            for watched in self._watched.values():
                watched.see(size)
