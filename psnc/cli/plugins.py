"""``psnc plugins`` and ``psnc hooks``: what is loaded, and what can be implemented."""

from __future__ import annotations

import difflib
import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import attrs
import click

from psnc.cli.options import debug_option, group_plugins, load_manager, plugin_option
from psnc.errors import PluginError

if TYPE_CHECKING:
    from psnc.hookdocs import HookDoc
    from psnc.manager import PluginManager
    from psnc.plugin_loading import PluginOrigin

__all__ = ["hooks", "plugins"]


@click.command()
@plugin_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
@click.pass_context
def plugins(context: click.Context, plugins: tuple[str, ...], as_json: bool) -> None:
    """List the plugins in the order of loading, and what failed to load.

    Of two plugins that answer the same question, the one that was loaded later is asked first.
    """
    manager = load_manager((*group_plugins(context), *plugins), strict=False)
    if as_json:
        click.echo(json.dumps(_as_json(manager), indent=1))
    else:
        _print_plugins(manager)
    if manager.failures:
        sys.exit(PluginError.exit_code)


@click.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="Print the documentation's page.")
@debug_option
def hooks(name: str | None, markdown: bool) -> None:
    """List the hooks that a plugin can implement, or say all of one."""
    from psnc.hookdocs import hook_docs, markdown_page

    if markdown:
        click.echo(markdown_page(), nl=False)
        return
    docs = hook_docs()
    if name is None:
        _print_hooks(docs)
        return
    by_name = {doc.name: doc for doc in docs}
    chosen = by_name.get(name) or by_name.get(f"psnc_{name}")
    if chosen is None:
        close = difflib.get_close_matches(name, by_name, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "psnc hooks lists those there are"
        raise PluginError(f"there is no hook {name!r}: {hint}")
    _print_hook(chosen)


# --- plugins ----------------------------------------------------------------------------------


def _hooks_of(manager: PluginManager, name: str) -> list[str]:
    callers = manager.get_hookcallers(manager.get_plugin(name)) or []
    return [caller.name for caller in callers]


def _kept_out(manager: PluginManager) -> list[str]:
    named = {choice[3:] for choice in manager.config.plugins if choice.startswith("no:")}
    return sorted(name for name in named if manager.is_blocked(name))


def _unknown(manager: PluginManager) -> set[str]:
    """Return what is kept out and would not have been loaded anyway: misspelt, perhaps."""
    from psnc.manager import BUILT_IN_PLUGINS
    from psnc.plugin_loading import find_plugins

    everything = attrs.evolve(manager.config, load_installed=True)
    there = {origin.title for origin in find_plugins(everything, BUILT_IN_PLUGINS)}
    return set(_kept_out(manager)) - there


def _as_json(manager: PluginManager) -> dict[str, Any]:
    return {
        "loaded": [
            {**_origin_json(origin), "hooks": _hooks_of(manager, name)}
            for name, origin in manager.origins.items()
        ],
        "kept_out": _kept_out(manager),
        "failed": [
            {**_origin_json(failure.origin), "reason": failure.reason}
            for failure in manager.failures
        ],
        "installed_are_loaded": manager.config.load_installed,
        "configuration_file": manager.config.file,
    }


def _origin_json(origin: PluginOrigin) -> dict[str, str]:
    return {
        "name": origin.name,
        "kind": origin.kind,
        "reference": origin.reference,
        "distribution": origin.distribution,
        "version": origin.version,
    }


def _print_plugins(manager: PluginManager) -> None:
    width = max((len(origin.title) for origin in manager.origins.values()), default=0)
    for number, (name, origin) in enumerate(manager.origins.items(), 1):
        click.echo(f"{number:2}  {origin.title:{width}}  {_source(origin)}")
        _print_wrapped(", ".join(_hooks_of(manager, name)) or "no hooks", indent=4)
    if kept_out := _kept_out(manager):
        unknown = _unknown(manager)
        names = [f"{name} (not there)" if name in unknown else name for name in kept_out]
        click.echo(f"kept out: {', '.join(names)}")
    if not manager.config.load_installed:
        _print_wrapped(
            "plugins that are installed are not loaded: PSNC_DISABLE_INSTALLED_PLUGINS is set",
            indent=0,
        )
    if manager.config.file is not None:
        click.echo(f"configuration file: {manager.config.file}")
    for failure in manager.failures:
        # In one line: it names files.
        click.echo(f"failed to load: {failure.reason}")


def _source(origin: PluginOrigin) -> str:
    if origin.kind == "installed":
        return f"{origin.distribution} {origin.version}, {origin.reference}"
    if origin.kind == "built-in":
        return f"built in, {origin.reference}"
    if origin.kind == "named":
        return f"{origin.named_by}, {origin.reference}"
    return origin.reference


# --- hooks ------------------------------------------------------------------------------------


def _print_hooks(docs: list[HookDoc]) -> None:
    section = ""
    for doc in docs:
        if doc.section != section:
            click.echo(f"{'' if not section else chr(10)}{doc.section}")
            section = doc.section
        _print_wrapped(f"{doc.signature}", indent=2)
        _print_wrapped(_plain(f"{doc.process.rstrip('.')}: {doc.summary}"), indent=6)
    click.echo()
    _print_wrapped("To use one, write a function of its name, and mark it with @psnc.hookimpl.", 0)
    _print_wrapped("psnc hooks NAME says all of one, with an example.", 0)
    _print_words()


def _print_hook(doc: HookDoc) -> None:
    click.echo(doc.signature)
    for text in filter(None, (doc.summary, doc.details)):
        _print_wrapped(_plain(text), indent=2)
    for fact in ("when", "process", "result", "errors"):
        _print_wrapped(f"{fact}: {_plain(getattr(doc, fact))}", indent=2)
    for name, description in doc.arguments.items():
        _print_wrapped(f"{name}: {_plain(description)}", indent=2)
    click.echo()
    click.echo(f"from psnc import hookimpl\n\n@hookimpl\ndef {doc.signature}:\n    ...\n")
    if doc.arguments:
        _print_wrapped("Leave out the arguments that you do not need.", 0)
    _print_words()


def _print_words() -> None:
    _print_wrapped(
        "The driver is the process that starts a run. A worker is one that runs indices, which may "
        "be the driver itself. A contained error is logged and counted, and the run goes on; one "
        "that is raised ends the command or the run.",
        0,
    )


def _plain(text: str) -> str:
    return text.replace("``", "")


def _print_wrapped(text: str, indent: int) -> None:
    width = max(shutil.get_terminal_size().columns, 40)
    click.echo(
        click.wrap_text(
            text, width, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2)
        )
    )
