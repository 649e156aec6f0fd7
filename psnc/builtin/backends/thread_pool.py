"""Run indices in threads of this process: for stages that wait, or that release the GIL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from psnc.backend import Backend, R, T
from psnc.worker import BatchResult, WorkerTask

__all__ = ["ThreadPoolBackend"]


class ThreadPoolBackend(Backend):
    """``n_jobs`` threads that share the pipeline's stages."""

    def __init__(self, n_jobs: int) -> None:
        super().__init__(n_jobs)
        self._pool = ThreadPoolExecutor(n_jobs, thread_name_prefix="psnc-worker")
        self._task: WorkerTask | None = None

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Call the function in the threads."""
        return list(self._pool.map(function, items))

    def start(self, task: WorkerTask) -> None:
        """Keep the task."""
        self._task = task

    def submit(self, indices: Sequence[int]) -> Future[BatchResult]:
        """Run the batch on the next free thread."""
        assert self._task is not None
        return self._pool.submit(self._task, indices)

    def stop(self, *, now: bool = False) -> None:
        """Wait for the threads; with ``now``, only for the indices that they are at."""
        if now and self._task is not None:
            self._task.stop_requested.set()
        self._pool.shutdown(wait=True, cancel_futures=now)
