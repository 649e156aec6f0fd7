"""Pipelines as files: written, read, checked and run."""

from __future__ import annotations

import enum
import json
import math
import os
import re
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NewType, Protocol, TypedDict
from uuid import UUID

import attrs
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from other_programs import RunPython
from stages_for_tests import (
    Add,
    Discard,
    Double,
    FailOn,
    Numbers,
    WriteText,
    numbers_pipeline,
)

import psnc
from psnc import ConfigurationError, Filter, Param, Pipeline, PipelineError
from psnc.manager import PluginManager
from psnc.pipeline_files.yaml_text import read_yaml

if TYPE_CHECKING:
    from decimal import Context

SUFFIXES = [".toml", ".yaml", ".yml", ".json"]
HERE = __name__


class Color(enum.Enum):
    RED = 1
    GREEN = 2


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Named(Protocol):
    name: str


Metres = NewType("Metres", float)


class Pass(Filter[Any, Any]):
    """Lets items pass; has one parameter of any kind."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, items: Iterator[Any]) -> Iterator[Any]:
        return items


class OneOfEach(Pass):
    """A parameter of each kind of annotation."""

    def __init__(
        self,
        integer: int = 0,
        number: float = 0.0,
        text: str = "",
        truth: bool = False,
        path: Path | None = None,
        maybe: int | None = None,
        either: int | str = 0,
        color: Color = Color.RED,
        color_or_text: Color | str = "",
        access: Access = Access.READ,
        mode: Literal["fast", "slow"] = "fast",
        items: list[int] = [],  # noqa: B006
        pair: tuple[int, Path] | None = None,
        many: tuple[float, ...] = (),
        names: set[str] = frozenset(),  # type: ignore[assignment]
        table: dict[str, Color] = {},  # noqa: B006
        sequence: Sequence[str] = (),
        mapping: Mapping[int, Path] | None = None,
        moment: datetime | None = None,
        day: date | None = None,
        hour: time | None = None,
        span: timedelta | None = None,
        decimal: Decimal | None = None,
        fraction: Fraction | None = None,
        identity: UUID | None = None,
        pattern: re.Pattern[str] | None = None,
        length: Metres = Metres(0.0),
        wide: Annotated[int, "metres"] = 0,
        inner: Filter[Any, Any] | None = None,
        function: Callable[[int], int] | None = None,
        anything: Any = None,
        named: Named | None = None,
        unknown: Context | None = None,
    ) -> None:
        self.arguments = SimpleNamespace(**{k: v for k, v in locals().items() if k != "self"})


class Row(TypedDict):
    count: int


class Seldom(Pass):
    """Annotations that are seldom seen."""

    def __init__(
        self,
        nothing: None = None,
        row: Row | None = None,
        bare: tuple = (),  # type: ignore[type-arg]
        frozen: frozenset[int] = frozenset(),
        either: list[int] | dict[str, int] | None = None,
        option: Literal[Color.RED, "blue"] = "blue",
        kind: type[int] | None = None,
        texts: Iterable[str] = (),
        table: dict = {},  # type: ignore[type-arg]  # noqa: B006
        choice: Path | UUID | None = None,
        loose: set = frozenset(),  # type: ignore[type-arg,assignment]
    ) -> None:
        self.arguments = SimpleNamespace(**{k: v for k, v in locals().items() if k != "self"})


class Variadic(Pass):
    def __init__(self, first: int, /, second: int = 2, *rest: int, last: int = 9, **more: float):
        self.given = (first, second, rest, last, more)


class Login(Pass):
    def __init__(
        self,
        token: Annotated[str, Param(secret=True)] = "",
        other: Annotated[str | None, Param(secret=True)] = None,
        number: Annotated[int, Param(secret=True)] = 0,
    ) -> None:
        if token == "wrong":
            raise ValueError(f"the token {token} is wrong")
        self.token = token


class Refuses(Pass):
    def __init__(self, token: Annotated[str, Param(secret=True)]) -> None:
        raise ValueError(f"{token} or {token!r}")


class Around(Pass):
    def __init__(self, login: Login) -> None:
        raise ValueError(f"no use for {login.token}")


class Picky(Pass):
    def __init__(self, value: Any = None) -> None:
        raise ValueError("never\n  content")


class Boastful(Pass):
    @classmethod
    def params(cls) -> list[Param]:
        raise LookupError("no catalogue")


class Leaves(Pass):
    def __init__(self) -> None:
        raise SystemExit(3)


class Declines(Pass):
    def __init__(self) -> None:
        raise psnc.SourceError("/data is empty: fill it")


class Unfinished(Filter[Any, Any]):
    """Abstract: it has no __call__."""


@attrs.frozen
class FromAttrs(Filter[Any, Any]):
    count: int
    names: list[str] = attrs.Factory(list)

    def __call__(self, items: Iterator[Any]) -> Iterator[Any]:
        return items


class Outer:
    class Inner(Pass):
        pass


constructed: list[str] = []


class NoStage:
    def __init__(self, **params: Any) -> None:
        constructed.append("NoStage")


class Counted(Pass):
    def __init__(self, value: Any = None) -> None:
        constructed.append("Counted")


def function(items: Any) -> Any:
    constructed.append("function")
    return items


def chain(*filters: Filter[Any, Any], **fields: Any) -> Pipeline[Any]:
    return Pipeline(Numbers(3), filters, Discard(), **fields)


def reloaded(pipeline: Pipeline[Any], suffix: str) -> Pipeline[Any]:
    path = Path(f"saved{suffix}")
    pipeline.save(path)
    return Pipeline.load(path)


def tree(*filters: dict[str, Any], **sections: Any) -> dict[str, Any]:
    source = {"stage": "stages_for_tests:Numbers", "params": {"count": 3}}
    return {"source": source, "filters": list(filters), **sections}


def use(stage: str, /, **params: Any) -> dict[str, Any]:
    return {"stage": f"{HERE}:{stage}", "params": params}


def load_tree(content: Any) -> Pipeline[Any]:
    Path("tree.json").write_text(json.dumps(content))
    return Pipeline.load("tree.json")


def errors_of(content: Any) -> list[str]:
    """Return the lines of the error that loading raises, without the first."""
    with pytest.raises(PipelineError) as caught:
        load_tree(content)
    first, *lines = str(caught.value).splitlines()
    assert first == f"tree.json: {len(lines)} error{'' if len(lines) == 1 else 's'}"
    return [line.removeprefix("  ") for line in lines]


def error_of(content: Any) -> str:
    (line,) = errors_of(content)
    return line


def error_in_text(text: str | bytes, suffix: str) -> str:
    path = Path(f"text{suffix}")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PipelineError) as caught:
        Pipeline.load(path)
    first, line = str(caught.value).splitlines()
    assert first == f"{path}: 1 error"
    return line.strip()


# --- there and back ---------------------------------------------------------------------------

NAIVE = datetime(2024, 2, 29, 12, 30, 15, 250)

VALUES = [
    None, True, False, 0, 1, -7, 2**70, 0.0, -0.0, 1.0, 1e-7, 1e300, math.inf, -math.inf, math.nan,
    "", "text", "no", "1e3", "1", "null", "~", "2024-01-01", " spaces ", "two\nlines", "tab\t", "é",
    "\x00\x07\x1b", "\x85\u2028\ufeff", "😀", "'\"\\", "a: b # c", "$set", "-",
    [], [1, [2.0, None]], (1, "a", ()), {"a": {"b": [1]}, "": 0, "a.b": 1, "no": 2, "1": 3},
    {}, {"$set": [1]}, {"$dict": 1, "other": 2}, {2: "a", None: "b", (1, 2): "c", True: "d"},
    {frozenset({1}): 1}, OrderedDict(b=1, a=2), set(), {1, "a", None, (1, 2)}, frozenset({1.5}),
    {frozenset({1, 2}), frozenset()}, 1 + 2j, complex(math.nan, -0.0), Decimal("1.10"),
    Decimal("NaN"), Fraction(1, 3), b"", b"\x00\xff", bytearray(b"a"), NAIVE,
    NAIVE.replace(tzinfo=UTC), NAIVE.replace(tzinfo=timezone(timedelta(hours=-3, minutes=-30))),
    date(1, 1, 1), time(23, 59, 59, 999999), time(0, tzinfo=UTC), timedelta(-1, microseconds=5),
    UUID(int=5), re.compile("a+", re.IGNORECASE), re.compile(b"x"), range(3), range(10, 0, -2),
    slice(None, 5), Path("a/b"), [Path("a")], np.int64(3), np.float32(0.1), np.bool_(True),
    np.str_("a"), Double(), [Add(2), {"inner": Pass(Add(3))}], Pass(None),
]  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "value", VALUES, ids=[f"{number}-{type(each).__name__}" for number, each in enumerate(VALUES)]
)
def test_a_value_is_the_same_when_it_is_read(value: Any, suffix: str) -> None:
    pipeline = chain(Pass(value))
    assert reloaded(pipeline, suffix).config_json == pipeline.config_json


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.decimals()
    | st.fractions()
    | st.complex_numbers()
    | st.dates()
    | st.datetimes(timezones=st.none() | st.just(UTC))
    | st.times()
    | st.timedeltas()
    | st.uuids()
    | st.builds(Path, st.text(st.characters(codec="utf-8", exclude_characters="\0")))
)
keys = st.none() | st.integers() | st.text() | st.sampled_from(["$set", "$dict", "$env", "$x"])
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner)
        | st.dictionaries(st.text(), inner)
        | st.sets(st.integers() | st.text() | st.tuples(st.integers(), st.text()))
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("suffix", [".toml", ".yaml", ".json"])
@given(value=values)
@example(value={"a": [{"b": None}, {"c": {"$": 1}}]})
@example(value=[[], [[]], [{}], {"a": []}])
def test_any_nested_value_is_the_same_when_it_is_read(value: Any, suffix: str) -> None:
    pipeline = chain(Pass(value))
    assert reloaded(pipeline, suffix).config_json == pipeline.config_json


paths = st.builds(Path, st.text(st.characters(codec="utf-8", exclude_characters="\0")))
names = st.sampled_from(Color)
typed_arguments = st.fixed_dictionaries(
    {},
    optional={
        "integer": st.integers(),
        "number": st.floats() | st.integers(),
        "text": st.text(),
        "truth": st.booleans(),
        "path": st.none() | paths,
        "maybe": st.none() | st.integers(),
        "either": st.integers() | st.text(),
        "color": names,
        "color_or_text": names | st.text(),
        "access": st.sampled_from([Access.READ, Access.READ | Access.WRITE]),
        "mode": st.sampled_from(["fast", "slow"]),
        "items": st.lists(st.integers()),
        "pair": st.none() | st.tuples(st.integers(), paths),
        "many": st.lists(st.floats()).map(tuple),
        "names": st.sets(st.text()),
        "table": st.dictionaries(st.text() | st.just("$set"), names),
        "mapping": st.none() | st.dictionaries(st.integers(), paths),
        "moment": st.none() | st.datetimes(timezones=st.none() | st.timezones()),
        "inner": st.none() | st.builds(Add, st.integers()) | st.builds(OneOfEach, text=st.text()),
        "anything": values,
    },
)


@pytest.mark.parametrize("suffix", [".toml", ".yaml", ".json"])
@given(arguments=typed_arguments)
def test_any_typed_arguments_are_the_same_when_they_are_read(
    arguments: dict[str, Any], suffix: str
) -> None:
    pipeline = chain(OneOfEach(**arguments))
    assert reloaded(pipeline, suffix).config_json == pipeline.config_json


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_whole_pipeline_is_the_same_when_it_is_read(suffix: str) -> None:
    pipeline = Pipeline(
        source=Numbers(5, items=2),
        filters=[Double(), Add(-1), FailOn((7,), mended="mended")],
        sink=WriteText("out"),
        resume=True,
        db_dir=Path("checkpoints"),
        track_memory="python",
        track_gpu=False,
    )
    read = reloaded(pipeline, suffix)
    assert read.config_hash == pipeline.config_hash
    assert read.db_path == pipeline.db_path
    assert [type(stage) for stage in read.filters] == [Double, Add, FailOn]
    assert (read.resume, read.db_dir) == (True, Path("checkpoints"))
    assert (read.track_memory, read.track_gpu, read.track_metrics) == ("python", False, True)
    assert read[1] == ["out/1.txt"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_values_are_given_to_the_constructor_as_its_annotations_say(suffix: str) -> None:
    stage = OneOfEach(
        path=Path("a"),
        either="1",
        color=Color.GREEN,
        color_or_text=Color.GREEN,
        access=Access.READ | Access.WRITE,
        mode="slow",
        items=[1, 2],
        pair=(1, Path("b")),
        many=(1.0, 2.5),
        names={"x", "y"},
        table={"a": Color.RED},
        mapping={1: Path("c")},
        moment=NAIVE,
        day=NAIVE.date(),
        hour=NAIVE.time(),
        span=timedelta(1),
        decimal=Decimal("1.5"),
        pattern=re.compile("a+"),
        inner=Add(3),
        anything=Path("d"),
    )
    read = reloaded(chain(stage), suffix).filters[0]
    assert isinstance(read, OneOfEach)
    before, after = vars(stage.arguments), vars(read.arguments)
    del before["inner"]
    assert after.pop("inner").amount == 3
    # A list is as good a sequence as a tuple.
    assert (before.pop("sequence"), after.pop("sequence")) == ((), [])
    assert after == before
    assert list(map(type, after.values())) == list(map(type, before.values()))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "stage",
    [Variadic(1), Variadic(1, 3), Variadic(1, 2, 4, 5, last=6, x=1.0, y=2.0), Variadic(1, more=3)],
)
def test_positional_and_variadic_arguments_are_kept(stage: Variadic, suffix: str) -> None:
    read = reloaded(chain(stage), suffix).filters[0]
    assert read.given == stage.given  # type: ignore[attr-defined]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_stages_made_by_attrs_and_inside_classes_are_kept(suffix: str) -> None:
    pipeline = chain(FromAttrs(3), FromAttrs(3, ["a"]), Outer.Inner(1))
    read = reloaded(pipeline, suffix)
    assert read.config_hash == pipeline.config_hash
    assert [stage.names for stage in read.filters[:2]] == [[], ["a"]]  # type: ignore[attr-defined]


def test_every_parameter_is_written_so_that_a_new_default_changes_nothing() -> None:
    chain(Add()).save("saved.json")
    (written,) = json.loads(Path("saved.json").read_text())["filters"]
    assert written == {"stage": "stages_for_tests:Add", "params": {"amount": 1}}


def test_a_saved_file_reads_from_source_to_sink() -> None:
    chain(Double(), Pass({"a": {"b": 1}}), resume=True).save("saved.toml")
    assert Path("saved.toml").read_text() == textwrap.dedent(f"""\
        [source]
        stage = "stages_for_tests:Numbers"

        [source.params]
        count = 3
        items = 1

        [[filters]]
        stage = "stages_for_tests:Double"

        [[filters]]
        stage = "{HERE}:Pass"

        [filters.params.value.a]
        b = 1

        [sink]
        stage = "stages_for_tests:Discard"

        [sink.params]
        files = 1

        [pipeline]
        resume = true
        """)


def test_toml_leaves_out_what_is_none_by_default() -> None:
    chain(FailOn([1])).save("saved.toml")
    assert "mended" not in Path("saved.toml").read_text()
    chain(FailOn([1])).save("saved.json")
    assert '"mended": null' in Path("saved.json").read_text()


def test_only_fields_that_differ_from_the_pipelines_defaults_are_written() -> None:
    numbers_pipeline(resume=True).save("saved.json")
    assert json.loads(Path("saved.json").read_text())["pipeline"] == {"resume": True}
    numbers_pipeline().save("saved.json")
    assert "pipeline" not in json.loads(Path("saved.json").read_text())


def test_a_pipeline_without_a_sink_is_kept() -> None:
    pipeline = Pipeline(Numbers(3), [Double()])
    read = reloaded(pipeline, ".toml")
    assert (read.sink, read.config_hash) == (None, pipeline.config_hash)


def test_saving_calls_no_constructor() -> None:
    pipeline = chain(Counted())
    constructed.clear()
    pipeline.save("saved.toml")
    assert constructed == []


def test_saving_replaces_the_file_as_a_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.toml"
    target.write_text("old")
    os.symlink(target, tmp_path / "link.toml")
    chain().save("link.toml")
    assert Pipeline.load(target).config_hash == chain().config_hash
    assert sorted(os.listdir(tmp_path)) == ["elsewhere.toml", "link.toml"]
    with pytest.raises(ConfigurationError):
        chain(Pass(object())).save("link.toml")
    assert Pipeline.load(target).config_hash == chain().config_hash
    assert sorted(os.listdir(tmp_path)) == ["elsewhere.toml", "link.toml"]


# --- what cannot be saved ---------------------------------------------------------------------


def test_what_has_no_plain_form_is_named_with_its_stage_and_parameter() -> None:
    with open(os.devnull) as file:
        pipeline = chain(
            Pass(np.zeros(3)), Pass(file), Pass(len), Pass(Color.RED), Pass({"deep": [object()]})
        )
        with pytest.raises(ConfigurationError) as caught:
            pipeline.save("saved.toml")
    first, *lines = str(caught.value).splitlines()
    assert first == "saved.toml is not written: 5 errors"
    assert all(
        f"filters[{n}].params.value: Pass(value=…): " in line for n, line in enumerate(lines)
    )
    for line, reason in zip(
        lines,
        ["'ndarray' has no plain form", "'TextIOWrapper' has no plain form",
         "len is a function or class", "annotate the parameter with Color", "'object' has no"],
        strict=True,
    ):  # fmt: skip
        assert reason in line
    assert not Path("saved.toml").exists()


def test_a_default_without_a_plain_form_is_left_out() -> None:
    class_with_default = DefaultColor()
    pipeline = chain(class_with_default)
    assert reloaded(pipeline, ".toml").config_hash == pipeline.config_hash
    with pytest.raises(ConfigurationError, match="annotate the parameter with Color"):
        chain(DefaultColor(Color.GREEN)).save("saved.toml")


class DefaultColor(Pass):
    def __init__(self, color: Any = Color.RED, key: Any = len) -> None:
        self.color = color


def test_a_value_that_would_be_read_as_another_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"str 'RED' would be Color <Color.RED: 1>"):
        chain(OneOfEach(color_or_text="RED")).save("saved.yaml")
    with pytest.raises(ConfigurationError, match=r"amount: must be int, not str 'x'"):
        chain(Add("x")).save("saved.yaml")  # type: ignore[arg-type]


def test_a_class_that_nobody_else_can_import_is_refused(run_python: RunPython) -> None:
    class Local(Pass):
        pass

    with pytest.raises(ConfigurationError, match=r"filters\[0\]: .*Local is defined inside a fun"):
        chain(Local(1)).save("saved.toml")
    impostor = type("Double", (Pass,), {"__module__": "stages_for_tests"})
    with pytest.raises(ConfigurationError, match="stages_for_tests:Double is not this class there"):
        chain(impostor(1)).save("saved.toml")
    with pytest.raises(ConfigurationError, match="math:sqrt is the function there, and no stage"):
        chain(psnc.filter(math.sqrt)()).save("saved.toml")
    program = """
        from stages_for_tests import Discard, Numbers
        from psnc import Pipeline

        class Mine(Numbers):
            pass

        Pipeline(Mine(1), (), Discard()).save("mine.toml")
    """
    finished = run_python("-c", textwrap.dedent(program), check=False)
    assert "Mine is defined in the script or session that runs" in finished.stderr


@pytest.mark.parametrize("name", ["saved", "saved.txt", "saved.toml.bak"])
def test_another_suffix_is_refused(name: str) -> None:
    with pytest.raises(PipelineError, match=r"must end in .toml, .yaml, .yml or .json"):
        chain().save(name)
    Path(name).write_text("")
    with pytest.raises(PipelineError, match=r"must end in .toml, .yaml, .yml or .json"):
        Pipeline.load(name)


def test_a_place_that_cannot_be_written_is_named() -> None:
    os.mkdir("directory.toml")
    with pytest.raises(PipelineError, match=r"directory.toml cannot be written: it is a directory"):
        chain().save("directory.toml")
    Path("file").touch()
    with pytest.raises(PipelineError, match=r"file/saved.toml cannot be written: Not a directory"):
        chain().save("file/saved.toml")
    assert sorted(os.listdir()) == ["directory.toml", "file"]


def test_missing_directories_are_made() -> None:
    chain().save("a/b/saved.toml")
    assert os.listdir("a/b") == ["saved.toml"]


def test_a_file_name_that_is_not_unicode_is_kept_except_in_toml() -> None:
    pipeline = chain(Pass(os.fsdecode(b"caf\xe9 \xff")))
    for suffix in (".json", ".yaml"):
        assert reloaded(pipeline, suffix).config_hash == pipeline.config_hash
    with pytest.raises(PipelineError, match=r"is not Unicode.*\\udce9.*: save it as .json"):
        pipeline.save("saved.toml")


def test_a_password_in_a_stores_url_is_not_written() -> None:
    pipeline = chain(store="postgresql://ada:hunter2@host/runs")
    with pytest.raises(ConfigurationError) as caught:
        pipeline.save("saved.toml")
    assert "pipeline.store: the URL has a password" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    read = reloaded(chain(store="postgresql://ada@host/runs"), ".toml")
    assert read.store == "postgresql://ada@host/runs"


# --- secrets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_secret_is_read_from_the_environment_and_never_written(
    suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = chain(Login("hunter2"), Login("hunter2"), Login("quaint"), Login(other="third"))
    path = Path(f"saved{suffix}")
    pipeline.save(path)
    text = path.read_text()
    assert not any(secret in text for secret in ("hunter2", "quaint", "third"))
    with pytest.raises(PipelineError) as caught:
        Pipeline.load(path)
    assert str(caught.value).count("PSNC_SECRET_LOGIN_TOKEN is not set: set it") == 2
    monkeypatch.setenv("PSNC_SECRET_LOGIN_TOKEN", "hunter2")
    monkeypatch.setenv("PSNC_SECRET_LOGIN_TOKEN_2", "quaint")
    monkeypatch.setenv("PSNC_SECRET_LOGIN_OTHER", "third")
    assert Pipeline.load(path).config_hash == pipeline.config_hash


def test_a_secret_in_the_file_itself_is_refused_and_not_repeated() -> None:
    message = error_of(tree(use("Login", token="hunter2")))
    assert message.startswith("filters[0].params.token: a secret does not belong in a file")
    assert "hunter2" not in message
    load_tree(tree(use("Login", other=None)))


def test_what_a_constructor_says_of_a_secret_is_masked(
    monkeypatch: pytest.MonkeyPatch, run_python: RunPython
) -> None:
    monkeypatch.setenv("TOKEN", "wrong")
    message = error_of(tree(use("Login", token={"$env": "TOKEN"})))
    assert message == "filters[0]: Login(…): raised ValueError: the token *** is ***"
    monkeypatch.setenv("TOKEN", "12")
    message = error_of(tree(use("Login", number={"$env": "TOKEN"})))
    assert message == "filters[0].params.number: TOKEN holds text, which does not fit the " \
                      "parameter's type"  # fmt: skip


@pytest.mark.parametrize("secret", ["wrong\n", "wrong  word", "-----\nwrong\n-----\n"])
def test_a_secret_of_more_than_one_line_or_word_is_masked(
    secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", secret)
    message = error_of(tree(use("Refuses", token={"$env": "TOKEN"})))
    assert message == "filters[0]: Refuses(…): raised ValueError: *** or '***'"


def test_the_secret_of_a_stage_inside_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "hunter2")
    login = {"$stage": use("Login", token={"$env": "TOKEN"})}
    message = error_of(tree(use("Around", login=login)))
    assert message == "filters[0]: Around(…): raised ValueError: no use for ***"


def test_a_secret_that_is_no_text_cannot_be_saved() -> None:
    with pytest.raises(
        ConfigurationError, match=r"Login\(number=…\): a secret is read from the en"
    ):
        chain(Login(number=7)).save("saved.toml")


def test_only_secrets_come_from_the_environment() -> None:
    message = error_of(tree(use("Pass", value={"$env": "HOME"})))
    assert message == "filters[0].params.value.$env: only a secret parameter comes from the " \
                      "environment"  # fmt: skip


# --- files that cannot be read ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (".toml", "", 'source: missing: write a table "source"'),
        (".yaml", "# nothing\n", 'source: missing: write a table "source"'),
        (".json", " \n", 'source: missing: write a table "source"'),
        (".json", "[1]", "it must hold a table with a source, not list [1]"),
        (".toml", "a = 1\n[source\n", "line 2, column 8: Expected"),
        (".toml", "a = 1\na = 2\n", "line 2, column 6: Cannot overwrite a value"),
        (".toml", "a = 2024-13-01", "line 1, column 9: "),
        (".yaml", "a: [1\nb: }", "line 2, column 2: "),
        (".yaml", "a: 1\nb: {c: 1, c: 2}", "line 2, column 11: the key 'c' is there twice"),
        (".yaml", "a: 2024-13-01", "line 1, column 4: month must be in 1..12"),
        (".yaml", "a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (".yaml", "a: 1\n---\nb: 1", "expected a single document"),
        (".yaml", "a: 1\nb: \x01", "line 2: a character that YAML does not allow"),
        (".yaml", "a: &a [*a]", "an anchor refers to itself"),
        (".json", '{"a": 1,\n"a": 2}', "the key 'a' is there twice in one object"),
        (".json", '{"a":\n1 2}', "line 2, column 3: "),
        (".json", '{"a": NaN}', 'NaN is not JSON: write {"$float": "nan"}'),
        (".json", "[" * 100_000, "nested more than 200 levels deep"),
        (".yaml", "[" * 100_000, "nested more than 200 levels deep"),
        (".toml", b"# caf\xe9", "line 1: not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(
    suffix: str, text: str | bytes, message: str
) -> None:
    assert message in error_in_text(text, suffix)


def test_anchors_that_multiply_are_refused_before_memory_is_full() -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    message = error_in_text("\n".join(["a0: &a0 [1]", *levels]), ".yaml")
    assert message == "its anchors make more than 10,000,000 values"


def test_merges_that_multiply_are_read_before_memory_is_full() -> None:
    levels = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 12)]
    assert read_yaml("\n".join(["a0: &a0 {x: 1}", *levels]))["a11"] == {"x": 1}


def test_of_merged_tables_the_first_wins() -> None:
    text = "one: &one {a: 1, b: 1}\ntwo: &two {a: 2, c: 2}\nsum: {<<: [*one, *two, *one], b: 3}"
    assert read_yaml(text)["sum"] == {"a": 1, "b": 3, "c": 2}


def nested(levels: int) -> list[Any]:
    deep: list[Any] = []
    for _ in range(levels - 1):
        deep = [deep]
    return deep


@pytest.mark.parametrize("levels", [250, 350, 900, 100_000])
def test_values_that_are_nested_too_deeply_are_refused_in_both_ways(levels: int) -> None:
    params = f'{{"sequence": {"[" * levels + "]" * levels}}}'
    text = f'{{"source": {{"stage": "psnc.sources:SequenceSource", "params": {params}}}}}'
    said = error_in_text(text, ".json")
    assert said == "lists or tables are nested more than 200 levels deep"
    if levels <= 350:
        with pytest.raises(ConfigurationError, match="is not written: lists or tables are nested"):
            chain(Pass(nested(levels))).save("saved.json")


@pytest.mark.parametrize("suffix", [".json", ".toml", ".yaml"])
def test_values_that_are_nested_deeply_are_read_as_they_were_written(suffix: str) -> None:
    pipeline = chain(Pass(nested(150)))
    pipeline.save(f"saved{suffix}")
    assert Pipeline.load(f"saved{suffix}").config_hash == pipeline.config_hash


def test_a_missing_file_and_a_directory_are_named() -> None:
    with pytest.raises(PipelineError, match=r"none\.toml: 1 error\n  no such file: check the path"):
        Pipeline.load("none.toml")
    os.mkdir("directory.toml")
    with pytest.raises(
        PipelineError, match=r"directory\.toml: 1 error\n  a directory: give the pa"
    ):
        Pipeline.load("directory.toml")


WINDOWS = '[source]\nstage = "stages_for_tests:Numbers"\nparams = { count = 2 }\n'


def test_marks_and_newlines_of_windows_change_nothing() -> None:
    Path("unix.toml").write_text(WINDOWS)
    Path("windows.toml").write_bytes(b"\xef\xbb\xbf" + WINDOWS.replace("\n", "\r\n").encode())
    hashes = {Pipeline.load(name).config_hash for name in ("unix.toml", "windows.toml")}
    assert hashes == {Pipeline(Numbers(2)).config_hash}


def test_the_three_syntaxes_say_the_same() -> None:
    Path("same.toml").write_text("""
        [source]
        stage = "stages_for_tests:Numbers"
        params.count = 3
        [[filters]]
        stage = "stages_for_tests:Add"
        [filters.params]
        amount = 2
        [pipeline]
        resume = true
    """)
    Path("same.yaml").write_text("""
        source: {stage: "stages_for_tests:Numbers", params: &three {count: 3}}
        filters:
          - stage: stages_for_tests:Add
            params:
              amount: 2
        pipeline:
          resume: yes
    """)
    content = tree({"stage": "stages_for_tests:Add", "params": {"amount": 2}})
    Path("same.json").write_text(json.dumps({**content, "pipeline": {"resume": True}}))
    read = [Pipeline.load(f"same{suffix}") for suffix in (".toml", ".yaml", ".json")]
    expected = Pipeline(Numbers(3), [Add(2)], resume=True)
    assert {each.config_hash for each in read} == {expected.config_hash}
    assert {each.db_path for each in read} == {expected.db_path}


# --- files that are wrong ---------------------------------------------------------------------


def test_all_errors_are_said_at_once_each_with_its_place() -> None:
    content = tree(
        *[use("Pass", valeu=1) for _ in range(23)],
        use("OneOfEach", integer="1", items=["a", 2, 3.5], no_such=1),
        sinc={},
        sink={"stage": 3},
        pipeline={"resume": "yes", "db_dri": "x", "db_dir": 3},
    )
    content["source"]["parms"] = {}
    lines = errors_of(content)
    places = [line.split(": ")[0] for line in lines]
    assert places == [
        "sinc",
        "source.parms",
        *[f"filters[{n}].params.{name}" for n in range(23) for name in ("valeu", "value")],
        "filters[23].params.integer",
        "filters[23].params.items[0]",
        "filters[23].params.items[2]",
        "filters[23].params.no_such",
        "sink.stage",
        "pipeline.db_dri",
        "pipeline.resume",
        "pipeline.db_dir",
    ]
    assert "filters[0].params.valeu: Pass has no such parameter: did you mean 'value'?" in lines
    assert "filters[0].params.value: missing: Pass cannot do without it" in lines
    assert "sinc: no such key: did you mean 'sink'?" in lines
    assert "pipeline.resume: must be bool, not str 'yes': write true or false" in lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"source": None}, "source: must be a table, not None"),
        ({"source": "x"}, "source: must be a table, not str 'x'"),
        (tree() | {"filters": {}}, "filters: must be a list of tables, not dict {}"),
        (tree(3), "filters[0]: must be a table, not int 3"),  # type: ignore[arg-type]
        (tree({"stage": None}), "filters[0].stage: must be a name as text, not None"),
        (tree({}), "filters[0].stage: missing: give a registered name, or module:Class"),
        (tree(use("Pass") | {"params": []}), "filters[0].params: must be a table, not list []"),
        (tree(use("Pass", value=1) | {"value": 1}),
         "filters[0].value: no such key: parameters belong in filters[0].params"),
        (tree(pipeline=1), "pipeline: must be a table, not int 1"),
        (tree(pipeline={"track_memory": "pyton"}),
         "pipeline.track_memory: must be bool | Literal['python'], not str 'pyton': did you mean "
         "'python'?"),
        (tree(pipeline={"db_file": "a", "store": "b"}),
         "pipeline: store and db_file both say where to record: give one of them"),
        (tree(pipeline={"filters": []}), "pipeline.filters: no such key: there are resume, "),
    ],
)  # fmt: skip
def test_what_is_no_pipeline_is_said(content: Any, message: str) -> None:
    assert error_of(content).startswith(message)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (f"{HERE}:Pss", f"module '{HERE}' ({__file__}) has no 'Pss': did you mean 'Pass'?"),
        (f"{HERE}:NoStage", "is no class of stages: derive it from psnc.Filter"),
        (f"{HERE}:function", "is of type function, and no class of stages"),
        (f"{HERE}:constructed", "is of type list, and no class of stages"),
        (f"{HERE}:Unfinished", "cannot be constructed: it has no __call__"),
        ("psnc:Filter", "cannot be constructed: it has no __call__"),
        ("stages_for_tests:Discard", "is a sink, where a filter belongs"),
        ("no_such_module:Pass", "no module named 'no_such_module' here or among the installed"),
        ("stages_for_tests:", "is no stage: write module:Class"),
        (":Double", "is no stage: write module:Class"),
        ("stages.py:Double", "a file names modules, not paths: write module:Class"),
        ("Duoble", "no filter has the name 'Duoble': plugins offer "),
    ],
)  # fmt: skip
def test_a_stage_that_is_none_is_named_and_not_called(stage: str, message: str) -> None:
    constructed.clear()
    error = error_of(tree({"stage": stage}))
    assert error.startswith("filters[0].stage: ")
    assert message in error
    assert constructed == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise RuntimeError('no\\n luck')", "importing broken_{0} raised RuntimeError: no luck"),
        ("raise SystemExit(4)", "importing broken_{0} called exit(4)"),
        ("def f(:", "importing broken_{0} raised SyntaxError"),
        ("import no_such_library", "raised ModuleNotFoundError: No module named 'no_such_library'"),
        (
            "def __getattr__(name): raise ImportError('no h5py')",
            "cannot be imported (ImportError: n",
        ),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_error(
    source: str, message: str, request: pytest.FixtureRequest
) -> None:
    name = f"broken_{abs(hash(request.node.name))}"
    Path(f"{name}.py").write_text(source)
    line = error_of(tree({"stage": f"{name}:Pass"}))
    assert line.startswith("filters[0].stage: ")
    assert message.format(name.removeprefix("broken_")) in line


def test_whatever_a_stage_raises_is_one_error_a_stage() -> None:
    lines = errors_of(tree(use("Picky"), use("Leaves"), use("Declines"), use("Boastful")))
    assert lines == [
        "filters[0]: Picky(…): raised ValueError: never content",
        "filters[1]: Leaves(…): raised SystemExit: 3",
        "filters[2]: Declines(…): /data is empty: fill it",
        "filters[3]: Boastful.params() raised LookupError: no catalogue",
    ]


def test_a_stage_with_a_wrong_parameter_is_not_constructed() -> None:
    constructed.clear()
    errors_of(tree(use("Counted", value={"$sett": []}), use("Counted", valu=1)))
    assert constructed == []


WRONG = [
    ("integer", 1.0, "must be int, not float 1.0: write 1"),
    ("integer", True, "must be int, not bool True"),
    ("integer", "12", "must be int, not str '12': write 12 without quotes"),
    ("integer", None, "must be int, not None"),
    ("number", "1e3", "must be float, not str '1e3': write 1000.0 without quotes"),
    ("number", "1e-7", "must be float, not str '1e-7': write 1.0e-07 without quotes"),
    ("number", False, "must be float, not bool False"),
    ("text", False, "must be str, not bool False: put text in quotes"),
    ("text", 1, "must be str, not int 1: put text in quotes"),
    ("truth", 1, "must be bool, not int 1: write true or false"),
    ("truth", "x", "must be bool, not str 'x'"),
    ("path", 3, "must be Path as text, not int 3"),
    ("either", 1.5, "must be int | str, not float 1.5: put text in quotes"),
    ("color", "GREN", "must be one of RED, GREEN, not str 'GREN': did you mean 'GREEN'?"),
    ("color", 1, "must be one of RED, GREEN, not int 1: give a member by its name"),
    (
        "access",
        "READ|WRIT",
        "must be one of READ, WRITE, not str 'READ|WRIT': did you mean 'READ'?",
    ),
    ("mode", "fsat", "must be one of 'fast', 'slow', not str 'fsat': did you mean 'fast'?"),
    ("mode", 3, "must be one of 'fast', 'slow', not int 3"),
    ("items", 3, "must be list[int], not int 3: write a list"),
    ("items", {"$set": [1]}, "must be list[int], not set {1}: write a list"),
    ("pair", [1], "must be tuple[int, Path], not list [1]: write 2 values"),
    ("pair", 1, "must be tuple[int, Path], not int 1: write a list"),
    ("many", "1", "must be tuple[float, ...], not str '1': write a list"),
    ("names", "a", "must be set[str], not str 'a': write a list"),
    ("names", [[1]], "must be str, not list [1]"),
    ("table", [], "must be dict[str, Color], not list []: write a table"),
    ("table", {"a": "BLUE"}, "must be one of RED, GREEN, not str 'BLUE'"),
    ("sequence", 1, "must be Sequence[str], not int 1: write a list"),
    ("mapping", {"a": "b"}, "must be int, not str 'a'"),
    ("moment", "yesterday", "must be datetime, not str 'yesterday': Invalid isoformat string"),
    ("moment", 5, "must be datetime as text, not int 5"),
    (
        "span",
        5,
        'must be timedelta, not int 5: write {"$timedelta": [days, seconds, microseconds]}',
    ),
    ("decimal", "x", "must be Decimal, not str 'x': "),
    ("fraction", "1/0", "must be Fraction, not str '1/0': Fraction(1, 0)"),
    ("pattern", "(", "must be Pattern, not str '(': missing )"),
    ("length", "x", "must be float, not str 'x'"),
    ("wide", "x", "must be int, not str 'x'"),
    ("inner", 1, 'must be a stage (Filter), not int 1: write {"$stage": '),
    ("function", "len", "must be a function, not str 'len': no file can give one"),
]


SELDOM_WRONG = [
    ("nothing", 1, "must be None, not int 1"),
    ("row", [], "must be dict, not list []: write a table"),
    ("bare", 1, "must be tuple, not int 1: write a list"),
    ("frozen", ["a"], "must be int, not str 'a'"),
    ("either", ["a"], "must be int, not str 'a'"),
    ("either", {"a": "b"}, "must be int, not str 'b'"),
    ("either", 1, "must be list[int] | dict[str, int] | None, not int 1"),
    ("option", "RD", "must be one of RED, 'blue', not str 'RD'"),
    ("kind", "int", "must be a class, not str 'int': no file can give one"),
    ("texts", [1], "must be str, not int 1: put text in quotes"),
    ("table", 1, "must be dict, not int 1: write a table"),
    ("loose", [[1]], "must be set, not list [[1]]: no lists or tables in a set"),
]


@pytest.mark.parametrize(
    ("stage", "name", "value", "message"),
    [("OneOfEach", *each) for each in WRONG] + [("Seldom", *each) for each in SELDOM_WRONG],
    ids=str,
)
def test_a_value_that_does_not_fit_its_annotation_is_refused(
    stage: str, name: str, value: Any, message: str
) -> None:
    line = error_of(tree(use(stage, **{name: value})))
    place, _, reason = line.partition(": ")
    assert place.startswith(f"filters[0].params.{name}")
    assert reason.startswith(message)


RIGHT = [
    ("number", 1, 1),
    ("path", "a", Path("a")),
    ("either", "a", "a"),
    ("color", "GREEN", Color.GREEN),
    ("color_or_text", "GREEN", Color.GREEN),
    ("color_or_text", "green", "green"),
    ("access", "READ|WRITE", Access.READ | Access.WRITE),
    ("many", [1, 2.5], (1, 2.5)),
    ("pair", [1, "a"], (1, Path("a"))),
    ("names", ["a", "b"], {"a", "b"}),
    ("table", {"a": "RED"}, {"a": Color.RED}),
    ("sequence", "text", "text"),
    ("mapping", {"$dict": [[1, "a"]]}, {1: Path("a")}),
    ("moment", "2024-02-29 12:30", datetime(2024, 2, 29, 12, 30)),
    ("day", "2024-02-29", date(2024, 2, 29)),
    ("decimal", "1.10", Decimal("1.10")),
    ("fraction", "1/3", Fraction(1, 3)),
    ("identity", "0" * 31 + "5", UUID(int=5)),
    ("pattern", "a+", re.compile("a+")),
    ("anything", {"a": [1, None]}, {"a": [1, None]}),
    ("named", "what cannot be judged passes", "what cannot be judged passes"),
    ("unknown", 3, 3),
]


@pytest.mark.parametrize(
    ("name", "value", "expected"), RIGHT, ids=[f"{name}-{value}" for name, value, _ in RIGHT]
)
def test_a_value_becomes_what_its_annotation_asks_for(name: str, value: Any, expected: Any) -> None:
    (stage,) = load_tree(tree(use("OneOfEach", **{name: value}))).filters
    found = getattr(stage.arguments, name)  # type: ignore[attr-defined]
    assert (type(found), found) == (type(expected), expected)
    assert chain(OneOfEach(**{name: expected})).config["filters"] == chain(stage).config["filters"]


def test_whole_and_broken_numbers_stay_apart_as_in_python() -> None:
    hashes = {
        load_tree(tree(use("OneOfEach", number=number))).config_hash: number for number in (1, 1.0)
    }
    assert len(hashes) == 2


def test_times_of_toml_and_yaml_are_taken_as_they_are() -> None:
    moment = "2024-02-29 12:30:15.000250"
    Path("a.toml").write_text(
        f'source.stage = "stages_for_tests:Numbers"\nsource.params.count = 1\n'
        f'[[filters]]\nstage = "{HERE}:OneOfEach"\nparams = {{ moment = {moment} }}\n'
    )
    Path("a.yaml").write_text(
        "source: {stage: 'stages_for_tests:Numbers', params: {count: 1}}\n"
        f"filters: [{{stage: '{HERE}:OneOfEach', params: {{moment: {moment}}}}}]\n"
    )
    expected = Pipeline(Numbers(1), [OneOfEach(moment=NAIVE)]).config_hash
    assert Pipeline.load("a.toml").config_hash == expected
    assert Pipeline.load("a.yaml").config_hash == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"$sett": []}, "value: '$sett' is no special form: did you mean '$set'?"),
        ({"$set": [], "a": 1}, "value.$set: stands alone in its table: take out 'a'"),
        ({"$set": 3}, "value.$set: int 3 cannot be read: write it as a list"),
        ({"$set": [{}]}, "value.$set: list [{}] cannot be read: a table can be neither in a set"),
        ({"$dict": [[1]]}, "value.$dict: list [[1]] cannot be read: write a list of lists"),
        ({"$dict": [[1, 2], [1, 3]]}, "the key 1 is there twice"),
        ({"$float": "x"}, "value.$float: str 'x' cannot be read: could not convert"),
        ({"$none": False}, "value.$none: bool False cannot be read: write true, or leave"),
        ({"$datetime": "x"}, "value.$datetime: str 'x' cannot be read: Invalid isoformat"),
        ({"$timedelta": [1, 2]}, "cannot be read: write three integers"),
        ({"$bytes": "*"}, "value.$bytes: str '*' cannot be read: "),
        ({"$decimal": "x"}, "value.$decimal: str 'x' cannot be read: "),
        ({"$complex": [1, "x"]}, "cannot be read: write two numbers"),
        ({"$range": [1]}, "cannot be read: write three integers: start, stop, step"),
        ({"$pattern": ["(", 0]}, "value.$pattern: list ['(', 0] cannot be read: missing )"),
        ({"$enum": ["os:O", "A"]}, "value: '$enum' is no special form"),
        ({"$callable": "os:getcwd"}, "value: '$callable' is no special form"),
        ({"$stage": use("Pass")}, "value.$stage.params.value: missing: Pass cannot do without it"),
        ({"$stage": {"stage": f"{HERE}:NoStage"}}, "value.$stage.stage: "),
        ({"a b": [{"$x": 1}]}, "value['a b'][0]: '$x' is no special form"),
    ],
)
def test_a_special_form_that_is_wrong_is_refused(value: Any, message: str) -> None:
    constructed.clear()
    assert message in error_of(tree(use("Pass", value=value)))
    assert constructed == []


def test_parameters_that_params_adds_are_known_and_required() -> None:
    assert errors_of(tree(use("Described", size="a"))) == [
        "filters[0].params.size: must be int, not str 'a'",
        "filters[0].params.path: missing: Described cannot do without it",
    ]


class Described(Pass):
    def __init__(self, **options: Any) -> None:
        self.options = options

    @classmethod
    def params(cls) -> list[Param]:
        return [Param(name="path", type=str), Param(name="size", type=int, default=1)]


# --- names ------------------------------------------------------------------------------------


class Offers:
    @psnc.hookimpl
    def psnc_sources(self) -> dict[str, Any]:
        return {"numbers": "stages_for_tests:Numbers"}

    @psnc.hookimpl
    def psnc_filters(self) -> dict[str, Any]:
        return {"add": Add, "broken": "no_such_module:Thing", "wrong": NoStage}

    @psnc.hookimpl
    def psnc_sinks(self) -> dict[str, Any]:
        return {"discard": Discard}


def test_a_registered_name_gives_the_same_pipeline_as_its_class(plugins: PluginManager) -> None:
    plugins.register(Offers(), name="offers")
    content = {
        "source": {"stage": "numbers", "params": {"count": 3}},
        "filters": [{"stage": "add"}, use("Pass", value={"$stage": {"stage": "discard"}})],
        "sink": {"stage": "discard"},
    }
    assert load_tree(content).config_hash == chain(Add(), Pass(Discard())).config_hash


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ad", "did you mean 'add'?"),
        (
            "xyz",
            "no filter has the name 'xyz': plugins offer add, broken, wrong; or write module:Cl",
        ),
        ("numbers", "'numbers' is a source, where a filter belongs"),
        ("broken", "No module named 'no_such_module'"),
        ("wrong", "'wrong' is no class of stages"),
    ],
)
def test_a_name_that_is_none_lists_those_there_are(
    name: str, message: str, plugins: PluginManager
) -> None:
    plugins.register(Offers(), name="offers")
    assert message in error_of(tree({"stage": name}))


# --- the command line -------------------------------------------------------------------------

STAGES = """
from stages_for_tests import Discard, Double, Journal, Numbers, WriteText

class Shift(Double):
    def __init__(self, reference: float):
        self.reference = reference
    def __call__(self, items):
        return (item - self.reference for item in items)
"""

PIPELINE = """
[source]
stage = "local_stages:Journal"
params = { count = 4, journal = "journal.txt" }

[[filters]]
stage = "local_stages:Shift"
params = { reference = 1.0 }

[sink]
stage = "local_stages:WriteText"
[sink.params]
output_dir = "out"

[pipeline]
resume = true
db_dir = "checkpoints"
"""


@pytest.fixture
def psnc_run(run_python: RunPython, tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "local_stages.py").write_text(STAGES)
    (tmp_path / "pipeline.toml").write_text(PIPELINE)

    def run(*arguments: str, check: bool = True) -> Any:
        return run_python("-m", "psnc", "run", "--no-progress", *arguments, check=check)

    return run


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_psnc_runs_a_file_and_goes_on_where_it_was(
    psnc_run: Callable[..., Any], jobs: str, tmp_path: Path
) -> None:
    first = psnc_run("pipeline.toml", "-j", jobs, "--indices", "0-2")
    assert "3 completed, 0 failed, of 3" in first.stdout
    second = psnc_run("pipeline.toml", "-j", jobs)
    assert "1 completed, 3 completed before, 0 failed, of 4" in second.stdout
    assert len(list((tmp_path / "checkpoints").glob("*.db"))) == 1
    assert (tmp_path / "out" / "3.txt").read_text() == "2.0\n"


def test_psnc_says_all_that_is_wrong_with_a_file(
    psnc_run: Callable[..., Any], tmp_path: Path
) -> None:
    wrong = PIPELINE.replace("reference", "refrence").replace("count = 4", 'count = "4"')
    (tmp_path / "wrong.toml").write_text(wrong)
    finished = psnc_run("wrong.toml", check=False)
    assert finished.returncode == 2
    assert finished.stderr == (
        "psnc: wrong.toml: 3 errors\n"
        "  source.params.count: must be int, not str '4': write 4 without quotes\n"
        "  filters[0].params.refrence: Shift has no such parameter: did you mean 'reference'?\n"
        "  filters[0].params.reference: missing: Shift cannot do without it\n"
    )


def test_psnc_shows_where_a_constructor_raised_if_asked(
    psnc_run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "local_stages.py").write_text(
        STAGES.replace("self.reference = reference", "self.reference = 1 / 0")
    )
    finished = psnc_run("pipeline.toml", check=False)
    assert finished.stderr == (
        "psnc: pipeline.toml: 1 error\n"
        "  filters[0]: Shift(…): raised ZeroDivisionError: division by zero\n"
    )
    finished = psnc_run("pipeline.toml", "--debug", check=False)
    assert "self.reference = 1 / 0" in finished.stderr


def test_psnc_refuses_to_run_a_file_without_a_sink(
    psnc_run: Callable[..., Any], tmp_path: Path
) -> None:
    Path("no_sink.toml").write_text(PIPELINE.partition("[sink]")[0])
    finished = psnc_run("no_sink.toml", check=False)
    assert (finished.returncode, finished.stderr) == (
        2,
        "psnc: this pipeline has no sink: add one with .write(sink)\n",
    )


def test_a_local_module_comes_before_an_installed_one_of_its_name(
    psnc_run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "colorsys.py").write_text(STAGES)
    (tmp_path / "pipeline.toml").write_text(PIPELINE.replace("local_stages", "colorsys"))
    assert "4 completed" in psnc_run("pipeline.toml").stdout
