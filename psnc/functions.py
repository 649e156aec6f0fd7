"""Filters and sinks made of functions.

A decorator makes a class of the function, since a class is what parameters, hashes, pickles and
listings know. The function's own arguments, other than the data, are the constructor's.
"""

from __future__ import annotations

import functools
import inspect
import reprlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Concatenate, NoReturn, ParamSpec, Protocol, TypeVar, overload

from psnc.errors import ConfigurationError, StageError
from psnc.stages import Filter, Param, Sink, Stage, constructor_arguments, secret_arguments

__all__ = ["FilterClass", "SinkClass", "filter", "sink"]

P = ParamSpec("P")
In = TypeVar("In")
Out = TypeVar("Out")

Paths = Iterable[str | Path] | str | Path | None


class FilterClass(Protocol[P, In, Out]):
    """What :func:`filter` makes, as type checkers see it: a subclass of :class:`psnc.Filter`.

    Attributes
    ----------
    function : callable
        The function as it was.
    """

    __name__: str
    function: Callable[..., Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Filter[In, Out]:
        """Construct the filter with the function's further arguments."""
        ...

    def params(self) -> list[Param]:
        """List the constructor's parameters."""
        ...


class SinkClass(Protocol[P, In]):
    """What :func:`sink` makes, as type checkers see it: a subclass of :class:`psnc.Sink`.

    Attributes
    ----------
    function : callable
        The function as it was.
    """

    __name__: str
    function: Callable[..., Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Sink[In]:
        """Construct the sink with the function's further arguments."""
        ...

    def params(self) -> list[Param]:
        """List the constructor's parameters."""
        ...


class _FilterDecorator(Protocol):
    @overload
    def __call__(
        self, function: Callable[Concatenate[Iterator[In], P], Iterator[Out]], /
    ) -> FilterClass[P, In, Out]: ...

    @overload
    def __call__(
        self, function: Callable[Concatenate[In, P], Out], /
    ) -> FilterClass[P, In, Out]: ...


class _SinkDecorator(Protocol):
    def __call__(
        self, function: Callable[Concatenate[Iterator[In], int, P], Paths], /
    ) -> SinkClass[P, In]: ...


@overload
def filter(
    function: Callable[Concatenate[Iterator[In], P], Iterator[Out]], /
) -> FilterClass[P, In, Out]: ...


@overload
def filter(function: Callable[Concatenate[In, P], Out], /) -> FilterClass[P, In, Out]: ...


@overload
def filter() -> _FilterDecorator: ...


def filter(function: Callable[..., Any] | None = None, /) -> Any:
    """Make a filter's class of a function.

    The function's first parameter takes the data, the others are the constructor's. A plain
    function is called with every item, and what it returns takes the item's place. A generator
    function is called once an index, with an iterator over its items, and may yield fewer or more.

    Parameters
    ----------
    function : callable
        The function. It must have a name of its own, at module level, for the pipeline to have a
        hash; ``track_metrics=False`` needs none.

    Returns
    -------
    class
        A subclass of :class:`psnc.Filter` with the function's name; the function itself is its
        ``function``.

    Raises
    ------
    StageError
        If it cannot be called so.

    Examples
    --------
    >>> @filter
    ... def scale(item: float, factor: float = 2.0) -> float:
    ...     return item * factor
    >>> scale(factor=10.0)
    scale(factor=10.0)
    >>> list(scale(10.0)(iter([1.0, 2.0])))
    [10.0, 20.0]
    >>> scale.function(3.0)
    6.0

    >>> @filter
    ... def only_even(items: Iterator[int]) -> Iterator[int]:
    ...     for item in items:
    ...         if item % 2 == 0:
    ...             yield item
    >>> list(only_even()(iter([1, 2, 3, 4])))
    [2, 4]
    """
    return filter if function is None else _class_of(_FunctionFilter, function)


@overload
def sink(function: Callable[Concatenate[Iterator[In], int, P], Paths], /) -> SinkClass[P, In]: ...


@overload
def sink() -> _SinkDecorator: ...


def sink(function: Callable[..., Any] | None = None, /) -> Any:
    """Make a sink's class of a function.

    The function is called once an index. Its first parameter takes an iterator over the items, its
    second the index, the others are the constructor's. It returns the paths that it wrote.

    Parameters
    ----------
    function : callable
        The function, named as for :func:`filter`.

    Returns
    -------
    class
        A subclass of :class:`psnc.Sink` with the function's name; the function itself is its
        ``function``.

    Raises
    ------
    StageError
        If it cannot be called so.

    Examples
    --------
    >>> from psnc import atomic_write
    >>> @sink
    ... def write_text(items: Iterator[str], index: int, directory: str) -> Path:
    ...     path = Path(directory, f"{index}.txt")
    ...     with atomic_write(path, "w") as file:
    ...         file.writelines(items)
    ...     return path
    >>> write_text("out")
    write_text(directory='out')
    """
    return sink if function is None else _class_of(_FunctionSink, function)


class _FunctionStage(Stage):
    """What filters and sinks made of functions share."""

    function: ClassVar[Callable[..., Any]]
    _data: ClassVar[tuple[str, ...]]
    _decorator: ClassVar[str]
    _args: tuple[Any, ...]
    _kwargs: dict[str, Any]

    def identity(self) -> None:
        """Refuse a function without a name that tells it from another."""
        name = type(self).function.__qualname__
        if "<lambda>" in name or "<locals>" in name:
            kind = "a lambda" if "<lambda>" in name else "a function inside a function"
            raise ConfigurationError(
                f"{type(self).__name__}: {kind} ({name}) has no name that tells it from another, "
                "so the pipeline has no stable hash: define it at module level, or run with "
                "track_metrics=False"
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        function = type(self).function
        for base in (_FunctionFilter, _FunctionSink):
            if isinstance(self, base) and type(self) is _importable_class(base, function):
                _, arguments = reduced[1]
                return (_restore, (base, function, arguments), *reduced[2:])
        # The function's name is now that of the class, by which the class is found.
        return reduced

    def __repr__(self) -> str:
        secret = secret_arguments(self)
        arguments = [
            f"{name}={'…' if name in secret else reprlib.repr(value)}"
            for name, value in constructor_arguments(self).items()
        ]
        return f"{type(self).__name__}({', '.join(arguments)})"


class _FunctionFilter(_FunctionStage, Filter[Any, Any]):
    _data = ("an item",)
    _decorator = "filter"
    _is_generator: ClassVar[bool]

    def __call__(self, items: Iterator[Any]) -> Iterable[Any]:
        if self._is_generator:
            produced: Iterable[Any] = type(self).function(items, *self._args, **self._kwargs)
            return produced
        return self._changed(items)

    def _changed(self, items: Iterator[Any]) -> Iterator[Any]:
        function, args, kwargs = type(self).function, self._args, self._kwargs
        for item in items:
            result = function(item, *args, **kwargs)
            if type(result) in _NO_ITEMS:
                self._refuse(result)
            yield result

    def _refuse(self, result: Any) -> NoReturn:
        name = type(self).__name__
        if result is None:
            raise StageError(
                f"{name} returned None for an item: return the item, or yield from a generator "
                "function, which is given all the items of an index, to drop some"
            )
        raise StageError(
            f"{name} returned a {type(result).__name__} for an item: return the item itself, or "
            "yield items from a generator function, which is given all those of an index"
        )


class _FunctionSink(_FunctionStage, Sink[Any]):
    _data = ("the items", "the index")
    _decorator = "sink"

    def __call__(self, items: Iterator[Any], index: int) -> Paths:
        paths: Paths = type(self).function(items, index, *self._args, **self._kwargs)
        return paths


_NO_ITEMS = frozenset(
    {types.NoneType, types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType}
)

_Base = type[_FunctionFilter] | type[_FunctionSink]


def _class_of(base: _Base, function: Callable[..., Any]) -> type[Stage]:
    _require_function(base, function)
    return _importable_class(base, function) or _make_class(base, function)


def _importable_class(base: _Base, function: Callable[..., Any]) -> type[Stage] | None:
    """Return the one class of a function that is found by its name."""
    found: Any = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return _lasting_class(base, function) if found is function else None


@functools.cache
def _lasting_class(base: _Base, function: Callable[..., Any]) -> type[Stage]:
    return _make_class(base, function)


def _make_class(base: _Base, function: Callable[..., Any]) -> type[Stage]:
    signature = _constructor_signature(base, function)
    namespace = {
        "__module__": function.__module__,
        "__qualname__": function.__qualname__,
        "__doc__": function.__doc__,
        "__wrapped__": staticmethod(function),
        "__init__": _make_constructor(function, signature),
        "__signature__": signature,
        "function": staticmethod(function),
        "_is_generator": inspect.isgeneratorfunction(inspect.unwrap(function)),
    }
    made: type[Stage] = type(function.__name__, (base,), namespace)
    return made


def _make_constructor(
    function: Callable[..., Any], signature: inspect.Signature
) -> Callable[..., None]:
    def __init__(self: _FunctionStage, /, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__qualname__}(): {error}") from None
        self._args, self._kwargs = bound.args, bound.kwargs

    name = "_self" if "self" in signature.parameters else "self"
    itself = inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
    parameters = [itself, *signature.parameters.values()]
    __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    __init__.__wrapped__ = function  # type: ignore[attr-defined]
    __init__.__doc__ = function.__doc__
    return __init__


def _constructor_signature(base: _Base, function: Callable[..., Any]) -> inspect.Signature:
    """Return the function's signature without the parameters that take the data."""
    decorator, name = f"@psnc.{base._decorator}", function.__qualname__
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        raise StageError(
            f"{decorator}: {name} does not tell its parameters: wrap it in a function of your own"
        ) from None
    given = [
        each
        for each in parameters
        if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    if len(given) < len(base._data):
        raise StageError(
            f"{decorator}: {name}{inspect.signature(function)} has no parameter for "
            f"{base._data[len(given)]}: it is called with {' and '.join(base._data)} first"
        )
    if given[0].name in ("self", "cls"):
        raise StageError(
            f"{decorator}: {name} is a method: make a function of it, or derive a class from "
            f"psnc.{base._decorator.capitalize()}"
        )
    return inspect.Signature(parameters[len(base._data) :])


def _require_function(base: _Base, function: Any) -> None:
    decorator, stage = f"@psnc.{base._decorator}", f"psnc.{base._decorator.capitalize()}"
    name = getattr(function, "__qualname__", None)
    if isinstance(function, type):
        reason = f"{name} is a class: derive it from {stage} instead"
    elif isinstance(function, (staticmethod, classmethod)) or _is_bound(function):
        reason = f"{name} is a method: make a function of it, or derive a class from {stage}"
    elif not callable(function) or name is None or getattr(function, "__module__", None) is None:
        reason = f"{type(function).__qualname__!r} is no function: give one with a name"
    elif inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        reason = f"{name} is async, and stages are not: write it with def"
    else:
        return
    raise StageError(f"{decorator}: {reason}")


def _is_bound(function: Any) -> bool:
    # A C function's __self__ is its module.
    return not isinstance(getattr(function, "__self__", None), (types.NoneType, types.ModuleType))


def _restore(base: _Base, function: Callable[..., Any], arguments: tuple[Any, Any]) -> Stage:
    made = _class_of(base, function)
    args, kwargs = arguments
    return made.__new__(made, *args, **kwargs)
