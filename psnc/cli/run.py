"""``psnc run``: run a pipeline."""

from __future__ import annotations

import copy
import logging
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import click

from psnc.cli.gather import say_gathered
from psnc.cli.options import (
    debug_option,
    group_plugins,
    load_manager,
    pipeline_directories,
    plugin_choices,
    plugin_option,
)
from psnc.cli.places import at_place, recorded, refuse_several_places
from psnc.code_change import OnCodeChange
from psnc.errors import (
    IndexRangeError,
    PipelineError,
    PluginError,
    RunTerminated,
    TooManyFailuresError,
)
from psnc.gather import gather, require_gatherable
from psnc.loading import load_exceptions, load_pipeline
from psnc.manager import PluginManager, install
from psnc.options import PluginOption
from psnc.output_facts import LEVELS, VerifyLevel
from psnc.pipeline import Pipeline
from psnc.records import RunSummary
from psnc.retries import RetryPolicy
from psnc.session import Session
from psnc.store import CheckpointStore, shown_url

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


class _RunCommand(click.Command):
    """``psnc run``, with the options of the plugins that its own arguments ask for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plugin_of_flag: dict[str, str] = {}

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        own = click.Command.get_params(self, click.Context(self, parent))
        before = group_plugins(parent) if parent is not None else ()
        manager = load_manager((*before, *plugin_choices(args)), pipeline_directories(args))
        options = manager.plugin_options()
        _refuse_taken_flags(options, own)
        # A command of this very call: another call may have other plugins.
        command = copy.copy(self)
        command.params = [*self.params, *map(_as_click_option, options)]
        command.plugin_of_flag = {option.flag: option.plugin for option in options}
        return click.Command.make_context(
            command, info_name, list(args), parent, obj=manager, **extra
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write psnc's own options, then each plugin's under its name."""
        by_section: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                plugin = self.plugin_of_flag.get(parameter.opts[0])
                heading = f"Options of the plugin {plugin}" if plugin else "Options"
                by_section.setdefault(heading, []).append(record)
        for heading, records in by_section.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _refuse_taken_flags(options: list[PluginOption], own: list[click.Parameter]) -> None:
    taken = {flag: "psnc run" for parameter in own for flag in parameter.opts}
    for option in options:
        for flag in option.flags:
            if flag in taken:
                raise PluginError(
                    f"plugin {option.plugin!r} declares the option {flag}, which {taken[flag]} "
                    f"has already: rename it, or run with -p no:{option.plugin}"
                )
            taken[flag] = f"plugin {option.plugin!r}"


def _as_click_option(option: PluginOption) -> click.Option:
    return click.Option(
        ["/".join(option.flags), f"plugin_option_{option.name}"],
        type=click.Choice(option.choices) if option.choices else _click_type(option.type),
        # Not given is neither the default nor false: the configuration file is asked then.
        default=None,
        multiple=option.multiple,
        help=f"{option.help}{_shown_default(option)}",
    )


def _shown_default(option: PluginOption) -> str:
    default = option.default
    if option.type is bool:
        default = option.flags[0].removeprefix("--") if default else None
    elif option.multiple:
        default = ", ".join(map(str, default))
    return "" if default in (None, "") else f"  [default: {default}]"


def _click_type(kind: type) -> Any:
    return click.Path(path_type=Path) if kind is Path else kind


@click.command(cls=_RunCommand)
@click.argument("target", metavar="MODULE:NAME|FILE.py:NAME|FILE.toml")
@click.option("-j", "--jobs", default=1, metavar="N", help="Workers; -1 for one a CPU.")
@click.option("--backend", metavar="NAME", help="How to run them: process_pool for several jobs.")
@click.option("--resume", is_flag=True, help="Skip what this configuration's database holds.")
@click.option("--db-dir", type=click.Path(file_okay=False), help="Directory of the database.")
@click.option(
    "--db-file", type=click.Path(dir_okay=False), help="Record to, and resume from, this."
)
@click.option("--store", metavar="URL", help="Record to this store, such as postgresql://host/db.")
@click.option("--recover", is_flag=True, help="Salvage the database first if it is damaged.")
@click.option("--indices", type=IndexRanges(), help="Only these, such as 0-99,200.")
@click.option("--shard", metavar="K/N", help="Only the K-th of N parts, such as 3/16.")
@click.option("--retry-failed", is_flag=True, help="Only what failed before; implies --resume.")
@click.option("--retries", default=0, metavar="N", help="More attempts of an index that fails.")
@click.option(
    "--retry-on",
    multiple=True,
    metavar="ERROR",
    help="Only after such errors: OSError, or module:Class.",
)
@click.option(
    "--retry-delay",
    default=1.0,
    metavar="SECONDS",
    help="Before the second attempt; doubles each time.  [default: 1]",
)
@click.option("--timeout", type=float, metavar="SECONDS", help="That an index may take.")
@click.option("--max-failures", type=int, metavar="N", help="End when so many indices failed.")
@click.option(
    "--grace", type=float, metavar="SECONDS", help="For indices at work after Ctrl-C or SIGTERM."
)
@click.option(
    "--on-code-change",
    type=click.Choice(get_args(OnCodeChange)),
    default="warn",
    help="If a stage's code is not what completed indices ran with.  [default: warn]",
)
@click.option(
    "--verify",
    type=click.Choice(LEVELS),
    help="Run completed indices again whose outputs are gone or changed.",
)
@click.option("--no-gather", is_flag=True, help="Leave what filters and the sink kept where it is.")
@plugin_option
@click.option("--strict-plugins", is_flag=True, help="Fail the run if a plugin's hook raises.")
@click.option("--no-progress", is_flag=True, help="Show no progress.")
@click.option(
    "--log-level",
    type=click.Choice(_LEVELS, case_sensitive=False),
    help="Lowest level of log entry to record.  [default: INFO]",
)
@debug_option
@click.pass_obj
def run(
    manager: PluginManager,
    /,
    target: str,
    jobs: int,
    backend: str | None,
    resume: bool,
    db_dir: str | None,
    db_file: str | None,
    store: str | None,
    recover: bool,
    indices: list[range] | None,
    shard: str | None,
    retry_failed: bool,
    retries: int,
    retry_on: tuple[str, ...],
    retry_delay: float,
    timeout: float | None,
    max_failures: int | None,
    grace: float | None,
    on_code_change: OnCodeChange,
    verify: VerifyLevel | None,
    no_gather: bool,
    plugins: tuple[str, ...],
    strict_plugins: bool,
    no_progress: bool,
    log_level: str | None,
    **plugin_options: Any,
) -> None:
    """Run a pipeline: a module's or a file's, or what a function there returns."""
    settings: dict[str, Any] = {}
    if log_level is not None:
        settings["log_level"] = logging.getLevelNamesMapping()[log_level.upper()]
    if strict_plugins:
        settings["strict_plugins"] = True
    if recover:
        settings["recover"] = True
    given = {name.removeprefix("plugin_option_"): value for name, value in plugin_options.items()}
    manager.configure({name: value for name, value in given.items() if value != ()}, **settings)
    install(manager)
    refuse_several_places(db_dir=db_dir, db_file=db_file, store=store)
    if shard is not None and retry_failed:
        raise PipelineError(
            "--shard and --retry-failed: what failed changes while drivers are at work, and each "
            "would divide another list: give one of them"
        )
    pipeline = at_place(load_pipeline(target), db_file, store)
    gathers = not no_gather and pipeline.track_metrics and pipeline.gathers
    if gathers:
        # Before hours are spent on what could not be put together then.
        require_gatherable(pipeline)
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
        policy=RetryPolicy(retries, load_exceptions(retry_on) or BaseException, retry_delay),
        timeout=timeout,
        max_failures=max_failures,
        grace=grace,
        on_code_change=on_code_change,
        verify=verify,
        progress=not no_progress,
        shard=shard,
        collect=False,
    )
    try:
        summary = session.run()
    except (KeyboardInterrupt, RunTerminated) as interruption:
        _say_interrupted(session)
        sys.exit(130 if isinstance(interruption, KeyboardInterrupt) else RunTerminated.exit_code)
    except SystemExit as error:
        _say_interrupted(session)
        # Its code is another program's, and may say that all is done.
        raise PipelineError(
            f"a stage or plugin called exit({error.code}), which ended the run: raise an error "
            "there, which ends its index only (--debug shows where)"
        ) from error
    except (PluginError, TooManyFailuresError):
        if session.summary is not None:
            _say_done(session.summary, session.run_state.store)
        raise
    _say_done(summary, session.run_state.store)
    if gathers and session.run_state.store is not None:
        _gather(session, is_shard=shard is not None)
    sys.exit(1 if summary.failed else 0)


def _gather(session: Session, *, is_shard: bool) -> None:
    # What an early shard put together could replace what the last one did.
    left = session.left_of_all_shards() if is_shard else 0
    if left and not (session.pipeline.resume or session.pipeline.db_file):
        click.echo(
            "not gathered: this shard was recorded to a database of its own: give all shards "
            "--resume or one --db-file, or merge their databases (psnc merge) and gather that one"
        )
    elif left:
        some = "1 index of all shards is" if left == 1 else f"{left} indices of all shards are"
        click.echo(
            f"not gathered: {some} not completed yet (the shard that completes the last one "
            "gathers, and psnc gather does so at any time)"
        )
    else:
        gathered = gather(session.pipeline)
        # A sink may gather in some pipelines only.
        if gathered.files or session.pipeline.has_state:
            say_gathered(gathered)


def _expanded(ranges: list[range], total: int) -> Sequence[int]:
    for each in ranges:
        # Before it is written out, which may take all memory.
        if each.stop > total:
            raise IndexRangeError(
                f"index {each.stop - 1} is out of range: the source has {total} indices"
            )
    return ranges[0] if len(ranges) == 1 else [index for each in ranges for index in each]


def _only_failed(
    pipeline: Pipeline[Any], db_dir: str | None, indices: Sequence[int] | None
) -> tuple[Pipeline[Any], list[int]]:
    pipeline = recorded(pipeline, db_dir, "--retry-failed")
    failed = pipeline.failed_indices
    if indices is None:
        return pipeline, list(failed)
    return pipeline, [index for index in indices if index in failed]


def _say_done(summary: RunSummary, store: CheckpointStore | None) -> None:
    parts = [f"{summary.completed} completed"]
    if summary.cached:
        parts.append(f"{summary.cached} completed before")
    parts.append(f"{len(summary.failed)} failed")
    click.echo(f"{', '.join(parts)}, of {summary.requested}, in {summary.elapsed_s:.1f} s")
    for index in list(summary.failed)[:_SHOWN_FAILURES]:
        click.echo(f"  index {index}: {_first_line(summary.failed[index])}")
    if len(summary.failed) > _SHOWN_FAILURES:
        click.echo(f"  and {len(summary.failed) - _SHOWN_FAILURES} more")
    if summary.retries:
        click.echo(f"{_times(summary.retries, 'attempt')} failed and had another")
    for index, attempts in summary.quarantined.items():
        if attempts > 1:
            click.echo(
                f"index {index} ended its worker each of {attempts} times, and was set aside"
            )
    for where, count in summary.plugin_errors.items():
        click.echo(f"plugin error in {where}, {'once' if count == 1 else f'{count} times'}")
    if summary.db_path:
        click.echo(f"database {summary.db_path}")
        if summary.failed:
            command = ["psnc", "errors", summary.db_path, *_which_run(store)]
            click.echo(f"more with: {shlex.join(command)}")


def _times(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _which_run(store: CheckpointStore | None) -> list[str]:
    """Return the option that names the run of a store, if there are several to choose from."""
    # Not every store can tell.
    run_id = getattr(store, "run_id", None)
    if store is None or run_id is None or len(store.runs()) == 1:
        return []
    return ["--run", str(run_id)]


def _say_interrupted(session: Session) -> None:
    summary = session.summary
    if summary is None:
        return
    done = summary.completed + summary.cached
    click.echo(f"interrupted: {done} of {summary.requested} completed", err=True)
    if summary.db_path:
        command = _resume_command(session, summary.db_path)
        hint = ", with the password in place of ***" if "***" in command else ""
        click.echo(f"go on with{hint}: {command}", err=True)


def _resume_command(session: Session, db_path: str) -> str:
    """Return the command that was given, made to go on in the same database."""
    arguments = ["psnc", *map(shown_url, sys.argv[1:])]
    if session.pipeline.resume or session.pipeline.db_file is not None:
        return shlex.join(arguments)
    if "://" in session.pipeline.configured_store_url:
        return shlex.join([*arguments, "--resume"])
    # Of the places that a command names there can be one.
    arguments = _without_option("--db-dir", _without_option("--store", arguments))
    return shlex.join([*arguments, "--db-file", db_path])


def _without_option(flag: str, arguments: list[str]) -> list[str]:
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == flag:
            next(rest, None)
        elif not argument.startswith(f"{flag}="):
            kept.append(argument)
    return kept


def _first_line(text: str) -> str:
    return text.split("\n", 1)[0]
