"""Whether two values that should be alike are, and where they are not."""

from __future__ import annotations

import dataclasses
import reprlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

__all__ = ["difference"]


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """Say where two values differ; ``None`` if they are equal.

    Arrays and tensors are compared by type, shape and content, objects without an equality of
    their own by their attributes. NaN equals NaN. What has neither, such as an iterator, is taken
    for the same as any other of its type.

    Parameters
    ----------
    one, other : Any
        The values.
    where : str
        What they are, to begin the answer with.
    """
    return _compare(one, other, where, set())


def _compare(one: Any, other: Any, where: str, under_way: set[tuple[int, int]]) -> str | None:
    pair = (id(one), id(other))
    if one is other or pair in under_way:
        return None
    if type(one) is not type(other):
        return _told(where, one, other)
    content, other_content = _array_content(one), _array_content(other)
    if content is not None:
        same = content == other_content
        return None if same else f"{where}: arrays of other type, shape or content"
    parts, other_parts = _parts(one), _parts(other)
    if parts is None or other_parts is None:
        return None if _equal(one, other) else _told(where, one, other)
    if parts.keys() != other_parts.keys():
        return _told(where, one, other)
    under_way.add(pair)
    answers = (
        _compare(parts[name], other_parts[name], f"{where}{name}", under_way) for name in parts
    )
    return next(filter(None, answers), None)


def _told(where: str, one: Any, other: Any) -> str:
    return f"{where}: {reprlib.repr(one)} and then {reprlib.repr(other)}"


def _array_content(value: Any) -> list[Any] | None:
    """Look only at libraries that are imported: no other array can be one of theirs."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        content = value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
        return [value.dtype, value.shape, content]
    if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
        return None
    if value.dtype.hasobject:
        return None
    return [value.dtype, value.shape, value.tobytes()]


def _parts(value: Any) -> dict[str, Any] | None:
    """Take a value apart, by how one would write each part; ``None`` for what is one whole."""
    if isinstance(value, Mapping):
        return {f"[{key!r}]": value[key] for key in value}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return {f"[{number}]": part for number, part in enumerate(value)}
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        # An array of objects, whose bytes are addresses.
        return {".shape": value.shape, ".flat": value.ravel().tolist()}
    names = _field_names(value)
    if names is not None:
        return {f".{name}": getattr(value, name) for name in names}
    if "__eq__" not in _methods(value):
        return {f".{name}": part for name, part in _attributes(value).items()}
    return None


def _methods(value: Any) -> set[str]:
    """Name what the classes of a value define, other than what every object has."""
    return {name for cls in type(value).__mro__[:-1] for name in vars(cls)}


def _field_names(value: Any) -> list[str] | None:
    if attrs.has(type(value)):
        return [field.name for field in attrs.fields(type(value)) if field.eq]
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value) if field.compare]
    return None


def _attributes(value: Any) -> dict[str, Any]:
    slots = (name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()))
    state = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return state | getattr(value, "__dict__", {})


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (float, complex)) and one != one:
        return bool(other != other)
    equals = getattr(one, "equals", None)
    # Tables and labelled arrays have it, whose == answers element by element.
    return bool(equals(other)) if callable(equals) else bool(one == other)
