"""Fit a plain value to a parameter's annotation: judge it, and make what plain text lacks.

Only what is plainly wrong is refused. An annotation that says nothing of plain values (a protocol,
a class of somebody's own, a name that only type checkers import) lets everything pass.
"""

from __future__ import annotations

import collections.abc
import difflib
import os
import re
import types
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag
from fractions import Fraction
from functools import reduce
from operator import or_
from pathlib import Path, PurePath, PurePosixPath
from typing import (
    Annotated,
    Any,
    Literal,
    NewType,
    Union,
    get_args,
    get_origin,
    is_typeddict,
)
from uuid import UUID

from psnc.pipeline_files.faults import Faults, item_place, shown
from psnc.stages import Stage

__all__ = ["annotation_name", "classes_in", "fitted"]

# What a value may be; bool is an int only to Python.
_SCALARS: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (float, int),
    complex: (complex, float, int),
    str: (str,),
    bytes: (bytes,),
    timedelta: (timedelta,),
}

_FROM_TEXT: dict[Any, Callable[[str], Any]] = {
    Path: Path,
    PurePath: PurePath,
    PurePosixPath: PurePosixPath,
    os.PathLike: Path,
    datetime: datetime.fromisoformat,
    date: date.fromisoformat,
    time: time.fromisoformat,
    Decimal: Decimal,
    Fraction: Fraction,
    UUID: UUID,
    re.Pattern: re.compile,
}

_TRUTHS = {"0", "1", "f", "false", "n", "no", "off", "on", "t", "true", "y", "yes"}

_LISTS = (
    list,
    collections.abc.Sequence,
    collections.abc.MutableSequence,
    collections.abc.Collection,
    collections.abc.Iterable,
    collections.abc.Container,
    collections.abc.Reversible,
)
_SETS = (set, frozenset, collections.abc.Set, collections.abc.MutableSet)
_TABLES = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def fitted(value: Any, annotation: Any, place: str, faults: Faults) -> Any:
    """Return a value as its annotation asks for it, and note where it does not fit.

    Parameters
    ----------
    value : Any
        As a file gives it.
    annotation : Any
        What the parameter is annotated with.
    place : str
        Where the value stands.
    faults : Faults
        What does not fit is added here; the value then is returned as it is.
    """
    annotation = _bare(annotation)
    kind = get_origin(annotation) or annotation
    if kind is None or kind is type(None):
        return value if value is None else _refuse(value, "None", place, faults)
    if kind in (Union, types.UnionType):
        return _fitted_to_union(value, annotation, place, faults)
    if kind is Literal:
        return _fitted_to_literal(value, annotation, place, faults)
    if is_typeddict(kind):
        kind, annotation = dict, dict
    if not isinstance(kind, type):
        return value
    for judges, fit in _JUDGES:
        if judges(kind):
            return fit(value, annotation, place, faults)
    return value


def classes_in(annotation: Any) -> Iterator[type]:
    """Yield the classes that an annotation is made of."""
    annotation = _bare(annotation)
    kind = get_origin(annotation) or annotation
    if isinstance(kind, type):
        yield kind
    for argument in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield type(argument)
        else:
            yield from classes_in(argument)


def annotation_name(annotation: Any) -> str:
    """Return an annotation as an author would write it.

    Examples
    --------
    >>> annotation_name(dict[str, Path | None])
    'dict[str, Path | None]'
    """
    annotation = _bare(annotation)
    kind = get_origin(annotation)
    if annotation in (None, type(None)):
        return "None"
    if annotation is Ellipsis:
        return "..."
    if kind in (Union, types.UnionType):
        return " | ".join(map(annotation_name, get_args(annotation)))
    name = getattr(kind or annotation, "__name__", None) or str(annotation).removeprefix("typing.")
    if kind is Literal:
        return f"{name}[{', '.join(map(repr, get_args(annotation)))}]"
    arguments = ", ".join(map(annotation_name, get_args(annotation)))
    return f"{name}[{arguments}]" if arguments else name


def _bare(annotation: Any) -> Any:
    """Take off what says nothing about the value."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif isinstance(annotation, NewType):
            annotation = annotation.__supertype__
        elif type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        else:
            return annotation


def _refuse(value: Any, wanted: str, place: str, faults: Faults, advice: str = "") -> Any:
    hint = f": {advice}" if advice else ""
    faults.add(place, f"must be {wanted}, not {shown(value)}{hint}")
    return value


# --- one value --------------------------------------------------------------------------------


def _fit_scalar(value: Any, annotation: Any, place: str, faults: Faults) -> Any:
    is_bool = isinstance(value, bool)
    if isinstance(value, _SCALARS[annotation]) and is_bool == (annotation is bool):
        return value
    return _refuse(value, annotation.__name__, place, faults, _advice(value, annotation))


def _advice(value: Any, wanted: type) -> str:
    if wanted is str and isinstance(value, (bool, int, float, date, time)):
        return "put text in quotes"
    if wanted in (int, float) and isinstance(value, str):
        number = _number(value, wanted)
        return f"write {number} without quotes" if number else ""
    if wanted is int and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if wanted is bool and str(value).lower() in _TRUTHS:
        return "write true or false"
    if wanted is timedelta:
        return 'write {"$timedelta": [days, seconds, microseconds]}'
    return ""


def _number(text: str, wanted: type) -> str:
    try:
        number = str(wanted(text))
    except ValueError:
        return ""
    # With a point, without which YAML takes a number with an exponent for text.
    return re.sub(r"^(-?\d+)e", r"\1.0e", number)


def _fit_from_text(value: Any, annotation: Any, place: str, faults: Faults) -> Any:
    kind = get_origin(annotation) or annotation
    if isinstance(value, kind):
        return value
    if not isinstance(value, str):
        return _refuse(value, f"{kind.__name__} as text", place, faults)
    try:
        return _FROM_TEXT[kind](value)
    except (ValueError, ArithmeticError, re.error) as error:
        return _refuse(value, kind.__name__, place, faults, f"{error or type(error).__name__}")


def _fit_enum(value: Any, annotation: Any, place: str, faults: Faults) -> Any:
    if isinstance(value, annotation):
        return value
    member = _member(value, annotation)
    if member is not None:
        return member
    names = list(annotation.__members__)
    close = difflib.get_close_matches(str(value), names, n=1)
    advice = f"did you mean {close[0]!r}?" if close else "give a member by its name"
    return _refuse(value, f"one of {', '.join(names)}", place, faults, advice)


def _member(name: Any, enum: type[Enum]) -> Enum | None:
    if not isinstance(name, str):
        return None
    if name in enum.__members__:
        return enum.__members__[name]
    parts = name.split("|")
    if issubclass(enum, Flag) and all(part in enum.__members__ for part in parts):
        return reduce(or_, (enum.__members__[part] for part in parts))
    return None


def _fit_stage(value: Any, annotation: Any, place: str, faults: Faults) -> Any:
    kind = get_origin(annotation) or annotation
    if isinstance(value, kind):
        return value
    advice = 'write {"$stage": {"stage": …, "params": …}}'
    return _refuse(value, f"a stage ({kind.__name__})", place, faults, advice)


def _fit_callable(value: Any, annotation: Any, place: str, faults: Faults) -> Any:
    if isinstance(value, Stage):
        return value
    wanted = "a class" if get_origin(annotation) is type or annotation is type else "a function"
    advice = "no file can give one, so build this pipeline in Python"
    return _refuse(value, wanted, place, faults, advice)


def _fitted_to_literal(value: Any, annotation: Any, place: str, faults: Faults) -> Any:
    options = get_args(annotation)
    for option in options:
        if type(option) is type(value) and option == value:
            return value
        if isinstance(option, Enum) and option.name == value:
            return option
    wanted = f"one of {', '.join(_option_texts(options))}"
    return _refuse(value, wanted, place, faults, _closest_option(value, options))


def _option_texts(options: Iterable[Any]) -> list[str]:
    return [option.name if isinstance(option, Enum) else repr(option) for option in options]


def _closest_option(value: Any, options: Iterable[Any]) -> str:
    close = difflib.get_close_matches(repr(value), _option_texts(options), n=1)
    return f"did you mean {close[0]}?" if close else ""


def _fitted_to_union(value: Any, annotation: Any, place: str, faults: Faults) -> Any:
    """Take the member that the value fits as it is, or else the first that it can be made to fit.

    Text that names a member of an enumeration means that member.
    """
    made: list[Any] = []
    inside: list[Faults] = []
    members = [member for member in get_args(annotation) if member is not type(None)]
    if value is None and len(members) < len(get_args(annotation)):
        return value
    for member in sorted(members, key=lambda each: not _is_enum(_bare(each))):
        trial = Faults()
        result = fitted(value, member, place, trial)
        if not trial and (result is value or _is_enum(_bare(member))):
            return result
        if not trial:
            made.append(result)
        elif len(members) == 1 or any(each != place for each in trial.places):
            inside.append(trial)
    if made:
        return made[0]
    if len(inside) == 1:
        # The right kind of thing for one member only: what is wrong with it says more.
        faults.extend(inside[0])
        return value
    advice = next(filter(None, (_union_advice(value, member) for member in members)), "")
    return _refuse(value, annotation_name(annotation), place, faults, advice)


def _union_advice(value: Any, member: Any) -> str:
    if get_origin(member) is Literal:
        return _closest_option(value, get_args(member))
    return _advice(value, member) if member in _SCALARS else ""


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


# --- many values ------------------------------------------------------------------------------


def _fit_list(value: Any, annotation: Any, place: str, faults: Faults) -> Any:
    kind = get_origin(annotation) or annotation
    wanted = annotation_name(annotation)
    if not isinstance(value, kind):
        return _refuse(value, wanted, place, faults, "write a list")
    item_kind = next(iter(get_args(annotation)), Any)
    if isinstance(value, str):
        # Text is a sequence of texts, and of nothing else.
        trial = Faults()
        fitted(value, item_kind, place, trial)
        return _refuse(value, wanted, place, faults, "write a list") if trial else value
    if not isinstance(value, (list, tuple, set, frozenset)):
        return value
    return _same_or_new(value, _fitted_items(value, item_kind, place, faults), type(value))


def _fit_tuple(value: Any, annotation: Any, place: str, faults: Faults) -> Any:
    if not isinstance(value, (list, tuple)):
        return _refuse(value, annotation_name(annotation), place, faults, "write a list")
    kinds = get_args(annotation)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_fitted_items(value, kinds[0], place, faults))
    if annotation is tuple or get_origin(annotation) is None:
        return tuple(value)
    if len(kinds) != len(value):
        advice = f"write {len(kinds)} values"
        return _refuse(value, annotation_name(annotation), place, faults, advice)
    return tuple(
        fitted(item, kind, item_place(place, position), faults)
        for position, (item, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _fit_set(value: Any, annotation: Any, place: str, faults: Faults) -> Any:
    if not isinstance(value, (list, set, frozenset)):
        return _refuse(value, annotation_name(annotation), place, faults, "write a list")
    before = len(faults)
    items = _fitted_items(value, next(iter(get_args(annotation)), Any), place, faults)
    if len(faults) > before:
        return value
    kind = frozenset if (get_origin(annotation) or annotation) is frozenset else set
    try:
        return _same_or_new(value, items, kind)
    except TypeError:
        return _refuse(
            value, annotation_name(annotation), place, faults, "no lists or tables in a set"
        )


def _fit_table(value: Any, annotation: Any, place: str, faults: Faults) -> Any:
    if not isinstance(value, dict):
        return _refuse(value, annotation_name(annotation), place, faults, "write a table")
    arguments = get_args(annotation)
    if len(arguments) != 2:
        return value
    keys = [fitted(key, arguments[0], item_place(place, key), faults) for key in value]
    items = [
        fitted(item, arguments[1], item_place(place, key), faults) for key, item in value.items()
    ]
    return _same_or_new(value, list(zip(keys, items, strict=True)), dict)


def _fitted_items(values: Any, kind: Any, place: str, faults: Faults) -> list[Any]:
    return [
        fitted(item, kind, item_place(place, position), faults)
        for position, item in enumerate(values)
    ]


def _same_or_new(value: Any, items: list[Any], kind: type[Any]) -> Any:
    """Return the value itself if nothing had to be made, so that a union can tell."""
    before = list(value.items()) if isinstance(value, dict) else list(value)
    flat_before = [each for pair in before for each in pair] if kind is dict else before
    flat_items = [each for pair in items for each in pair] if kind is dict else items
    unchanged = all(a is b for a, b in zip(flat_before, flat_items, strict=True))
    return value if unchanged and isinstance(value, kind) else kind(items)


_JUDGES: list[tuple[Callable[[type], bool], Callable[[Any, Any, str, Faults], Any]]] = [
    (_SCALARS.__contains__, _fit_scalar),
    (_FROM_TEXT.__contains__, _fit_from_text),
    (_is_enum, _fit_enum),
    (lambda kind: issubclass(kind, Stage), _fit_stage),
    ({type, collections.abc.Callable}.__contains__, _fit_callable),
    (_LISTS.__contains__, _fit_list),
    (lambda kind: kind is tuple, _fit_tuple),
    (_SETS.__contains__, _fit_set),
    (_TABLES.__contains__, _fit_table),
]
