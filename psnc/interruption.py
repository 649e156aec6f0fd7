"""Ctrl-C and SIGTERM: the first lets the indices at work end, the second ends them."""

from __future__ import annotations

import _thread
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from psnc.errors import RunTerminated

__all__ = ["Interruption", "interruptible", "terminable"]


class Interruption:
    """What signals have asked of a run.

    Parameters
    ----------
    stop : callable
        Called at the first signal: starts nothing more.
    grace : float, optional
        Seconds that the indices at work have after it.
    """

    def __init__(self, stop: Callable[[], None], grace: float | None) -> None:
        self._stop = stop
        self._grace = grace
        self._signal: int | None = None
        self._timer: threading.Timer | None = None

    def is_set(self) -> bool:
        """Tell whether a signal has come."""
        return self._signal is not None

    def error(self) -> BaseException:
        """Return what the run is to raise."""
        return RunTerminated() if self._signal == signal.SIGTERM else KeyboardInterrupt()

    def handle(self, signal_number: int, frame: Any) -> None:
        """Answer a signal."""
        if self._signal is not None:
            raise self.error()
        self._signal = signal_number
        self._stop()
        limit = "" if self._grace is None else f", for {self._grace:g} s at the most"
        again = "Ctrl-C again" if signal_number == signal.SIGINT else "a second signal"
        # Not print: a signal may arrive while that very stream is being written to.
        text = f"\npsnc: letting the indices at work end{limit}; {again} ends them now\n"
        with suppress(OSError):  # nobody to tell
            os.write(2, text.encode())
        if self._grace is not None:
            # To this thread it is as if the signal came again, whatever it is at.
            self._timer = threading.Timer(self._grace, _thread.interrupt_main, (signal_number,))
            self._timer.daemon = True
            self._timer.start()

    def over(self) -> None:
        """Let the time that was granted not end anything else."""
        if self._timer is not None:
            self._timer.cancel()


@contextmanager
def interruptible(stop: Callable[[], None], grace: float | None) -> Iterator[Interruption]:
    """Answer Ctrl-C and SIGTERM in a ``with`` block.

    Nothing changes in other threads than the main one, which alone may handle signals, nor for a
    signal that the caller handles in a way of its own.
    """
    interruption = Interruption(stop, grace)
    with _answered(interruption.handle, *_DEFAULTS):
        try:
            yield interruption
        finally:
            interruption.over()


@contextmanager
def terminable() -> Iterator[None]:
    """Have SIGTERM raise :class:`psnc.RunTerminated` in a ``with`` block, as Ctrl-C raises.

    For what comes before the first index, when nothing is at work that should end first. Nothing
    changes where :func:`interruptible` changes nothing.
    """

    def terminate(signal_number: int, frame: Any) -> None:
        raise RunTerminated

    with _answered(terminate, signal.SIGTERM):
        yield


@contextmanager
def _answered(answer: Callable[[int, Any], None], *numbers: signal.Signals) -> Iterator[None]:
    """Answer signals, in the main thread, that nobody answers in a way of their own."""
    earlier: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) is _DEFAULTS[number]:
                earlier[number] = signal.signal(number, answer)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
