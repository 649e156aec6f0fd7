"""Source, Filter and Sink: what a pipeline is made of, and what an author implements.

A stage remembers the arguments that it was constructed with, whatever its own attributes are
called: they are what the pipeline's hash, and so its checkpoint, is made from.
"""

from __future__ import annotations

import copy
import copyreg
import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Generic,
    Protocol,
    Self,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

import attrs
from attrs import evolve, frozen

if TYPE_CHECKING:
    from psnc.pipeline import Pipeline

__all__ = [
    "Filter",
    "Param",
    "Sink",
    "Source",
    "Stage",
    "StatefulFilter",
    "constructor_arguments",
    "constructor_signature",
    "copy_containers",
    "gathers",
    "is_stateful",
    "secret_arguments",
    "stage_name",
]

T = TypeVar("T")
In = TypeVar("In")
Out = TypeVar("Out")

_ARGUMENTS = "_psnc_constructor_arguments"


@frozen(kw_only=True)
class Param:
    """One parameter of a stage's constructor.

    Attributes
    ----------
    name : str
        The constructor's name for it.
    type : Any
        The annotation, ``typing.Any`` where there is none.
    default : Any
        The default value; ``inspect.Parameter.empty`` for one that must be given.
    description : str
        One sentence for ``--help`` and listings.
    secret : bool
        A secret's value is never written anywhere; only its digest enters the pipeline's hash.
        Mark it in the signature: ``token: Annotated[str, Param(secret=True)]``.
    """

    name: str = ""
    type: Any = Any
    default: Any = inspect.Parameter.empty
    description: str = ""
    secret: bool = False

    @property
    def required(self) -> bool:
        """Whether the constructor cannot be called without it."""
        return self.default is inspect.Parameter.empty


class Stage:
    """What sources, filters and sinks share: a name and remembered constructor arguments."""

    name: ClassVar[str] = ""
    description: ClassVar[str] = ""

    # Not where arguments are the very items that the stage yields.
    _copies_objects: ClassVar[bool] = True

    def __new__(cls, /, *args: Any, **kwargs: Any) -> Self:
        """Remember the arguments, before the author's constructor can change them."""
        if cls.__init__ is object.__init__ and (args or kwargs):
            # Python itself stops saying so for classes with a __new__ of their own.
            raise TypeError(f"{cls.__name__}() takes no arguments")
        stage = super().__new__(cls)
        # A constructor may sort or empty the list that it is given, and change an object's fields.
        captured = (
            copy_containers(args, with_objects=cls._copies_objects),
            copy_containers(kwargs, with_objects=cls._copies_objects),
        )
        stage.__dict__[_ARGUMENTS] = captured
        return stage

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        # A slotted subclass (attrs) pickles only the fields that it knows of, so that the
        # captured arguments travel beside its own state.
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_restore, (type(self), self.__dict__[_ARGUMENTS]), *reduced[2:])
        return reduced

    @classmethod
    def params(cls) -> list[Param]:
        """List the constructor's parameters.

        Derived from the signature and its annotations; override it to say more than they can.
        """
        return _params_from_signature(cls)

    def identity(self) -> Any:
        """Return what besides the constructor's arguments decides what the stage yields.

        It enters the pipeline's hash, so that a run is resumed only if it is still the same: which
        files match a pattern, say. ``None`` if there is no such thing. Like an argument it must be
        made of plain values, and it is written to the database as it is.
        """
        return None


class Source(Stage, ABC, Generic[T]):
    """Data indexed by integers: index ``i`` yields any number of items.

    Examples
    --------
    >>> class Numbers(Source[int]):
    ...     def __init__(self, count: int):
    ...         self.count = count
    ...
    ...     def __len__(self) -> int:
    ...         return self.count
    ...
    ...     def __getitem__(self, index: int) -> Iterator[int]:
    ...         yield index
    >>> list(Numbers(3)[2])
    [2]
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of indices."""

    @abstractmethod
    def __getitem__(self, index: int) -> Iterable[T]:
        """Yield the items of one index, ``0 <= index < len(self)``, preferably lazily."""

    def __iter__(self) -> Iterator[Iterable[T]]:
        """Yield the items of every index in turn."""
        return (self[index] for index in range(len(self)))

    def index_name(self, index: int) -> str | None:
        """Say what an index is, if another may take its number: its file, say.

        The name is recorded with the index, and a run is not resumed where a completed index has
        another name than it had. So more indices may follow, and none may move. ``None`` if the
        arguments, or what :meth:`identity` returns, decide what every index is.
        """
        return None

    def partition_indices(self, indices: Sequence[int]) -> Sequence[Sequence[int]] | None:
        """Say which of the indices about to run must run in one worker, one after the other.

        Parameters
        ----------
        indices : sequence of int
            The indices of this run that are not completed yet, sorted.

        Returns
        -------
        sequence of sequence of int, or None
            Groups that cover each index exactly once; ``None`` when every index stands alone.
        """
        return None

    def filter(self, filter: Filter[T, Out]) -> Pipeline[Out]:
        """Start a pipeline with this source and one filter."""
        from psnc.pipeline import Pipeline

        return Pipeline[T](source=self).filter(filter)

    def write(self, sink: Sink[T]) -> Pipeline[T]:
        """Make a pipeline of this source and a sink."""
        from psnc.pipeline import Pipeline

        return Pipeline[T](source=self).write(sink)


class Filter(Stage, ABC, Generic[In, Out]):
    """Turns a stream of items into another: changes, drops or adds items.

    A filter is called once an index, with that index's items, and should yield lazily.
    One that gathers something over many items is a :class:`StatefulFilter`.
    """

    @abstractmethod
    def __call__(self, items: Iterator[In]) -> Iterable[Out]:
        """Yield what becomes of ``items``."""


@runtime_checkable
class StatefulFilter(Protocol):
    """A filter that accumulates: statistics, a vocabulary, a histogram.

    Each index runs on a fresh copy of the filter as it was constructed, so that an index that
    fails or is retried leaves nothing behind in another's state. :func:`psnc.gather_pipeline` puts
    together what the completed indices flushed, in the file that the filter has as its ``output``,
    if it has such an attribute or argument.
    """

    def flush(self, path: Path) -> None:
        """Write what this index accumulated to the file ``path``."""

    def merge(self, shards: Sequence[Path], output: Path) -> None:
        """Combine the files that ``flush`` wrote for many indices into ``output``."""


def is_stateful(filter: Filter[Any, Any]) -> bool:
    """Tell whether a filter accumulates."""
    return callable(getattr(filter, "flush", None))


class Sink(Stage, ABC, Generic[T]):
    """Consumes the items of one index and says which files came of them.

    Attributes
    ----------
    shares_outputs : bool
        Whether indices write to the same files or directories. What these were as one index ended
        says nothing then, so that ``verify`` only looks whether they are there.
    """

    shares_outputs: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, items: Iterator[T], index: int) -> Iterable[str | Path] | str | Path | None:
        """Write ``items`` and return the output paths.

        An index can run again after a crash or on another machine, so writing it twice must
        give what writing it once gives.
        """

    def prepare(self, pipeline: Pipeline[T]) -> None:
        """Get ready for the first index, for example by laying out a shared output.

        Called once in every process that runs indices, in the driver before any index runs and
        before earlier results are taken over: ``pipeline.reset_index(index)`` has an index run
        again whose output is gone. It must be idempotent, and bear being called by several
        processes at once. ``pipeline.source`` and ``pipeline.items(index)`` tell what is coming,
        and :func:`psnc.map_on_workers` has all workers look at it. Workers get the sink as the
        driver has prepared it.
        """

    def gather(self, indices: Sequence[int]) -> Iterable[str | Path] | str | Path | None:
        """Make of all indices what no index can make alone, such as one file of many parts.

        Called by :func:`psnc.gather_pipeline`, after the filters' files are put together, in one
        process that may neither have prepared the sink nor run an index. It must be idempotent, as
        it is called again after more indices have run, or have run once more: what it makes is to
        follow from what ``indices`` left, not from what an earlier call made. A kill at any moment
        must leave what was there before, or what is new (:func:`psnc.atomic_write`).

        Parameters
        ----------
        indices : sequence of int
            The completed indices, sorted; one at least.

        Returns
        -------
        The paths of what was made, in the forms that :meth:`__call__` has them in; ``None``, or no
        path, if there was nothing to make.
        """
        return None

    def partition_indices(self, indices: Sequence[int]) -> Sequence[Sequence[int]] | None:
        """Say which indices must run in one worker; see :meth:`Source.partition_indices`."""
        return None


def gathers(sink: Sink[Any] | None) -> bool:
    """Tell whether a sink has a ``gather`` of its own."""
    return sink is not None and getattr(type(sink), "gather", Sink.gather) is not Sink.gather


def stage_name(stage: Stage | type[Stage]) -> str:
    """Return the name that a stage goes by in the database: that of its class."""
    return (stage if isinstance(stage, type) else type(stage)).__name__


def constructor_arguments(stage: Stage) -> dict[str, Any]:
    """Return the arguments that a stage was constructed with, by name, defaults included.

    ``*args`` come as a tuple under the parameter's name, ``**kwargs`` each under its own.
    """
    args, kwargs = stage.__dict__[_ARGUMENTS]
    signature = constructor_signature(type(stage))
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for name, make in _factories(type(stage)).items():
        if any(arguments.get(name) is mark for mark in _FACTORY_MARKS):
            arguments[name] = make()
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name))
    return arguments


# What the constructors of attrs classes and dataclasses have as a default that is yet to be made.
_FACTORY_MARKS = (attrs.NOTHING, dataclasses._HAS_DEFAULT_FACTORY)  # type: ignore[attr-defined]


def _factories(cls: type[Stage]) -> dict[str, Callable[[], Any]]:
    """Return what makes defaults, by the constructor's names."""
    if attrs.has(cls):
        return {
            field.alias or field.name: field.default.factory
            for field in attrs.fields(cls)
            if isinstance(field.default, attrs.Factory) and not field.default.takes_self  # type: ignore[arg-type]
        }
    if dataclasses.is_dataclass(cls):
        made = {field.name: field.default_factory for field in dataclasses.fields(cls)}
        return {
            name: make
            for name, make in made.items()
            if not isinstance(make, type(dataclasses.MISSING))
        }
    return {}


def secret_arguments(stage: Stage) -> set[str]:
    """Return the names of a stage's arguments whose values must not be written anywhere."""
    secret = {param.name for param in type(stage).params() if param.secret}
    signature = constructor_signature(type(stage))
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and parameter.name in secret:
            named = set(signature.parameters)
            secret |= {name for name in constructor_arguments(stage) if name not in named}
    return secret


def constructor_signature(cls: type) -> inspect.Signature:
    """Return the signature of a class's constructor, without ``self``."""
    constructor = cls.__init__  # type: ignore[misc]
    if constructor is object.__init__:
        return inspect.Signature()
    return inspect.Signature(list(inspect.signature(constructor).parameters.values())[1:])


def _params_from_signature(cls: type[Stage]) -> list[Param]:
    params = []
    for parameter in constructor_signature(cls).parameters.values():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        annotation = _resolved(parameter, cls)
        default = parameter.default
        if variadic:
            default = {} if parameter.kind is parameter.VAR_KEYWORD else ()
        params.append(_param(parameter.name, annotation, default))
    return params


def _resolved(parameter: inspect.Parameter, cls: type[Stage]) -> Any:
    """Evaluate one annotation by itself: another may name what only type checkers import."""
    holder = SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    # A constructor made for a function has the annotations of that function's module.
    names = getattr(inspect.unwrap(cls.__init__), "__globals__", {})
    try:
        return get_type_hints(holder, names, include_extras=True)[parameter.name]
    except (NameError, TypeError):
        return parameter.annotation


def _param(name: str, annotation: Any, default: Any) -> Param:
    declared = _declared(annotation) or Param()
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if annotation is inspect.Parameter.empty:
        annotation = Any
    return evolve(declared, name=name, type=annotation, default=default)


def _declared(annotation: Any) -> Param | None:
    """Find the ``Param`` in an annotation, inside a union too."""
    if isinstance(annotation, Param):
        return annotation
    return next(filter(None, map(_declared, get_args(annotation))), None)


def copy_containers(value: Any, *, with_objects: bool = False) -> Any:
    """Copy lists, tuples, sets and dictionaries, and those inside them too.

    Parameters
    ----------
    value : Any
        What may be one.
    with_objects : bool
        Copy instances of attrs classes and dataclasses besides. A copy has their fields alone.
    """
    return _Copier(with_objects).copy(value)


class _Copier:
    """Copies containers once each, so that objects may refer to each other in circles."""

    def __init__(self, with_objects: bool) -> None:
        self._with_objects = with_objects
        # Each with the object itself, so that no other one can take its address meanwhile.
        self._objects: dict[int, tuple[Any, Any]] = {}

    def copy(self, value: Any) -> Any:
        kind = type(value)
        if kind in _NEVER_COPIED:
            return value
        if kind is dict:
            return {key: self.copy(item) for key, item in value.items()}
        if kind in (list, tuple, set, frozenset):
            return kind(self.copy(item) for item in value)
        if isinstance(value, (dict, list, tuple, set, bytearray, MappingProxyType)):
            # Whatever a class of somebody's own does when it is copied.
            with suppress(Exception):
                return self._copy_of_another_kind(value)
        elif self._with_objects and _has_fields(kind):
            with suppress(Exception):
                return self._copy_of_object(value)
        return value

    def _copy_of_another_kind(self, value: Any) -> Any:
        """Copy an ordered dictionary, a named tuple or the like."""
        if isinstance(value, MappingProxyType):
            return MappingProxyType({key: self.copy(item) for key, item in value.items()})
        if isinstance(value, tuple):
            return tuple.__new__(type(value), map(self.copy, value))
        copied = copy.copy(value)
        if isinstance(value, dict):
            for key, item in value.items():
                dict.__setitem__(copied, key, self.copy(item))
        elif isinstance(value, list):
            list.__setitem__(copied, slice(None), list(map(self.copy, value)))
        return copied

    def _copy_of_object(self, value: Any) -> Any:
        if id(value) in self._objects:
            return self._objects[id(value)][1]
        kind = type(value)
        copied = object.__new__(kind)
        self._objects[id(value)] = (value, copied)
        fields = attrs.fields(kind) if attrs.has(kind) else dataclasses.fields(value)
        for field in fields:
            # A frozen one would not have it otherwise.
            object.__setattr__(copied, field.name, self.copy(getattr(value, field.name)))
        return copied


_NEVER_COPIED = frozenset({type(None), bool, int, float, str, bytes})


def _has_fields(kind: type) -> bool:
    """Tell whether a value is known by its fields alone, and a copy's end means nothing."""
    if issubclass(kind, (Stage, Enum)) or hasattr(kind, "psnc_config") or hasattr(kind, "__del__"):
        return False
    return attrs.has(kind) or dataclasses.is_dataclass(kind)


def _restore(cls: type[Stage], arguments: tuple[Any, Any]) -> Stage:
    stage: Stage = object.__new__(cls)
    stage.__dict__[_ARGUMENTS] = arguments
    return stage
