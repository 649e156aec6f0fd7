"""Capture every log entry that is emitted while an index runs, and record it with the index.

Entries are taken where loggers hand them to their handlers, whatever handlers there are: those of
loggers that do not propagate too, and also after a stage has set up logging anew. Handlers, levels
and factories are the program's own and stay so: a logger's level and filters decide what there is
to capture. Only where nobody has set up logging is the root logger's level lowered while indices
run, and what there is because of that reaches nobody else.

Entries wait in memory and are recorded with the index, in its transaction. That is bounded: of an
index that logs without end its first and its last entries are kept, and one entry in between says
how many are not.
"""

from __future__ import annotations

import logging
import os
import reprlib
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any

from psnc import LogRecord, hookimpl

if TYPE_CHECKING:
    from psnc import Config, IndexContext

# What is kept of one index, at each of its ends.
_KEPT_ENTRIES = 5_000
_KEPT_CHARACTERS = 5_000_000

# What is kept of one entry.
_ENTRY_CHARACTERS = 100_000

_CallHandlers = Callable[[logging.Logger, logging.LogRecord], None]

_formatter = logging.Formatter()


class _IndexLog:
    """The entries of one index, few enough to be held in memory; and the index around it."""

    _characters = _first = _left_out = 0

    def __init__(self, context: IndexContext, outer: _IndexLog | None) -> None:
        self.context = context
        self.outer = outer

    def add(self, entry: LogRecord) -> None:
        """Take an entry in."""
        entries = self.context.logs
        entries.append(entry)
        self._characters += len(entry.message)
        if len(entries) > 3 * _KEPT_ENTRIES or self._characters > 3 * _KEPT_CHARACTERS:
            self._thin_out(entries)

    def _thin_out(self, entries: list[LogRecord]) -> None:
        """Leave out the middle, and say so there."""
        with _tap.lock:
            if not self._left_out:
                self._first = _number_kept(entries)
            begin = self._first
            end = len(entries) - _number_kept(reversed(entries))
            if begin < end:  # unless another thread has done it
                # What was said of an earlier middle is in this one.
                self._left_out += end - begin - bool(self._left_out)
                entries[begin:end] = [_gap(entries[end - 1].timestamp, self._left_out)]
            self._characters = sum(len(entry.message) for entry in entries)


def _number_kept(entries: Iterable[LogRecord]) -> int:
    number = characters = 0
    for entry in islice(entries, _KEPT_ENTRIES):
        characters += len(entry.message)
        if characters > _KEPT_CHARACTERS:
            break
        number += 1
    return number


def _gap(timestamp: str, number: int) -> LogRecord:
    message = f"{number:,} entries are left out here, as this index logged more than is kept"
    return LogRecord(timestamp, logging.WARNING, "WARNING", "psnc.logcapture", message)


class _Lowered(int):
    """The root logger's level while indices run, told apart from the same one set by another."""


class _Tap:
    """Takes entries on their way from loggers to handlers."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.level = logging.INFO
        self._logs: dict[int, _IndexLog] = {}
        self._drivers: set[int] = set()
        self._thread = threading.local()
        self._is_open = False
        self._before: _CallHandlers = logging.Logger.callHandlers
        self._wrapper = self._wrap(self._before)
        self._lowered: _Lowered | None = None

    def begin(self, context: IndexContext) -> None:
        """Capture what the calling thread logs for an index."""
        thread = threading.get_ident()
        with self.lock:
            # A stage may itself run the indices of another pipeline.
            self._logs[thread] = _IndexLog(context, self._logs.get(thread))
            if not self._is_open:
                self._open()
            if (self._lowered is None) is not bool(logging.root.handlers):
                self._adjust_root_level()

    def end(self, context: IndexContext) -> None:
        """Let the calling thread go back to the index that it was at, if it was at any."""
        thread = threading.get_ident()
        with self.lock:
            log = self._logs.get(thread)
            if log is not None and log.context is context:
                if log.outer is None:
                    del self._logs[thread]
                else:
                    self._logs[thread] = log.outer
            # In a session the level stays for the next index. What is wrapped stays in any case: a
            # class that is changed again and again is slow for all who use it.
            if not context.run.in_session and not self._logs:
                self._restore_root_level()

    def close(self) -> None:
        """Leave logging as it was, unless an index is running."""
        with self.lock:
            if not self._logs:
                self._shut()

    def drop(self) -> None:
        """Forget every index."""
        self.lock = threading.RLock()
        self._logs.clear()
        self._drivers.clear()
        self._shut()

    def set_driver(self, *, driving: bool) -> None:
        """Note whether the calling thread drives a run; then its entries are no index's."""
        change = self._drivers.add if driving else self._drivers.discard
        change(threading.get_ident())

    # --- on the way ---------------------------------------------------------------------------

    def _open(self) -> None:
        present = logging.Logger.callHandlers
        if present is not self._before and present is not self._wrapper:
            self._before, self._wrapper = present, self._wrap(present)
        logging.Logger.callHandlers = self._wrapper  # type: ignore[assignment,method-assign]
        self._is_open = True

    def _shut(self) -> None:
        # Somebody else who came later stays, and with them this, which then passes all on.
        if logging.Logger.callHandlers is self._wrapper:
            logging.Logger.callHandlers = self._before  # type: ignore[assignment,method-assign]
        self._is_open = False
        self._restore_root_level()

    def _wrap(self, before: _CallHandlers) -> _CallHandlers:
        def call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
            self._pass(logger, record, before)

        return call_handlers

    def _adjust_root_level(self) -> None:
        root = logging.root
        if root.handlers:
            self._restore_root_level()
        elif root.level == logging.WARNING > self.level:
            self._lowered = _Lowered(self.level)
            root.setLevel(self._lowered)

    def _restore_root_level(self) -> None:
        if self._lowered is not None and logging.root.level is self._lowered:
            logging.root.setLevel(logging.WARNING)
        self._lowered = None

    def _pass(
        self, logger: logging.Logger, record: logging.LogRecord, before: _CallHandlers
    ) -> None:
        if not self._logs and self._lowered is None:
            before(logger, record)
            return
        here: dict[str, Any] = self._thread.__dict__
        outer = here.get("record")
        # Not again, if a handler or somebody who wraps loggers too hands the same one on.
        if record is not outer and record.levelno >= self.level:
            self._capture(record, here)
        if self._only_captured(logger, record):
            return
        here["record"] = record
        try:
            before(logger, record)
        finally:
            here["record"] = outer

    def _only_captured(self, logger: logging.Logger, record: logging.LogRecord) -> bool:
        """Tell whether there would be no such entry, had the root's level not been lowered."""
        return (
            self._lowered is not None
            and record.levelno < logging.WARNING
            and logger.getEffectiveLevel() is self._lowered
        )

    def _capture(self, record: logging.LogRecord, here: dict[str, Any]) -> None:
        log = self._log()
        # A plugin that logs from psnc_log_record must not be called for that entry again.
        if log is None or here.get("busy"):
            return
        here["busy"] = True
        try:
            when = _timestamp(record.created)
            entry = LogRecord(when, record.levelno, record.levelname, record.name, _text(record))
            log.add(entry)
            context = log.context
            if context.run.plugins.implements("psnc_log_record"):
                context.run.plugins.call_contained("psnc_log_record", context=context, record=entry)
        finally:
            here["busy"] = False

    def _log(self) -> _IndexLog | None:
        thread = threading.get_ident()
        log = self._logs.get(thread)
        if log is None and len(self._logs) == 1 and thread not in self._drivers:
            if threading.current_thread() is threading.main_thread():
                return None
            # A helper thread that the stage started, while no other index is running here.
            log = next(iter(self._logs.values()), None)
        return log


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")


def _text(record: logging.LogRecord) -> str:
    """Return what the entry says; the record stays as it is for those that come after."""
    try:
        parts = [record.getMessage()]
        if record.exc_text:
            parts.append(record.exc_text)
        elif record.exc_info:
            parts.append(_formatter.formatException(record.exc_info))
        if record.stack_info:
            parts.append(record.stack_info)
        text = "\n".join(parts)
    except Exception as error:  # a careless logging call must not fail its index
        said = f"{reprlib.repr(record.msg)} with {reprlib.repr(record.args)}"
        text = f"{said} (not formatted: {reprlib.repr(error)})"
    return text if len(text) <= _ENTRY_CHARACTERS else _cut(text)


def _cut(text: str) -> str:
    """Keep both ends of a long text: the end of a traceback says what went wrong."""
    half = _ENTRY_CHARACTERS // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]}\n[{left_out:,} characters are left out here]\n{text[-half:]}"


_tap = _Tap()


def _renew_after_fork() -> None:
    """Forget the threads that did not come along, and the lock that one may have held."""
    _tap.drop()


os.register_at_fork(after_in_child=_renew_after_fork)


# --- hooks ------------------------------------------------------------------------------------


@hookimpl
def psnc_configure(config: Config) -> None:
    """Take the level; nothing is captured before an index runs."""
    # With none at all, that of the lowest entry there can be.
    _tap.level = max(config.log_level, 1)


@hookimpl
def psnc_unconfigure() -> None:
    """Leave logging as it was found."""
    _tap.close()


@hookimpl
def psnc_run_start() -> None:
    """Tell the driver's entries from those of the indices that run in its process."""
    _tap.set_driver(driving=True)


@hookimpl
def psnc_run_done() -> None:
    """Leave logging as it was found."""
    _tap.set_driver(driving=False)
    _tap.close()


@hookimpl
def psnc_worker_done() -> None:
    """Leave logging as it was found."""
    _tap.close()


@hookimpl(tryfirst=True)
def psnc_index_start(context: IndexContext) -> None:
    """Begin to capture for the calling thread."""
    _tap.begin(context)


@hookimpl(trylast=True)
def psnc_index_done(context: IndexContext) -> None:
    """Stop capturing for the calling thread."""
    _tap.end(context)


@hookimpl
def psnc_index_interrupted(context: IndexContext) -> None:
    """Stop capturing for the calling thread."""
    _tap.end(context)
