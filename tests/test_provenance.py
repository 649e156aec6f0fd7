"""The same configuration has the same hash everywhere, and another one has another."""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import math
import operator
import os
import pickle
import re
import sqlite3
import sys
import textwrap
import typing
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path, PurePosixPath
from threading import Event
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar
from uuid import UUID

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stages_for_tests import Add, Discard, Double, Numbers

from psnc import ConfigurationError, Filter, Param, Pipeline, Source

T = TypeVar("T")


class Keep(Filter[Any, Any]):
    """A filter with one parameter, of any kind."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def __call__(self, items: Iterator[Any]) -> Iterator[Any]:
        return items


class Unlock(Keep):
    def __init__(self, value: Annotated[Any, Param(secret=True)] = None) -> None:
        super().__init__(value)


class Table(Source[float]):
    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Iterator[float]:
        yield float(self.values[index])


class Base:
    factor = 1

    @classmethod
    def scale(cls, x: float) -> float:
        return cls.factor * x


class Two(Base):
    factor = 2


class Ten(Base):
    factor = 10

    @classmethod
    def own(cls, x: float) -> float:
        return x


class Texts(dict[str, str]):
    """Inherits class methods that are written in C."""


class Color(enum.Enum):
    RED = 1
    GREEN = 2


class Shade(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Mode(enum.IntFlag):
    FAST = 1
    SAFE = 2


@attrs.frozen
class Cell:
    a: float
    b: tuple[int, ...] = ()


@attrs.frozen
class OtherCell:
    a: float
    b: tuple[int, ...] = ()


@dataclasses.dataclass
class Box:
    a: float
    inner: Cell | None = None


class Own:
    def __init__(self, knob: int) -> None:
        self.knob = knob
        self.cache: dict[int, int] = {id(self): 1}

    def psnc_config(self) -> dict[str, int]:
        return {"knob": self.knob}

    def method(self) -> int:
        return self.knob


class Either(Generic[T]):
    def __init__(self, knob: int) -> None:
        self.knob = knob

    def psnc_config(self) -> dict[str, int]:
        return {"knob": self.knob}


def make_other_texts() -> type[dict[str, str]]:
    namespace = {"__module__": "elsewhere", "__qualname__": "Texts"}
    return type("Texts", (dict,), namespace)


def module_function(x: float) -> float:
    return x


def other_function(x: float) -> float:
    return x


def hash_of(value: Any, stage_class: type[Keep] = Keep) -> str:
    pipeline = Pipeline(source=Numbers(1), filters=[stage_class(value)], sink=Discard())
    return pipeline.config_hash


# --- properties -------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=8)
    | st.dates()
    | st.sampled_from(list(Color))
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text() | st.integers(), values, max_size=6), st.randoms())
def test_the_order_of_a_dictionary_does_not_matter(table: dict[Any, Any], random: Any) -> None:
    pairs = list(table.items())
    random.shuffle(pairs)
    assert hash_of(dict(pairs)) == hash_of(table)


@given(st.sets(scalars | st.tuples(st.integers(), st.text()), max_size=8), st.randoms())
def test_the_order_of_a_set_does_not_matter(members: set[Any], random: Any) -> None:
    shuffled = list(members)
    random.shuffle(shuffled)
    assert hash_of(set(shuffled)) == hash_of(members) == hash_of(frozenset(shuffled))


@given(st.lists(values, max_size=5))
def test_a_tuple_is_a_list(items: list[Any]) -> None:
    assert hash_of(tuple(items)) == hash_of(items)


@given(st.text(st.characters(exclude_characters="\0/"), min_size=1).filter(lambda t: t != "."))
def test_a_path_is_its_text(text: str) -> None:
    assert hash_of(Path(text)) == hash_of(text) == hash_of(PurePosixPath(text))


@given(values)
def test_equal_values_built_twice_have_one_hash(value: Any) -> None:
    assert hash_of(pickle.loads(pickle.dumps(value))) == hash_of(value)


@given(values)
def test_the_configuration_is_json_that_survives_a_round_trip(value: Any) -> None:
    pipeline = Pipeline(source=Numbers(1), filters=[Keep(value)], sink=Discard())
    parsed = json.loads(pipeline.config_json)
    assert json.dumps(parsed, sort_keys=True, separators=(",", ":")) == pipeline.config_json
    assert parsed == pipeline.config


@given(values, values)
def test_different_plain_values_have_different_hashes(one: Any, other: Any) -> None:
    # JSON's own view decides what is different: True is not 1 there, and 1.0 is not 1.
    assert (hash_of(one) == hash_of(other)) == (plain(one) == plain(other))


def plain(value: Any) -> Any:
    if isinstance(value, list):
        return ["list", *map(plain, value)]
    if isinstance(value, dict):
        return sorted(["dict", key, repr(plain(item))] for key, item in value.items())
    return [type(value).__name__, repr(value)]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_changing_one_element_of_an_array_changes_the_hash(
    items: list[int], data: st.DataObject
) -> None:
    changed = list(items)
    changed[data.draw(st.integers(0, len(items) - 1))] += 1
    assert hash_of(np.array(items)) != hash_of(np.array(changed))


# --- numbers, text, containers ----------------------------------------------------------------

# Not as the linter has it written.
TYPING_LIST = vars(typing)["List"]

DISTINCT: list[tuple[str, list[Any]]] = [
    ("scalars", [None, True, 1, 1.0, "1", b"1", "None", "", 0, False, -1, 10**30]),
    ("special floats", [math.nan, math.inf, -math.inf, 0.0, "nan", "inf"]),
    ("containers", [[], {}, set(), "", [[]], [None], {"a": []}, {1: 2}, {"1": 2}]),
    ("list and set", [[1, 2], {1, 2}, [2, 1]]),
    ("look-alikes", [{"$float": "nan"}, math.nan, {"$set": []}, set(), {"$bytes": ""}, b""]),
    ("times", [date(2024, 1, 2), datetime(2024, 1, 2), "2024-01-02", time(1), timedelta(1)]),
    ("zones", [datetime(2024, 1, 2, tzinfo=UTC), datetime(2024, 1, 2)]),
    ("numbers", [Decimal("1"), Decimal("1.0"), Fraction(1), 1, complex(1), complex(1, 1)]),
    ("enums", [Color.RED, Color.GREEN, Shade.RED, Level.LOW, 1, Color]),
    ("flags", [Access.READ, Access.WRITE, Access.READ | Access.WRITE, Access(0)]),
    ("bits that no flag has", [Mode(0), Mode(1), Mode(8), Mode(16), Mode(9)]),
    ("records", [Cell(1.0), Cell(2.0), OtherCell(1.0), Box(1.0), Box(1.0, Cell(1.0)), Cell]),
    ("ranges", [range(3), range(1, 3), range(0, 3, 2), slice(3), [0, 1, 2]]),
    ("patterns", [re.compile("a"), re.compile("a", re.I), re.compile("b"), "a"]),
    ("ids", [UUID(int=1), UUID(int=2), UUID(int=1).hex]),
    ("stages", [Add(1), Add(2), Double(), Add]),
    ("functions", [module_function, other_function, len, max, np.add, np.exp, Cell, int]),
    ("partials", [partial(pow, 2), partial(pow, 3), partial(pow, exp=2), pow]),
    ("methods", [Own(1).method, Own(2).method, Own.method, Own(1)]),
    ("methods of built-in objects", [{1: 2}.get, {1: 3}.get, {1: 2}.pop, "a".join, "b".join]),
    ("slot methods of built-in objects", [(5).__add__, (6).__add__, (5).__sub__]),
    ("class methods", [dict.fromkeys, OrderedDict.fromkeys, Path.cwd]),
    ("inherited class methods", [Base.scale, Two.scale, Ten.scale, Ten.own, Two.mro, Ten.mro]),
    ("inherited class methods in C", [dict.fromkeys, Texts.fromkeys, make_other_texts().fromkeys]),
    ("generic classes", [list, list[int], list[str], dict[str, int], dict[int, str], tuple[int]]),
    ("tuples", [tuple, tuple[int, ...], tuple[int], tuple[int, int]]),
    ("typing", [TYPING_LIST, TYPING_LIST[int], TYPING_LIST[str], int | None, int | str]),
    ("typing of values", [Literal["a"], Literal["b"], Annotated[int, 1], Annotated[int, 2]]),
    ("typing of functions", [Callable[[int], str], Callable[[str], str], Callable[..., str]]),
    ("generic classes of one's own", [Either, Either[int], Either[str], Either(1)]),
    (
        "structured dtypes",
        [
            np.dtype("V4"),
            np.dtype("f4"),
            np.dtype([("a", "<f4")]),
            np.dtype([("a", "<i4")]),
            np.dtype([("b", "<i4")]),
            np.dtype([("a", "<f4"), ("b", "<i4")]),
            np.dtype([("b", "<i4"), ("a", "<f4")]),
            np.dtype([("a", "i1"), ("b", "<i4")]),
            np.dtype([("a", "i1"), ("b", "<i4")], align=True),
            np.dtype([("a", [("b", "<f4")])]),
            np.dtype([("a", [("b", "<i4")])]),
            np.dtype(("<f4", (2, 3))),
            np.dtype(("<f4", (3, 2))),
            np.dtype([("a", "<f4", (2,))]),
        ],
    ),
    (
        "structured scalars",
        [
            np.zeros((), dtype)[()]
            for dtype in (
                [("a", "<f4")],
                [("a", "<f8")],
                [("a", "<i4")],
                [("b", "<i4")],
                [("a", "<i4"), ("b", "<i4")],
                [("b", "<i4"), ("a", "<i4")],
            )
        ]
        + [(0,), [0.0]],
    ),
    ("operators", [operator.itemgetter, operator.add, operator.mul]),
    ("NumPy times", [np.datetime64(5, "ns"), np.datetime64(5, "ps"), np.timedelta64(5, "ns"), 5]),
    ("NumPy no time", [np.datetime64("NaT", "s"), None]),
]


@pytest.mark.parametrize("different", [pytest.param(v, id=name) for name, v in DISTINCT])
def test_different_values_have_different_hashes(different: list[Any]) -> None:
    hashes = [hash_of(value) for value in different]
    alike = [
        (different[i], different[j])
        for i in range(len(hashes))
        for j in range(i)
        if hashes[i] == hashes[j]
    ]
    assert alike == []


# The beginnings of hashes that results have been recorded under.
RECORDED: dict[str, tuple[Any, str]] = {
    "None": (None, "e1bd232d907cf1af"),
    "list": ([1, 2.5, "a", None, True], "674169fe7fbf90cb"),
    "dict": ({"b": {3, 1, 2}, 1: "x"}, "93761c6ad5b45b3a"),
    "date": (date(2024, 1, 2), "75f8533209b664d9"),
    "bytes": (b"ab", "8d1cc0b4c4b5ae65"),
    "nan": (math.nan, "a09a8f4293f36420"),
    "pattern": (re.compile("a", re.I), "d2f40aa7c78d022f"),
    "uuid": (UUID(int=1), "c096af8b48d19d3d"),
    "range": (range(1, 3), "d0f4b655b8d425a4"),
    "enum": (Color.RED, "13b799ca25637495"),
    "flags": (Access.READ | Access.WRITE, "fd3327c7ffc97e28"),
    "no flag": (Access(0), "8c8b4eb8b00d09e0"),
    "int enum": (Level.LOW, "81c7b61201f04fca"),
    "attrs": (Cell(1.0, (2,)), "04b20b2b58184701"),
    "dataclass": (Box(1.0, Cell(1.0)), "fdac66b469237720"),
    "own": (Own(3), "174f489cda26e876"),
    "method": (Own(3).method, "11986ba56bcf36cc"),
    "function": (module_function, "7ac497e95403faca"),
    "class": (Cell, "7d7c544cb72699b1"),
    "built-in class": (list, "3cbd1e6dcaced06f"),
    "built-in": (len, "433a16a7cd9250b2"),
    "ufunc": (np.add, "5b9382806bcc6267"),
    "partial": (partial(pow, 2, mod=5), "5687707b8e4e929e"),
    "class method": (dict.fromkeys, "d567d394a4772751"),
    "class method of C": (datetime.fromisoformat, "722baac852036967"),
    "inherited class method of C": (datetime.fromordinal, "4b735bf53e9a1506"),
    "class method of Python": (Fraction.from_float, "6148e9e8539d5963"),
    "class that has moved": (Path, "50ca3df7a464514e"),
    "method of an object": ({1: 2}.get, "a5828f5e92984b3f"),
    "ordered": (OrderedDict(b=1, a=2), "c271455efdcaed6b"),
    "array": (np.arange(6, dtype="<i4").reshape(2, 3), "b5c2fcc2d103f8c8"),
    "times": (np.array(["2024-01-02"], "M8[D]"), "060fb62f7c809109"),
    "objects": (np.array([1, "a", None], object), "301b20ddcaf2e299"),
    "mask": (np.ma.array(np.array([1, 2], "<i4"), mask=[0, 1]), "dd0a23312c70238a"),
    "structured": (np.array([(1, 2.5)], [("a", "<i4"), ("b", "<f8")]), "e303de561dfe46ed"),
    "dtype": (np.dtype("<f8"), "a86c6140696f5d49"),
    "NumPy time": (np.datetime64(5, "ns"), "c44da620128b0ef0"),
    "stage": (Add(2), "dacba024681af525"),
    "void": (np.void(b"ab"), "8d1cc0b4c4b5ae65"),
    "void dtype": (np.dtype("V8"), "0323d6d8008dfa7b"),
    "bare typing": (TYPING_LIST, "e5922100fef28d53"),
}
if sys.version_info < (3, 13):
    # Later it is the method of a base that earlier there was not.
    RECORDED["class method of pathlib"] = (Path.cwd, "83124b7ba2e89c0f")


@pytest.mark.parametrize("kind", RECORDED)
def test_what_was_recorded_is_found_again(kind: str) -> None:
    value, beginning = RECORDED[kind]
    assert hash_of(value)[: len(beginning)] == beginning


SAME: list[tuple[Any, Any]] = [
    (math.nan, float("nan")),
    (np.float64(1.5), 1.5),
    (np.int32(7), 7),
    (np.bool_(True), True),
    (np.str_("a"), "a"),
    (np.float64("inf"), math.inf),
    (Path("a") / "b", "a/b"),
    ([1, (2, 3)], (1, [2, 3])),
    (OrderedDict(b=1, a=2), {"a": 2, "b": 1}),
    (MappingProxyType({"a": 1}), {"a": 1}),
    ({"a", "b", "c"}, frozenset("cba")),
    ({1: "x", 2: "y"}, {2: "y", 1: "x"}),
    (Cell(1.0, (2, 3)), Cell(1.0, (2, 3))),
    (Box(1.0, Cell(2.0)), Box(1.0, Cell(2.0))),
    (Own(3), Own(3)),
    (Own(3).method, Own(3).method),
    (bytearray(b"ab"), b"ab"),
    (partial(pow, 2, mod=5), partial(pow, 2, mod=5)),
    (np.dtype("<f8"), np.dtype(float)),
    (np.dtype([("a", "<f4")]), np.dtype({"names": ["a"], "formats": ["<f4"]})),
    (Two.scale, Two.scale),
    (list[int], TYPING_LIST[int]),
    (Mode(8), Mode(8)),
    ({1: 2}.get, {1: 2}.get),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=lambda value: type(value).__name__)
def test_the_same_value_written_otherwise_has_the_same_hash(one: Any, other: Any) -> None:
    assert hash_of(one) == hash_of(other)


def test_defaults_written_out_make_no_difference() -> None:
    one = Pipeline(source=Numbers(3), sink=Discard())
    other = Pipeline(source=Numbers(count=3, items=1), sink=Discard(files=1))
    assert one.config_hash == other.config_hash


def test_stages_and_their_order_are_part_of_the_hash() -> None:
    source = Numbers(3)
    pipelines = [
        source.write(Discard()),
        source.filter(Double()).write(Discard()),
        source.filter(Double()).filter(Add()).write(Discard()),
        source.filter(Add()).filter(Double()).write(Discard()),
        source.filter(Add()).filter(Double()).write(Discard(2)),
        Numbers(4).filter(Add()).filter(Double()).write(Discard()),
    ]
    assert len({pipeline.config_hash for pipeline in pipelines}) == len(pipelines)


def test_what_is_not_configuration_is_not_part_of_the_hash(tmp_path: Path) -> None:
    plain = Pipeline(source=Numbers(3), sink=Discard())
    other = Pipeline(
        source=Numbers(3),
        sink=Discard(),
        resume=True,
        db_dir=tmp_path,
        track_metrics=False,
        track_memory=False,
        track_gpu=False,
    )
    assert plain.config_hash == other.config_hash


def test_the_hash_is_the_sha256_of_the_canonical_json() -> None:
    import hashlib

    pipeline = Pipeline(source=Numbers(3), filters=[Keep("é")], sink=Discard())
    assert pipeline.config_hash == hashlib.sha256(pipeline.config_json.encode()).hexdigest()
    assert pipeline.config_json.isascii()


# --- arrays -----------------------------------------------------------------------------------


def test_sources_that_differ_in_the_middle_of_a_long_array_have_different_hashes() -> None:
    values = np.zeros(100_000)
    changed = values.copy()
    changed[50_000] = 1e-300
    one, other = (Pipeline(source=Table(array), sink=Discard()) for array in (values, changed))
    assert one.config_hash != other.config_hash
    assert one.db_path.name[:16] != other.db_path.name[:16]


ARRAYS_ALIKE: dict[str, tuple[Any, Any]] = {
    "Fortran order": (
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    ),
    "a strided view": (np.arange(12)[::2], np.array([0, 2, 4, 6, 8, 10])),
    "a reversed view": (np.arange(3)[::-1], np.array([2, 1, 0])),
    "a read-only array": (np.frombuffer(b"abcd", "u1"), np.array(list(b"abcd"), "u1")),
    "object arrays": (np.array([1, "a", None], object), np.array([1, "a", None], object)),
    "a masked array": (np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2], mask=[0, 1])),
}


@pytest.mark.parametrize("name", ARRAYS_ALIKE)
def test_how_an_array_lies_in_memory_makes_no_difference(name: str) -> None:
    one, other = ARRAYS_ALIKE[name]
    assert hash_of(one) == hash_of(other)


STRUCTURED = np.dtype([("a", "i4"), ("b", "f8")])

ARRAYS_DIFFERENT: dict[str, list[Any]] = {
    "dtype": [np.zeros(4, dtype) for dtype in ("f8", "f4", "i8", "i4", "u8", "?", "c16", "S4")],
    "shape": [np.zeros(6), np.zeros((2, 3)), np.zeros((3, 2)), np.zeros((6, 1))],
    "0-d": [np.array(1.0), np.array([1.0]), 1.0, np.array(2.0)],
    "empty": [np.zeros(0), np.zeros((0, 3)), np.zeros((3, 0)), np.zeros(0, "i4"), []],
    "array and list": [np.array([1, 2]), [1, 2]],
    "dates": [
        np.array(["2024-01-02"], "M8[D]"),
        np.array(["2024-01-03"], "M8[D]"),
        np.array(["2024-01-02"], "M8[s]"),
        np.array(["NaT"], "M8[D]"),
        np.array([5], "m8[s]"),
        np.array([5], "m8[ms]"),
    ],
    "structured": [
        np.zeros(2, STRUCTURED),
        np.ones(2, STRUCTURED),
        np.zeros(2, [("a", "i4"), ("c", "f8")]),
        np.zeros(2, [("b", "i4"), ("a", "f8")]),
        np.zeros(2, [("b", "f8"), ("a", "i4")]),
    ],
    "objects": [
        np.array([1, "a"], object),
        np.array([1, "b"], object),
        np.array([[1], ["a"]], object),
        np.array([], object),
    ],
    "text": [np.array(["a", "b"]), np.array(["a", "c"]), np.array(["a", "b"], "U5")],
    "values": [np.array([0.0, 1.0]), np.array([1.0, 0.0]), np.array([np.nan, 0.0])],
    "masks": [
        np.ma.array([1, 2], mask=[0, 1]),
        np.ma.array([1, 2], mask=[1, 0]),
        np.array([1, 2]),
    ],
}


@pytest.mark.parametrize("name", ARRAYS_DIFFERENT)
def test_different_arrays_have_different_hashes(name: str) -> None:
    arrays = ARRAYS_DIFFERENT[name]
    assert len({hash_of(array) for array in arrays}) == len(arrays)


@pytest.mark.parametrize("make", [np.longdouble, np.clongdouble])
def test_numpy_numbers_wider_than_pythons_have_a_hash_of_their_value(make: Any) -> None:
    third = make(1) / make(3)
    assert hash_of(third) == hash_of(make(1) / make(3))
    assert hash_of(third) != hash_of(third + make(2) ** -62)


def test_bytes_between_the_fields_of_a_structured_array_make_no_difference() -> None:
    aligned = np.dtype([("a", "i1"), ("b", "i4")], align=True)
    dirty = np.frombuffer(bytearray(b"\xff" * 16), aligned)
    clean = np.frombuffer(bytearray(16), aligned)
    dirty["a"], dirty["b"] = 0, 0
    assert (dirty == clean).all()
    assert hash_of(dirty) == hash_of(clean)


# --- what has no canonical form ---------------------------------------------------------------


def make_local() -> Callable[[], None]:
    def local() -> None: ...

    return local


def make_local_class() -> type:
    class Local: ...

    return Local


REFUSED: dict[str, Callable[[], Any]] = {
    "lambda": lambda: lambda x: x,
    "local function": make_local,
    "local class": make_local_class,
    "object": object,
    "open file": lambda: open(os.devnull),  # noqa: SIM115
    "iterator": lambda: iter([1]),
    "generator": lambda: (i for i in [1]),
    "inside a container": lambda: {"a": [1, (object(),)]},
    "in an attrs class": lambda: Cell(object()),  # type: ignore[arg-type]
    "in a partial": lambda: partial(lambda x: x, 1),
    "in an object array": lambda: np.array([object()]),
    "time zone": lambda: timezone(timedelta(hours=1)),
    "method of an object without a form": lambda: iter([1]).__next__,
}


# --- classes inside functions -----------------------------------------------------------------


def make_scale(factor: Any) -> Filter[Any, Any]:
    class Scale(Keep):
        def __call__(self, items: Iterator[Any]) -> Iterator[Any]:
            return (factor * item for item in items)

    return Scale()


def make_scale_by_attribute(factor: Any) -> Filter[Any, Any]:
    class Scale(Keep):
        by = factor

    return Scale()


def make_scale_by_default(factor: Any) -> Filter[Any, Any]:
    class Scale(Keep):
        def __call__(self, items: Iterator[Any], by: Any = factor) -> Iterator[Any]:
            return (by * item for item in items)

    return Scale()


def make_scale_by_property(factor: Any) -> Filter[Any, Any]:
    class Scale(Keep):
        @property
        def by(self) -> Any:
            return factor

    return Scale()


def make_scale_by_base(factor: Any) -> Filter[Any, Any]:
    class Inner(Keep):
        @staticmethod
        def by() -> Any:
            return factor

    class Scale(Inner):
        pass

    return Scale()


def make_scale_by_function(factor: Any) -> Filter[Any, Any]:
    def scaled(self: Any, items: Iterator[Any]) -> Iterator[Any]:
        return (factor * item for item in items)

    named = {"__module__": __name__, "__qualname__": "make.<locals>.Scale"}
    return type("Scale", (Keep,), {**named, "__call__": scaled})()


def config_hash_of(filter: Filter[Any, Any]) -> str:
    return Pipeline(source=Numbers(1), filters=[filter], sink=Discard()).config_hash


def make_scale_by_helper(factor: Any) -> Filter[Any, Any]:
    import math

    def scaled(item: Any) -> Any:
        return scaled(item) if math.isnan(item) else factor * item

    class Scale(Keep):
        def __call__(self, items: Iterator[Any]) -> Iterator[Any]:
            return map(scaled, items)

    return Scale()


MAKE_SCALE = [
    make_scale,
    make_scale_by_attribute,
    make_scale_by_default,
    make_scale_by_property,
    make_scale_by_base,
    make_scale_by_function,
    make_scale_by_helper,
]


@pytest.mark.parametrize("make", MAKE_SCALE)
def test_what_a_class_has_of_its_function_is_part_of_the_hash(make: Any) -> None:
    assert config_hash_of(make(2)) == config_hash_of(make(2))
    factors = (2, 3, "2", None, (2,), Path("a"), Color.RED)
    assert len({config_hash_of(make(factor)) for factor in factors}) == len(factors)


def test_a_class_or_function_that_a_class_has_of_its_function_is_known_by_its_name() -> None:
    kinds = (module_function, other_function, Cell, make_scale, type(make_scale(2)))
    assert len({config_hash_of(make_scale(kind)) for kind in kinds}) == len(kinds)


@pytest.mark.parametrize(
    "variable", [[], {}, Event(), object()], ids=["list", "dictionary", "event", "object"]
)
def test_a_class_that_uses_what_may_change_in_its_function_is_refused(variable: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        config_hash_of(make_scale(variable))
    assert str(caught.value) == (
        "Scale: a class inside a function (make_scale.<locals>.Scale) that uses the function's "
        "'factor', which may change, has no name that tells it from another, so the pipeline has "
        "no stable hash. Pass what it uses to the constructor, or define the class at module level."
    )


def test_a_class_that_uses_a_lambda_of_its_function_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^Scale: a lambda .* Pass what it uses"):
        config_hash_of(make_scale(lambda x: x))


def test_a_class_that_has_nothing_of_its_function_is_known_by_its_name() -> None:
    def make() -> Filter[Any, Any]:
        class Careful(Keep):
            seen: ClassVar[list[Any]] = []

            def __init__(self, value: Any) -> None:
                super().__init__(value)
                Careful.seen.append(value)

            @contextmanager
            def opened(self) -> Iterator[None]:
                yield

            def __call__(self, items: Iterator[Any]) -> Iterator[Any]:
                with self.opened():
                    yield from items

        return Careful(1)

    assert config_hash_of(make()) == config_hash_of(make())


def test_attrs_classes_and_dataclasses_inside_functions_are_known_by_their_fields() -> None:
    def make(kind: Any, width: float) -> Filter[Any, Any]:
        @kind
        class Scale(Filter[Any, Any]):
            width: float
            height: float = 1.0

            def __call__(self, items: Iterator[Any]) -> Iterator[Any]:
                return items

        return Scale(width)  # type: ignore[call-arg]

    for kind in (attrs.define, attrs.frozen, dataclasses.dataclass, FROZEN_DATACLASS):
        assert config_hash_of(make(kind, 1.0)) == config_hash_of(make(kind, 1.0))
        assert config_hash_of(make(kind, 1.0)) != config_hash_of(make(kind, 2.0))


FROZEN_DATACLASS = dataclasses.dataclass(frozen=True)


def test_a_value_of_a_class_inside_a_function_is_known_by_what_the_class_has_of_it() -> None:
    def make(factor: Any) -> Any:
        @attrs.frozen
        class Inner:
            width: int

            def area(self) -> int:
                return self.width * int(factor)

        return Inner(1)

    assert hash_of(make(2)) == hash_of(make(2)) != hash_of(make(3))
    with pytest.raises(ConfigurationError, match=r"^Keep\(value=…\): .*'factor'.*no name"):
        hash_of(make([2]))


def test_members_of_an_enum_inside_a_function_are_known_by_their_values_too() -> None:
    def make(value: int) -> enum.Enum:
        class Inner(enum.Enum):
            ONLY = value

        return Inner.ONLY

    assert hash_of(make(1)) == hash_of(make(1)) != hash_of(make(2))


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_has_no_canonical_form_is_refused_by_stage_and_parameter(kind: str) -> None:
    pipeline = Pipeline(source=Numbers(1), filters=[Keep(REFUSED[kind]())], sink=Discard())
    with pytest.raises(ConfigurationError, match=r"^Keep\(value=…\): .*no (canonical form|name)"):
        _ = pipeline.config_hash


def test_a_refused_parameter_stops_a_run_before_anything_is_made(own_home: Path) -> None:
    pipeline = Pipeline(source=Numbers(1), filters=[Keep(object())], sink=Discard())
    with pytest.raises(ConfigurationError):
        pipeline[0]
    assert list(own_home.rglob("*.db")) == []


def test_a_refused_parameter_is_no_matter_where_nothing_is_recorded() -> None:
    pipeline = Pipeline(
        source=Numbers(1), filters=[Keep(object())], sink=Discard(), track_metrics=False
    )
    assert pipeline[0] == ["out/0-0.bin"]


# --- secrets ----------------------------------------------------------------------------------


def test_a_secret_is_nowhere_in_the_database(own_home: Path) -> None:
    pipeline = Pipeline(source=Numbers(2), filters=[Unlock("SESAME-9c1f")], sink=Discard())
    pipeline[0], pipeline[1]
    pipeline.summary()
    assert "SESAME" not in pipeline.config_json
    files = [path for path in own_home.rglob("*") if path.is_file()]
    assert pipeline.db_path in files
    assert b"$secret" in b"".join(path.read_bytes() for path in files)
    assert [path for path in files if b"SESAME-9c1f" in path.read_bytes()] == []


class Blurts(Unlock):
    """Says its secret in a log entry and in an error."""

    def __call__(self, items: Iterator[Any]) -> Iterator[Any]:
        logging.getLogger("blurts").warning("trying %s", self.value)
        raise ValueError(f"{self.value!r} does not open")


@pytest.mark.parametrize("nested", [False, True])
def test_what_a_stage_says_of_its_secret_is_recorded_without_it(
    own_home: Path, nested: bool
) -> None:
    filters = [Keep([Unlock("SESAME-9c1f")]), Blurts("SESAME-9c1f")]
    if nested:
        filters = [Keep({"lock": Unlock("SESAME-9c1f")}), Quotes("SESAME", "-9c1f")]
    pipeline = Pipeline(source=Numbers(1), filters=filters, sink=Discard())
    with pytest.raises(ValueError, match="SESAME-9c1f"):
        pipeline[0]
    assert pipeline.failed_indices == {0: "ValueError: '***' does not open"}
    files = [path for path in own_home.rglob("*") if path.is_file()]
    assert pipeline.db_path in files
    assert [path for path in files if b"SESAME-9c1f" in path.read_bytes()] == []


class Quotes(Filter[Any, Any]):
    """Quotes what it can know only from another stage's secret."""

    def __init__(self, one: str, other: str) -> None:
        self.whole = one + other

    def __call__(self, items: Iterator[Any]) -> Iterator[Any]:
        raise ValueError(f"{self.whole!r} does not open")


def test_a_secret_is_part_of_the_hash() -> None:
    assert hash_of("one", Unlock) != hash_of("other", Unlock)
    assert hash_of("one", Unlock) == hash_of("one", Unlock)


def test_a_secret_inside_a_stage_that_is_a_parameter_stays_out() -> None:
    pipeline = Pipeline(source=Numbers(1), filters=[Keep([Unlock("SESAME")])], sink=Discard())
    assert "SESAME" not in pipeline.config_json


def test_a_secret_without_a_canonical_form_is_refused_without_being_shown() -> None:
    class Leaky:
        def __repr__(self) -> str:
            return "SESAME"

    with pytest.raises(ConfigurationError) as caught:
        hash_of(Leaky(), Unlock)
    assert "SESAME" not in str(caught.value)


# --- other processes --------------------------------------------------------------------------

HASH_OF_MANY_THINGS = """
    import math, sys
    from datetime import date
    from pathlib import Path
    import numpy as np
    from psnc import Pipeline
    from stages_for_tests import Add, Discard, FailOn, Numbers
    values = {"b": {3, 1, 2, "x", "y", "z"}, "a": [date(2024, 1, 2), Path("p"), math.nan, len]}
    source = Numbers({"n": frozenset("abcdefg"), "v": values, "m": np.arange(5)})
    print(Pipeline(source=source, filters=[Add(2), FailOn([1])], sink=Discard()).config_hash)
"""


def test_the_hash_is_the_same_under_every_hash_seed(run_python: Any) -> None:
    code = textwrap.dedent(HASH_OF_MANY_THINGS)
    hashes = {run_python("-c", code, PYTHONHASHSEED=seed).stdout for seed in ("0", "1", "4242")}
    assert len(hashes) == 1
    assert re.fullmatch(r"[0-9a-f]{64}\n", hashes.pop())


SCRIPT = """
    import sys
    from psnc import Filter, Pipeline, run_pipeline
    from stages_for_tests import Discard, Numbers

    class Triple(Filter):
        def __call__(self, items):
            return (3 * item for item in items)

    def helper(x):
        return x

    class Apply(Filter):
        def __init__(self, function):
            self.function = function
        def __call__(self, items):
            return map(self.function, items)

    pipeline = Pipeline(
        source=Numbers(6), filters=[Triple(), Apply(helper)], sink=Discard(), resume=True
    )
"""

# There is no `if __name__ == "__main__"` here on purpose.
RUN_ON_PROCESSES = """
    import os
    run_pipeline(pipeline, n_jobs=2, backend="process_pool")
    print(pipeline.config_hash, pipeline.db_path)
    print(sorted(pipeline.completed_indices), pipeline.remaining_indices())
    print(os.getpid() in {worker["pid"] for worker in pipeline.active_workers})
"""

RUN_HERE = """
    run_pipeline(pipeline)
    print(pipeline.config_hash)
"""


@pytest.fixture
def write_script(tmp_path: Path) -> Callable[[str], Path]:
    def write(end: str) -> Path:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(SCRIPT) + textwrap.dedent(end))
        return path

    return write


def test_an_unguarded_script_runs_in_processes_and_asks_for_what_they_recorded(
    write_script: Any, run_python: Any, query: Any, own_home: Path
) -> None:
    output = run_python(write_script(RUN_ON_PROCESSES)).stdout.splitlines()
    config_hash, database = output[0].split()
    assert output[1:] == ["[0, 1, 2, 3, 4, 5] []", "False"]
    assert list(own_home.rglob("*.db")) == [Path(database)]
    assert Path(database).name == f"{config_hash[:16]}.db"
    assert query(database, "SELECT config_hash FROM pipeline_runs") == [(config_hash,)]
    assert len(query(database, "SELECT idx FROM index_results")) == 6


def test_a_script_has_one_hash_and_one_record_however_it_is_started(
    write_script: Any, run_python: Any, query: Any, own_home: Path
) -> None:
    script = write_script(RUN_HERE)
    rows = "SELECT idx, completed_at FROM index_results ORDER BY idx"
    by_path = run_python(script.name).stdout
    (database,) = own_home.rglob("*.db")
    recorded = query(database, rows)
    assert len(recorded) == 6
    assert run_python("-m", "script").stdout == by_path
    assert run_python(script.absolute()).stdout == by_path
    assert run_python("-c", "import script").stdout == by_path
    assert list(own_home.rglob("*.db")) == [database]
    assert query(database, rows) == recorded


@pytest.mark.parametrize("name", ["convert", "__main__"])
def test_a_script_in_a_package_has_one_hash_however_it_is_started(
    tmp_path: Path, run_python: Any, name: str
) -> None:
    script = tmp_path / "outer" / "inner" / f"{name}.py"
    script.parent.mkdir(parents=True)
    for directory in (script.parent, script.parent.parent):
        (directory / "__init__.py").touch()
    script.write_text(textwrap.dedent(SCRIPT) + textwrap.dedent(RUN_HERE))
    module = "outer.inner" if name == "__main__" else f"outer.inner.{name}"
    by_path = run_python(script).stdout
    assert run_python("-m", module).stdout == by_path
    if name != "__main__":
        assert run_python("-c", f"import {module}").stdout == by_path
        script.write_text(textwrap.dedent(SCRIPT))
        run_python("-m", "psnc", "run", f"{script}:pipeline", "--db-file", "by.db")
        with closing(sqlite3.connect(tmp_path / "by.db")) as connection:
            recorded = connection.execute("SELECT config_hash FROM pipeline_runs").fetchone()
        assert f"{recorded[0]}\n" == by_path


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_a_guarded_script_has_one_hash_in_processes_of_its_own(
    tmp_path: Path, run_python: Any, method: str
) -> None:
    main = f"""
    def fingerprint(_):
        fresh = Pipeline(
            source=Numbers(6), filters=[Triple(), Apply(helper)], sink=Discard(), resume=True
        )
        return fresh.config_hash, str(fresh.db_path)

    if __name__ == "__main__":
        import multiprocessing
        with multiprocessing.get_context({method!r}).Pool(1) as pool:
            assert pool.map(fingerprint, [0]) == [(pipeline.config_hash, str(pipeline.db_path))]
            print("alike")
    """
    path = tmp_path / "guarded.py"
    path.write_text(textwrap.dedent(SCRIPT) + textwrap.dedent(main))
    assert run_python(path).stdout == "alike\n"
