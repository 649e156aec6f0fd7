"""What a stage remembers of its construction, and what it says of its parameters."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import pickle
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import attrs
import cloudpickle
import pytest
from stages_for_tests import Add, Discard, Double, Numbers, Sum, WriteText

from psnc import Filter, Param, Pipeline, SequenceSource, Sink, Source, StatefulFilter
from psnc.stages import constructor_arguments

if TYPE_CHECKING:
    from decimal import Decimal as OnlyForTypeCheckers


class Pass(Filter[Any, Any]):
    """A base whose subclasses only need a constructor."""

    def __call__(self, items: Iterator[Any]) -> Iterator[Any]:
        return items


class Annotations(Pass):
    def __init__(self, path: Path, count: int = 3, *, label: str | None = None, anything=1) -> None:
        """Annotated, but for one."""


class Variadic(Pass):
    def __init__(self, first: int, *rest: float, **options: str) -> None:
        """Takes anything."""


class Described(Pass):
    def __init__(
        self,
        token: Annotated[str, Param(secret=True, description="What opens the door.")],
        size: Annotated[int, "not a Param"] = 2,
    ) -> None:
        """Says more in the signature."""


class Overridden(Pass):
    def __init__(self, *args: Any) -> None:
        self.args = args

    @classmethod
    def params(cls) -> list[Param]:
        return [Param(name="args", description="Anything at all.")]


class Renaming(Pass):
    """Keeps its argument under another name, and changed."""

    def __init__(self, threshold: float) -> None:
        self._limit = threshold * 100


class Mutating(Pass):
    def __init__(self, names: list[str], table: dict[str, list[int]], seen: set[int]) -> None:
        names.sort()
        table["a"].append(99)
        seen.clear()
        self.names = names


class Base(Pass):
    def __init__(self, scale: float) -> None:
        self.scale = scale


class Derived(Base):
    def __init__(self, percent: int) -> None:
        super().__init__(percent / 100)


@attrs.frozen
class SlottedFrozen(Pass):
    width: int
    height: int = 4
    _depth: int = 5

    @property
    def volume(self) -> int:
        return self.width * self.height * self._depth


@attrs.define
class Slotted(Pass):
    tags: list[str] = attrs.Factory(list)


@dataclasses.dataclass
class Data(Pass):
    width: int
    height: int = 4


@dataclasses.dataclass
class DataWithFactory(Pass):
    tags: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlottedData(Pass):
    width: int
    height: int = 4


def by_name(stage_class: type[Any]) -> dict[str, Param]:
    return {param.name: param for param in stage_class.params()}


# --- params() ---------------------------------------------------------------------------------


def test_params_are_derived_from_the_signature_and_its_annotations() -> None:
    params = by_name(Annotations)
    assert list(params) == ["path", "count", "label", "anything"]
    assert params["path"].type is Path
    assert params["path"].required
    assert (params["count"].type, params["count"].default) == (int, 3)
    assert not params["count"].required
    assert params["label"].type == (str | None)
    assert params["label"].default is None
    assert params["anything"].type is Any
    assert not any(param.secret for param in params.values())


def test_variadic_parameters_are_listed_and_not_required() -> None:
    params = by_name(Variadic)
    assert [params[name].required for name in ("first", "rest", "options")] == [True, False, False]
    assert (params["rest"].type, params["rest"].default) == (float, ())
    assert (params["options"].type, params["options"].default) == (str, {})


def test_a_param_in_an_annotation_says_what_the_signature_cannot() -> None:
    token = by_name(Described)["token"]
    assert (token.type, token.secret) == (str, True)
    assert token.description == "What opens the door."
    assert token.default is inspect.Parameter.empty
    size = by_name(Described)["size"]
    assert (size.type, size.secret, size.default) == (int, False, 2)


def test_a_stage_without_a_constructor_has_no_params() -> None:
    assert Double.params() == []
    assert constructor_arguments(Double()) == {}


def test_params_can_be_overridden() -> None:
    assert [param.description for param in Overridden.params()] == ["Anything at all."]
    assert constructor_arguments(Overridden(1, 2)) == {"args": (1, 2)}


@pytest.mark.parametrize("stage_class", [SlottedFrozen, Data, FrozenSlottedData])
def test_params_of_attrs_classes_and_dataclasses_come_from_their_fields(
    stage_class: type[Any],
) -> None:
    params = by_name(stage_class)
    assert (params["width"].type, params["width"].required) == (int, True)
    assert (params["height"].type, params["height"].default) == (int, 4)


# --- captured arguments -----------------------------------------------------------------------


def test_arguments_are_captured_by_name_with_their_defaults() -> None:
    assert constructor_arguments(Numbers(3)) == {"count": 3, "items": 1}
    assert constructor_arguments(Numbers(items=2, count=5)) == {"count": 5, "items": 2}


def test_variadic_arguments_are_captured() -> None:
    captured = constructor_arguments(Variadic(1, 2.0, 3.0, a="b", c="d"))
    assert captured == {"first": 1, "rest": (2.0, 3.0), "a": "b", "c": "d"}


def test_attributes_may_be_called_otherwise_than_arguments() -> None:
    assert constructor_arguments(Renaming(0.5)) == {"threshold": 0.5}


def test_arguments_are_those_given_though_the_constructor_changes_its_containers() -> None:
    names, table, seen = ["b", "a"], {"a": [1]}, {1, 2}
    stage = Mutating(names, table, seen)
    assert names == ["a", "b"]
    captured = {"names": ["b", "a"], "table": {"a": [1]}, "seen": {1, 2}}
    assert constructor_arguments(stage) == captured


class Size(NamedTuple):
    sides: list[int]


@attrs.define
class Slots:
    sides: list[int]


@dataclasses.dataclass
class Ring:
    sides: list[int]
    next: Any = None


class Consuming(Pass):
    def __init__(self, value: Any, consume: Callable[[Any], object]) -> None:
        consume(value)
        self.value = value

    def psnc_config(self) -> dict[str, Any]:
        """Leave out what has no canonical form."""
        return {"value": constructor_arguments(self)["value"]}


def consume_ring(ring: Ring) -> None:
    ring.sides.clear()
    ring.next.sides = [0]


MUTABLE: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "ordered dictionary": (lambda: OrderedDict(a=[1], b=[2]), lambda value: value.popitem()),
    "dictionary with defaults": (lambda: defaultdict(list, a=[1]), lambda value: value["b"]),
    "list inside": (lambda: OrderedDict(a=[1]), lambda value: value["a"].pop()),
    "counter": (lambda: Counter("aab"), lambda value: value.subtract("a")),
    "list in a named tuple": (lambda: Size([1, 2]), lambda value: value.sides.pop()),
    "read-only view": (lambda: MappingProxyType({"a": [1]}), lambda value: value["a"].pop()),
    "bytes": (lambda: bytearray(b"ab"), lambda value: value.pop()),
    "dataclass": (lambda: Ring([1]), lambda value: setattr(value, "sides", [2])),
    "list in a dataclass": (lambda: Ring([1]), lambda value: value.sides.pop()),
    "attrs class": (lambda: Slots([1]), lambda value: setattr(value, "sides", [2])),
    "list in an attrs class": (lambda: Slots([1]), lambda value: value.sides.pop()),
    "one in the other": (lambda: Ring([1], Slots([2])), consume_ring),
    "in a container": (lambda: {"a": [Slots([1])]}, lambda value: value["a"][0].sides.pop()),
}


@pytest.mark.parametrize("kind", MUTABLE)
def test_the_hash_is_of_what_was_given_though_the_constructor_changes_it(kind: str) -> None:
    make, consume = MUTABLE[kind]
    value = make()
    changed = Numbers(1).filter(Consuming(value, consume))
    left_alone = Numbers(1).filter(Consuming(make(), leave))
    assert value_of(changed) == value_of(left_alone)
    # The constructor was given the very thing, and has changed it.
    assert value_of(Numbers(1).filter(Consuming(value, leave))) != value_of(changed)


def leave(value: Any) -> None:
    """Leave a value as it is."""


def value_of(pipeline: Pipeline[Any]) -> Any:
    """Return what stands for the value in a pipeline's configuration."""
    return pipeline.config["filters"][0]["params"]["value"]


def test_values_that_refer_to_each_other_in_a_circle_can_be_arguments() -> None:
    ring = Ring([1])
    ring.next = Ring([2], ring)
    captured = constructor_arguments(Consuming(ring, leave))["value"]
    assert captured.next.next is captured is not ring


class Closing:
    closed: ClassVar[list[int]] = []


@attrs.define
class Handle:
    number: int

    def __del__(self) -> None:
        Closing.closed.append(self.number)


def test_what_does_something_at_its_end_is_not_copied() -> None:
    handle = Handle(5)
    stage = Consuming(handle, leave)
    assert constructor_arguments(stage)["value"] is handle
    del stage
    gc.collect()
    assert Closing.closed == []


def test_the_items_of_a_list_that_is_a_source_are_the_very_ones() -> None:
    rings = [Ring([1]), Ring([2])]
    assert [item for index in SequenceSource(rings) for item in index] == rings
    assert next(iter(SequenceSource(rings)[0])) is rings[0]


def test_arguments_are_those_given_though_the_caller_changes_them_later() -> None:
    tags = ["x"]
    stage = Slotted(tags)
    tags.append("y")
    assert constructor_arguments(stage) == {"tags": ["x"]}


def test_a_subclass_is_known_by_its_own_arguments_not_those_it_hands_up() -> None:
    stage = Derived(percent=50)
    assert stage.scale == 0.5
    assert constructor_arguments(stage) == {"percent": 50}


def test_an_attrs_stage_captures_a_private_field_by_its_argument() -> None:
    stage = SlottedFrozen(2, depth=6)
    assert stage.volume == 48
    assert constructor_arguments(stage) == {"width": 2, "height": 4, "depth": 6}


@pytest.mark.parametrize("stage_class", [Slotted, DataWithFactory])
def test_a_default_that_a_factory_makes_is_the_value_that_it_makes(
    stage_class: Callable[..., Filter[Any, Any]],
) -> None:
    assert constructor_arguments(stage_class()) == {"tags": []}
    left_out, given, other = (
        Numbers(1).filter(stage_class(*arguments)).config_hash
        for arguments in ((), ([],), (["x"],))
    )
    assert left_out == given != other


@pytest.mark.parametrize("stage_class", [Slotted, DataWithFactory])
def test_a_factorys_default_is_saved_and_loaded(
    stage_class: Callable[..., Filter[Any, Any]],
) -> None:
    pipeline = Numbers(1).filter(stage_class())
    pipeline.save("saved.toml")
    assert Pipeline.load("saved.toml").config_hash == pipeline.config_hash


def test_wrong_arguments_fail_at_construction() -> None:
    with pytest.raises(TypeError, match="count"):
        Numbers()  # type: ignore[call-arg]


@pytest.mark.parametrize("make", [lambda: Double(5), lambda: Double(amount=5)])
def test_a_stage_without_a_constructor_takes_no_arguments(make: Any) -> None:
    with pytest.raises(TypeError):
        make()


# --- copies -----------------------------------------------------------------------------------

STAGES = [
    Numbers(3),
    Derived(percent=50),
    Renaming(0.25),
    Variadic(1, 2.0, a="b"),
    SlottedFrozen(2, depth=6),
    Slotted(["x"]),
    Data(3),
    FrozenSlottedData(3, 9),
    Mutating(["b", "a"], {"a": [1]}, {1}),
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: type(stage).__name__)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_state_and_captured_arguments(stage: Any, protocol: int) -> None:
    restored = pickle.loads(pickle.dumps(stage, protocol))
    assert type(restored) is type(stage)
    assert constructor_arguments(restored) == constructor_arguments(stage)
    assert vars(restored).keys() == vars(stage).keys()


def test_pickled_slotted_stages_keep_their_fields() -> None:
    assert pickle.loads(pickle.dumps(SlottedFrozen(2, depth=6))).volume == 48
    assert pickle.loads(pickle.dumps(FrozenSlottedData(3, 9))).height == 9
    assert pickle.loads(pickle.dumps(Slotted(["x"]))).tags == ["x"]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: type(stage).__name__)
def test_copies_keep_captured_arguments(stage: Any, duplicate: Any) -> None:
    assert constructor_arguments(duplicate(stage)) == constructor_arguments(stage)


def test_a_class_defined_in_a_function_travels_by_cloudpickle() -> None:
    class Local(Pass):
        def __init__(self, amount: int) -> None:
            self.amount = amount

        def __call__(self, items: Iterator[int]) -> Iterator[int]:
            return (item + self.amount for item in items)

    restored = pickle.loads(cloudpickle.dumps(Local(4)))
    assert list(restored(iter([1]))) == [5]
    assert constructor_arguments(restored) == {"amount": 4}


def test_a_stage_with_a_reduce_of_its_own_is_restored_by_it() -> None:
    restored = pickle.loads(pickle.dumps(Reducing(7)))
    assert constructor_arguments(restored) == {"amount": 7}


class Reducing(Pass):
    def __init__(self, amount: int) -> None:
        self.amount = amount

    def __reduce__(self) -> Any:
        return (Reducing, (self.amount,))


# --- secrets in every way of writing a signature ----------------------------------------------


class SecretUnion(Pass):
    def __init__(self, token: Annotated[str, Param(secret=True)] | None = None) -> None:
        """The mark is inside a union."""


class SecretBesideUnknownName(Pass):
    def __init__(
        self,
        token: Annotated[str, Param(secret=True)],
        number: OnlyForTypeCheckers | None = None,
    ) -> None:
        """Another parameter's annotation cannot be resolved when the program runs."""


class SecretKeywords(Pass):
    def __init__(self, **credentials: Annotated[str, Param(secret=True)]) -> None:
        """Every keyword is a secret."""


class SecretPositional(Pass):
    def __init__(self, *credentials: Annotated[str, Param(secret=True)]) -> None:
        """Every argument is a secret."""


@attrs.frozen
class SecretAttrs(Pass):
    token: Annotated[str, Param(secret=True)]


@dataclasses.dataclass
class SecretData(Pass):
    token: Annotated[str, Param(secret=True)]


@pytest.mark.parametrize(
    "stage",
    [
        Described("SESAME"),
        SecretUnion("SESAME"),
        SecretBesideUnknownName("SESAME"),
        SecretKeywords(token="SESAME"),
        SecretPositional("SESAME"),
        SecretAttrs("SESAME"),
        SecretData("SESAME"),
    ],
    ids=lambda stage: type(stage).__name__,
)
def test_a_parameter_marked_secret_stays_out_however_the_signature_is_written(stage: Any) -> None:
    pipeline = Pipeline(source=Numbers(1), filters=[stage], sink=Discard())
    assert "SESAME" not in pipeline.config_json
    assert "$secret" in pipeline.config_json


# --- the base classes -------------------------------------------------------------------------


@pytest.mark.parametrize("base", [Source, Filter, Sink])
def test_the_base_classes_cannot_be_constructed(base: type[Any]) -> None:
    with pytest.raises(TypeError, match="abstract"):
        base()


def test_a_source_iterates_over_its_indices() -> None:
    assert [list(items) for items in Numbers(3, items=2)] == [[0, 0], [1, 1], [2, 2]]


def test_a_source_builds_a_pipeline_with_filter_and_with_write() -> None:
    source, sink = Numbers(3), WriteText("out")
    filtered = source.filter(Double())
    assert isinstance(filtered, Pipeline)
    assert filtered.sink is None
    written = source.write(sink)
    assert (written.source, written.filters, written.sink) == (source, (), sink)


def test_a_filter_that_flushes_is_stateful() -> None:
    assert isinstance(Sum(), StatefulFilter)
    assert not isinstance(Add(), StatefulFilter)


def test_stages_are_generic_in_their_items() -> None:
    assert Source[int] is not Source[str]
    assert issubclass(Numbers, Source)
    pipeline = Pipeline[int](source=Numbers(2), sink=Discard())
    assert isinstance(pipeline, Pipeline)
