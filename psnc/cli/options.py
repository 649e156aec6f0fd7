"""Options that several commands share, and the plugins that they ask for."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from psnc.errors import PluginError, PsncError

if TYPE_CHECKING:
    from psnc.manager import PluginManager
    from psnc.plugin_loading import PluginOrigin

__all__ = [
    "debug_option",
    "load_manager",
    "pipeline_directories",
    "plugin_choices",
    "plugin_commands",
    "plugin_option",
    "with_plugins",
]

Command = TypeVar("Command", bound=Callable[..., Any])

_PIPELINE_FILES = (".toml", ".yaml", ".yml", ".json")

# `main` looks for it itself, since an error may come before or after a command has its options.
debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")

plugin_option = click.option(
    "-p",
    "plugins",
    multiple=True,
    metavar="NAME",
    # Before --help, which lists what plugins add.
    is_eager=True,
    help="Load a plugin or a module; no:NAME keeps one out.",
)


def load_manager(
    plugins: Iterable[str], beside: Iterable[Path] = (), *, strict: bool = True
) -> PluginManager:
    """Load the plugins for a command; it configures and installs the manager itself.

    Parameters
    ----------
    plugins : iterable of str
        As ``-p`` gives them, before and after the command's name.
    beside : iterable of Path
        Directories, besides the working directory, whose plugin file is loaded before its own.
    strict : bool
        Whether a plugin that cannot be loaded is an error.
    """
    from psnc.manager import PluginManager
    from psnc.settings import read_config, working_directory

    config = read_config(plugins=plugins, beside=[*beside, working_directory()])
    manager = PluginManager(config)
    manager.load_plugins()
    if strict:
        manager.require_plugins()
    return manager


def with_plugins(command: Command) -> Command:
    """Give a command ``-p``, and load the plugins before it runs."""

    @plugin_option
    @functools.wraps(command)
    def loaded(*args: Any, plugins: tuple[str, ...], **kwargs: Any) -> Any:
        from psnc.manager import install

        context = click.get_current_context()
        manager = load_manager((*group_plugins(context), *plugins))
        manager.configure()
        install(manager)
        return command(*args, **kwargs)

    return loaded  # type: ignore[return-value]


def group_plugins(context: click.Context) -> tuple[str, ...]:
    """Return what was given with ``-p`` before the command's name."""
    choices: tuple[str, ...] = context.find_root().params.get("plugins") or ()
    return choices


def plugin_choices(arguments: Sequence[str]) -> list[str]:
    """Return the values of ``-p`` among a command's arguments, before they can be parsed.

    Which options there are depends on the plugins.
    """
    found: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            break
        if argument == "-p":
            found.extend(value for value in [next(rest, None)] if value is not None)
        elif argument.startswith("-p") and len(argument) > 2:
            found.append(argument[2:])
    return found


def pipeline_directories(arguments: Iterable[str]) -> list[Path]:
    """Return the directories of the pipelines among a command's arguments."""
    found = []
    for argument in arguments:
        place, separator, _ = argument.rpartition(":")
        if argument.lower().endswith(_PIPELINE_FILES) or (separator and place.endswith(".py")):
            file = Path(place if place.endswith(".py") else argument)
        elif separator and re.fullmatch(r"\w+(\.\w+)*", place):
            file = _module_file(place) or Path()
        else:
            continue
        if file.is_file():
            found.append(file.absolute().parent)
    return found


def _module_file(name: str) -> Path | None:
    """Return the file of a module without importing the packages that it is in."""
    top, *inner = name.split(".")
    beside = Path(*name.split("."))
    for local in (beside.with_suffix(".py"), beside / "__init__.py"):
        if local.is_file():
            return local
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not os.path.isfile(spec.origin):
        return None
    file = Path(spec.origin)
    if not inner:
        return file
    member = file.parent.joinpath(*inner)
    package = member / "__init__.py"
    return package if package.is_file() else member.with_suffix(".py")


def plugin_commands(
    manager: PluginManager, own: Iterable[str], problems: list[PsncError] | None = None
) -> dict[str, tuple[str, click.Command]]:
    """Return the commands that plugins add, by name, each with its plugin's name.

    Parameters
    ----------
    manager : PluginManager
        Has the plugins.
    own : iterable of str
        The names of psnc's own commands.
    problems : list of PsncError, optional
        Takes the errors, for a listing that goes on; without it they are raised.

    Raises
    ------
    PluginError
        If one has the name of another, or its plugin fails to make it.
    """
    taken = dict.fromkeys(own, "psnc")
    commands: dict[str, tuple[str, click.Command]] = {}
    for origin, function in manager.implementations("psnc_add_commands"):
        group = click.Group()
        try:
            manager.call_or_raise("psnc_add_commands", origin, function, group)
            _refuse_taken_names(origin, group.commands, taken)
        except PsncError as error:
            if problems is None:
                raise
            problems.append(error)
            continue
        for name, command in group.commands.items():
            taken[name] = f"plugin {origin.title!r}"
            commands[name] = (origin.title, command)
    return commands


def _refuse_taken_names(
    origin: PluginOrigin, names: Iterable[str], taken: Mapping[str, str]
) -> None:
    for name in names:
        if name in taken:
            raise PluginError(
                f"{origin.described} adds the command {name!r}, which {taken[name]} has already: "
                f"rename it, or run with -p no:{origin.title}"
            )
