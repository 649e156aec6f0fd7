"""``psnc run``: run a pipeline."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from typing import Any

import attrs
import click

from psnc.cli.options import debug_option
from psnc.config import Config
from psnc.errors import IndexRangeError, PipelineError
from psnc.loading import load_pipeline
from psnc.manager import activate
from psnc.pipeline import Pipeline
from psnc.records import RunSummary
from psnc.session import Session

__all__ = ["run"]

_SHOWN_FAILURES = 5
_LEVELS = ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


class IndexRanges(click.ParamType):  # type: ignore[type-arg]  # generic only for mypy
    """Text such as ``0-99,200``: integers and inclusive ranges, parted by commas."""

    name = "ranges"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[range]:
        """Return the ranges that the text names, in its order."""
        if isinstance(value, list):
            return value
        ranges: list[range] = []
        for part in value.split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, re.ASCII)
            if match is None:
                self.fail(f"{part!r} is no index or range: write 7 or 0-99", param, ctx)
            first, last = match[1], match[2] or match[1]
            if int(last) < int(first):
                self.fail(f"{part!r} runs backwards: write {last}-{first}", param, ctx)
            ranges.append(range(int(first), int(last) + 1))
        return ranges


@click.command()
@click.argument("target", metavar="MODULE:NAME|FILE.py:NAME")
@click.option("-j", "--jobs", default=1, metavar="N", help="Workers; -1 for one a CPU.")
@click.option("--backend", metavar="NAME", help="How to run them: process_pool for several jobs.")
@click.option("--resume", is_flag=True, help="Skip what this configuration's database holds.")
@click.option("--db-dir", type=click.Path(file_okay=False), help="Directory of the database.")
@click.option(
    "--db-file", type=click.Path(dir_okay=False), help="Record to, and resume from, this."
)
@click.option("--indices", type=IndexRanges(), help="Only these, such as 0-99,200.")
@click.option("--retry-failed", is_flag=True, help="Only what failed before; implies --resume.")
@click.option("-p", "plugins", multiple=True, metavar="NAME", help="Load a plugin; no:NAME, don't.")
@click.option("--strict-plugins", is_flag=True, help="Fail the run if a plugin's hook raises.")
@click.option("--no-progress", is_flag=True, help="Show no progress.")
@click.option(
    "--log-level",
    type=click.Choice(_LEVELS, case_sensitive=False),
    default="INFO",
    show_default=True,
    help="Lowest level of log entry to record.",
)
@debug_option
def run(
    target: str,
    jobs: int,
    backend: str | None,
    resume: bool,
    db_dir: str | None,
    db_file: str | None,
    indices: list[range] | None,
    retry_failed: bool,
    plugins: tuple[str, ...],
    strict_plugins: bool,
    no_progress: bool,
    log_level: str,
) -> None:
    """Run a pipeline: a module's or a file's, or what a function there returns."""
    level = logging.getLevelNamesMapping()[log_level.upper()]
    activate(Config(plugins=plugins, strict_plugins=strict_plugins, log_level=level))
    if db_dir is not None and db_file is not None:
        raise click.UsageError("--db-dir and --db-file: give one of them")
    pipeline = load_pipeline(target)
    if db_file is not None:
        pipeline = attrs.evolve(pipeline, db_file=db_file)
    chosen = None if indices is None else _expanded(indices, len(pipeline))
    if retry_failed:
        pipeline, chosen = _only_failed(pipeline, db_dir, chosen)
    session = Session(
        pipeline,
        n_jobs=jobs,
        backend=backend,
        indices=chosen,
        resume=True if resume else None,
        db_dir=db_dir,
        progress=not no_progress,
    )
    try:
        summary = session.run()
    except KeyboardInterrupt:
        _say_interrupted(session)
        sys.exit(130)
    _say_done(summary)
    sys.exit(1 if summary.failed else 0)


def _expanded(ranges: list[range], total: int) -> list[int]:
    for each in ranges:
        # Before it is written out, which may take all memory.
        if each.stop > total:
            raise IndexRangeError(
                f"index {each.stop - 1} is out of range: the source has {total} indices"
            )
    return [index for each in ranges for index in each]


def _only_failed(
    pipeline: Pipeline[Any], db_dir: str | None, indices: list[int] | None
) -> tuple[Pipeline[Any], list[int]]:
    overrides: dict[str, Any] = {"resume": True}
    if db_dir is not None:
        overrides |= {"db_dir": db_dir, "db_file": None}
    pipeline = attrs.evolve(pipeline, **overrides)
    if not pipeline.track_metrics or not pipeline.db_path.exists():
        raise PipelineError(
            f"--retry-failed: nothing is recorded of this pipeline at {_place(pipeline)}: run it "
            "with --resume first, or name its database with --db-file"
        )
    failed = pipeline.failed_indices
    if indices is None:
        return pipeline, list(failed)
    return pipeline, [index for index in indices if index in failed]


def _place(pipeline: Pipeline[Any]) -> str:
    return str(pipeline.db_path) if pipeline.track_metrics else "any place"


def _say_done(summary: RunSummary) -> None:
    parts = [f"{summary.completed} completed"]
    if summary.cached:
        parts.append(f"{summary.cached} completed before")
    parts.append(f"{len(summary.failed)} failed")
    click.echo(f"{', '.join(parts)}, of {summary.requested}, in {summary.elapsed_s:.1f} s")
    for index in list(summary.failed)[:_SHOWN_FAILURES]:
        click.echo(f"  index {index}: {_first_line(summary.failed[index])}")
    if len(summary.failed) > _SHOWN_FAILURES:
        click.echo(f"  and {len(summary.failed) - _SHOWN_FAILURES} more")
    for where, count in summary.plugin_errors.items():
        click.echo(f"plugin error in {where}, {count} times")
    if summary.db_path:
        click.echo(f"database {summary.db_path}")
        if summary.failed:
            click.echo(f"more with: psnc errors {shlex.quote(summary.db_path)}")


def _say_interrupted(session: Session) -> None:
    summary = session.summary
    if summary is None:
        return
    done = summary.completed + summary.cached
    click.echo(f"interrupted: {done} of {summary.requested} completed", err=True)
    if summary.db_path:
        click.echo(f"go on with: {_resume_command(session, summary.db_path)}", err=True)


def _resume_command(session: Session, db_path: str) -> str:
    """Return the command that was given, made to go on in the same database."""
    arguments = ["psnc", *sys.argv[1:]]
    if not session.pipeline.resume and session.pipeline.db_file is None:
        arguments += ["--db-file", db_path]
    return shlex.join(arguments)


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]
