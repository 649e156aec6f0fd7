"""Run the examples in README.md, in docs/ and in the docstrings of psnc.

Every page, and every docstring, has a home, a working directory and plugins of its own; plugins of
other distributions are not loaded. The first Python block of ``docs/getting_started.md`` lies there
as ``doubles.py``, for examples to import.

On a page, Python blocks run from top to bottom in one namespace. One that begins with ``>>>`` has
its output compared; one that begins with a comment such as ``# picky.py`` is written to that file
instead, and so is such a block of TOML or YAML. In ``console`` blocks the lines that begin with
``$`` are run by bash, and what they print is compared.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, chdir
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from sybil import Document, Example, Region, Sybil
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser

from psnc.manager import deactivate

ROOT = Path(__file__).parent
FILE_NAME = re.compile(r"# ([\w/-]+\.(?:py|toml|yaml))\n")
# Progress, of which a reader's terminal has a bar that is gone in the end, and a remark on how the
# examples are run.
NOT_FOR_READERS = re.compile(
    r"^(psnc: \d+/\d+ indices, |plugins that are installed are not loaded: ).*\n", re.MULTILINE
)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def enter_workplace(stack: ExitStack) -> dict[str, Any]:
    """Move to an empty directory with ``doubles.py``; return what that file defines."""
    workplace = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="psnc-docs-")))
    page = (ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    (workplace / "doubles.py").write_text(block[1], encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PSNC_")}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    home = workplace / ".home"
    environment = {
        **kept,
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home),
        "COLUMNS": "100",
        "PSNC_DISABLE_INSTALLED_PLUGINS": "1",
    }
    stack.enter_context(mock.patch.dict(os.environ, environment, clear=True))
    stack.enter_context(chdir(workplace))
    deactivate()
    stack.callback(deactivate)
    stack.enter_context(mock.patch.object(sys, "path", [str(workplace), *sys.path]))
    stack.callback(sys.modules.pop, "doubles", None)
    import doubles

    return {name: getattr(doubles, name) for name in ("Numbers", "Double", "WriteText")}


# --- pages ------------------------------------------------------------------------------------


def set_up_page(namespace: dict[str, Any]) -> None:
    namespace["_stack"] = ExitStack()
    enter_workplace(namespace["_stack"])
    # As in a script: what a page defines travels to worker processes by value.
    namespace["__name__"] = "__main__"


def tear_down_page(namespace: dict[str, Any]) -> None:
    namespace["_stack"].close()


class PythonBlockParser(PythonCodeBlockParser):
    """Finds the Python blocks of a page, and knows those that are files."""

    def __call__(self, document: Document) -> Iterator[Region]:
        """Yield the blocks."""
        for region in super().__call__(document):
            if isinstance(region.parsed, str) and FILE_NAME.match(region.parsed):
                region.evaluator = write_file
            yield region


def write_file(example: Example) -> None:
    """Write a block to the file that its first line names, if it names one."""
    name = FILE_NAME.match(example.parsed)
    if name is not None:
        path = Path(name[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(example.parsed, encoding="utf-8")


def run_console(example: Example) -> str | None:
    """Run the commands of a block; return what differs from the page, if anything does."""
    for part in re.split(r"^\$ ", example.parsed, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        finished = subprocess.run(
            ["bash", "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
            check=False,
        )
        printed = NOT_FOR_READERS.sub("", finished.stdout)
        wanted = doctest.Example(command, expected)
        checker = doctest.OutputChecker()
        if not checker.check_output(wanted.want, printed, OPTIONS):
            return f"$ {command}\n" + checker.output_difference(wanted, printed, OPTIONS)
    return None


pytest_collect_file = Sybil(
    parsers=[
        PythonBlockParser(doctest_optionflags=OPTIONS),
        CodeBlockParser("toml", write_file),
        CodeBlockParser("yaml", write_file),
        CodeBlockParser("console", run_console),
    ],
    path=str(ROOT),
    patterns=["README.md", "docs/*.md"],
    setup=set_up_page,
    teardown=tear_down_page,
).pytest()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """End the processes that joblib keeps for its next caller.

    They would take the directory and the environment of one test along to another.
    """
    loky = sys.modules.get("joblib.externals.loky.reusable_executor")
    executor = None if loky is None else loky._executor
    if executor is not None:
        executor.shutdown(wait=True)


# --- docstrings -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def docstring_workplace(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give a docstring's examples a workplace and the stages of ``doubles.py``."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    with ExitStack() as stack:
        request.getfixturevalue("doctest_namespace").update(enter_workplace(stack))
        yield
