"""Which errors are worth another attempt, and how long to wait before it."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from attrs import field, frozen

from psnc.errors import INTERRUPTS, PipelineError

__all__ = ["RetryPolicy"]

_LONGEST_PAUSE_S = 60.0

# A pause is this share of its nominal length at the least: what failed together, at the hand of a
# server that had too much to do, should not come back together.
_SHORTEST_SHARE = 0.5


def _exception_classes(value: Any) -> tuple[type[BaseException], ...]:
    if isinstance(value, type):
        value = (value,)
    classes = tuple(value) if isinstance(value, Iterable) else (value,)
    for each in classes:
        is_class = isinstance(each, type) and issubclass(each, BaseException)
        if not is_class or issubclass(each, INTERRUPTS):
            raise PipelineError(
                f"retry_on: {each!r} is no class of exceptions: give one such as OSError, or more"
            )
    return classes


@frozen
class RetryPolicy:
    """What is done about an index that fails.

    Attributes
    ----------
    retries : int
        How many more attempts an index has in this run after its first.
    retry_on : tuple of exception classes
        The errors that are worth another attempt. The end of a worker counts as
        :class:`psnc.WorkerDiedError`, and one that its time ended as
        :class:`psnc.IndexTimeoutError`, which derives from it.
    retry_delay : float
        Seconds before the second attempt; twice as long before each further one, a minute at the
        most. Each pause is shortened by a random share of up to a half.
    """

    retries: int = 0
    retry_on: tuple[type[BaseException], ...] = field(
        default=(BaseException,), converter=_exception_classes
    )
    retry_delay: float = 1.0

    def __attrs_post_init__(self) -> None:
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise PipelineError(f"retries={self.retries!r}: give a number of attempts, 0 or more")
        if not isinstance(self.retry_delay, (int, float)) or not 0 <= self.retry_delay < 1e9:
            raise PipelineError(f"retry_delay={self.retry_delay!r}: give seconds, 0 or more")

    def is_worth_it(self, error: BaseException) -> bool:
        """Tell whether another attempt may end otherwise."""
        return isinstance(error, self.retry_on)

    def pause_s(self, attempt: int) -> float:
        """Return how many seconds to wait after the failure of an attempt, the first being 1."""
        nominal = min(self.retry_delay * 2.0 ** min(attempt - 1, 32), _LONGEST_PAUSE_S)
        return nominal * random.uniform(_SHORTEST_SHARE, 1.0)
