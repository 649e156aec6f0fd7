"""Classes inside functions: what they have of the function besides their text.

One ``class`` statement inside a function makes a class each time the function is called, and all
of them have one name. Where they differ in nothing, as in most tests, the name is enough.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from enum import Enum
from functools import cached_property, partialmethod
from typing import Any

__all__ = ["captured_variables", "is_local", "plain_attributes"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None))

# Attributes that say nothing of what a stage does.
_FOR_LISTINGS = ("name", "description")


def is_local(cls: type) -> bool:
    """Tell whether a class was made inside a function."""
    return "<locals>" in cls.__qualname__


def captured_variables(cls: type) -> list[str]:
    """Return the names of the variables of a surrounding function that a class's methods use."""
    found: set[str] = set()
    for base in _local_bases(cls):
        for value in vars(base).values():
            for function in _functions_in(value):
                found.update(_captured_by(function, base))
    return sorted(found)


def plain_attributes(cls: type) -> dict[str, Any]:
    """Return the plain values among the attributes and defaults of a class inside a function.

    They may come from the function, as ``factor = n`` does, and nothing tells it from
    ``factor = 2``.
    """
    found: dict[str, Any] = {}
    for base in reversed(_local_bases(cls)):
        for name, value in vars(base).items():
            if name.startswith("__") and not inspect.isfunction(value):
                continue
            if name not in _FOR_LISTINGS and _is_plain(value):
                found[name] = value
            if name != "__init__":  # whose defaults are among the arguments
                for function in _functions_in(value):
                    found.update(_plain_defaults(name, function))
    return found


def _local_bases(cls: type) -> list[type]:
    return [base for base in cls.__mro__ if is_local(base)]


def _functions_in(value: Any) -> Iterator[types.FunctionType]:
    """Yield the functions behind an attribute of a class, without what decorates them."""
    if isinstance(value, property):
        found = [value.fget, value.fset, value.fdel]
    elif isinstance(value, (staticmethod, classmethod)):
        found = [value.__func__]
    elif isinstance(value, (cached_property, partialmethod)):
        found = [value.func]
    else:
        found = [value]
    for each in found:
        function = inspect.unwrap(each) if callable(each) else each
        if isinstance(function, types.FunctionType):
            yield function


def _captured_by(function: types.FunctionType, cls: type) -> Iterator[str]:
    if function.__code__.co_qualname.startswith("__create_fn__."):  # made by dataclasses
        return
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        # Python has some of its own: __class__, for super(). And so has attrs.
        if name.startswith("__") or function.__module__ != cls.__module__:
            continue
        try:
            content = cell.cell_contents
        except ValueError:  # nothing yet
            content = None
        if isinstance(content, types.FunctionType) and _is_method_of(content, cls):
            yield from _captured_by(content, cls)  # which a decorator has wrapped
        elif not (isinstance(content, type) and _is_same_class(content, cls)):
            yield name


def _is_method_of(function: types.FunctionType, cls: type) -> bool:
    return function.__code__.co_qualname.startswith(f"{cls.__qualname__}.")


def _is_same_class(content: type, cls: type) -> bool:
    """Tell whether it is that class, a base, or what a decorator has made another class of."""
    names = {(base.__module__, base.__qualname__) for base in _local_bases(cls)}
    return (content.__module__, content.__qualname__) in names


def _plain_defaults(name: str, function: types.FunctionType) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {
        f"{name}.{each.name}": each.default
        for each in parameters
        if each.default is not each.empty and _is_plain(each.default)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (*_PLAIN, Enum))
