"""Show on standard error how a run is going: a bar on a terminal, plain lines elsewhere.

The bar keeps to the last line of the terminal. What the program prints meanwhile goes where it
always went, and unchanged; the bar only steps aside for it.
"""

from __future__ import annotations

import builtins
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

from psnc import hookimpl

if TYPE_CHECKING:
    from psnc import IndexRecord, Run

# A line at once, then ever fewer: a log file should stay readable after a week.
_FIRST_LINE_S = 5.0
_LAST_INTERVAL_S = 60.0

_REDRAW_S = 0.1

# The rate that is shown is that of the last so many seconds.
_RATE_OVER_S = 30

_SHORTEST_BAR = 8
_GAP = "  "
_TO_LINE_START, _CLEAR_REST, _RED, _PLAIN = "\r", "\x1b[K", "\x1b[31m", "\x1b[0m"


class _Display(Protocol):
    def advance(self, *, failed: bool) -> None: ...

    def close(self) -> None: ...


_displays: dict[int, _Display] = {}
_bar: _Bar | None = None

# Held by whoever writes to the terminal.
_screen = threading.RLock()


@hookimpl
def psnc_run_start(run: Run, indices: Sequence[int], cached: int) -> None:
    """Begin to show progress, if the caller wants to see it."""
    if sys.stderr is None or not indices:
        return
    on_terminal = _is_terminal(sys.stderr)
    wanted = on_terminal if run.show_progress is None else run.show_progress
    if not wanted:
        return
    count = _Count(len(indices) + cached, cached)
    if not on_terminal or not _can_redraw():
        _displays[id(run)] = _Lines(count)
    elif _bar is None:
        _displays[id(run)] = _Bar(count)
    elif run.show_progress:
        # A run within a run, or beside it: there is one last line, and it is taken.
        _displays[id(run)] = _Lines(count)


@hookimpl
def psnc_index_reported(run: Run, record: IndexRecord) -> None:
    """Count one index."""
    display = _displays.get(id(run))
    if display is not None:
        display.advance(failed=record.status == "error")


@hookimpl(tryfirst=True)
def psnc_run_done(run: Run) -> None:
    """Leave the terminal in order."""
    display = _displays.pop(id(run), None)
    if display is not None:
        display.close()


def _can_redraw() -> bool:
    return os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


class _Count:
    """How far a run is, and how fast."""

    def __init__(self, total: int, cached: int) -> None:
        self.total = total
        self.ended = cached
        self.failed = 0
        self._started = time.monotonic()
        self._marks = deque([(self._started, cached)], maxlen=_RATE_OVER_S + 1)

    def advance(self, *, failed: bool) -> None:
        self.ended += 1
        self.failed += failed

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def per_second(self) -> float:
        """Return the indices that end in a second; 0 as long as none has."""
        now = time.monotonic()
        if now - self._marks[-1][0] >= 1:
            self._marks.append((now, self.ended))
        since, ended = self._marks[0]
        return (self.ended - ended) / (now - since) if now > since else 0.0


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


# --- a terminal -------------------------------------------------------------------------------


class _Bar:
    """The last line of the terminal, redrawn ten times a second if it has changed."""

    def __init__(self, count: _Count) -> None:
        global _bar
        self._count = count
        self._terminal = sys.stderr
        self._filled, self._empty = _characters(self._terminal)
        self._shown = ""
        self._others_line_is_open = False
        self._over = False
        self._woken = threading.Event()
        self.advance = count.advance
        self._input = builtins.input
        with _screen:
            _bar = self
            self._stand_in_for_streams()
            builtins.input = self._ask
            self._draw()
        threading.Thread(target=self._keep_drawing, name="psnc-progress", daemon=True).start()

    def close(self) -> None:
        """Leave the bar as it is in the end, and the streams as they were."""
        self._woken.set()
        with _screen:
            self.let_go()
            if self._others_line_is_open:
                self._write("\n")
            self._others_line_is_open = False
            self._draw()
            self._write("\n")

    def let_go(self) -> None:
        """Draw no more, and give the streams back."""
        global _bar
        _bar = None
        self._over = True
        for name, stream in self._streams.items():
            # Whoever has put something else there since then will give this back.
            if getattr(sys, name) is stream:
                setattr(sys, name, stream.behind)
        if builtins.input == self._ask:
            builtins.input = self._input

    def pass_on(self, stream: TextIO, text: str) -> int:
        """Write what the program prints where the bar is, and the bar below it."""
        with _screen:
            if self._over or not text:
                return stream.write(text)
            self._erase()
            written = stream.write(text)
            stream.flush()
            self._others_line_is_open = not text.endswith("\n")
            self._draw()
            return written

    def _ask(self, prompt: object = "") -> str:
        """Stand in for ``input``, which writes its prompt past every stream."""
        with _screen:
            self._step_aside()
        try:
            return self._input(prompt)
        finally:
            self._others_line_is_open = False

    def _step_aside(self) -> None:
        if not self._over:
            self._erase()
            self._others_line_is_open = True

    def _stand_in_for_streams(self) -> None:
        self._streams = {
            name: _Above(self, stream)
            for name in ("stdout", "stderr")
            if (stream := getattr(sys, name)) is not None and _is_terminal(stream)
        }
        for name, stream in self._streams.items():
            setattr(sys, name, cast(TextIO, stream))

    def _keep_drawing(self) -> None:
        while not self._woken.wait(_REDRAW_S):
            with _screen:
                if not self._over:
                    self._draw()

    def _draw(self) -> None:
        text = self._text(_columns(self._terminal))
        # A prompt, or a line that is not complete, is not written over.
        if text != self._shown and not self._others_line_is_open:
            self._write(_TO_LINE_START + text)
            self._shown = text

    def _erase(self) -> None:
        if self._shown:
            self._write(_TO_LINE_START + _CLEAR_REST)
            self._shown = ""

    def _write(self, text: str) -> None:
        # The terminal may be gone, which is no reason for a run to end.
        with suppress(OSError, ValueError):
            self._terminal.write(text)
            self._terminal.flush()

    def _text(self, room: int) -> str:
        """Return as much as there is room for, the most important first.

        The line is filled: what others then print past this object, as worker processes do, begins
        on the next one.
        """
        count = self._count
        rate = count.per_second()
        failed = f"{count.failed} failed" if count.failed else ""
        remaining = count.total - count.ended
        left = f"{_clock(remaining / rate)} left" if rate and remaining else ""
        # By place in the line, in order of importance.
        parts = {
            0: f"{count.ended}/{count.total}"[: max(room, 0)],
            4: failed,
            3: left,
            1: f"{rate:,.1f}/s" if rate else "",
            2: _clock(count.elapsed_s()),
        }
        chosen: dict[int, str] = {}
        for place, text in parts.items():
            if text and _width([*chosen.values(), text]) <= room:
                chosen[place] = text
        length = room - _width(chosen.values())
        if 4 in chosen and "NO_COLOR" not in os.environ:
            chosen[4] = f"{_RED}{chosen[4]}{_PLAIN}"
        line = _GAP.join(chosen[place] for place in sorted(chosen))
        bar = self._drawn_bar(length - len(_GAP)) + _GAP if length > _SHORTEST_BAR else ""
        return bar + line + " " * (length - len(bar))

    def _drawn_bar(self, length: int) -> str:
        filled = min(length * self._count.ended // self._count.total, length)
        return self._filled * filled + self._empty * (length - filled)


class _Above:
    """Stands in for a stream that shows on the bar's terminal."""

    def __init__(self, bar: _Bar, behind: TextIO) -> None:
        self._bar = bar
        self.behind = behind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.behind, name)

    def write(self, text: str) -> int:
        return self._bar.pass_on(self.behind, text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # something of the program's own, or closed
        return False


def _columns(terminal: TextIO) -> int:
    try:
        columns = os.get_terminal_size(terminal.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return columns or 80


def _characters(terminal: TextIO) -> tuple[str, str]:
    try:
        "━─".encode(terminal.encoding or "ascii")
    except UnicodeEncodeError:
        return "#", "-"
    return "━", "─"


def _width(parts: Iterable[str]) -> int:
    return len(_GAP.join(parts))


# A child has the program's streams, and no thread that draws.


def _after_fork_in_child() -> None:
    _screen.release()
    if _bar is not None:
        _bar.let_go()
    _displays.clear()


os.register_at_fork(
    before=_screen.acquire,
    after_in_parent=_screen.release,
    after_in_child=_after_fork_in_child,
)


# --- a pipe or a file -------------------------------------------------------------------------


class _Lines:
    """A plain line now and then, for log files and pipes."""

    def __init__(self, count: _Count) -> None:
        self._count = count
        self._printed = -1
        self._interval = _FIRST_LINE_S
        self._next = time.monotonic() + self._interval

    def advance(self, *, failed: bool) -> None:
        self._count.advance(failed=failed)
        now = time.monotonic()
        if now >= self._next:
            self._print()
            self._interval = min(self._interval * 2, _LAST_INTERVAL_S)
            self._next = now + self._interval

    def close(self) -> None:
        if self._printed != self._count.ended:
            self._print()

    def _print(self) -> None:
        count = self._count
        self._printed = count.ended
        rate = count.per_second()
        remaining = count.total - count.ended
        left = f", {_clock(remaining / rate)} left" if rate and remaining else ""
        # A disk may be full, or whoever read may be gone, which is no reason for a run to fail.
        with suppress(OSError, ValueError):
            print(
                f"psnc: {count.ended}/{count.total} indices, {count.failed} failed, {rate:,.1f}/s, "
                f"{_clock(count.elapsed_s())} elapsed{left}",
                file=sys.stderr,
                flush=True,
            )
