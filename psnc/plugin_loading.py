"""Find, import and check plugins: what `PluginManager.load_plugins` is made of.

Every error says which distribution or file a plugin came from, and the line to mend.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import linecache
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
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
        The entry point's value, the module, or the file's path; empty for an entry point without
        a value.
    distribution, version : str
        The installed distribution; empty where there is none.
    named_by : str
        What names it: ``-p``, ``PSNC_PLUGINS`` or a configuration file.
    """

    name: str
    kind: Literal["built-in", "installed", "named", "local", "object"]
    reference: str = ""
    distribution: str = ""
    version: str = ""
    named_by: str = ""

    def __str__(self) -> str:
        """Return what a person needs to find it."""
        if self.kind == "installed":
            return f"{self.distribution} {self.version} (entry point {self.entry_point})"
        if self.kind == "named":
            return f"-p {self.name}" if self.named_by in ("", "-p") else self.named_by
        if self.kind == "local":
            return self.reference
        return "psnc itself" if self.kind == "built-in" else "the program"

    @property
    def title(self) -> str:
        """What ``-p no:NAME`` knows it by: all local plugins have one name."""
        return LOCAL_NAME if self.kind == "local" else self.name

    @property
    def described(self) -> str:
        """Which plugin it is and where it comes from, to begin a message with."""
        return f"{self}" if self.kind == "local" else f"plugin {self.name!r} of {self}"

    @property
    def entry_point(self) -> str:
        """The line of the distribution's ``[project.entry-points.psnc]``."""
        return f'{self.name} = "{self.reference}"' if self.reference else self.name


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
            yield PluginOrigin(name, "named", name, named_by=_named_by(name, config))
    for path in config.local_plugins:
        yield PluginOrigin(path, "local", path)


def _named_by(name: str, config: Config) -> str:
    from psnc.settings import plugins_of_environment, plugins_of_file

    if name in plugins_of_environment():
        return "PSNC_PLUGINS"
    if config.file is not None and name in plugins_of_file(config.file):
        return config.file
    return "-p"


def _installed() -> Iterator[PluginOrigin]:
    from importlib_metadata import entry_points

    try:
        named = [
            (each.dist, each.name, each.value) for each in entry_points(group=ENTRY_POINT_GROUP)
        ]
    except Exception:  # whatever it makes of a line that is no entry point
        named = list(_entry_points_line_by_line())
    found = []
    for distribution, entry_point, reference in named:
        # Read once: name and version would each parse all of it.
        metadata = distribution.metadata if distribution else None
        name, version = "?", "?"
        if metadata:
            name, version = metadata.get("Name", "?"), metadata.get("Version", "?")
        found.append(PluginOrigin(entry_point, "installed", reference, name, version))
    # One distribution that is found twice, as in a source tree and where it is installed, is one.
    return iter(dict.fromkeys(sorted(found, key=lambda each: (each.distribution, each.name))))


def _entry_points_line_by_line() -> Iterator[tuple[Any, str, str]]:
    """Yield entry points with their distributions; a line that is none as one without a value."""
    from importlib_metadata import distributions

    seen = set()
    for distribution in distributions():
        # Of one name the first is what Python imports.
        name = distribution.metadata["Name"] if distribution.metadata else "?"
        if name in seen:
            continue
        seen.add(name)
        group = ""
        for line in (distribution.read_text("entry_points.txt") or "").splitlines():
            text = line.strip()
            if text.startswith("[") and text.endswith("]"):
                group = text[1:-1]
            elif text and not text.startswith("#") and group == ENTRY_POINT_GROUP:
                entry_point, _, reference = text.partition("=")
                yield distribution, entry_point.strip(), reference.strip()


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
    if not origin.reference:
        raise PluginError(
            f"{origin.distribution} {origin.version} has the line {origin.name!r} under "
            f"[{ENTRY_POINT_GROUP}] in its entry_points.txt, which names no module: write "
            f"{origin.name} = module, uninstall {origin.distribution}, or run with "
            f"-p no:{origin.name}"
        )
    module, attribute = _module_and_attribute(origin)
    try:
        plugin = _import_module(module, origin)
        for name in filter(None, attribute.split(".")):
            plugin = getattr(plugin, name)
    except (Exception, SystemExit) as error:
        raise PluginError(_import_problem(origin, module, error)) from error
    return plugin


def _module_and_attribute(origin: PluginOrigin) -> tuple[str, str]:
    if origin.kind == "installed":
        from importlib_metadata import EntryPoint

        entry_point = EntryPoint(origin.name, origin.reference, ENTRY_POINT_GROUP)
        # Where it is none, the import says so.
        with suppress(Exception):
            return entry_point.module, entry_point.attr or ""
    module, _, attribute = origin.reference.partition(":")
    return module, attribute


def _import_module(name: str, origin: PluginOrigin) -> Any:
    if origin.kind == "named" and os.getcwd() not in sys.path:
        # A console script's sys.path lacks the working directory, where `python -m` would look.
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _import_file(origin: PluginOrigin) -> ModuleType:
    path = Path(origin.reference)
    # The plain name, which is in the hash of a pipeline that uses its classes, goes to the first.
    by_path = f"{LOCAL_NAME}_{zlib.crc32(os.fsencode(path)):08x}"
    for name in (LOCAL_NAME, by_path):
        loaded = sys.modules.get(name)
        file = getattr(loaded, "__file__", None)
        if loaded is not None and file and os.path.realpath(file) == os.path.realpath(path):
            return loaded
    name = by_path if LOCAL_NAME in sys.modules else LOCAL_NAME
    if str(path.parent) not in sys.path:
        # It may import what lies beside it.
        sys.path.insert(0, str(path.parent))
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
    # In another process it may have had the other name, and what is pickled there comes here.
    sys.modules.setdefault(by_path, module)
    return module


def _import_problem(origin: PluginOrigin, module: str, error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else error
    reason = " ".join(f"{type(error).__name__}: {text}".split())
    missing = isinstance(error, ModuleNotFoundError) and error.name is not None
    is_missing = missing and f"{module}.".startswith(f"{error.name}.")  # type: ignore[attr-defined]
    where = _line_at_fault(error)
    if origin.kind == "local":
        return (
            f"{origin}: importing it raised {reason}{where}: mend it, or run with "
            f"-p no:{LOCAL_NAME}"
        )
    if origin.kind == "named":
        named = f"{origin}" if origin.name in str(origin) else f"{origin} names {origin.name}"
        if is_missing or not where:
            return (
                f"{named}: no installed plugin has this name, and it cannot be imported as a "
                f"module ({error}): {_advice(origin.name)}"
            )
        return f"{named}: importing it raised {reason}{where}"
    if is_missing:
        problem = f"names a module that is not there ({error})"
    elif isinstance(error, AttributeError) and not where:
        problem = f"names what is not in its module ({error})"
    else:
        problem = f"raised {reason}{where}"
    return (
        f"{origin.described} {problem}: mend or uninstall {origin.distribution}, "
        f"or run with -p no:{origin.name}"
    )


def _advice(name: str) -> str:
    if name.endswith(".py") or os.sep in name:
        return f"give a module's name, not a file's, such as {Path(name).stem}"
    installed = list(_installed())
    for each in installed:
        if each.distribution == name:
            return f"the plugin of the distribution {name} is {each.name!r}"
    return _suggestion(name, [each.name for each in installed], "check the spelling")


def _line_at_fault(error: BaseException) -> str:
    """Return `` at file:line`` of the last line that somebody could mend, if there is one.

    That is neither in the import machinery nor, if there is any other, in psnc or in Python's own
    library, which only say what is wrong.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    import traceback

    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith("<frozen")
        and frame.f_code.co_filename not in (__file__, importlib.__file__)
    ]
    to_mend = [(file, line) for file, line in frames if not _is_given(file)]
    return "".join(f" at {file}:{line}" for file, line in (to_mend or frames)[-1:])


def _is_given(file: str) -> bool:
    library = os.path.dirname(os.__file__) + os.sep
    is_library = file.startswith(library) and "-packages" not in file.removeprefix(library)
    return is_library or file.startswith(os.path.dirname(__file__) + os.sep)


# --- check ------------------------------------------------------------------------------------


def check_hooks(
    plugin: Any,
    origin: PluginOrigin,
    implementations: Iterable[tuple[str, Any, bool]],
    hooks: Mapping[str, tuple[str, ...]],
) -> None:
    """Refuse a plugin with a hook that psnc would not call, or not as the author means it.

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
    marked: set[str] = set()
    for hook, function, optional in implementations:
        marked |= {hook, getattr(function, "__name__", hook)}
        if hook not in hooks:
            if optional:
                continue
            raise PluginError(
                f"{origin.described}: there is no hook {hook!r} ({_place(function)}): "
                f"{_suggestion(hook, hooks, 'psnc hooks lists those there are')}"
            )
        _check_arguments(hook, function, hooks[hook], origin)
        _check_callable(hook, function, plugin, origin)
    _check_unmarked(plugin, origin, marked, hooks)


def _check_arguments(
    hook: str, function: Any, arguments: tuple[str, ...], origin: PluginOrigin
) -> None:
    from pluggy._hooks import varnames

    for name in varnames(function)[0]:
        if name not in arguments:
            takes = f"the hook has {', '.join(arguments) or 'no arguments'}"
            raise PluginError(
                f"{origin.described}: {hook} has no argument {name!r} ({_place(function)}): "
                f"{_suggestion(name, arguments, takes)}"
            )
    for parameter in inspect.signature(function).parameters.values():
        advice = "name the arguments that it needs, and no * before them"
        shown = str(parameter).partition(":")[0]
        if parameter.default is not parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in arguments:
                # Meant to be the function's own.
                continue
            advice = "name the arguments that it needs, and give them no default"
            shown = f"{parameter.name}={parameter.default!r}"
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            continue
        raise PluginError(
            f"{origin.described}: {hook} has {shown!r}, which is never filled "
            f"({_place(function)}): {advice}"
        )


def _check_callable(hook: str, function: Any, plugin: Any, origin: PluginOrigin) -> None:
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise PluginError(
            f"{origin.described}: {hook} is async ({_place(function)}): write it with a plain def"
        )
    _check_yield(hook, function, origin)
    if isinstance(plugin, type) and isinstance(
        inspect.getattr_static(plugin, function.__name__, None), FunctionType
    ):
        name = plugin.__qualname__
        raise PluginError(
            f"{origin.described}: {hook} needs an object of the class {name} "
            f"({_place(function)}): make one, as in plugin = {name}(), and name that"
        )


def _check_yield(hook: str, function: Any, origin: PluginOrigin) -> None:
    marks = getattr(function, "psnc_impl", {})
    is_wrapper = bool(marks.get("wrapper") or marks.get("hookwrapper"))
    if is_wrapper and not inspect.isgeneratorfunction(function):
        problem = "is a wrapper that does not yield"
        advice = "yield once, where the other plugins are to be called"
    elif inspect.isgeneratorfunction(function) and not is_wrapper:
        problem = "yields, so that its body would never run"
        advice = "return instead, or mark a wrapper with @psnc.hookimpl(wrapper=True)"
    else:
        return
    raise PluginError(f"{origin.described}: {hook} {problem} ({_place(function)}): {advice}")


def _check_unmarked(
    plugin: Any, origin: PluginOrigin, marked: set[str], hooks: Iterable[str]
) -> None:
    for name in hooks:
        function = _own_function(plugin, name)
        if function is not None and name not in marked:
            raise PluginError(
                f"{origin.described}: {name} is not marked as a hook ({_place(function)}): "
                "decorate it with @psnc.hookimpl"
            )


def _own_function(plugin: Any, name: str) -> FunctionType | None:
    """Return a function that a module defines rather than imports, or a plugin's class has."""
    if not isinstance(plugin, ModuleType):
        function = inspect.getattr_static(plugin, name, None)
        return function if isinstance(function, FunctionType) else None
    function = vars(plugin).get(name)
    own = isinstance(function, FunctionType) and function.__module__ == plugin.__name__
    return function if own else None


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
