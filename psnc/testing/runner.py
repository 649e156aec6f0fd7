"""Run pipelines and the ``psnc`` command with chosen plugins and nothing else."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

from attrs import frozen

from psnc.config import Config
from psnc.hookspecs import hookimpl
from psnc.manager import PluginManager, activated
from psnc.options import require_known
from psnc.pipeline import Pipeline
from psnc.records import IndexRecord, LogRecord, RunSummary
from psnc.run import Run
from psnc.session import run_pipeline
from psnc.store import CheckpointStore
from psnc.testing.recorder import HookRecorder

__all__ = ["CommandResult", "RunResult", "Runner"]

_NO_INSTALLED = "PSNC_DISABLE_INSTALLED_PLUGINS"


@frozen
class RunResult:
    """What came of a run.

    Attributes
    ----------
    outputs : list of list of str
        As ``run_pipeline`` returns them: output paths in the order of the indices.
    summary : RunSummary
        How the run ended.
    records : list of IndexRecord
        One for each index that ran, sorted by index.
    """

    outputs: list[list[str]]
    summary: RunSummary
    records: list[IndexRecord]

    @property
    def failed(self) -> dict[int, str]:
        """The error of each index that failed."""
        return self.summary.failed

    @property
    def logs(self) -> list[LogRecord]:
        """What the indices logged, index by index."""
        return [entry for record in self.records for entry in record.logs]

    @property
    def plugin_errors(self) -> dict[str, int]:
        """How often each plugin's hook raised, by ``"plugin: hook"``."""
        return self.summary.plugin_errors


@frozen
class CommandResult:
    """What came of a command line."""

    exit_code: int
    stdout: str
    stderr: str


class Runner:
    """Runs pipelines with the built-in plugins and those that it is given.

    Made by the fixture ``psnc_runner``. Whatever else is installed on the machine is not loaded,
    and what plugins opened is closed at the end of the test.

    Attributes
    ----------
    plugins : PluginManager
        The plugins that are active now.
    """

    plugins: PluginManager

    def __init__(self) -> None:
        self._active = ExitStack()
        self._watch = _Watch()
        self._recorders: list[HookRecorder] = []
        self._written: list[str] = []
        self._path: str | None = None

    def __enter__(self) -> Self:
        self.activate()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with ExitStack() as stack:
            stack.callback(self._forget_modules)
            stack.callback(self._active.close)
            for store in self._watch.stores:
                stack.callback(store.close)

    def activate(
        self,
        *plugins: str | ModuleType | object,
        strict_plugins: bool = False,
        options: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> PluginManager:
        """Load plugins in place of those that were active.

        Parameters
        ----------
        *plugins
            Names of modules or installed plugins, and ``"no:NAME"``, as ``-p`` takes them;
            modules; or any objects with hooks. Worker processes load those that have a name; an
            object is a plugin in this process only.
        strict_plugins : bool
            A hook that raises fails the run.
        options : mapping, optional
            Values of the options that the plugins declare, by name, of the types declared.
        **settings
            Other fields of :class:`psnc.Config`.

        Raises
        ------
        PluginError
            If one cannot be loaded.
        ConfigurationError
            If an option is declared by none of them, or its value has another type.
        """
        names, objects = _sorted_out(plugins)
        config = Config(
            plugins=names, load_installed=False, strict_plugins=strict_plugins, **settings
        )
        manager = PluginManager(config)
        manager.load_plugins()
        for plugin in (*objects, self._watch, *self._recorders):
            manager.register(plugin)
        manager.require_plugins()
        given = None if options is None else require_known(manager.plugin_options(), options)
        self._active.close()
        manager.configure(given)
        self._active.callback(manager.close)
        self._active.enter_context(activated(manager))
        self.plugins = manager
        return manager

    def record(self, recorder: HookRecorder) -> None:
        """Have hooks noted, those of plugins that are activated later included."""
        self._recorders.append(recorder)
        self.plugins.register(recorder)

    def run(
        self, pipeline: Pipeline[Any], n_jobs: int = 1, backend: str | None = None, **arguments: Any
    ) -> RunResult:
        """Run a pipeline.

        Parameters
        ----------
        pipeline : Pipeline
            The pipeline.
        n_jobs, backend, **arguments
            As :func:`psnc.run_pipeline` takes them.
        """
        self._watch.records.clear()
        outputs = run_pipeline(pipeline, n_jobs, backend, **{"progress": False, **arguments})
        assert self._watch.summary is not None  # a run that returns has ended
        records = sorted(self._watch.records, key=lambda record: record.index)
        return RunResult(outputs, self._watch.summary, records)

    def cli(
        self,
        *arguments: object,
        plugins: Sequence[str] = (),
        installed: bool = False,
        timeout: float = 120,
    ) -> CommandResult:
        """Run the ``psnc`` command in a process of its own, in the working directory.

        It finds the modules that the test finds.

        Parameters
        ----------
        *arguments
            As on a command line: ``cli("run", "example.py:pipeline", "-j", "2")``.
        plugins : sequence of str
            Plugins to load, as ``-p`` takes them.
        installed : bool
            Also load the plugins of all installed distributions.
        timeout : float
            Seconds after which the command is ended and the test fails.
        """
        environment = {**os.environ, _NO_INSTALLED: "1", "PSNC_PLUGINS": ",".join(plugins)}
        if installed:
            del environment[_NO_INSTALLED]
        # An empty entry means the working directory, which comes first anyway.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        finished = subprocess.run(
            [sys.executable, "-m", "psnc", *map(str, arguments)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return CommandResult(finished.returncode, finished.stdout, finished.stderr)

    def write_module(self, name: str, source: str) -> str:
        """Write a module to the working directory, importable here and in workers.

        Parameters
        ----------
        name : str
            The module's name.
        source : str
            Its text; common indentation is removed.

        Returns
        -------
        str
            The name.
        """
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no name of a module: use letters, digits and _")
        if name not in self._written:
            if importlib.util.find_spec(name) is not None:
                raise ValueError(f"there is a module {name!r} already: choose another name")
            self._written.append(name)
        if self._path is None:
            self._path = os.getcwd()
            sys.path.insert(0, self._path)
        path = Path(self._path, f"{name}.py")
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        # What was compiled from another text of this length, within the same second, passes for
        # this one's.
        Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return name

    def _forget_modules(self) -> None:
        for name in self._written:
            sys.modules.pop(name, None)
        if self._path is not None:
            sys.path.remove(self._path)


class _Watch:
    """A plugin that knows which stores were opened, what was reported, and how a run ended."""

    def __init__(self) -> None:
        self.stores: list[CheckpointStore] = []
        self.records: list[IndexRecord] = []
        self.summary: RunSummary | None = None

    @hookimpl(wrapper=True)
    def psnc_open_store(self, url: str) -> Iterator[None]:
        store = yield
        if store is not None:
            self.stores.append(store)
        return store

    @hookimpl
    def psnc_index_reported(self, run: Run, record: IndexRecord) -> None:
        self.records.append(record)

    @hookimpl
    def psnc_run_done(self, run: Run, summary: RunSummary) -> None:
        self.summary = summary


def _sorted_out(plugins: Sequence[Any]) -> tuple[tuple[str, ...], list[Any]]:
    """Part those that worker processes can load by name from those that exist only here."""
    names, objects = [], []
    for plugin in plugins:
        if isinstance(plugin, ModuleType) and sys.modules.get(plugin.__name__) is plugin:
            names.append(plugin.__name__)
        elif isinstance(plugin, str):
            names.append(plugin)
        else:
            objects.append(plugin)
    return tuple(names), objects
