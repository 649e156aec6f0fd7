"""The rules that sources, filters and sinks share, and what the checks of each are made of."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import cloudpickle

from psnc.errors import ConfigurationError
from psnc.provenance import canonical_json, config_hash, pipeline_config
from psnc.stages import (
    Filter,
    Param,
    Sink,
    Source,
    Stage,
    constructor_arguments,
    stage_name,
)
from psnc.testing.comparison import difference
from psnc.testing.fresh_process import FreshProcess

__all__ = [
    "Interruption",
    "ItemsOf",
    "call_arguments",
    "check_hash_elsewhere",
    "check_result_elsewhere",
    "check_stage",
    "constructed_again",
    "cut_short",
    "fail",
    "hash_of",
    "pickled_copy",
    "require_same",
    "require_stage",
    "source_of",
]

AnyStage = TypeVar("AnyStage", bound=Stage)

# A seed that no process has by chance, as PYTHONHASHSEED is random or zero unless somebody says so.
_OTHER_HASH_SEED = 77


class Interruption(Exception):  # noqa: N818  # no error of anything under test
    """What a check raises in the middle of a stream of items."""


class ItemsOf(Source[Any]):
    """A source of given items: index ``i`` yields copies of those in ``groups[i]``.

    Copies, since a stage may change the items that it is given.
    """

    def __init__(self, groups: Sequence[Iterable[Any]]) -> None:
        self.groups = [list(group) for group in groups]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Iterator[Any]:
        return (copy.deepcopy(item) for item in self.groups[index])


def source_of(items: Source[Any] | Sequence[Iterable[Any]]) -> Source[Any]:
    """Return a source as it is, and lists of items, one an index, as a source."""
    source = items if isinstance(items, Source) else ItemsOf(items)
    if len(source) == 0:
        raise ValueError("there is no index to check with: give a source, or items, with some")
    return source


def cut_short(items: Iterable[Any], after: int) -> Iterator[Any]:
    """Yield some items, then raise `Interruption`."""
    for number, item in enumerate(items):
        if number >= after:
            break
        yield item
    raise Interruption(f"interrupted by the check after {after} items")


def fail(stage: Stage, sentence: str) -> NoReturn:
    """Say which rule a stage breaks."""
    __tracebackhide__ = True
    raise AssertionError(f"{stage_name(stage)}: {sentence}") from None


def require_same(stage: Stage, expected: Any, found: Any, what: str, sentence: str) -> None:
    """Fail, and say where, unless two values are equal."""
    __tracebackhide__ = True
    where = difference(expected, found, what)
    if where is not None:
        fail(stage, f"{sentence} ({where})")


def require_stage(stage: Any, kind: type[Stage]) -> None:
    """Refuse what is no stage of a kind, or a class instead of one of its instances."""
    __tracebackhide__ = True
    if isinstance(stage, kind):
        return
    if isinstance(stage, type):
        raise AssertionError(f"{stage.__qualname__} is a class: construct it, and check that")
    raise AssertionError(
        f"a value of type {type(stage).__qualname__} is no {kind.__name__}: derive its class from "
        f"psnc.{kind.__name__}"
    )


def check_stage(stage: Stage) -> None:
    """Check what every stage keeps: parameters, pickling, and a hash that means its parameters."""
    __tracebackhide__ = True
    _check_params(stage)
    own_hash = hash_of(stage)
    if hash_of(constructed_again(stage)) != own_hash:
        fail(
            stage,
            "constructed twice with equal arguments, it has two hashes: what identity() and an "
            "argument's psnc_config() return must follow from the arguments' values alone",
        )
    for module in (pickle, cloudpickle):
        if hash_of(pickled_copy(stage, module)) != own_hash:
            fail(
                stage,
                f"its hash changes on a trip through {module.__name__}: a copy must have the same "
                "arguments and identity()",
            )


def hash_of(stage: Stage) -> str:
    """Return the hash that a stage contributes to its pipeline's."""
    __tracebackhide__ = True
    nothing = ItemsOf([])
    source = stage if isinstance(stage, Source) else nothing
    filters = [stage] if isinstance(stage, Filter) else []
    sink = stage if isinstance(stage, Sink) else None
    try:
        return config_hash(canonical_json(pipeline_config(source, filters, sink)))
    except ConfigurationError as error:
        fail(stage, f"its parameters have no canonical form: {error}")


def pickled_copy(stage: AnyStage, module: Any = cloudpickle) -> AnyStage:
    """Return a copy that went through ``pickle`` or ``cloudpickle``."""
    __tracebackhide__ = True
    try:
        duplicate: AnyStage = module.loads(module.dumps(stage))
    except Exception as error:
        fail(
            stage,
            f"it cannot go through {module.__name__} ({type(error).__name__}: {error}): open such "
            "things when they are first used, leave them out in __getstate__, and define the class "
            "at module level",
        )
    return duplicate


def _check_params(stage: Stage) -> None:
    __tracebackhide__ = True
    params = type(stage).params()
    if not all(isinstance(param, Param) for param in params):
        fail(stage, "params() returns something else than psnc.Param values")
    listed = {param.name: param for param in params}
    if len(listed) != len(params):
        fail(stage, "params() lists a parameter twice")
    signature = _signature(stage)
    missing = sorted(signature.parameters.keys() - listed.keys())
    if missing:
        fail(stage, f"params() leaves out {missing[0]!r}, which the constructor takes")
    unknown = sorted(listed.keys() - signature.parameters.keys())
    if unknown:
        fail(stage, f"params() lists {unknown[0]!r}, which the constructor does not take")
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        require_same(
            stage,
            parameter.default,
            listed[parameter.name].default,
            "default",
            f"params() gives {parameter.name!r} another default than the constructor",
        )


def _signature(stage: Stage) -> inspect.Signature:
    constructor = type(stage).__init__
    if constructor is object.__init__:
        return inspect.Signature()
    return inspect.Signature(list(inspect.signature(constructor).parameters.values())[1:])


def constructed_again(stage: AnyStage) -> AnyStage:
    """Return a stage constructed with the same arguments, or equal ones."""
    args, kwargs = call_arguments(stage)
    try:
        args, kwargs = copy.deepcopy((args, kwargs))
    except Exception:
        # The arguments themselves will do: nothing asks for them to be copied.
        return type(stage)(*args, **kwargs)
    return type(stage)(*args, **kwargs)


def call_arguments(stage: Stage) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments to construct the same stage with."""
    arguments = constructor_arguments(stage)
    args: list[Any] = []
    for parameter in _signature(stage).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            args = [*args, *arguments.pop(parameter.name, ())]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            args.append(arguments.pop(parameter.name))
    return args, arguments


def check_hash_elsewhere(stage: Stage) -> None:
    """Check that another process gives the same hash to a stage constructed there."""
    __tracebackhide__ = True
    call = (_hash_of_new, type(stage), *call_arguments(stage))
    with FreshProcess(*call, hash_seed=_OTHER_HASH_SEED) as process:
        try:
            elsewhere = process.result()
        except RuntimeError as error:
            fail(stage, f"it cannot be constructed in another process ({error})")
    if elsewhere != hash_of(stage):
        fail(
            stage,
            "another process gives it another hash: what identity() and an argument's "
            "psnc_config() return must not depend on hash(), id(), or the order of a set",
        )


def check_result_elsewhere(
    stage: Stage,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    expected: Any,
    sentence: str,
) -> None:
    """Check that a function returns in another process what it returned here."""
    __tracebackhide__ = True
    if not _can_be_sent(expected):
        return
    with FreshProcess(_sent, function, arguments, hash_seed=_OTHER_HASH_SEED) as process:
        try:
            sent = process.result()
        except RuntimeError as error:
            fail(stage, f"it does not work in another process ({error})")
    require_same(stage, expected, cloudpickle.loads(sent), "items", sentence)


def _can_be_sent(value: Any) -> bool:
    """Tell whether what is unpickled would be known for the same."""
    try:
        return difference(value, cloudpickle.loads(cloudpickle.dumps(value))) is None
    except Exception:
        # Whatever pickling it raises: it stays where it is.
        return False


def _sent(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    sent: bytes = cloudpickle.dumps(function(*arguments))
    return sent


def _hash_of_new(cls: type[Stage], args: list[Any], kwargs: dict[str, Any]) -> str:
    return hash_of(cls(*args, **kwargs))
