"""Parameters as plain values, and back.

A plain value is what TOML, YAML and JSON have in common: text, numbers, true and false, lists and
tables, and ``None``. What they lack is a table with one key that starts with ``$``, named as in
:mod:`psnc.provenance`: ``{"$set": [1, 2]}``. Tuples are lists, and paths are text. A table that
has such a key of its own, or keys that are not text, is written ``{"$dict": [[key, value], …]}``.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Collection
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID

from attrs import frozen

from psnc.pipeline_files.faults import Faults, did_you_mean, item_place, one_line, shown
from psnc.stages import Stage, constructor_arguments

__all__ = ["NoPlainFormError", "PlainReader", "PlainWriter", "exact_text"]


class NoPlainFormError(Exception):
    """A value that no file can hold; says why, and what to do."""


# --- to plain values --------------------------------------------------------------------------


@frozen
class PlainWriter:
    """Turns values into plain ones.

    Attributes
    ----------
    stage_form : callable
        Gives the plain form of a stage that is another's parameter.
    classes : collection of type
        The classes of the parameter's annotation: text tells a member of an enumeration only
        where the annotation names the enumeration, and a path only where it names paths or text.
    """

    stage_form: Callable[[Stage], Any]
    classes: Collection[type] = ()

    def plain(self, value: Any) -> Any:
        """Return a value's plain form.

        Raises
        ------
        NoPlainFormError
            If it has none.
        """
        if isinstance(value, Enum):
            return self._member_name(value)
        if isinstance(value, Stage):
            return {"$stage": self.stage_form(value)}
        for form in (_plain_scalar, self._path, _plain_time, self._container):
            found = form(value)
            if found is not None or value is None:
                return found
        raise NoPlainFormError(_no_plain_form(value))

    def _member_name(self, member: Enum) -> Any:
        if type(member) not in self.classes or not member.name:
            raise NoPlainFormError(
                f"{member} cannot be told from text: annotate the parameter with "
                f"{type(member).__name__}"
            )
        return member.name

    def _path(self, value: Any) -> Any:
        if not isinstance(value, os.PathLike):
            return None
        text = os.fspath(value)
        if not isinstance(text, str):
            return None
        is_named = any(issubclass(kind, (str, os.PathLike)) for kind in self.classes)
        return text if is_named else {"$path": text}

    def _container(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return [self.plain(item) for item in value]
        if type(value) in (set, frozenset):
            return {"$set": sorted((self.plain(item) for item in value), key=_sort_key)}
        if type(value) in (dict, OrderedDict, MappingProxyType):
            if all(type(key) is str and not key.startswith("$") for key in value):
                return {key: self.plain(item) for key, item in value.items()}
            pairs = [[self.plain(key), self.plain(item)] for key, item in value.items()]
            return {"$dict": sorted(pairs, key=_sort_key)}
        if isinstance(value, (range, slice)):
            limits = [value.start, value.stop, value.step]
            return {f"${type(value).__name__}": [self.plain(limit) for limit in limits]}
        return None


@frozen
class _ExactWriter(PlainWriter):
    """Keeps apart what one annotation or another would take for the same."""

    def plain(self, value: Any) -> Any:
        try:
            return super().plain(value)
        except NoPlainFormError:
            # A default that a file leaves out: it is the same object, or it is another value.
            return {"$id": id(value)}

    def _member_name(self, member: Enum) -> Any:
        return {"$enum": [id(type(member)), member.name, repr(member.value)]}


def exact_text(value: Any) -> str:
    """Return a text that is the same for values with the same canonical form, in this process."""

    def stage_form(stage: Stage) -> Any:
        arguments = constructor_arguments(stage).items()
        return [id(type(stage)), {name: writer.plain(each) for name, each in arguments}]

    # Paths are text wherever they stand.
    writer = _ExactWriter(stage_form, (str,))
    return _sort_key(writer.plain(value))


def _plain_scalar(value: Any) -> Any:
    # Numbers and texts of NumPy are these too.
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, complex):
        return {"$complex": [value.real, value.imag]}
    if isinstance(value, (Decimal, Fraction)):
        return {f"${type(value).__name__.lower()}": str(value)}
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, UUID):
        return {"$uuid": value.hex}
    if isinstance(value, re.Pattern):
        return {"$pattern": [_plain_scalar(value.pattern), value.flags]}
    return _plain_numpy_scalar(value)


def _plain_numpy_scalar(value: Any) -> Any:
    if type(value).__module__ != "numpy" or not hasattr(value, "item") or value.shape != ():
        return None
    plain = value.item()
    # Times of NumPy have a unit, and its widest floats no counterpart.
    return plain if type(plain) in (bool, int, float) and value.dtype.kind in "biuf" else None


def _plain_time(value: Any) -> Any:
    for kind in (datetime, date, time):
        if type(value) is kind:
            return {f"${kind.__name__}": value.isoformat()}
    if type(value) is timedelta:
        return {"$timedelta": [value.days, value.seconds, value.microseconds]}
    return None


def _no_plain_form(value: Any) -> str:
    if callable(value):
        name = getattr(value, "__qualname__", None) or type(value).__qualname__
        return (
            f"{name} is a function or class, and a file names none but stages: make what it does "
            "a stage, or build this pipeline in Python"
        )
    return (
        f"a value of type {type(value).__qualname__!r} has no plain form: keep it in a file of its "
        "own and give the stage the path, or build this pipeline in Python"
    )


def _sort_key(plain: Any) -> str:
    return json.dumps(plain, sort_keys=True)


# --- from plain values ------------------------------------------------------------------------


@frozen
class PlainReader:
    """Turns plain values into what they stand for, and notes what stands for nothing.

    Attributes
    ----------
    make_stage : callable
        Makes a stage of what ``{"$stage": …}`` holds, given that and its place.
    faults : Faults
        What is wrong is added here.
    """

    make_stage: Callable[[Any, str], Any]
    faults: Faults

    def value(self, plain: Any, place: str) -> Any:
        """Return what a plain value stands for."""
        if isinstance(plain, list):
            return [self.value(item, item_place(place, n)) for n, item in enumerate(plain)]
        if not isinstance(plain, dict):
            return plain
        forms = [key for key in plain if isinstance(key, str) and key.startswith("$")]
        if forms:
            return self._special(plain, forms[0], place)
        return {key: self.value(item, item_place(place, key)) for key, item in plain.items()}

    def _special(self, plain: dict[Any, Any], form: str, place: str) -> Any:
        inside = item_place(place, form)
        if len(plain) > 1:
            others = ", ".join(repr(key) for key in plain if key != form)
            self.faults.add(inside, f"stands alone in its table: take out {others}")
            return None
        content = plain[form]
        if form == "$stage":
            return self.make_stage(content, inside)
        if form == "$env":
            self.faults.add(inside, "only a secret parameter comes from the environment")
            return None
        if form not in _FORMS:
            known = [*_FORMS, "$stage", "$env"]
            hint = did_you_mean(form, known, f"there are {', '.join(known)}")
            advice = f'{hint} A key of your own goes in {{"$dict": [["{form}", …]]}}'
            self.faults.add(place, f"{form!r} is no special form: {advice}")
            return None
        before = len(self.faults)
        content = self.value(content, inside)
        if len(self.faults) > before:
            return None
        try:
            return _FORMS[form](content)
        except (ValueError, TypeError, ArithmeticError, re.error) as error:
            self.faults.add(inside, f"{shown(content)} cannot be read: {one_line(error)}")
            return None


def _of(kind: type, make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Read a form whose content is of one type."""

    def read(content: Any) -> Any:
        if type(content) is not kind:
            raise TypeError(f"write it as {_KIND_NAMES[kind]}")
        return make(content)

    return read


_KIND_NAMES = {str: "text", list: "a list", bool: "true"}


def _none(content: bool) -> None:
    if not content:
        raise ValueError("write true, or leave the parameter out")


def _complex(parts: list[Any]) -> complex:
    real, imaginary = parts
    return complex(_number(real), _number(imaginary))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError("write two numbers")
    return value


def _timedelta(parts: list[Any]) -> timedelta:
    if len(parts) != 3 or any(type(part) is not int for part in parts):
        raise TypeError("write three integers: days, seconds, microseconds")
    return timedelta(*parts)


def _pattern(parts: list[Any]) -> re.Pattern[Any]:
    pattern, flags = parts
    return re.compile(pattern, flags)


def _range(limits: list[Any]) -> range:
    if len(limits) != 3:
        raise ValueError("write three integers: start, stop, step")
    return range(*limits)


def _slice(limits: list[Any]) -> slice:
    start, stop, step = limits
    return slice(start, stop, step)


def _set(items: list[Any]) -> set[Any]:
    return {_hashable(item) for item in items}


def _dict(pairs: list[Any]) -> dict[Any, Any]:
    table: dict[Any, Any] = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise TypeError("write a list of lists, each of a key and its value")
        key = _hashable(pair[0])
        if key in table:
            raise ValueError(f"the key {key!r} is there twice")
        table[key] = pair[1]
    return table


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, set):
        return frozenset(value)
    if isinstance(value, dict):
        raise TypeError("a table can be neither in a set nor a key")
    return value


_FORMS: dict[str, Callable[[Any], Any]] = {
    "$none": _of(bool, _none),
    "$float": _of(str, float),
    "$complex": _of(list, _complex),
    "$decimal": _of(str, Decimal),
    "$fraction": _of(str, Fraction),
    "$bytes": _of(str, lambda text: base64.b64decode(text, validate=True)),
    "$uuid": _of(str, UUID),
    "$path": _of(str, Path),
    "$pattern": _of(list, _pattern),
    "$datetime": _of(str, datetime.fromisoformat),
    "$date": _of(str, date.fromisoformat),
    "$time": _of(str, time.fromisoformat),
    "$timedelta": _of(list, _timedelta),
    "$range": _of(list, _range),
    "$slice": _of(list, _slice),
    "$set": _of(list, _set),
    "$dict": _of(list, _dict),
}
