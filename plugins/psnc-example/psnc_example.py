"""One of everything that a plugin can add to psnc: stages, a backend, a command and a hook."""

import cProfile
import csv
import json
from concurrent.futures import Future
from pathlib import Path

import click

import psnc


class CSVRows(psnc.FilesSource):
    """The rows of CSV files; each file is an index."""

    def __getitem__(self, index):
        for path in super().__getitem__(index):
            with path.open(newline="") as file:
                yield from csv.DictReader(file)


@psnc.filter
def where(rows, column: str, value: str):
    """Keep the rows that have a value in a column."""
    yield from (row for row in rows if row[column] == value)


@psnc.sink
def json_lines(rows, index, output_dir: str):
    """Write each index to a file of JSON lines."""
    path = Path(output_dir, f"{index}.jsonl")
    with psnc.atomic_write(path, "w") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
    return path


class Profiled(psnc.Backend):
    """Runs indices in this process, and leaves for ``python -m pstats run.prof`` what they do."""

    def start(self, task):
        self.task, self.profile = task, cProfile.Profile()

    def submit(self, indices):
        done = Future()
        done.set_result(self.profile.runcall(self.task, indices))
        return done

    def stop(self, *, now=False):
        self.profile.dump_stats("run.prof")


@psnc.hookimpl
def psnc_sources():
    return {"csv-rows": CSVRows}


@psnc.hookimpl
def psnc_filters():
    return {"where": where}


@psnc.hookimpl
def psnc_sinks():
    return {"json-lines": json_lines}


@psnc.hookimpl
def psnc_backends():
    return {"profiled": Profiled}


@psnc.hookimpl
def psnc_run_done(summary):
    click.echo(f"{summary.completed / summary.elapsed_s:.0f} indices a second", err=True)


@psnc.hookimpl
def psnc_add_commands(cli):
    @cli.command()
    @click.argument("pattern")
    def columns(pattern):
        """Say which columns CSV files have."""
        for path in CSVRows(pattern).paths:
            with path.open(newline="") as file:
                click.echo(f"{path}: {', '.join(csv.DictReader(file).fieldnames or [])}")
