"""From a pipeline to canonical JSON, and from that to its SHA-256.

The same configuration must give the same text in every process, on every machine and in every
session, since the text's hash decides which results a resumed run may rely on. So nothing here
falls back on ``repr`` or an address: a value without a canonical form is an error.

JSON has fewer types than Python. Values that it lacks become an object with one key that starts
with ``$``; tuples are lists and paths are text, so that a configuration read from a file has the
hash of the one written in Python.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import attrs

from psnc.errors import ConfigurationError
from psnc.local_classes import captured_variables, is_local, never_changes, plain_attributes
from psnc.stages import (
    Filter,
    Sink,
    Source,
    Stage,
    constructor_arguments,
    secret_arguments,
    stage_name,
)

__all__ = [
    "Content",
    "Name",
    "canonical_json",
    "config_hash",
    "module_of_file",
    "pipeline_config",
    "qualified_name",
    "text_values",
]

FORMAT = 1

_NAME = "$name"

# Of a long value the text itself is kept out of the database.
_LONG = 1000

_METHODS = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)


@attrs.frozen
class Content:
    """The items of a sequence, as a stage's ``psnc_config()`` may describe them.

    Many of them enter a configuration by their number, their ends and a digest of them all.

    Attributes
    ----------
    items : Any
        The sequence.
    advice : str
        What to do if it has no canonical form.
    """

    items: Any
    advice: str


@attrs.frozen
class Name:
    """Text that names something and is no path, even if there is a file of that name."""

    text: str


class _NoCanonicalFormError(Exception):
    """Carries the reason up to where the stage and the parameter are known."""

    advice = (
        "Pass plain values, or give the value's class a method psnc_config() that returns them."
    )


def pipeline_config(
    source: Source[Any], filters: Iterable[Filter[Any, Any]], sink: Sink[Any] | None
) -> dict[str, Any]:
    """Describe a pipeline's stages and their parameters in JSON's own types.

    Raises
    ------
    ConfigurationError
        If a parameter has no canonical form; names the stage and the parameter.
    """
    return {
        "format": FORMAT,
        "source": _stage_config(source),
        "filters": [_stage_config(filter) for filter in filters],
        "sink": None if sink is None else _stage_config(sink),
    }


def canonical_json(config: dict[str, Any]) -> str:
    """Write a configuration as text: keys sorted, no spaces, ASCII."""
    return json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)


def config_hash(config_json: str) -> str:
    """Return the SHA-256 of a configuration's canonical JSON, as 64 hexadecimal digits."""
    return hashlib.sha256(config_json.encode("ascii")).hexdigest()


def qualified_name(thing: Any) -> str:
    """Return ``module:qualname`` of a class or function, the same in a script and its workers.

    The script that runs as ``__main__`` goes by the name that it is imported by, so that it hashes
    alike however it was started.
    """
    module = getattr(thing, "__module__", None) or type(thing).__module__
    if module in ("__main__", "__mp_main__"):
        module = _main_module_name()
    return f"{_MOVED.get(module, module)}:{thing.__qualname__}"


# What other versions of Python have somewhere else, and all of them here.
_MOVED = {"pathlib._local": "pathlib"}


def text_values(config: Any) -> Iterator[str]:
    """Yield every text value in a configuration's parameters that may be a path."""
    if isinstance(config, str):
        yield config
    elif isinstance(config, dict):
        for key, value in config.items():
            if key not in ("class", _NAME):
                yield from text_values(value)
    elif isinstance(config, list):
        for value in config:
            yield from text_values(value)


def _main_module_name() -> str:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name.removesuffix(".__main__"))
    path = getattr(main, "__file__", None)
    if not path:
        return "__main__"
    name, _ = module_of_file(Path(path))
    return name.removesuffix(".__main__").removesuffix(".__init__")


def module_of_file(path: Path) -> tuple[str, Path]:
    """Return the dotted name by which a file is imported, and the directory that it is found from.

    The directories above it that have an ``__init__.py`` are packages.
    """
    parts, root = [path.stem], path.absolute().parent
    while (root / "__init__.py").exists() and root != root.parent:
        parts.insert(0, root.name)
        root = root.parent
    return ".".join(parts), root


def _stage_config(stage: Stage) -> dict[str, Any]:
    config = {"class": qualified_name(type(stage)), "params": _params_config(stage)}
    # Of the class, since an author may well call an attribute or a field of the stage so.
    identity = getattr(type(stage), "identity", None)
    value = identity(stage) if callable(identity) else None
    try:
        if value is not None:
            config["identity"] = _canonical(value)
    except _NoCanonicalFormError as error:
        raise ConfigurationError(
            f"{stage_name(stage)}.identity(): {error}, so the pipeline has no stable hash. "
            "Return plain values."
        ) from None
    try:
        return {**config, **_local_part(type(stage))}
    except _NoCanonicalFormError as error:
        raise ConfigurationError(
            f"{stage_name(stage)}: {error}, so the pipeline has no stable hash. Pass what it uses "
            "to the constructor, or define the class at module level."
        ) from None


def _local_part(thing: type | types.FunctionType, inside: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Return what besides its name tells a class or function from others that its function makes.

    Raises
    ------
    _NoCanonicalFormError
        If it uses a variable of the function that may change, or has no canonical form itself.
    """
    parts = {}
    variables = captured_variables(thing)
    if variables:
        inside = (*inside, thing)
        parts["variables"] = {
            name: _variable_form(thing, name, value, inside) for name, value in variables.items()
        }
    attributes = plain_attributes(thing) if isinstance(thing, type) else {}
    if attributes:
        parts["attributes"] = _canonical(attributes)
    return parts


def _variable_form(
    user: type | types.FunctionType, name: str, value: Any, inside: tuple[Any, ...]
) -> Any:
    if isinstance(value, types.ModuleType):
        return {"$module": value.__name__}
    if isinstance(value, (type, types.FunctionType)):
        if not is_local(value) or "<lambda>" in value.__qualname__:
            return _canonical(value)
        # They may refer to each other in a circle.
        local_part = {} if value in inside else _local_part(value, inside)
        return {"$local": [qualified_name(value), local_part]}
    if never_changes(value):
        return _canonical(value)
    kind = "class" if isinstance(user, type) else "function"
    raise _NoCanonicalFormError(
        f"a {kind} inside a function ({user.__qualname__}) that uses the function's {name!r}, "
        "which may change, has no name that tells it from another"
    )


def _object_form(value: Any, content: Any) -> Any:
    local_part = _local_part(type(value))
    return {
        "$object": [qualified_name(type(value)), content, *([local_part] if local_part else ())]
    }


def _params_config(stage: Stage) -> dict[str, Any]:
    secret = secret_arguments(stage)
    params = {}
    for name, value in _described_arguments(stage).items():
        try:
            canonical = _canonical(value)
        except _NoCanonicalFormError as error:
            raise ConfigurationError(
                f"{stage_name(stage)}({name}=…): {error}, so the pipeline has no stable hash. "
                f"{error.advice}"
            ) from None
        params[name] = {"$secret": _digest_of_json(canonical)} if name in secret else canonical
    return params


def _described_arguments(stage: Stage) -> Mapping[str, Any]:
    """Return the constructor's arguments, or the values that the stage says stand for them."""
    own = getattr(type(stage), "psnc_config", None)
    if not callable(own):
        return constructor_arguments(stage)
    arguments = own(stage)
    if not isinstance(arguments, Mapping):
        raise ConfigurationError(
            f"{stage_name(stage)}.psnc_config() returned {type(arguments).__qualname__}: return a "
            "mapping of the constructor's parameters to values"
        )
    return arguments


def _canonical(value: Any) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, Enum):
        return _from_enum(value)
    if isinstance(value, Stage):
        return {"$stage": _stage_config(value)}
    if isinstance(value, Content):
        return _from_content(value)
    if isinstance(value, Name):
        return {_NAME: value.text}
    for convert in (_from_own_method, _from_number, _from_text, _from_container, _from_array):
        canonical = convert(value)
        if canonical is not None:
            return canonical
    canonical = _from_callable(value)
    if canonical is None:
        canonical = _from_fields(value)
    if canonical is None:
        raise _NoCanonicalFormError(
            f"a value of type {type(value).__qualname__!r} has no canonical form"
        )
    return canonical


def _from_enum(member: Enum) -> Any:
    cls = type(member)
    # A value of a flag may be made of bits that no member has.
    nameless = member.name is None and member.value != 0
    value = [_canonical(member.value)] if nameless or is_local(cls) else []
    return {"$enum": [qualified_name(cls), member.name, *value]}


def _from_own_method(value: Any) -> Any:
    method = getattr(value, "psnc_config", None)
    # What is made of a class, Own[int] say, has the class's attributes.
    if isinstance(value, type) or not callable(method) or _is_generic(value):
        return None
    return _object_form(value, _canonical(method()))


def _from_number(value: Any) -> Any:
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, complex):
        return {"$complex": [_canonical(value.real), _canonical(value.imag)]}
    if isinstance(value, (Decimal, Fraction)):
        return {f"${type(value).__name__.lower()}": str(value)}
    return None


def _from_text(value: Any) -> Any:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": hashlib.sha256(value).hexdigest()}
    if isinstance(value, (datetime, date, time)):
        return {f"${type(value).__name__}": value.isoformat()}
    if isinstance(value, timedelta):
        return {"$timedelta": [value.days, value.seconds, value.microseconds]}
    if isinstance(value, UUID):
        return {"$uuid": value.hex}
    if isinstance(value, re.Pattern):
        return {"$pattern": [_canonical(value.pattern), value.flags]}
    return None


def _from_container(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return {"$set": sorted((_canonical(item) for item in value), key=_sort_key)}
    if isinstance(value, (dict, types.MappingProxyType)):
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _canonical(item) for key, item in value.items()}
        pairs = [[_canonical(key), _canonical(item)] for key, item in value.items()]
        return {"$dict": sorted(pairs, key=_sort_key)}
    if isinstance(value, (range, slice)):
        return {f"${type(value).__name__}": [value.start, value.stop, value.step]}
    return None


def _from_content(content: Content) -> Any:
    try:
        canonical = _canonical(content.items)
    except _NoCanonicalFormError as error:
        error.advice = content.advice
        raise
    if not isinstance(canonical, list) or len(canonical) <= _LONG:
        return canonical
    # The ends tell a reader what it is of, and whether it is of relative paths.
    ends = [canonical[0], canonical[-1]]
    return {"$content": [len(canonical), ends, _digest_of_json(canonical)]}


def _from_array(value: Any) -> Any:
    """Arrays by dtype, shape and content; looks only at libraries that are imported already."""
    numpy = sys.modules.get("numpy")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        content = value.detach().cpu().flatten().view(torch.uint8).numpy().data
        return _array_form(str(value.dtype), tuple(value.shape), content)
    if numpy is None:
        return None
    if isinstance(value, numpy.generic):
        return _from_numpy_scalar(value)
    if isinstance(value, numpy.dtype):
        return {"$dtype": _dtype_form(value)}
    if not isinstance(value, numpy.ndarray):
        return None
    if isinstance(value, numpy.ma.MaskedArray):
        return {"$masked": [_canonical(value.data), _canonical(numpy.ma.getmaskarray(value))]}
    if value.dtype.names:
        # Field by field, since the bytes between them mean nothing.
        return {"$array": ["fields", list(value.shape), _array_fields(value)]}
    if value.dtype.hasobject:
        return {"$array": ["object", list(value.shape), [_canonical(item) for item in value.flat]]}
    content = numpy.ascontiguousarray(value).reshape(-1).view(numpy.uint8).data
    return _array_form(value.dtype.str, value.shape, content)


def _dtype_form(dtype: Any) -> Any:
    """Return a dtype as text; a structured one, whose text is its size alone, in full."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return [_dtype_form(base), list(shape)]
    if dtype.names is None:
        return dtype.str
    fields = [(name, *dtype.fields[name][:2]) for name in dtype.names]
    return [dtype.str, [[name, _dtype_form(each), offset] for name, each, offset in fields]]


def _array_fields(array: Any) -> Any:
    names = array.dtype.names
    fields = [[name, _canonical(array[name])] for name in names]
    # An object of JSON has no order, so that this one is for fields in the order of their names.
    return dict(fields) if list(names) == sorted(names) else fields


def _from_numpy_scalar(value: Any) -> Any:
    if value.dtype.names:
        fields = [_canonical(value[name]) for name in value.dtype.names]
        return {"$scalar": [_dtype_form(value.dtype), fields]}
    plain = value.item()
    if value.dtype.kind in "mM" or type(plain) is type(value):
        # Times lose their unit as Python's, and the widest floats have no counterpart there.
        return {"$scalar": [value.dtype.str, str(value)]}
    return _canonical(plain)


def _array_form(dtype: str, shape: tuple[int, ...], content: Any) -> Any:
    return {"$array": [dtype, list(shape), hashlib.sha256(content).hexdigest()]}


def _is_generic(value: Any) -> bool:
    """Tell ``list[int]`` and the like, which go by the names of their classes, from the classes."""
    return isinstance(value, types.GenericAlias) or bool(typing.get_args(value))


def _from_generic(value: Any) -> Any:
    arguments = [
        {"$ellipsis": []} if each is ... else _canonical(each) for each in typing.get_args(value)
    ]
    return {"$generic": [_canonical(typing.get_origin(value)), arguments]}


def _from_callable(value: Any) -> Any:
    if _is_generic(value):
        return _from_generic(value)
    if isinstance(value, partial):
        parts = [value.func, list(value.args), dict(value.keywords)]
        return {"$partial": [_canonical(part) for part in parts]}
    if isinstance(value, _METHODS) and not isinstance(value.__self__, types.ModuleType):
        owner = value.__self__
        if not isinstance(owner, type):
            return {"$method": [_canonical(owner), value.__name__]}
        if not _is_named_after(owner, value):
            return {"$method": [_canonical(owner), qualified_name(value)]}
    named = isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType))
    # NumPy's ufuncs and C functions of other libraries are callables with a name of their own.
    if not named and not (callable(value) and hasattr(value, "__qualname__")):
        return None
    if "<lambda>" in value.__qualname__ or "<locals>" in value.__qualname__:
        kind = (
            "lambda" if "<lambda>" in value.__qualname__ else "function or class inside a function"
        )
        raise _NoCanonicalFormError(
            f"a {kind} ({value.__qualname__}) has no name that tells it from another; "
            "define it at module level"
        )
    return {"$callable": qualified_name(value)}


def _is_named_after(owner: type, method: Any) -> bool:
    """Tell whether a class method's name says which class it is of, and not a base that has it."""
    if isinstance(method, types.MethodType):
        return qualified_name(method) == f"{qualified_name(owner)}.{method.__name__}"
    # Those in C are named after the class that they are got from, without its module. Of classes
    # in Python there are many of one name.
    return method.__name__ in vars(owner) or "__module__" not in vars(owner)


def _from_fields(value: Any) -> Any:
    if attrs.has(type(value)):
        names = [field.name for field in attrs.fields(type(value))]
    elif dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    else:
        return None
    fields = {name: _canonical(getattr(value, name)) for name in names}
    return _object_form(value, fields)


def _sort_key(canonical: Any) -> str:
    return json.dumps(canonical, sort_keys=True)


def _digest_of_json(canonical: Any) -> str:
    return hashlib.sha256(_sort_key(canonical).encode()).hexdigest()
