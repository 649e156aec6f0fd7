"""Every test has a home, a working directory and a plugin manager of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import hypothesis
import pytest
from hypothesis.configuration import set_hypothesis_home_dir
from other_programs import Rows, RunPython, query
from stages_for_tests import TESTS_FIRST

from psnc import group_commit
from psnc.config import Config
from psnc.manager import PluginManager, activated

# A shell that runs the tests in the background has them, and all they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, and no directory of them in the working tree.
hypothesis.settings.register_profile(
    "psnc", derandomize=True, deadline=None, database=None, max_examples=60
)
hypothesis.settings.load_profile("psnc")
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "psnc-hypothesis")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let reports travel between processes, as UTF-8, with the odd bytes that some tests log."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


# Not in faults/, whose conftest.py the process that only distributes tests does not read.
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how much the tests of faults have tried."""
    tried: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, number in report.user_properties:
            if name.startswith("faults: "):
                tried[name.removeprefix("faults: ")] += number
    if tried:
        failed = [each for each in terminalreporter.getreports("failed") if "faults" in each.nodeid]
        terminalreporter.section("faults")
        for what, number in sorted(tried.items()):
            terminalreporter.line(f"faults: {number:,} {what}")
        terminalreporter.line(f"faults: {len(failed)} tests found something lost or different")


@pytest.fixture(autouse=True)
def own_home(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Keep the user's home, caches and working directory, and other tests, out of every test."""
    home = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.startswith(("PSNC_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    # What else is installed here is nothing to these tests.
    monkeypatch.setenv("PSNC_DISABLE_INSTALLED_PLUGINS", "1")
    monkeypatch.chdir(tmp_path)
    yield home
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(f"{tmp_path}{os.sep}"):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def plugins(own_home: Path) -> Iterator[PluginManager]:
    """Give the test a plugin manager, and close what its pipelines opened."""
    manager = PluginManager(Config(load_installed=False))
    manager.load()
    with activated(manager):
        yield manager
    for store in list(group_commit._open_stores):
        store.close()
    manager.close()


@pytest.fixture
def journal(tmp_path: Path) -> str:
    """Path for a `Journal` source to write to."""
    return str(tmp_path / "journal.txt")


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """Run Python in a process of its own, in ``tmp_path``, with the tests' stages importable."""

    def run(
        *arguments: str | os.PathLike[str], check: bool = True, timeout: float = 60, **env: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": TESTS_FIRST, **env}
        finished = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check:
            assert finished.returncode == 0, finished.stderr
        return finished

    return run


@pytest.fixture(name="query")
def query_fixture() -> Callable[..., Rows]:
    """Return :func:`query`."""
    return query
