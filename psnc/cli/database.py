"""``psnc status``, ``psnc errors`` and ``psnc reset``: look into a checkpoint database."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from psnc.claims import Claim, shown_indices
from psnc.cli.options import debug_option, with_plugins
from psnc.errors import IndexRangeError, PipelineError, StoreError
from psnc.processes import Life
from psnc.store import CheckpointStore, RunRow, open_store, shown_url

__all__ = ["errors", "reset", "status"]

_database = click.argument("database", metavar="DB")
_run_option = click.option("--run", "run_id", type=int, help="Which run, where there are several.")


@click.command()
@_database
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@with_plugins
@debug_option
def status(database: str, as_json: bool) -> None:
    """Say how far the runs in a database are."""
    with _opened(database) as store:
        rows = []
        for run in store.runs():
            store.select(run.run_id)
            rows.append(_status_of(run, store))
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        _print_status(row)
    if not rows:
        click.echo("no run is recorded")


@click.command()
@_database
@_run_option
@click.option("--index", type=int, help="Only this index.")
@click.option("--traceback", is_flag=True, help="Show where each failed.")
@with_plugins
@debug_option
def errors(database: str, run_id: int | None, index: int | None, traceback: bool) -> None:
    """List the indices that failed, and why."""
    with _opened(database) as store:
        _select(store, run_id, database)
        failed = store.failed_indices()
        if index is not None:
            failed = {index: failed[index]} if index in failed else {}
        for failed_index, error in failed.items():
            click.echo(f"{failed_index}: {error}")
            if traceback:
                _print_errors_logged(store, failed_index)
    if not failed:
        click.echo("no index failed" if index is None else f"{index} did not fail", err=True)


@click.command()
@_database
@_run_option
@click.option("--index", "indices", type=int, multiple=True, help="Only this index; repeatable.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_plugins
@debug_option
def reset(database: str, run_id: int | None, indices: tuple[int, ...], yes: bool) -> None:
    """Forget what is recorded, so that it runs again. Output files are left alone."""
    with _opened(database) as store:
        run = _select(store, run_id, database)
        indices = tuple(dict.fromkeys(indices))
        for index in indices:
            if not 0 <= index < run.total_indices:
                raise IndexRangeError(
                    f"index {index} is out of range: there are {run.total_indices}"
                )
        counts = store.counts(run.total_indices)
        what = (
            f"indices {', '.join(map(str, indices))}"
            if indices
            else f"all {counts.completed + counts.failed} recorded indices"
        )
        if not yes:
            if sys.stdin is None or not sys.stdin.isatty():
                raise click.UsageError("without a terminal to ask on, give --yes to forget records")
            click.confirm(f"Forget {what} of {shown_url(database)}?", abort=True)
        if indices:
            store.reset_indices(indices)
        else:
            store.reset()
    click.echo(f"forgot {what}")


@contextmanager
def _opened(database: str) -> Iterator[CheckpointStore]:
    store = open_store(database)
    if store is None:
        raise StoreError(f"no loaded plugin opens {shown_url(database)!r}: check the path or URL")
    try:
        yield store
    finally:
        store.close()


def _select(store: CheckpointStore, run_id: int | None, database: str) -> RunRow:
    runs = {run.run_id: run for run in store.runs()}
    if run_id is None and len(runs) == 1:
        (run_id,) = runs
    if run_id not in runs:
        known = ", ".join(map(str, runs)) or "none"
        raise PipelineError(f"{shown_url(database)}: choose a run with --run: {known}")
    store.select(run_id)
    return runs[run_id]


def _status_of(run: RunRow, store: CheckpointStore) -> dict[str, Any]:
    counts = store.counts(run.total_indices)
    return {
        "run": run.run_id,
        "config_hash": run.config_hash,
        "stages": _stage_classes(run.config_json),
        "started_at": run.started_at,
        "run_dir": run.run_dir,
        "total": run.total_indices,
        "completed": counts.completed,
        "failed": counts.failed,
        "remaining": run.total_indices - counts.completed - counts.failed,
        "avg_time_ms": counts.wall_time_ns / max(counts.completed, 1) / 1e6,
        "total_elapsed_s": counts.elapsed_s,
        "working": [
            {"index": worker["current_index"], "pid": worker["pid"], "hostname": worker["hostname"]}
            for worker in store.workers()
            if _is_at_work(worker, store)
        ],
        "drivers": [_driver_of(claim) for claim in store.claims()],
    }


def _driver_of(claim: Claim) -> dict[str, Any]:
    return {
        "pid": claim.pid,
        "hostname": claim.hostname,
        "started_at": claim.started_at,
        "indices": claim.indices,
        "state": claim.life().value,
    }


def _is_at_work(worker: dict[str, Any], store: CheckpointStore) -> bool:
    index = worker["current_index"]
    # Of a worker that was killed nobody has it on record, but perhaps that another did its work.
    return index is not None and store.lookup(index) is None


def _print_status(row: dict[str, Any]) -> None:
    click.echo(f"run {row['run']}  {row['config_hash'][:16]}  {' > '.join(row['stages'])}")
    click.echo(f"  started {row['started_at'][:19]} UTC in {row['run_dir']}")
    click.echo(
        f"  {row['completed']} of {row['total']} completed, {row['failed']} failed, "
        f"{row['remaining']} remaining"
    )
    click.echo(f"  {row['avg_time_ms']:.1f} ms an index, {row['total_elapsed_s']:.1f} s of running")
    for driver in row["drivers"]:
        click.echo(f"  {_driver_line(driver)}")
    for worker in row["working"]:
        where = f"process {worker['pid']} on {worker['hostname']}"
        click.echo(f"  index {worker['index']} begun by {where}")


def _driver_line(driver: dict[str, Any]) -> str:
    who = f"process {driver['pid']} on {driver['hostname']}"
    what = shown_indices(driver["indices"])
    since = f"{driver['started_at'][:19]} UTC"
    if driver["state"] == Life.DEAD.value:
        return f"left by {who}, which is dead: {what}, begun {since}"
    doubt = ", unless it has died" if driver["state"] == Life.UNKNOWN.value else ""
    return f"run by {who} since {since}{doubt}: {what}"


def _stage_classes(config_json: str) -> list[str]:
    config = json.loads(config_json)
    stages = [config["source"], *config["filters"], config["sink"]]
    return [stage["class"].partition(":")[2] for stage in stages if stage]


def _print_errors_logged(store: CheckpointStore, index: int) -> None:
    for entry in store.logs(index):
        if entry["level_name"] == "ERROR":
            for line in entry["message"].splitlines():
                click.echo(f"    {line}")
