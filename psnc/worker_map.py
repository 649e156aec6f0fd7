"""Calls on the workers of a run that is not under way yet, for stages that are getting ready."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from attrs import define

__all__ = ["lent_to_stages", "map_on_workers"]

T = TypeVar("T")
R = TypeVar("R")

_Map = Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]


@define
class _Loan:
    """The workers of a run, for as long as its stages get ready."""

    lender: int
    map: _Map | None


_loan: ContextVar[_Loan | None] = ContextVar("loan", default=None)


def map_on_workers(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call a function for every item, on the workers of the run that is getting ready.

    For :meth:`Sink.prepare`, where all of the input has to be looked at before the first index
    runs, as to lay out an output that is shared: what one process would do while all others wait,
    all do together. Where no run is getting ready, or its backend has no workers yet, it is
    ``[function(item) for item in items]``. So it is in a worker that prepares its own copy of the
    sink: look whether there is something left to find out. What the driver's sink found out and
    kept in an attribute is in that copy.

    Parameters
    ----------
    function : callable
        It may run in another process: it and its results must bear being pickled, and what it
        changes is not seen here. A source or filter may be called in it.
    items : iterable
        Its arguments. Each is sent on its own, so that an item should be worth milliseconds.

    Returns
    -------
    list
        The results, in the order of the items.

    Raises
    ------
    Exception
        What the function raised, for the first item for which it did.
    PipelineError
        If the function cannot be sent to another process.
    WorkerDiedError
        If a worker ended while it was at an item, as when memory runs out.

    Examples
    --------
    >>> from psnc import map_on_workers
    >>> map_on_workers(len, ["a", "list", "of words"])
    [1, 4, 8]
    """
    loan = _loan.get()
    # A process that was forked meanwhile is a worker itself.
    if loan is None or loan.map is None or loan.lender != os.getpid():
        return [function(item) for item in items]
    return loan.map(function, items)


@contextmanager
def lent_to_stages(map: _Map) -> Iterator[None]:
    """Have :func:`map_on_workers` be ``map`` in this thread."""
    loan = _Loan(os.getpid(), map)
    token = _loan.set(loan)
    try:
        yield
    finally:
        # Threads that the stages started may have copied the context.
        loan.map = None
        _loan.reset(token)
