"""Record every index in the checkpoint store, and answer for those it holds as completed.

SQLite is the store for plain paths. A plugin that opens another for its own URLs from
``psnc_open_store`` is recorded to in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from psnc import hookimpl

if TYPE_CHECKING:
    import click

    from psnc import CheckpointStore, IndexContext, IndexRecord, Run


@hookimpl(trylast=True)
def psnc_open_store(url: str, run: Run | None, create: bool) -> CheckpointStore | None:
    """Open the SQLite database at a path."""
    if "://" in url:
        return None
    from psnc import Config
    from psnc.builtin.checkpoint.store import SQLiteStore

    config = run.plugins.config if run is not None else Config()
    if run is not None and config.recover and create:
        _recover(Path(url), run)
    looking = run is None and not create
    return SQLiteStore(Path(url), create=create, looking=looking, config=config)


def _recover(path: Path, run: Run) -> None:
    """Salvage a damaged database, unless this process is at work on it."""
    from importlib.metadata import version

    from psnc.builtin.checkpoint.runs import OwnRun
    from psnc.builtin.checkpoint.set_aside import recover_in_place
    from psnc.builtin.checkpoint.store import is_open_here

    if is_open_here(path):
        return
    about = (run.config_hash, run.pipeline.config_json, run.run_dir, run.total_indices)
    done = recover_in_place(path, OwnRun(*about, version("psnc")))
    if done is not None:
        print(f"psnc: {done}", file=sys.stderr)


@hookimpl
def psnc_add_commands(cli: click.Group) -> None:
    """Add what looks into SQLite files, mends and merges them."""
    from psnc.builtin.checkpoint.commands import COMMANDS

    for command in COMMANDS:
        cli.add_command(command)


@hookimpl(trylast=True)
def psnc_index_lookup(run: Run, index: int) -> Sequence[str] | None:
    """Answer with the recorded paths of a completed index."""
    return None if run.store is None else run.store.lookup(index)


@hookimpl
def psnc_index_start(context: IndexContext) -> None:
    """Note which index the worker is at."""
    if context.run.store is not None:
        context.run.store.index_started(context.worker, context.index)


@hookimpl(trylast=True)
def psnc_index_done(context: IndexContext, record: IndexRecord) -> None:
    """Record the index."""
    if context.run.store is not None:
        context.run.store.record(record)


@hookimpl
def psnc_index_interrupted(context: IndexContext) -> None:
    """Note that the worker is at no index any more."""
    if context.run.store is not None:
        context.run.store.worker_idle(context.worker)


@hookimpl(tryfirst=True)
def psnc_index_reported(run: Run, record: IndexRecord) -> None:
    """Record what a worker out of the store's reach, or one that died, could not."""
    _record_for_worker(run, record)


@hookimpl(tryfirst=True)
def psnc_index_retried(run: Run, record: IndexRecord) -> None:
    """Record the failed attempt of a worker that could not."""
    _record_for_worker(run, record)


def _record_for_worker(run: Run, record: IndexRecord) -> None:
    if run.store is not None and not record.recorded:
        run.store.record(record)
