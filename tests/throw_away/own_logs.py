"""Capture warnings in another way."""

import logging
from datetime import UTC, datetime

from psnc import IndexContext, LogRecord, hookimpl


class Handler(logging.Handler):
    context: IndexContext | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.context is not None:
            moment = datetime.fromtimestamp(record.created, UTC).isoformat()
            text = f"own: {record.getMessage()}"
            entry = LogRecord(moment, record.levelno, record.levelname, record.name, text)
            self.context.logs.append(entry)


handler = Handler(logging.WARNING)


@hookimpl
def psnc_configure() -> None:
    logging.getLogger().addHandler(handler)


@hookimpl
def psnc_unconfigure() -> None:
    logging.getLogger().removeHandler(handler)


@hookimpl
def psnc_index_start(context: IndexContext) -> None:
    handler.context = context


@hookimpl
def psnc_index_done() -> None:
    handler.context = None
