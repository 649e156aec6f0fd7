"""The ``psnc`` command."""

from __future__ import annotations

import os
import sys
import traceback

import click

from psnc.errors import PsncError

__all__ = ["main"]

_COMMANDS = {
    "run": "psnc.cli.run:run",
    "status": "psnc.cli.database:status",
    "errors": "psnc.cli.database:errors",
    "reset": "psnc.cli.database:reset",
}


class _LazyGroup(click.Group):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        from psnc.manager import load_object

        reference = _COMMANDS.get(cmd_name)
        command: click.Command | None = load_object(reference) if reference else None
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="psnc")
def cli() -> None:
    """Run pipelines over indexed datasets, and look at what was recorded of them.

    \b
    Exit codes:
      0    all is done
      1    the run is complete, and some indices failed
      2    something in the input is wrong
      3    the database cannot be read or written
      70   a stage or plugin raised where nothing could record it
      130  interrupted
    """  # noqa: D301


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, and turn psnc's errors into one line and an exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        cli.main(args=given, prog_name="psnc", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except PsncError as error:
        if "--debug" in given:
            traceback.print_exc()
        else:
            click.echo(f"psnc: {error}", err=True)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        sys.exit(70)
