"""``psnc stages`` and ``psnc backends``: what there is to build pipelines from and run them on."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import attrs
import click

from psnc.cli.options import debug_option, with_plugins

if TYPE_CHECKING:
    from psnc.discovery import Listed, ListedParameter

__all__ = ["backends", "stages"]

_LONGEST_DEFAULT = 60


@click.command()
@click.argument("place", metavar="MODULE|FILE.py", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@with_plugins
@debug_option
def stages(place: str | None, as_json: bool) -> None:
    """List sources, filters and sinks with their parameters.

    Those that plugins offer by name, or those of a module or file, which is imported for it.
    """
    listed = _offered_stages() if place is None else _stages_in(place)
    if as_json:
        click.echo(json.dumps([attrs.asdict(each) for each in listed], indent=1))
        return
    for kind in ("source", "filter", "sink"):
        of_kind = [each for each in listed if each.kind == kind]
        click.echo(f"{kind}s" if of_kind else f"{kind}s: none")
        for each in of_kind:
            _print_listed(each)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@with_plugins
@debug_option
def backends(as_json: bool) -> None:
    """List the ways to run indices, with their options."""
    from psnc.discovery import offered
    from psnc.manager import plugin_manager

    listed = offered(plugin_manager(), "backend")
    if as_json:
        click.echo(json.dumps([attrs.asdict(each) for each in listed], indent=1))
        return
    for each in listed:
        _print_listed(each)
    if not listed:
        click.echo("no backends")


def _offered_stages() -> list[Listed]:
    from psnc.discovery import STAGE_KINDS, offered
    from psnc.manager import plugin_manager

    manager = plugin_manager()
    return [each for kind in STAGE_KINDS for each in offered(manager, kind)]


def _stages_in(place: str) -> list[Listed]:
    from psnc.discovery import stages_of_module
    from psnc.loading import load_module

    return stages_of_module(load_module(place))


def _print_listed(each: Listed) -> None:
    click.echo(f"  {each.name}")
    # In one line, to be copied.
    click.echo(f"      {each.reference} ({each.origin})")
    if each.description:
        _print_wrapped(each.description.replace("``", ""), indent=6)
    if each.parameters is None:
        _print_wrapped(f"parameters unknown: {_reason(each)}", indent=6)
        return
    for parameter in each.parameters:
        text = f"{_shortened(parameter)}  {parameter.description}".rstrip()
        _print_wrapped(text.replace("``", ""), indent=6)


def _reason(each: Listed) -> str:
    module = each.reference.partition(":")[0]
    if each.problem or each.kind == "backend":
        return each.problem or f"the text of {module} does not tell them"
    return f"psnc stages {module} imports the module and shows them"


def _shortened(parameter: ListedParameter) -> ListedParameter:
    default = parameter.default
    if default is None or len(default) <= _LONGEST_DEFAULT:
        return parameter
    return attrs.evolve(parameter, default=f"{default[:_LONGEST_DEFAULT]}…")


def _print_wrapped(text: str, indent: int) -> None:
    width = max(shutil.get_terminal_size().columns, 40)
    first, rest = " " * indent, " " * (indent + 4)
    click.echo(click.wrap_text(text, width, initial_indent=first, subsequent_indent=rest))
