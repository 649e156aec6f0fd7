"""Classes inside functions: what they have of the function besides their text.

One ``class`` statement inside a function makes a class each time the function is called, and all
of them have one name. Where they differ in nothing, as in most tests, the name is enough.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import cached_property, partialmethod
from pathlib import PurePath
from typing import Any
from uuid import UUID

__all__ = ["captured_variables", "is_local", "never_changes", "plain_attributes"]

_UNCHANGING = (
    int,
    float,
    complex,
    str,
    bytes,
    Enum,
    PurePath,
    Decimal,
    Fraction,
    date,
    time,
    timedelta,
    UUID,
    re.Pattern,
    range,
)

# In place of a variable that has no value.
_NOTHING_YET = object()

# Attributes that say nothing of what a stage does.
_FOR_LISTINGS = ("name", "description")


def is_local(thing: type | types.FunctionType) -> bool:
    """Tell whether a class or function was made inside a function."""
    return "<locals>" in thing.__qualname__


def captured_variables(thing: type | types.FunctionType) -> dict[str, Any]:
    """Return the variables of surrounding functions that a class's methods or a function use."""
    found: dict[str, Any] = {}
    for function, owner in _functions_of(thing):
        for name, value in _captured_by(function, owner):
            if name in found and found[name] is not value:
                name = f"{function.__qualname__}.{name}"
            found[name] = value
    return found


def never_changes(value: Any) -> bool:
    """Tell whether a variable's value is the same for good: plain, and no container to fill."""
    if isinstance(value, (tuple, frozenset)):
        return all(never_changes(item) for item in value)
    return value is None or isinstance(value, _UNCHANGING)


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
            if name not in _FOR_LISTINGS and never_changes(value):
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


def _functions_of(
    thing: type | types.FunctionType,
) -> Iterator[tuple[types.FunctionType, type | types.FunctionType]]:
    if isinstance(thing, types.FunctionType):
        yield thing, thing
        return
    for base in _local_bases(thing):
        for value in vars(base).values():
            for function in _functions_in(value):
                yield function, base


def _captured_by(
    function: types.FunctionType, owner: type | types.FunctionType
) -> Iterator[tuple[str, Any]]:
    if function.__code__.co_qualname.startswith("__create_fn__."):  # made by dataclasses
        return
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        # Python has some of its own: __class__, for super(). And so has attrs.
        if name.startswith("__") or function.__module__ != owner.__module__:
            continue
        try:
            content = cell.cell_contents
        except ValueError:
            content = _NOTHING_YET
        if isinstance(content, types.FunctionType) and _is_method_of(content, owner):
            yield from _captured_by(content, owner)  # which a decorator has wrapped
        elif content is not owner and not _is_same_class(content, owner):
            yield name, content


def _is_method_of(function: types.FunctionType, owner: Any) -> bool:
    return function.__code__.co_qualname.startswith(f"{owner.__qualname__}.")


def _is_same_class(content: Any, owner: Any) -> bool:
    """Tell whether it is that class, a base, or what a decorator has made another class of."""
    if not isinstance(content, type) or not isinstance(owner, type):
        return False
    names = {(base.__module__, base.__qualname__) for base in _local_bases(owner)}
    return (content.__module__, content.__qualname__) in names


def _plain_defaults(name: str, function: types.FunctionType) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {
        f"{name}.{each.name}": each.default
        for each in parameters
        if each.default is not each.empty and never_changes(each.default)
    }
