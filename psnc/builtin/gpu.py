"""Measure the GPU memory that this process holds as each index ends.

NVIDIA's management library is asked for the process's memory on every GPU. Without a GPU or its
driver nothing is measured, and nothing is said.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from psnc.execution import IndexContext
from psnc.hookspecs import hookimpl

_devices: list[Any] | None = None


@hookimpl
def psnc_index_measure(context: IndexContext) -> Mapping[str, int] | None:
    """Report this process's GPU memory in bytes, summed over the GPUs."""
    if not context.run.pipeline.track_gpu:
        return None
    devices = _find_devices()
    if not devices:
        return None
    import pynvml

    used = [
        process.usedGpuMemory
        for device in devices
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device)
        # The driver withholds the figure from processes in some containers.
        if process.pid == os.getpid() and process.usedGpuMemory is not None
    ]
    return {"gpu_memory_bytes": sum(used)} if used else None


def _find_devices() -> list[Any]:
    global _devices
    if _devices is None:
        import pynvml

        try:
            pynvml.nvmlInit()
            _devices = [
                pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())
            ]
        except pynvml.NVMLError:
            _devices = []
    return _devices
