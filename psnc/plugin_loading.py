"""Find, import and check plugins: what `PluginManager.load_plugins` is made of.

Every error says which distribution or file a plugin came from, and the line to mend.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import linecache
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Literal

from attrs import frozen

from psnc.config import Config
from psnc.errors import PluginError

__all__ = [
    "ENTRY_POINT_GROUP",
    "LOCAL_NAME",
    "PluginFailure",
    "PluginOrigin",
    "check_hooks",
    "find_plugins",
    "import_plugin",
]

ENTRY_POINT_GROUP = "psnc"

# All local plugin files are kept out by this name, whatever directory they lie in.
LOCAL_NAME = "psnc_plugins"


@frozen
class PluginOrigin:
    """Where a plugin comes from.

    Attributes
    ----------
    name : str
        What it is registered as; the path of a local plugin.
    kind : {"built-in", "installed", "named", "local", "object"}
        What brought it: psnc itself, an entry point, ``-p``, a file beside the pipeline, or a
        call of ``PluginManager.register``.
    reference : str
        The entry point's value, the module, or the file's path.
    distribution, version : str
        The installed distribution; empty where there is none.
    """

    name: str
    kind: Literal["built-in", "installed", "named", "local", "object"]
    reference: str = ""
    distribution: str = ""
    version: str = ""

    def __str__(self) -> str:
        """Return what a person needs to find it."""
        if self.kind == "installed":
            return f"{self.distribution} {self.version} (entry point {self.entry_point})"
        if self.kind == "named":
            return f"-p {self.name}"
        if self.kind == "local":
            return self.reference
        return "psnc itself" if self.kind == "built-in" else "the program"

    @property
    def entry_point(self) -> str:
        """The line of the distribution's ``[project.entry-points.psnc]``."""
        return f'{self.name} = "{self.reference}"'


@frozen
class PluginFailure:
    """A plugin that could not be loaded, and why."""

    origin: PluginOrigin
    reason: str


# --- find -------------------------------------------------------------------------------------


def find_plugins(config: Config, built_in: Mapping[str, str]) -> Iterator[PluginOrigin]:
    """Yield every plugin that a configuration asks for, in the order of registration."""
    for name, module in built_in.items():
        yield PluginOrigin(name, "built-in", module)
    installed = list(_installed())
    if config.load_installed:
        yield from installed
    named = [name for name in config.plugins if not name.startswith("no:")]
    for name in dict.fromkeys(named):
        by_entry_point = [each for each in installed if each.name == name]
        if name in built_in or (by_entry_point and config.load_installed):
            continue
        if by_entry_point:
            yield from by_entry_point
        else:
            yield PluginOrigin(name, "named", name)
    for path in config.local_plugins:
        yield PluginOrigin(path, "local", path)


def _installed() -> Iterator[PluginOrigin]:
    from importlib_metadata import entry_points

    found = []
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        distribution = entry_point.dist
        name, version = (distribution.name, distribution.version) if distribution else ("?", "?")
        found.append(PluginOrigin(entry_point.name, "installed", entry_point.value, name, version))
    # One distribution that is found twice, as in a source tree and where it is installed, is one.
    return iter(dict.fromkeys(sorted(found, key=lambda each: (each.distribution, each.name))))


# --- import -----------------------------------------------------------------------------------


def import_plugin(origin: PluginOrigin) -> Any:
    """Import a plugin.

    Raises
    ------
    PluginError
        If that fails: which plugin, of what, and the line at fault.
    """
    if origin.kind == "local":
        return _import_file(origin)
    module, _, attribute = origin.reference.partition(":")
    try:
        plugin = _import_module(module, origin)
        for name in filter(None, attribute.split(".")):
            plugin = getattr(plugin, name)
    except (Exception, SystemExit) as error:
        raise PluginError(_import_problem(origin, module, error)) from error
    return plugin


def _import_module(name: str, origin: PluginOrigin) -> Any:
    if origin.kind == "named" and os.getcwd() not in sys.path:
        # A console script's sys.path lacks the working directory, where `python -m` would look.
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _import_file(origin: PluginOrigin) -> ModuleType:
    path = Path(origin.reference)
    name = LOCAL_NAME
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) != str(path):
        # The same path has the same name in every process, since what it defines may travel.
        name = f"{LOCAL_NAME}_{zlib.crc32(os.fsencode(path)):08x}"
        loaded = sys.modules.get(name)
    if loaded is not None:
        return loaded
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # its name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise PluginError(_import_problem(origin, name, error)) from error
    return module


def _import_problem(origin: PluginOrigin, module: str, error: BaseException) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    missing = isinstance(error, ModuleNotFoundError) and error.name is not None
    is_missing = missing and f"{module}.".startswith(f"{error.name}.")  # type: ignore[attr-defined]
    where = _line_at_fault(error)
    if origin.kind == "local":
        return f"{origin}: importing it raised {reason}{where}: mend it, or move it away"
    if origin.kind == "named":
        if is_missing:
            return (
                f"{origin}: no installed plugin has this name, and it cannot be imported as a "
                f"module ({error}): check the spelling"
            )
        return f"{origin}: importing it raised {reason}{where}"
    if is_missing:
        problem = f"names a module that is not there ({error})"
    elif isinstance(error, AttributeError) and not where:
        problem = f"names what is not in its module ({error})"
    else:
        problem = f"raised {reason}{where}"
    return (
        f"plugin {origin.name!r} of {origin} {problem}: mend or uninstall {origin.distribution}, "
        f"or run with -p no:{origin.name}"
    )


def _line_at_fault(error: BaseException) -> str:
    """Return `` at file:line`` of the last line outside the import machinery, if there is one."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    place = ""
    traceback = error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith("<frozen") and file not in (__file__, importlib.__file__):
            place = f" at {file}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


# --- check ------------------------------------------------------------------------------------


def check_hooks(
    plugin: Any,
    origin: PluginOrigin,
    implementations: Iterable[tuple[str, Any, bool]],
    hooks: Mapping[str, tuple[str, ...]],
) -> None:
    """Refuse a plugin with a hook, or an argument of one, that does not exist.

    Parameters
    ----------
    plugin : object
        The plugin.
    origin : PluginOrigin
        Where it comes from, for the message.
    implementations : iterable of (str, callable, bool)
        Each marked function, with the hook that it implements, and whether that hook may be
        missing.
    hooks : mapping
        The arguments of every hook, by its name.

    Raises
    ------
    PluginError
        For the first such function: its file and line, and what it probably should be.
    """
    marked = set()
    for hook, function, optional in implementations:
        marked.add(getattr(function, "__name__", hook))
        if hook not in hooks:
            if optional:
                continue
            raise PluginError(
                f"{_of(origin)}: there is no hook {hook!r} ({_place(function)}): "
                f"{_suggestion(hook, hooks, 'psnc hooks lists those there are')}"
            )
        _check_arguments(hook, function, hooks[hook], origin)
    if isinstance(plugin, ModuleType):
        _check_unmarked(plugin, origin, marked, hooks)


def _check_arguments(
    hook: str, function: Any, arguments: tuple[str, ...], origin: PluginOrigin
) -> None:
    from pluggy._hooks import varnames

    for name in varnames(function)[0]:
        if name not in arguments:
            takes = f"the hook has {', '.join(arguments) or 'no arguments'}"
            raise PluginError(
                f"{_of(origin)}: {hook} has no argument {name!r} ({_place(function)}): "
                f"{_suggestion(name, arguments, takes)}"
            )


def _check_unmarked(
    module: ModuleType, origin: PluginOrigin, marked: set[str], hooks: Iterable[str]
) -> None:
    for name in hooks:
        function = vars(module).get(name)
        own = isinstance(function, FunctionType) and function.__module__ == module.__name__
        if own and name not in marked:
            raise PluginError(
                f"{_of(origin)}: {name} is not marked as a hook ({_place(function)}): decorate it "
                "with @psnc.hookimpl"
            )


def _of(origin: PluginOrigin) -> str:
    return f"plugin {origin.name!r} of {origin}" if origin.kind != "local" else str(origin)


def _suggestion(name: str, known: Iterable[str], otherwise: str) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise


def _place(function: Any) -> str:
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is None:
        return repr(function)
    line = code.co_firstlineno
    # A decorated function begins at its first decorator; the name is further down.
    while (text := linecache.getline(code.co_filename, line)) and "def " not in text:
        line += 1
    return f"{code.co_filename}:{line if text else code.co_firstlineno}"
