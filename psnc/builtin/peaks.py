"""Peaks of indices that run side by side and share one high-water mark.

Memory is the process's, so that threads which run indices at the same time have one mark between
them. Each index sets it back as it begins; what the others had reached by then is kept for them.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from psnc import IndexContext

Figures = tuple[int, ...]


class Mark(Protocol):
    """Figures that remember how high they have been; none, where there is nothing to read."""

    def reset(self) -> None:
        """Begin anew, at the present height."""
        ...

    def read(self) -> Figures:
        """Return the greatest heights since the last reset."""
        ...


class SharedPeaks:
    """The peaks of the indices that are running.

    Parameters
    ----------
    mark : Mark
        What they share.

    Attributes
    ----------
    lock : threading.Lock
        Held while an index begins or ends; whoever holds it can rely on ``in_use``.
    """

    def __init__(self, mark: Mark) -> None:
        self._reset, self._read = mark.reset, mark.read
        self._reached: dict[IndexContext, Figures] = {}
        self.lock = threading.Lock()

    @property
    def in_use(self) -> bool:
        """Whether any index is running."""
        return bool(self._reached)

    def begin(self, context: IndexContext) -> None:
        """Begin a new peak for an index, without a loss to those that are running."""
        with self.lock:
            if self._reached:
                now = self._read()
                for each, before in self._reached.items():
                    self._reached[each] = _greater(before, now)
            self._reset()
            self._reached[context] = ()

    def end(self, context: IndexContext) -> Figures:
        """Return what an index has reached since it began, and forget it."""
        with self.lock:
            before, now = self._reached.pop(context, ()), self._read()
        return _greater(before, now) if before else now

    def forget(self, context: IndexContext) -> None:
        """Forget an index that was not brought to its end."""
        with self.lock:
            self._reached.pop(context, None)


def _greater(first: Figures, second: Figures) -> Figures:
    return tuple(map(max, first, second)) if first and second else first or second
