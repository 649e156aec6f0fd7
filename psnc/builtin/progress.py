"""Show on standard error how a run is going: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from psnc.hookspecs import hookimpl
from psnc.records import IndexRecord, RunSummary
from psnc.run import Run

if TYPE_CHECKING:
    from rich.progress import Progress

# A line at once, then ever fewer: a log file should stay readable after a week.
_FIRST_LINE_S = 5.0
_LAST_INTERVAL_S = 60.0


class _Display(Protocol):
    def advance(self, *, failed: bool) -> None: ...

    def close(self) -> None: ...


_displays: dict[int, _Display] = {}


@hookimpl
def psnc_run_start(run: Run, indices: Sequence[int], cached: int) -> None:
    """Begin to show progress, if the caller wants to see it."""
    if sys.stderr is None:
        return
    on_terminal = sys.stderr.isatty()
    wanted = on_terminal if run.show_progress is None else run.show_progress
    # A dumb terminal cannot redraw a bar.
    on_terminal = on_terminal and os.environ.get("TERM") not in ("dumb", "unknown")
    if wanted and indices:
        display = _Bar if on_terminal else _Lines
        _displays[id(run)] = display(len(indices) + cached, cached)


@hookimpl
def psnc_index_reported(run: Run, record: IndexRecord) -> None:
    """Count one index."""
    display = _displays.get(id(run))
    if display is not None:
        display.advance(failed=record.status == "error")


@hookimpl(tryfirst=True)
def psnc_run_done(run: Run, summary: RunSummary) -> None:
    """Leave the terminal in order."""
    display = _displays.pop(id(run), None)
    if display is not None:
        display.close()


class _Bar:
    """A rich progress bar with rate, time left and failures; redrawn ten times a second."""

    def __init__(self, total: int, cached: int) -> None:
        self._progress = _rich_progress()
        self._task = self._progress.add_task("", total=total, completed=cached, failures="")
        self._failed = 0
        self._progress.start()

    def advance(self, *, failed: bool) -> None:
        self._failed += failed
        failures = f"[red]{self._failed} failed" if self._failed else ""
        self._progress.update(self._task, advance=1, failures=failures)

    def close(self) -> None:
        self._progress.stop()


def _rich_progress() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.1f}/s" if task.speed else "")

    return Progress(
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failures]}"),
        console=Console(stderr=True),
    )


class _Lines:
    """A plain line now and then, for log files and pipes."""

    def __init__(self, total: int, cached: int) -> None:
        self._total = total
        self._ended = self._cached = cached
        self._failed = 0
        self._started = time.monotonic()
        self._interval = _FIRST_LINE_S
        self._next = self._started + self._interval

    def advance(self, *, failed: bool) -> None:
        self._ended += 1
        self._failed += failed
        now = time.monotonic()
        if now >= self._next:
            self._print(now)
            self._interval = min(self._interval * 2, _LAST_INTERVAL_S)
            self._next = now + self._interval

    def close(self) -> None:
        self._print(time.monotonic())

    def _print(self, now: float) -> None:
        elapsed = now - self._started
        rate = (self._ended - self._cached) / elapsed if elapsed else 0.0
        left = (self._total - self._ended) / rate if rate else 0.0
        print(
            f"psnc: {self._ended}/{self._total} indices, {self._failed} failed, {rate:,.1f}/s, "
            f"{elapsed:.0f} s elapsed, {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
