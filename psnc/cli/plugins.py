"""``psnc plugins`` and ``psnc hooks``: what is loaded, and what can be implemented."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

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
    chosen = next((doc for doc in docs if doc.name == name), None)
    if chosen is None:
        raise PluginError(f"there is no hook {name!r}: psnc hooks lists those there are")
    _print_hook(chosen)


# --- plugins ----------------------------------------------------------------------------------


def _hooks_of(manager: PluginManager, name: str) -> list[str]:
    callers = manager.get_hookcallers(manager.get_plugin(name)) or []
    return [caller.name for caller in callers]


def _kept_out(manager: PluginManager) -> list[str]:
    named = {choice[3:] for choice in manager.config.plugins if choice.startswith("no:")}
    return sorted(name for name in named if manager.is_blocked(name))


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
    width = max(map(len, map(_title, manager.origins.values())), default=0)
    for number, (name, origin) in enumerate(manager.origins.items(), 1):
        click.echo(f"{number:2}  {_title(origin):{width}}  {_source(origin)}")
        _print_wrapped(", ".join(_hooks_of(manager, name)) or "no hooks", indent=4)
    if kept_out := _kept_out(manager):
        click.echo(f"kept out: {', '.join(kept_out)}")
    if manager.config.file is not None:
        click.echo(f"configuration file: {manager.config.file}")
    for failure in manager.failures:
        _print_wrapped(f"failed to load: {failure.reason}", indent=0)


def _title(origin: PluginOrigin) -> str:
    return "psnc_plugins" if origin.kind == "local" else origin.name


def _source(origin: PluginOrigin) -> str:
    if origin.kind == "installed":
        return f"{origin.distribution} {origin.version}, {origin.reference}"
    if origin.kind == "built-in":
        return f"built in, {origin.reference}"
    return f"-p, {origin.reference}" if origin.kind == "named" else origin.reference


# --- hooks ------------------------------------------------------------------------------------


def _print_hooks(docs: list[HookDoc]) -> None:
    section = ""
    for doc in docs:
        if doc.section != section:
            click.echo(f"{'' if not section else chr(10)}{doc.section}")
            section = doc.section
        _print_wrapped(f"{doc.signature}", indent=2)
        _print_wrapped(_plain(f"{doc.process.rstrip('.')}: {doc.summary}"), indent=6)


def _print_hook(doc: HookDoc) -> None:
    click.echo(doc.signature)
    for text in filter(None, (doc.summary, doc.details)):
        _print_wrapped(_plain(text), indent=2)
    for fact in ("when", "process", "result", "errors"):
        _print_wrapped(f"{fact}: {_plain(getattr(doc, fact))}", indent=2)
    for name, description in doc.arguments.items():
        _print_wrapped(f"{name}: {_plain(description)}", indent=2)


def _plain(text: str) -> str:
    return text.replace("``", "")


def _print_wrapped(text: str, indent: int) -> None:
    width = max(shutil.get_terminal_size().columns, 40)
    click.echo(
        click.wrap_text(
            text, width, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2)
        )
    )
