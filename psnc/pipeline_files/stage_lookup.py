"""From the name of a stage in a file to its class, and from a class to such a name.

A name is one that a plugin registered, or ``module:Class``. Finding it imports the module and
calls nothing.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, Literal

from psnc.errors import ConfigurationError, PipelineError
from psnc.loading import load_module
from psnc.manager import plugin_manager
from psnc.pipeline_files.faults import did_you_mean, one_line
from psnc.stages import Filter, Sink, Source, Stage

__all__ = ["KINDS", "class_reference", "find_stage"]

Kind = Literal["source", "filter", "sink"]

KINDS: dict[Kind, type[Stage]] = {"source": Source, "filter": Filter, "sink": Sink}


def find_stage(name: str, base: type[Stage]) -> type[Stage]:
    """Return the class that a name stands for.

    Parameters
    ----------
    name : str
        As registered by a plugin, or ``"module:Class"``.
    base : type
        ``Source``, ``Filter`` or ``Sink``; ``Stage`` for any of them.

    Raises
    ------
    PsncError
        If there is no such class, or if it is of another kind or abstract.
    """
    found = _from_module(name) if ":" in name else _registered(name, base)
    if not isinstance(found, type):
        raise PipelineError(f"{name!r} is of type {type(found).__name__}, and no class of stages")
    if not issubclass(found, Stage):
        raise PipelineError(f"{name!r} is no class of stages: derive it from psnc.{_title(base)}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise PipelineError(f"{name!r} cannot be constructed: it has no {missing}")
    if not issubclass(found, base):
        raise PipelineError(f"{name!r} is a {_kind_of(found)}, where a {_word(base)} belongs")
    return found


def class_reference(cls: type[Stage]) -> str:
    """Return the ``module:Class`` by which another process finds a class.

    Raises
    ------
    ConfigurationError
        If there is no such name: a class of the script that runs, or inside a function.
    """
    module, path = cls.__module__, cls.__qualname__
    if module in ("__main__", "__mp_main__"):
        raise ConfigurationError(
            f"{path} is defined in the script or session that runs: move it to a module, so that "
            "others can import it"
        )
    if "<" in path:
        raise ConfigurationError(f"{path} is defined inside a function: define it at module level")
    found = _attribute(sys.modules.get(module), path)
    if found is not cls and found is getattr(cls, "function", None):
        raise ConfigurationError(
            f"{module}:{path} is the function there, and no stage: write a function of your own "
            "that calls it, with the decorator above it"
        )
    if found is not cls:
        raise ConfigurationError(
            f"{module}:{path} is not this class there: give it the name that its module knows it by"
        )
    return f"{module}:{path}"


def _from_module(reference: str) -> Any:
    module_name, _, path = reference.partition(":")
    if not module_name or not path:
        raise PipelineError(f"{reference!r} is no stage: write module:Class")
    if module_name.endswith(".py") or "/" in module_name:
        raise PipelineError(
            f"{reference!r}: a file names modules, not paths: write module:Class, for a module in "
            "the working directory or an installed one"
        )
    module = load_module(module_name, advice="check the spelling, and the working directory")
    try:
        found = _attribute(module, path)
    except Exception as error:
        # A module may import what it offers only when it is asked for it.
        reason = one_line(f"{type(error).__name__}: {error}")
        raise PipelineError(f"{reference!r} cannot be imported ({reason})") from error
    if found is None:
        place = getattr(module, "__file__", None) or "built in"
        stages = [name for name, value in vars(module).items() if _is_stage(value)]
        hint = did_you_mean(path, stages, f"its stages are {', '.join(stages) or 'none'}")
        raise PipelineError(f"module {module_name!r} ({place}) has no {path!r}: {hint}")
    return found


def _attribute(module: Any, path: str) -> Any:
    found = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _registered(name: str, base: type[Stage]) -> Any:
    manager = plugin_manager()
    kinds = [kind for kind, cls in KINDS.items() if issubclass(cls, base)]
    known: list[str] = []
    for kind in kinds:
        offers = manager.offers(kind)
        if name in offers:
            return offers[name].load()
        known += offers
    for kind in KINDS:
        if kind not in kinds and name in manager.offers(kind):
            raise PipelineError(f"{name!r} is a {kind}, where a {_word(base)} belongs")
    listing = f"plugins offer {', '.join(sorted(known)) or 'none'}"
    hint = did_you_mean(name, known, "or write module:Class")
    raise PipelineError(f"no {_word(base)} has the name {name!r}: {listing}; {hint}")


def _is_stage(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Stage) and not inspect.isabstract(value)


def _kind_of(cls: type[Stage]) -> str:
    return next((kind for kind, base in KINDS.items() if issubclass(cls, base)), "stage")


def _title(base: type[Stage]) -> str:
    return "Source, Filter or Sink" if base is Stage else base.__name__


def _word(base: type[Stage]) -> str:
    return next((kind for kind, cls in KINDS.items() if cls is base), "stage")
