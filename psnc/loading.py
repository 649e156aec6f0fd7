"""Find the pipeline that ``module:name`` or ``path/to/file.py:name`` refers to."""

from __future__ import annotations

import builtins
import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from psnc import errors
from psnc.errors import PipelineError, PsncError
from psnc.pipeline import Pipeline
from psnc.pipeline_files.plain_text import SUFFIXES
from psnc.provenance import module_of_file

__all__ = ["load_exceptions", "load_module", "load_pipeline"]

_ADVICE = "check the spelling, or give the path of a .py file"


def load_pipeline(target: str) -> Pipeline[Any]:
    """Import a module or file and return its pipeline, calling a factory for it if need be.

    Parameters
    ----------
    target : str
        ``"package.module:name"`` or ``"path/to/file.py:name"``, where ``name`` is a pipeline or a
        function that takes no arguments and returns one; or a file that ``Pipeline.save`` wrote,
        or somebody in its way.

    Raises
    ------
    PipelineError
        If there is no such module, file or name, or if it is no pipeline.
    """
    if target.lower().endswith(SUFFIXES):
        return Pipeline.load(target)
    place, separator, name = target.rpartition(":")
    if not separator or not place or not name:
        raise PipelineError(
            f"{target!r} names no pipeline: write module:name, path/to/file.py:name, or the path "
            "of a .toml, .yaml or .json file"
        )
    return _as_pipeline(_attribute(load_module(place), name, target), target)


def load_exceptions(names: Iterable[str]) -> tuple[type[BaseException], ...]:
    """Return classes of exceptions by name.

    Parameters
    ----------
    names : iterable of str
        Each one of Python's own (``"OSError"``), one of psnc's (``"WorkerDiedError"``), or any as
        ``"package.module:Class"``.

    Raises
    ------
    PipelineError
        If there is no such class, or if it is no class of exceptions.
    """
    return tuple(_load_exception(name) for name in names)


def _load_exception(name: str) -> type[BaseException]:
    place, separator, attribute = name.rpartition(":")
    found: Any
    if separator:
        found = getattr(load_module(place), attribute, None)
    else:
        found = getattr(builtins, name, None) or getattr(errors, name, None)
    is_class = isinstance(found, type) and issubclass(found, BaseException)
    if not is_class or issubclass(found, errors.INTERRUPTS):
        raise PipelineError(
            f"{name!r} is no class of exceptions: write OSError or another of Python's own, or "
            "module:Class"
        )
    error_class: type[BaseException] = found
    return error_class


def load_module(place: str, advice: str = _ADVICE) -> ModuleType:
    """Import a module by its dotted name, or a file by its path.

    Parameters
    ----------
    place : str
        The name or the path.
    advice : str
        What to do if there is no such module.

    Raises
    ------
    PipelineError
        If there is no such module or file, or importing it fails.
    """
    is_file = place.endswith(".py") or os.sep in place
    return _load_file(Path(place)) if is_file else _load_module(place, advice)


def _load_module(name: str, advice: str) -> ModuleType:
    # A console script's sys.path lacks the working directory, where `python -m` would look.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise PipelineError(
                f"no module named {error.name!r} here or among the installed packages: {advice}"
            ) from error
        raise _import_error(name, error) from error
    except (Exception, SystemExit) as error:
        raise _import_error(name, error) from error


def _load_file(path: Path) -> ModuleType:
    path = path.absolute()
    if not path.is_file():
        raise PipelineError(f"no file {path}: check the path")
    if (path.parent / "__init__.py").exists():
        return _load_package_member(path)
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None:
        if getattr(loaded, "__file__", None) == str(path):
            return loaded
        raise PipelineError(
            f"{path} has the name of a module that is loaded already ({name!r}): rename the file"
        )
    # First on the path, so that workers, which import by name, find this file too.
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PipelineError(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _import_error(str(path), error) from error
    return module


def _load_package_member(path: Path) -> ModuleType:
    """Import a file of a package by its dotted name, so that its relative imports work."""
    name, root = module_of_file(path)
    sys.path.insert(0, str(root))
    return _load_module(name, _ADVICE)


def _import_error(what: str, error: Exception | SystemExit) -> PsncError:
    if isinstance(error, PsncError):
        return error
    if isinstance(error, SystemExit):
        return PipelineError(
            f"importing {what} called exit({error.code}): put what it runs under "
            "if __name__ == '__main__':"
        )
    return _raised(f"importing {what}", error)


def _raised(doing: str, error: BaseException) -> PipelineError:
    reason = " ".join(str(error).split())
    return PipelineError(f"{doing} raised {type(error).__name__}: {reason} (--debug shows where)")


def _attribute(module: ModuleType, name: str, target: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        pass
    pipelines = [key for key, value in vars(module).items() if isinstance(value, Pipeline)]
    close = difflib.get_close_matches(name, vars(module), n=1)
    hint = f"did you mean {close[0]!r}?" if close else "check the spelling"
    if pipelines:
        hint = f"its pipelines are {', '.join(pipelines)}"
    raise PipelineError(f"{target}: {module.__name__!r} has no {name!r}: {hint}")


def _as_pipeline(found: Any, target: str) -> Pipeline[Any]:
    if callable(found) and not isinstance(found, type):
        found = _call_factory(found, target)
    if isinstance(found, Pipeline):
        return found
    is_class = isinstance(found, type)
    kind = f"the class {found.__name__}" if is_class else f"of type {type(found).__name__}"
    raise PipelineError(
        f"{target} is no pipeline but {kind}: name a psnc.Pipeline, or a function that takes no "
        "arguments and returns one"
    )


def _call_factory(factory: Any, target: str) -> Any:
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise PipelineError(
            f"{target} cannot be called without arguments ({error}): a factory takes none"
        ) from error
    try:
        return factory()
    except PsncError:
        raise
    except (Exception, SystemExit) as error:
        raise _raised(f"calling {target}", error) from error
