"""The fixtures that ``pytest_plugins = ["psnc.testing"]`` brings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from psnc.testing.recorder import HookRecorder
from psnc.testing.runner import Runner

__all__ = ["psnc_home", "psnc_hooks", "psnc_runner"]


@pytest.fixture
def psnc_home(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Give the test a home directory, a cache and a working directory of its own.

    Nothing of the developer's settings gets in, neither to this process nor to those that the
    test starts: no ``PSNC_`` or ``XDG_`` variable, no configuration file, no installed plugin.
    The working directory is ``tmp_path``.

    Yields
    ------
    Path
        The home directory; databases are in ``.cache/psnc`` there.
    """
    home = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.startswith(("PSNC_", "XDG_")) and not name.startswith("PSNC_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PSNC_DISABLE_INSTALLED_PLUGINS", "1")
    monkeypatch.chdir(tmp_path)
    # It ends the search for a configuration file, where pytest's directory is inside a project.
    end = tmp_path.parent / "psnc.toml"
    is_ours = not end.exists()
    end.touch()
    yield home
    if is_ours:
        end.unlink()


@pytest.fixture
def psnc_runner(psnc_home: Path) -> Iterator[Runner]:
    """Give the test a :class:`Runner`, with no plugin active but the built-in ones.

    Pipelines that the test runs by itself (``pipeline[0]``, ``run_pipeline``) have the same
    plugins as those of ``psnc_runner.run``.
    """
    with Runner() as runner:
        yield runner


@pytest.fixture
def psnc_hooks(psnc_runner: Runner) -> HookRecorder:
    """Note every hook that psnc calls in this process, with its arguments."""
    recorder = HookRecorder()
    psnc_runner.record(recorder)
    return recorder
