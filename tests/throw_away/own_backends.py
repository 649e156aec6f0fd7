"""Run indices in the processes of Python's own executor."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor

from psnc import Backend, BatchResult, WorkerTask, hookimpl

task: WorkerTask | None = None


def begin(content: bytes) -> None:
    global task
    task = WorkerTask.from_bytes(content)


def run(indices: Sequence[int]) -> BatchResult:
    assert task is not None
    return task(indices)


class Spawned(Backend):
    """Starts every process anew."""

    def start(self, task: WorkerTask) -> None:
        print(f"own backend: {self.n_jobs} processes", flush=True)
        self._pool = ProcessPoolExecutor(
            self.n_jobs,
            multiprocessing.get_context("spawn"),
            initializer=begin,
            initargs=(task.to_bytes(),),
        )

    def submit(self, indices: Sequence[int]) -> Future[BatchResult]:
        return self._pool.submit(run, indices)

    def stop(self, *, now: bool = False) -> None:
        self._pool.shutdown(cancel_futures=now)


@hookimpl
def psnc_backends() -> dict[str, type[Backend]]:
    return {"spawned": Spawned}
