"""What the hooks' documentation says, in parts: for ``psnc hooks`` and the page made of it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import pluggy
from attrs import frozen

from psnc import hookspecs

__all__ = ["HookDoc", "hook_docs", "markdown_page"]

_FACTS = ("When", "Process", "Result", "Errors")
_SECTION = re.compile(r"^# --- (.+?) -+$")


@frozen
class HookDoc:
    """One hook, as :mod:`psnc.hookspecs` documents it.

    Attributes
    ----------
    name, section : str
        The hook, and the part of the file that it stands in.
    arguments : dict of str to str
        What each argument is.
    summary, details : str
        The purpose in one line, and what there is to say besides.
    when, process, result, errors : str
        The moment, the process, what to return, and what becomes of an exception.
    first_result : bool
        Whether plugins are asked until one answers.
    """

    name: str
    section: str
    arguments: dict[str, str]
    summary: str
    details: str
    when: str
    process: str
    result: str
    errors: str
    first_result: bool

    @property
    def signature(self) -> str:
        """The call as an implementation may write it."""
        return f"{self.name}({', '.join(self.arguments)})"


def hook_docs() -> list[HookDoc]:
    """Return the documentation of every hook, in the order of the file."""
    manager = pluggy.PluginManager("psnc")
    manager.add_hookspecs(hookspecs)
    return [_parse(name, section, manager) for name, section in _names_by_section()]


def _names_by_section() -> Iterator[tuple[str, str]]:
    section = ""
    for line in inspect.getsource(hookspecs).splitlines():
        if match := _SECTION.match(line):
            section = match[1]
        elif match := re.match(r"def (psnc_\w+)", line):
            yield match[1], section


def _parse(name: str, section: str, manager: pluggy.PluginManager) -> HookDoc:
    caller: pluggy.HookCaller = getattr(manager.hook, name)
    assert caller.spec is not None
    text = inspect.cleandoc(getattr(hookspecs, name).__doc__)
    text, _, parameters = text.partition("\nParameters\n----------\n")
    summary, _, rest = text.partition("\n\n")
    facts = {fact.lower(): _fact(fact, rest) for fact in _FACTS}
    described = _arguments(parameters)
    return HookDoc(
        name=name,
        section=section,
        arguments={each: described.get(each, "") for each in caller.spec.argnames},
        summary=_one_line(summary),
        details=_one_line(rest.partition("When:")[0]),
        first_result=bool(caller.spec.opts.get("firstresult")),
        **facts,
    )


def _fact(name: str, text: str) -> str:
    match = re.search(rf"^{name}: (.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    return _one_line(match[1]) if match else ""


def _arguments(text: str) -> dict[str, str]:
    pairs = re.findall(r"^(\w+) : (.*?)\n((?:    .*\n?)+)", text, re.MULTILINE)
    return {name: f"{kind}. {_one_line(description)}" for name, kind, description in pairs}


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- the page ---------------------------------------------------------------------------------


def markdown_page() -> str:
    """Return the page that lists every hook, in Markdown."""
    docs = hook_docs()
    lines = [
        "# All hooks",
        "",
        "This page is made from `psnc/hookspecs.py` by `psnc hooks --markdown`. How to write a",
        "hook, and what happens to its errors, is in [Plugins and hooks](plugins.md).",
        "",
        "| Hook | Process | Purpose |",
        "|---|---|---|",
        *(f"| `{doc.signature}` | {doc.process.rstrip('.')} | {doc.summary} |" for doc in docs),
    ]
    section = ""
    for doc in docs:
        if doc.section != section:
            section = doc.section
            lines += ["", f"## {section[0].upper()}{section[1:]}"]
        lines += ["", *_entry(doc)]
    return _plain("\n".join(lines)) + "\n"


def _entry(doc: HookDoc) -> Iterator[str]:
    yield f"### `{doc.signature}`"
    yield ""
    yield doc.summary
    if doc.details:
        yield ""
        yield doc.details
    yield ""
    for fact in _FACTS:
        yield f"- **{fact}**: {getattr(doc, fact.lower())}"
    for name, description in doc.arguments.items():
        yield f"- `{name}`: {description}"


def _plain(text: str) -> str:
    """Turn reStructuredText's marks of code into Markdown's."""
    return text.replace("``", "`")
