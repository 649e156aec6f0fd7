"""Tell every worker of a run to stop after its present index, those in other processes too."""

from __future__ import annotations

import mmap
import os
import threading
from typing import Self

__all__ = ["StopFlag"]

_STOP, _DISMISSED, _SIZE = 0, 1, 2


class StopFlag:
    """A flag of one process, or once it is shared, of all processes of the machine that join it.

    It is asked about after every index. The shared one is in memory, so that asking costs no system
    call.
    """

    def __init__(self) -> None:
        self._here = threading.Event()
        self._shared: mmap.mmap | None = None

    def share(self, path: str) -> None:
        """Make a file at ``path`` by which other processes can join."""
        with open(path, "wb") as file:
            file.write(bytes(_SIZE))
        self._map(path)
        if self.is_set():
            self.set()

    @classmethod
    def join(cls, path: str) -> Self:
        """Return the flag of another process; one of its own if that is on another machine."""
        flag = cls()
        if os.path.exists(path):
            flag._map(path)
        return flag

    def set(self) -> None:
        """Raise the flag."""
        self._here.set()
        if self._shared is not None:
            self._shared[_STOP] = 1

    def is_set(self) -> bool:
        """Tell whether any process has raised it."""
        return self._here.is_set() or (self._shared is not None and self._shared[_STOP] == 1)

    def dismiss(self) -> None:
        """Say that other processes are needed no more: a SIGTERM is from the driver now."""
        if self._shared is not None:
            self._shared[_DISMISSED] = 1

    def is_dismissed(self) -> bool:
        """Tell whether this process is needed no more."""
        return self._shared is not None and self._shared[_DISMISSED] == 1

    def _map(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._shared = mmap.mmap(file.fileno(), _SIZE)
