"""End a worker process whose index takes too long, whatever the index is at.

The kernel's interval timer sends ``SIGALRM``. Nothing in Python answers it: C code of the standard
library writes down where every thread is, and the signal's default action ends the process. So a
stage that is stuck in C code and holds the interpreter's lock is ended like any other, and the cost
is one system call as an index begins and one as it ends.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

__all__ = ["LastWords", "TimeLimit", "is_enforceable", "last_words"]

# The number of the index, padded so that each overwrites the one before.
_HEADING_BYTES = 24


def is_enforceable() -> bool:
    """Tell whether this system has the timer and the signal."""
    return hasattr(signal, "setitimer") and hasattr(faulthandler, "register")


class TimeLimit:
    """The time that an index may take in this process.

    It takes over ``SIGALRM``, and is for a process whose main thread runs one index at a time.

    Parameters
    ----------
    seconds : float
        The most that an index may take.
    directory : str
        Where to leave a report for the driver.
    """

    def __init__(self, seconds: float, directory: str) -> None:
        self._seconds = seconds
        create = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
        try:
            self._report = os.open(_report_path(directory, os.getpid()), create)
        except OSError:
            # A machine that does not see the driver's directory: the signal alone has to say it.
            self._report = os.open(os.devnull, os.O_WRONLY)
        os.lseek(self._report, _HEADING_BYTES, os.SEEK_SET)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        faulthandler.register(signal.SIGALRM, file=self._report, all_threads=True, chain=True)

    @contextmanager
    def over(self, index: int) -> Iterator[None]:
        """Hold an index to it."""
        os.pwrite(self._report, f"{index:<{_HEADING_BYTES - 1}}\n".encode(), 0)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


@frozen
class LastWords:
    """What a process left behind that its time limit ended.

    Attributes
    ----------
    index : int
        The index that it was at.
    traceback : str
        Where every thread was.
    """

    index: int
    traceback: str


def last_words(directory: str, pid: int) -> LastWords | None:
    """Return what a process left behind; ``None`` if its time limit did not end it."""
    try:
        content = _report_path(directory, pid).read_bytes()
    except OSError:
        return None
    heading, traceback = content[:_HEADING_BYTES], content[_HEADING_BYTES:]
    if not traceback:
        return None
    return LastWords(int(heading), traceback.decode(errors="backslashreplace").rstrip())


def _report_path(directory: str, pid: int) -> Path:
    return Path(directory) / str(pid)
