"""The hooks' documentation: complete, and the same on the command line and on the page."""

from __future__ import annotations

import inspect
import re

import pytest
from command_line import Psnc, Write, psnc, write

from psnc import PluginManager, hookspecs
from psnc.hookdocs import HookDoc, hook_docs, markdown_page

__all__ = ["psnc", "write"]

DOCS = hook_docs()
NAMES = [name for name in vars(hookspecs) if name.startswith("psnc_")]


def test_every_hook_is_documented_in_the_order_of_the_file() -> None:
    assert [doc.name for doc in DOCS] == NAMES
    assert all(doc.section for doc in DOCS)


@pytest.mark.parametrize("doc", DOCS, ids=NAMES)
def test_a_hooks_documentation_says_everything(doc: HookDoc) -> None:
    text = inspect.getdoc(getattr(hookspecs, doc.name)) or ""
    facts = re.findall(r"^(\w+): ", text, re.MULTILINE)
    assert facts == ["When", "Process", "Result", "Errors"]
    for fact in (doc.summary, doc.when, doc.process, doc.result, doc.errors):
        assert fact.endswith(".")
    assert "\n" not in doc.summary
    documented = re.findall(r"^(\w+) : (?!\s)", text, re.MULTILINE)
    parameters = list(inspect.signature(getattr(hookspecs, doc.name)).parameters)
    assert documented == parameters == list(doc.arguments)
    assert all(doc.arguments.values())


@pytest.mark.parametrize("doc", DOCS, ids=NAMES)
def test_a_hooks_documentation_is_true_of_its_kind(doc: HookDoc) -> None:
    assert doc.first_result == ("First result." in doc.result)
    assert doc.process.rstrip(".").split(",")[0] in (
        "driver", "worker", "driver and worker", "the dashboard's"
    )  # fmt: skip
    assert doc.errors.startswith(("contained", "raised"))


def test_hooks_are_listed_with_process_and_purpose(psnc: Psnc) -> None:
    said = psnc("hooks")
    assert said.code == 0
    listed = re.findall(r"^  (psnc_\w+)\(", said.out, re.MULTILINE)
    assert listed == NAMES
    assert "\none index\n" in said.out
    assert (
        "psnc_run_start(run, indices, cached)\n      driver: Know that a run begins.\n" in said.out
    )
    # What the words mean is said where they are used.
    assert "@psnc.hookimpl" in said.out
    assert "The driver is the process that starts a run." in said.out


@pytest.mark.parametrize("name", ["psnc_index_lookup", "index_lookup"])
def test_a_hook_is_told_with_an_example(name: str, psnc: Psnc) -> None:
    said = psnc("hooks", name)
    assert said.code == 0
    text = " ".join(said.out.split())
    for part in (
        "psnc_index_lookup(run, index) Answer with an earlier result, which ends the index.",
        "when: before an index runs.",
        "process: worker.",
        "errors: contained; the next plugin is asked.",
        "index: int. The source index.",
        "A contained error is logged and counted, and the run goes on",
    ):
        assert part in text
    assert "``" not in said.out


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_hook_is_a_plugin(name: str, psnc: Psnc) -> None:
    (example,) = re.findall(
        r"^from psnc import hookimpl\n.*?^    \.\.\.$", psnc("hooks", name).out, re.M | re.S
    )
    namespace: dict[str, object] = {}
    exec(example, namespace)
    plugin = type("Plugin", (), {name: staticmethod(namespace[name])})  # type: ignore[call-overload]
    manager = PluginManager()
    manager.register(plugin())
    assert manager.implements(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("psnc_index_dome", "did you mean 'psnc_index_done'?"),
        ("colour", "psnc hooks lists those there are"),
    ],
)
def test_a_hook_that_is_not_there_is_said(name: str, hint: str, psnc: Psnc) -> None:
    assert psnc("hooks", name).error == f"there is no hook {name!r}: {hint}"


def test_hooks_are_told_whatever_is_wrong_with_plugins(psnc: Psnc, write: Write) -> None:
    write("psnc_plugins.py", "1 / 0")
    write("psnc.toml", "plugins = 3")
    assert psnc("hooks").code == 0


def test_the_page_has_every_hook_and_only_markdown(psnc: Psnc) -> None:
    said = psnc("hooks", "--markdown")
    assert said.out == markdown_page()
    assert re.findall(r"^### `(psnc_\w+)\(", said.out, re.MULTILINE) == NAMES
    rows = re.findall(r"^\| `(psnc_\w+)\(.*?\)` \| [^|]+ \| [^|]+ \|$", said.out, re.MULTILINE)
    assert rows == NAMES
    assert "``" not in said.out
    for doc in DOCS:
        for name in doc.arguments:
            assert f"- `{name}`: " in said.out
