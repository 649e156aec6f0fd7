"""``psnc new``: write the beginnings of something of one's own."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

import click

from psnc.cli.options import debug_option

__all__ = ["new"]

_PREFIX = "psnc-"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_SUFFIX = ".template"

# Under its own name it would be obeyed in psnc's own source tree.
_GIT_IGNORE = "gitignore"


@click.group()
def new() -> None:
    """Write a new plugin to begin with."""


@new.command()
@click.argument("name")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to; by default a new directory psnc-NAME.",
)
@debug_option
def plugin(name: str, directory: Path | None) -> None:
    """Write a distribution with a source, a filter, a sink, a hook, and tests of all of them.

    NAME is what the plugin is called; the distribution and its module are called after it: of
    weather-maps they are psnc-weather-maps and psnc_weather_maps.
    """
    name = _checked_name(name)
    project = directory or Path(f"{_PREFIX}{name}")
    words = {"name": name, "distribution": f"{_PREFIX}{name}", "module": _module(name)}
    try:
        if project.exists() and any(project.iterdir()):
            raise click.UsageError(
                f"{project} is there and not empty: give another place with --directory"
            )
        _write(project, words)
    except OSError as error:
        raise click.FileError(str(error.filename or project), error.strerror) from error
    _say_what_next(project)


def _checked_name(given: str) -> str:
    from psnc.manager import BUILT_IN_PLUGINS
    from psnc.settings import LOCAL_PLUGINS

    name = given.removeprefix(_PREFIX)
    if not _NAME.fullmatch(name):
        likely = "-".join(re.findall(r"[a-z0-9]+", name.lower())).lstrip("-0123456789")
        hint = f": did you mean {likely!r}?" if likely else ", such as 'weather-maps'"
        raise click.UsageError(
            f"{given!r} is no name for a plugin, which has lower-case letters, digits and single "
            f"dashes, and begins with a letter{hint}"
        )
    if name in BUILT_IN_PLUGINS:
        raise click.UsageError(f"{name!r} is the name of a built-in plugin: choose another")
    if f"{_module(name)}.py" == LOCAL_PLUGINS:
        raise click.UsageError(
            f"the module of {name!r} would have the name of local plugins, {LOCAL_PLUGINS}: choose "
            "another"
        )
    return name


def _module(name: str) -> str:
    return f"{_PREFIX}{name}".replace("-", "_")


def _write(project: Path, words: dict[str, str]) -> None:
    for parts, template in _templates(files("psnc").joinpath("templates", "plugin"), ()):
        path = project.joinpath(*(words["module"] if part == "MODULE" else part for part in parts))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(template).substitute(words), encoding="utf-8")


def _templates(
    directory: Traversable, parents: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the path of each file to write, in parts, and its template."""
    for entry in directory.iterdir():
        if entry.is_dir():
            yield from _templates(entry, (*parents, entry.name))
        elif entry.name.endswith(_SUFFIX):
            name = entry.name.removesuffix(_SUFFIX)
            name = f".{name}" if name == _GIT_IGNORE else name
            yield (*parents, name), entry.read_text(encoding="utf-8")


def _say_what_next(project: Path) -> None:
    click.echo(f"wrote {project}: a source, a filter, a sink, a hook, and their tests")
    click.echo("next:")
    for command in (
        f"cd {shlex.quote(str(project))}",
        "pip install -e '.[test]'",
        "pytest",
        "psnc plugins",
        "psnc run example/pipeline.py:pipeline",
    ):
        click.echo(f"  {command}")
