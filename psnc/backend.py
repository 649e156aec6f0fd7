"""What a backend is: a way to run batches of indices on workers, and nothing more.

Which indices run, how they are batched, progress and the order of results belong to the session
and are the same on every backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import ClassVar, TypeVar

from psnc.worker import BatchResult, WorkerTask

__all__ = ["Backend", "BatchLostError"]

T = TypeVar("T")
R = TypeVar("R")


class BatchLostError(Exception):
    """A batch has to run again: nobody can tell how far it came, and it is not to blame."""


class Backend(ABC):
    """Runs batches on ``n_jobs`` workers.

    Keyword options of ``run_pipeline`` that it does not know itself go to the constructor.

    Parameters
    ----------
    n_jobs : int
        Number of workers, at least 1.

    Attributes
    ----------
    enforces_timeout : bool
        Whether each worker is a process of its own that runs batches in its main thread, and whose
        end the future of the batch tells. Only such a one can be ended by ``timeout``.
    """

    enforces_timeout: ClassVar[bool] = False

    def __init__(self, n_jobs: int) -> None:
        self.n_jobs = n_jobs

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Call a function for every item, and return the results in the order of the items.

        What :func:`psnc.map_on_workers` does while the stages get ready: before :meth:`start`, and
        any number of times. Calls are independent of each other, so that they may be made anywhere
        and in any order. A backend that leaves this as it is makes them here, one after the other;
        one that overrides it must bear :meth:`stop` without :meth:`start` after it.

        Raises
        ------
        Exception
            What the function raised, for the first item for which it did.
        """
        return [function(item) for item in items]

    @abstractmethod
    def start(self, task: WorkerTask) -> None:
        """Bring ``task`` to the workers, once each.

        In this process ``task(indices)`` runs a batch; ``task.to_bytes()`` and
        ``WorkerTask.from_bytes`` take it to another.
        """

    @abstractmethod
    def submit(self, indices: Sequence[int]) -> Future[BatchResult]:
        """Run a batch on one worker, in order.

        The future fails with :class:`psnc.WorkerDiedError` if the worker ends before the batch, and
        with ``psnc.backend.BatchLostError`` if the batch has to be submitted again.
        """

    @abstractmethod
    def stop(self, *, now: bool = False) -> None:
        """Release the workers, once submitted batches are done or, with ``now``, at once."""
