"""The ``psnc`` command in this process, and the files that a test writes for it."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from stages_for_tests import TESTS_PATH

from psnc.cli import main

PIPELINE = """
from stages_for_tests import Discard, Numbers

pipeline = Numbers(3).write(Discard())
"""

TELL = """
from psnc import hookimpl

@hookimpl
def psnc_index_reported(record):
    print(f"{__name__.partition('_plugins_')[0]} {record.index}")
"""


class Said(NamedTuple):
    """What a command did: its exit code, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that it printed on standard error as it refused, without ``psnc:``."""
        assert (self.code, self.out) == (2, ""), self
        (line,) = self.err.splitlines()
        assert line.startswith("psnc: ")
        return line.removeprefix("psnc: ")

    def told(self, name: str = "tell") -> list[str]:
        """Return what the plugin `TELL` of this name said."""
        assert self.code == 0, self
        return [line.split()[1] for line in self.out.splitlines() if line.split()[0] == name]


Psnc = Callable[..., Said]
Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write indented text to a file in ``tmp_path``; what is imported from there is forgotten."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.syspath_prepend(str(TESTS_PATH))

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(textwrap.dedent(text).encode())
        return path

    yield write_file
    forget(tmp_path)


def forget(directory: Path) -> None:
    """Forget what was imported from a directory, as if in a process of its own."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and os.path.realpath(file).startswith(os.path.realpath(directory)):
            del sys.modules[name]


@pytest.fixture
def psnc(
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Psnc:
    """Run a command line in ``tmp_path``, where ``three.py`` has a pipeline of three indices."""
    monkeypatch.setenv("PSNC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    write("three.py", PIPELINE)

    def run(*arguments: object) -> Said:
        forget(tmp_path)
        try:
            main([str(each) for each in arguments])
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run
