"""Run every index in the calling thread."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from psnc.backend import Backend
from psnc.errors import BackendError
from psnc.worker import BatchResult, WorkerTask

__all__ = ["SequentialBackend"]


class SequentialBackend(Backend):
    """One worker: the caller."""

    def __init__(self, n_jobs: int = 1) -> None:
        if n_jobs != 1:
            raise BackendError(
                f"backend 'sequential' runs one job, not {n_jobs}: leave n_jobs at 1, or choose "
                "'process_pool' or 'thread_pool'"
            )
        super().__init__(n_jobs)

    def start(self, task: WorkerTask) -> None:
        """Keep the task."""
        self._task = task

    def submit(self, indices: Sequence[int]) -> Future[BatchResult]:
        """Run the batch before returning."""
        future: Future[BatchResult] = Future()
        try:
            future.set_result(self._task(indices))
        except Exception as error:
            future.set_exception(error)
        return future

    def stop(self, *, now: bool = False) -> None:
        """Do nothing: no batch outlives its submission."""
