"""Stands in for NVIDIA's driver beneath the real ``pynvml``, on machines that have none.

As a plugin it puts itself in the driver's place in every process. What the GPUs hold is read from a
file at each question, so that a test can change it while an index runs; each question is noted in
another file.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
from stages_for_tests import wait_until

from psnc import hookimpl

STATE = "STAND_IN_GPU"  # names the file with the state

OWN = "own"  # for a process ID: that of whoever asks
WITHHELD = 2**64 - 1


class Gpus:
    """What a test tells the stand-in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.questions_path = Path(f"{path}.questions")
        self.questions_path.touch()

    def set(self, *gpus: dict[str, Any], **state: Any) -> None:
        """Say what there is from now on; see `own`."""
        aside = self.path.with_suffix(".new")
        aside.write_text(json.dumps({"gpus": gpus, **state}), encoding="utf-8")
        os.replace(aside, self.path)

    def questions(self, name: str = "") -> list[str]:
        """Return the driver's functions that were called and whose names hold a text."""
        return [each for each in self.questions_path.read_text().split() if name in each]

    def wait_for_questions(self, more: int) -> None:
        """Return once so many more questions have been asked."""
        asked = len(self.questions())
        wait_until(lambda: len(self.questions()) >= asked + more)


def own(size: int, kind: str = "Compute") -> dict[str, Any]:
    """Describe a GPU on which the asking process holds some bytes, beside another process."""
    return {kind: [[1, 77_000], [OWN, size]]}


@hookimpl
def psnc_configure() -> None:
    """Put the stand-in in the driver's place."""
    pynvml.nvmlLib = _Driver()
    pynvml._nvmlGetFunctionPointer_cache.clear()


class _Driver:
    """The functions that a driver has, found by name as in a shared library."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        state = _state()
        function = _FUNCTIONS.get(name)
        if function is None or name in state.get("without", []):
            raise AttributeError(name)
        return functools.partial(_answer, name, function)


def _state() -> dict[str, Any]:
    state: dict[str, Any] = json.loads(Path(os.environ[STATE]).read_text(encoding="utf-8"))
    return state


def _answer(name: str, function: Callable[..., int | None], *arguments: Any) -> int:
    with open(f"{os.environ[STATE]}.questions", "a", encoding="utf-8") as file:
        file.write(f"{name}\n")
    state = _state()
    time.sleep(state.get("takes_s", 0))
    return state.get("errors", {}).get(name) or function(state, *arguments) or 0


def _init(state: dict[str, Any], flags: int) -> None: ...


def _shutdown(state: dict[str, Any]) -> None: ...


def _count(state: dict[str, Any], count: Any) -> None:
    count._obj.value = len(state["gpus"])


def _handle(state: dict[str, Any], number: ctypes.c_uint, handle: Any) -> None:
    _set_handle(handle, number.value + 1)


def _mig_mode(state: dict[str, Any], handle: Any, current: Any, pending: Any) -> int | None:
    gpu = _gpu(state, handle)
    if "mig" not in gpu:
        return pynvml.NVML_ERROR_NOT_SUPPORTED
    current._obj.value = pending._obj.value = bool(gpu["mig"])
    return None


def _mig_count(state: dict[str, Any], handle: Any, count: Any) -> None:
    count._obj.value = 7


def _mig_handle(state: dict[str, Any], handle: Any, number: ctypes.c_uint, part: Any) -> int | None:
    if number.value >= len(_gpu(state, handle)["mig"]):
        return pynvml.NVML_ERROR_NOT_FOUND
    _set_handle(part, _number(handle) + 100 * (number.value + 1))
    return None


def _processes(kind: str, state: dict[str, Any], handle: Any, count: Any, array: Any) -> int:
    gpu = _gpu(state, handle)
    if isinstance(gpu.get(kind), int):
        return int(gpu[kind])  # an error
    processes = gpu.get(kind, [])
    room, count._obj.value = count._obj.value, len(processes)
    if room < len(processes):
        return pynvml.NVML_ERROR_INSUFFICIENT_SIZE
    for place, (process, size) in enumerate(processes):
        array[place].pid = os.getpid() if process == OWN else process
        array[place].usedGpuMemory = WITHHELD if size is None else size
    return 0


def _gpu(state: dict[str, Any], handle: Any) -> dict[str, Any]:
    part, number = divmod(_number(handle), 100)
    gpu: dict[str, Any] = state["gpus"][number - 1]
    return gpu["mig"][part - 1] if part else gpu


def _number(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _set_handle(handle: Any, number: int) -> None:
    ctypes.cast(ctypes.pointer(handle._obj), ctypes.POINTER(ctypes.c_void_p))[0] = number


_FUNCTIONS: dict[str, Callable[..., int | None]] = {
    "nvmlInitWithFlags": _init,
    "nvmlShutdown": _shutdown,
    "nvmlDeviceGetCount_v2": _count,
    "nvmlDeviceGetHandleByIndex_v2": _handle,
    "nvmlDeviceGetMigMode": _mig_mode,
    "nvmlDeviceGetMaxMigDeviceCount": _mig_count,
    "nvmlDeviceGetMigDeviceHandleByIndex": _mig_handle,
    **{
        f"nvmlDeviceGet{kind}RunningProcesses_{version}": functools.partial(_processes, kind)
        for kind in ("Compute", "Graphics", "MPSCompute")
        for version in ("v2", "v3")
    },
}
