"""Measure the peak GPU memory of each index.

``gpu_memory_bytes`` is what the process held on all GPUs together at its most, CUDA's own contexts
included. NVIDIA's driver knows that figure for the present moment only: it is read as an index
begins and ends, and up to forty times a second in between. Readings take a small share of the time
at most; indices too short for readings of their own share the latest one.

Where the program itself has put PyTorch to work on GPUs, ``torch_gpu_memory_bytes`` is the exact
peak of its tensors, summed over the devices; for that its peaks are reset as an index begins. And
``gpu_memory_bytes`` is then no less than what PyTorch had reserved at its most, also where the
driver does not tell a process its memory, as in some containers.

All of these are figures of the whole process: threads that run indices side by side share them.
Without a GPU or its driver nothing is measured, nothing is said, and no thread is started.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from psnc import hookimpl
from psnc.builtin.peaks import Figures, SharedPeaks

if TYPE_CHECKING:
    from psnc import IndexContext
    from psnc.builtin.nvml import Monitor


@hookimpl
def psnc_index_start(context: IndexContext) -> None:
    """Begin a new peak."""
    if (_looked and _monitor is None and "torch" not in sys.modules) or (
        not context.run.pipeline.track_gpu
    ):
        return
    if not _looked:
        _look_for_gpus()
    if "torch" in sys.modules:
        _torch.begin(context)
    if _monitor is not None:
        _monitor.begin(context)


@hookimpl
def psnc_index_measure(context: IndexContext) -> Mapping[str, int] | None:
    """Report the peaks since the index began, in bytes."""
    if (_monitor is None and "torch" not in sys.modules) or not context.run.pipeline.track_gpu:
        return None
    held = _monitor.end(context) if _monitor is not None else None
    if "torch" in sys.modules:
        figures = _torch.end(context)
        if figures:
            allocated, reserved = figures
            return {
                "gpu_memory_bytes": max(held or 0, reserved),
                "torch_gpu_memory_bytes": allocated,
            }
    return None if held is None else {"gpu_memory_bytes": held}


@hookimpl
def psnc_index_interrupted(context: IndexContext) -> None:
    """Forget the index."""
    _torch.forget(context)
    if _monitor is not None:
        _monitor.forget(context)


@hookimpl
def psnc_unconfigure() -> None:
    """Stop the thread, and let go of the driver."""
    global _looked, _monitor
    with _lock:
        monitor, _monitor, _looked = _monitor, None, False
    if monitor is not None:
        monitor.close()


# --- PyTorch ----------------------------------------------------------------------------------


class _TorchMark:
    """PyTorch's own peaks: of its tensors, and of the memory that it keeps for them."""

    def reset(self) -> None:
        cuda = _cuda_in_use()
        if cuda is not None:
            with suppress(RuntimeError):  # an allocator that keeps no count
                for device in range(cuda.device_count()):
                    cuda.reset_peak_memory_stats(device)

    def read(self) -> Figures:
        cuda = _cuda_in_use()
        if cuda is None:
            return ()
        try:
            devices = range(cuda.device_count())
            allocated = sum(map(cuda.max_memory_allocated, devices))
            reserved = sum(map(cuda.max_memory_reserved, devices))
        except RuntimeError:
            return ()
        return int(allocated), int(reserved)


def _cuda_in_use() -> Any:
    """Return ``torch.cuda`` if the program has it at work; neither is begun by looking."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    is_initialized = getattr(cuda, "is_initialized", None)
    return cuda if is_initialized is not None and is_initialized() else None


# --- this process -----------------------------------------------------------------------------

_monitor: Monitor | None = None
_looked = False
_torch = SharedPeaks(_TorchMark())
_lock = threading.Lock()
_forking = threading.local()


def _look_for_gpus() -> None:
    global _looked, _monitor
    with _lock:
        if not _looked:
            from psnc.builtin.nvml import open_monitor

            try:
                _monitor = open_monitor()
            finally:
                _looked = True


def _before_fork() -> None:
    _forking.paused = _monitor if _monitor is not None and _monitor.pause() else None


def _after_fork_in_parent() -> None:
    if _forking.paused is not None:
        _forking.paused.resume()


def _after_fork_in_child() -> None:
    """Begin anew: neither the thread nor the driver's connection came along."""
    global _lock, _looked, _monitor, _torch
    _lock = threading.Lock()
    _torch = SharedPeaks(_TorchMark())
    _monitor, _looked = None, False


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
