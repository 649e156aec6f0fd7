"""Capture every log entry that is emitted while an index runs, and record it with the index."""

from __future__ import annotations

import logging
import os
import threading

from psnc.config import Config
from psnc.execution import IndexContext
from psnc.hookspecs import hookimpl
from psnc.records import IndexRecord, LogRecord, RunSummary, WorkerInfo, utc_timestamp
from psnc.run import Run


class _CaptureHandler(logging.Handler):
    """Files each entry under the index that its thread is running."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.contexts: dict[int, IndexContext] = {}
        self._inside = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        context = self._context()
        if context is not None and not getattr(self._inside, "busy", False):
            # A plugin that logs from psnc_log_record must not be called for that entry again.
            self._inside.busy = True
            try:
                self._file(context, record)
            finally:
                self._inside.busy = False
        self._stand_in_for_last_resort(record)

    def _context(self) -> IndexContext | None:
        context = self.contexts.get(threading.get_ident())
        in_main_thread = threading.current_thread() is threading.main_thread()
        if context is None and len(self.contexts) == 1 and not in_main_thread:
            # A helper thread that the stage started, while no other index is running here.
            context = next(iter(self.contexts.values()), None)
        return context

    def _file(self, context: IndexContext, record: logging.LogRecord) -> None:
        entry = LogRecord(
            utc_timestamp(record.created),
            record.levelno,
            record.levelname,
            record.name,
            self._text(record),
        )
        context.logs.append(entry)
        plugins = context.run.plugins
        if plugins.implements("psnc_log_record"):
            plugins.call_contained("psnc_log_record", context=context, record=entry)

    def _text(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record)
        except Exception as error:  # a careless logging call must not fail its index
            return f"{record.msg!r} with {record.args!r} (not formatted: {error})"

    def _stand_in_for_last_resort(self, record: logging.LogRecord) -> None:
        """Print what logging would print by itself if this handler were not there."""
        fallback = logging.lastResort
        alone = logging.getLogger().handlers == [self]
        if alone and fallback is not None and record.levelno >= fallback.level:
            fallback.handle(record)


_handler: _CaptureHandler | None = None
_lock = threading.Lock()
_root_level: int | None = None
_installed = False


@hookimpl
def psnc_configure(config: Config) -> None:
    """Make the handler; it joins the root logger only while indices run."""
    global _handler
    _handler = _CaptureHandler(config.log_level)


@hookimpl
def psnc_unconfigure(config: Config) -> None:
    """Leave the root logger as it was found."""
    if _handler is not None:
        _remove(_handler)


@hookimpl(tryfirst=True)
def psnc_index_start(context: IndexContext) -> None:
    """Begin to capture for the calling thread."""
    handler = _handler
    assert handler is not None  # psnc_configure comes first
    with _lock:
        handler.contexts[threading.get_ident()] = context
        if len(handler.contexts) == 1 and not _installed:
            _install(handler)


@hookimpl(trylast=True)
def psnc_index_done(context: IndexContext, record: IndexRecord) -> None:
    """Stop capturing for the calling thread."""
    _stop(context.run)


@hookimpl
def psnc_index_interrupted(context: IndexContext) -> None:
    """Stop capturing for the calling thread."""
    _stop(context.run)


@hookimpl
def psnc_worker_done(run: Run, worker: WorkerInfo) -> None:
    """Leave the root logger as it was found."""
    _leave()


@hookimpl
def psnc_run_done(run: Run, summary: RunSummary) -> None:
    """Leave the root logger as it was found."""
    _leave()


def _leave() -> None:
    with _lock:
        if _handler is not None and not _handler.contexts:
            _remove(_handler)


def _renew_after_fork() -> None:
    """Forget the threads that did not come along, and the lock that one may have held."""
    global _lock
    _lock = threading.Lock()
    if _handler is not None:
        _handler.contexts.clear()
        _remove(_handler)


os.register_at_fork(after_in_child=_renew_after_fork)


def _stop(run: Run) -> None:
    handler = _handler
    assert handler is not None
    with _lock:
        handler.contexts.pop(threading.get_ident(), None)
        # Within a session it stays for the next index: to come and go costs as much as the rest.
        if not handler.contexts and not run.in_session:
            _remove(handler)


def _install(handler: _CaptureHandler) -> None:
    global _installed, _root_level
    _installed = True
    root = logging.getLogger()
    if not root.handlers and root.level > handler.level:
        # Nobody has set logging up, so that lowering the level shows nobody anything new.
        # Where somebody has, their level decides what there is to capture.
        _root_level = root.level
        root.setLevel(handler.level)
    root.addHandler(handler)


def _remove(handler: _CaptureHandler) -> None:
    global _installed, _root_level
    _installed = False
    root = logging.getLogger()
    root.removeHandler(handler)
    if _root_level is not None:
        root.setLevel(_root_level)
        _root_level = None
