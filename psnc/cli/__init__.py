"""The ``psnc`` command."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from io import StringIO, TextIOWrapper
from typing import TYPE_CHECKING, Any

import click

from psnc.cli.options import group_plugins, load_manager, plugin_commands, plugin_option
from psnc.errors import PsncError

if TYPE_CHECKING:
    from psnc.manager import PluginManager

__all__ = ["main"]

_COMMANDS = {
    "run": ("psnc.cli.run", "Run a pipeline."),
    "gather": ("psnc.cli.gather", "Put together what filters added up and the sink kept."),
    "status": ("psnc.cli.database", "Say how far the runs in a database are."),
    "errors": ("psnc.cli.database", "List the indices that failed, and why."),
    "reset": ("psnc.cli.database", "Forget what is recorded, so that it runs again."),
    "stages": ("psnc.cli.stages", "List sources, filters and sinks."),
    "backends": ("psnc.cli.stages", "List the ways to run indices."),
    "plugins": ("psnc.cli.plugins", "List the plugins, and what failed to load."),
    "hooks": ("psnc.cli.plugins", "List the hooks that a plugin can implement."),
    "new": ("psnc.cli.new", "Write a new plugin to begin with."),
}


class _PipeBrokenError(Exception):
    """Carries a broken pipe past click, which would end the program as if indices had failed."""


@contextmanager
def _broken_pipes_told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise _PipeBrokenError from error


class _Group(click.Group):
    """Imports a command's module when it is asked for, and takes commands from plugins."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        # Where --help is printed.
        with _broken_pipes_told():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _broken_pipes_told():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _COMMANDS:
            command: click.Command = getattr(import_module(_COMMANDS[cmd_name][0]), cmd_name)
            return command
        manager = load_manager(group_plugins(ctx))
        _, added = plugin_commands(manager, _COMMANDS).get(cmd_name, ("", None))
        if added is not None:
            self._make_ready(manager)
        return added

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])
        problems: list[PsncError] = []
        try:
            manager = load_manager(group_plugins(ctx), strict=False)
        except PsncError as error:
            formatter.write_paragraph()
            formatter.write(f"No commands of plugins: {error}\n")
            return
        added = plugin_commands(manager, _COMMANDS, problems)
        by_plugin: dict[str, list[tuple[str, str]]] = {}
        for name, (plugin, command) in added.items():
            if not command.hidden:
                summary = command.get_short_help_str(limit=formatter.width)
                by_plugin.setdefault(plugin, []).append((name, summary))
        for plugin, commands in by_plugin.items():
            with formatter.section(f"Commands of the plugin {plugin}"):
                formatter.write_dl(commands)
        for problem in problems:
            formatter.write_paragraph()
            formatter.write(f"Commands are missing: {problem}\n")
        if manager.failures:
            formatter.write_paragraph()
            names = ", ".join(failure.origin.title for failure in manager.failures)
            formatter.write_text(f"Could not be loaded: {names}. Ask psnc plugins why.")

    @staticmethod
    def _make_ready(manager: PluginManager) -> None:
        from psnc.manager import install

        manager.configure()
        install(manager)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="psnc")
@plugin_option
def cli(plugins: tuple[str, ...]) -> None:
    """Run pipelines over indexed datasets, and look at what was recorded of them.

    \b
    Exit codes:
      0    all is done
      1    some indices failed, or a check found something
      2    something in the input is wrong
      3    the database cannot be read or written, or another driver uses it
      70   a stage or plugin raised where nothing could record it
      74   the output cannot be written, as to a full disk
      130  interrupted by Ctrl-C
      141  whoever read the output has closed it
      143  ended by SIGTERM
    """  # noqa: D301


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, and turn psnc's errors into one line and an exit code."""
    _let_odd_names_through()
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
    except (_PipeBrokenError, BrokenPipeError) as error:
        closed = [descriptor for descriptor in (1, 2) if _is_closed_pipe(descriptor)]
        if not closed:
            # It is the pipe or connection of a plugin.
            _print_traceback(error.__cause__ or error)
            sys.exit(70)
        _give_up_output(*closed)
        sys.exit(141)


def _run(given: list[str]) -> None:
    try:
        cli.main(args=given, prog_name="psnc", standalone_mode=False)
        with _broken_pipes_told():
            sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.ClickException as error:
        said = StringIO()
        error.show(said)
        click.echo(_without_passwords(said.getvalue(), given), err=True, nl=False)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except (SystemExit, _PipeBrokenError, BrokenPipeError):
        raise
    except PsncError as error:
        if "--debug" in given:
            _print_traceback(error)
        else:
            click.echo(f"psnc: {_without_passwords(str(error), given)}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        # One that names a file came from elsewhere.
        if error.filename is not None or not _is_output_gone():
            _print_traceback(error)
            sys.exit(70)
        click.echo(f"psnc: cannot write the output ({error.strerror})", err=True)
        sys.exit(74)
    except BaseException as error:
        _print_traceback(error)
        sys.exit(70)


def _let_odd_names_through() -> None:
    """Have names of files be written as they are, also where their bytes are no text."""
    stream = sys.stdout
    if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="surrogateescape")


def _is_output_gone() -> bool:
    """Tell whether standard output takes nothing any more, and give it up then."""
    try:
        print(flush=True)
    except OSError:
        _give_up_output(1)
        return True
    return False


def _is_closed_pipe(descriptor: int) -> bool:
    """Tell whether nobody reads any more what is written to a descriptor."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _give_up_output(*descriptors: int) -> None:
    """Keep Python from complaining once more at its exit."""
    for descriptor in descriptors:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _without_passwords(message: str, arguments: list[str]) -> str:
    """Mask the passwords of URLs that a message quotes from the command line."""
    from psnc.store import shown_url

    for argument in filter(lambda each: "://" in each, arguments):
        # Taken for a path, it has lost a slash.
        for quoted in (argument, argument.replace("://", ":/")):
            message = message.replace(quoted, shown_url(argument))
    return message


def _print_traceback(error: BaseException) -> None:
    import traceback

    traceback.print_exception(error)
