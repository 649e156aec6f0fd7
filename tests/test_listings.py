"""What ``psnc plugins``, ``stages``, ``backends`` and ``--help`` list, and that it costs little."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import TELL, Psnc, Said, Write, psnc, write

from psnc import PluginError, PluginManager, hookimpl
from psnc.discovery import Listed, ListedParameter, offered, stages_of_module
from psnc.manager import BUILT_IN_PLUGINS

__all__ = ["psnc", "write"]

# Made for each other: what a domain needs, and what none of psnc's listings does.
HEAVY = {
    "ase", "asyncio", "lmdb", "multiprocessing", "numpy", "pebble", "psutil", "pynvml", "rich",
    "sqlite3", "yaml", "zarr",
}  # fmt: skip

COMMANDS = """
import click
from psnc import ConfigurationError, hookimpl, plugin_manager

@hookimpl
def psnc_add_commands(cli):
    @cli.command()
    @click.option("--loud", is_flag=True)
    def greet(loud):
        "Say hello."
        print("HELLO" if loud else "hello", plugin_manager().has_plugin("greets"))

    @cli.group()
    def tools():
        "Several tools."

    @tools.command()
    def hammer():
        raise ConfigurationError("no nail: bring one")

    cli.add_command(click.Command("secret", callback=lambda: print("found"), hidden=True))
"""


@pytest.fixture(autouse=True)
def only_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what happens to be installed."""
    monkeypatch.setenv("PSNC_DISABLE_INSTALLED_PLUGINS", "1")


@pytest.fixture
def installed(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay a distribution with a plugin on the path."""
    place = "site/teller-1.5.dist-info"
    write(f"{place}/METADATA", "Metadata-Version: 2.1\nName: teller\nVersion: 1.5\n")
    write(f"{place}/entry_points.txt", "[psnc]\ntell = teller_module\n")
    write("site/teller_module.py", TELL)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


# --- psnc plugins -----------------------------------------------------------------------------


def test_plugins_are_listed_in_the_order_of_loading(
    psnc: Psnc, write: Write, installed: None
) -> None:
    write("named.py", TELL)
    local = write("psnc_plugins.py", TELL)
    file = write("psnc.toml", "plugins = ['no:gpu']")
    said = psnc("plugins", "-p", "named", "-p", "tell", "--json")
    assert said.code == 0
    listed = json.loads(said.out)
    hooks = ["psnc_index_reported"]
    assert listed["loaded"][len(BUILT_IN_PLUGINS) - 1 :] == [
        {"name": "named", "kind": "named", "reference": "named", "distribution": "",
         "version": "", "hooks": hooks},
        {"name": "tell", "kind": "installed", "reference": "teller_module",
         "distribution": "teller", "version": "1.5", "hooks": hooks},
        {"name": str(local), "kind": "local", "reference": str(local), "distribution": "",
         "version": "", "hooks": hooks},
    ]  # fmt: skip
    assert [each["kind"] for each in listed["loaded"]].count("built-in") == len(
        BUILT_IN_PLUGINS
    ) - 1
    assert listed["kept_out"] == ["gpu"]
    assert listed["failed"] == []
    assert not listed["installed_are_loaded"]
    assert listed["configuration_file"] == str(file)


def test_the_text_says_the_same(
    psnc: Psnc, write: Write, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PSNC_DISABLE_INSTALLED_PLUGINS", "")
    monkeypatch.setenv("PSNC_PLUGINS", "other")
    write("named.py", "")
    write("other.py", TELL)
    local = write("psnc_plugins.py", TELL)
    file = write("psnc.toml", "plugins = ['no:gpu', 'no:gpuu']")
    said = psnc("plugins", "-p", "named")
    assert said.code == 0
    lines = [line.split(maxsplit=2) for line in said.out.splitlines()]
    assert ["tell", "teller 1.5, teller_module"] in [line[1:] for line in lines]
    assert ["named", "-p, named"] in [line[1:] for line in lines]
    assert ["other", "PSNC_PLUGINS, other"] in [line[1:] for line in lines]
    assert ["psnc_plugins", str(local)] in [line[1:] for line in lines]
    assert "    no hooks\n" in said.out
    assert "kept out: gpu, gpuu (not there)\n" in said.out
    assert f"configuration file: {file}\n" in said.out
    assert "DISABLE" not in said.out


def test_installed_plugins_that_are_kept_out_are_said(psnc: Psnc) -> None:
    said = psnc("plugins")
    assert "installed are not loaded: PSNC_DISABLE_INSTALLED_PLUGINS is set" in said.out


def test_a_plugin_that_fails_is_listed_beside_the_others(psnc: Psnc, write: Write) -> None:
    write("broken.py", "1 / 0")
    write("named.py", TELL)
    for said in (psnc("plugins", "-p", "broken", "-p", "named"),
                 psnc("-p", "broken", "plugins", "-p", "named")):  # fmt: skip
        assert said.code == 2
        assert said.err == ""
        assert "  named " in said.out
        assert said.out.splitlines()[-1].startswith(
            "failed to load: -p broken: importing it raised"
        )
    listed = json.loads(psnc("plugins", "-p", "broken", "--json").out)
    (failed,) = listed["failed"]
    assert failed["name"] == "broken"
    assert "ZeroDivisionError" in failed["reason"]


# --- psnc --help and the commands of plugins --------------------------------------------------


def test_commands_of_plugins_are_shown_under_their_names(psnc: Psnc, write: Write) -> None:
    write("greets.py", COMMANDS)
    own, _, added = psnc("-p", "greets", "--help").out.partition("\nCommands of the plugin greets:")
    assert "  plugins  " in own
    assert [line.split() for line in added.split("\n\n")[0].splitlines() if line] == [
        ["greet", "Say", "hello."],
        ["tools", "Several", "tools."],
    ]
    assert "greet" not in psnc("--help").out


def test_commands_of_plugins_run_with_their_plugin(psnc: Psnc, write: Write) -> None:
    write("greets.py", COMMANDS)
    assert psnc("-p", "greets", "greet", "--loud") == Said(0, "HELLO True\n", "")
    assert psnc("-p", "greets", "secret").out == "found\n"
    assert psnc("-p", "greets", "tools", "hammer").error == "no nail: bring one"
    assert "Say hello." in psnc("-p", "greets", "greet", "--help").out


def test_a_command_that_nobody_has_is_a_usage_error(psnc: Psnc, write: Write) -> None:
    write("greets.py", COMMANDS)
    for options in ([], ["-p", "greets"]):
        said = psnc(*options, "greeet")
        assert said.code == 2
        assert "No such command 'greeet'" in said.err


@pytest.mark.parametrize(
    ("plugin", "complaint"),
    [
        (COMMANDS.replace("def greet(", "def run("), "adds the command 'run', which psnc has"),
        (COMMANDS, "adds the command 'greet', which plugin 'greets' has already"),
        (COMMANDS.replace("    @cli.group()", "    1 / 0"), "raised in psnc_add_commands (ZeroDiv"),
        ("1 / 0", None),
    ],
)
def test_a_plugin_with_bad_commands_breaks_no_help_and_no_other_command(
    plugin: str, complaint: str | None, psnc: Psnc, write: Write
) -> None:
    write("greets.py", COMMANDS)
    write("rude.py", plugin)
    said = psnc("-p", "greets", "-p", "rude", "--help")
    assert said.code == 0
    assert said.err == ""
    assert "Commands of the plugin greets:" in said.out
    told = " ".join(said.out.split())
    if complaint is None:
        assert "Could not be loaded: rude. Ask psnc plugins why." in told
        assert psnc("-p", "rude", "greeet").error.startswith("-p rude: importing it raised")
        return
    assert f"Commands are missing: plugin 'rude' of -p rude {complaint}" in told
    assert "with -p no:rude" in told
    assert psnc("-p", "rude", "run", "three:pipeline").code == 0
    assert complaint in psnc("-p", "greets", "-p", "rude", "greeet").error


def test_help_is_shown_where_the_settings_are_wrong(psnc: Psnc, write: Write) -> None:
    file = write("psnc.toml", "plugins = 3")
    said = psnc("--help")
    assert said.code == 0
    assert f"No commands of plugins: {file}: plugins is 3" in " ".join(said.out.split())


def test_help_is_shown_where_a_plugin_fails_but_nothing_runs(psnc: Psnc, write: Write) -> None:
    write("psnc_plugins.py", "1 / 0")
    assert psnc("--help").code == 0
    for command in (["run", "three:pipeline"], ["stages"], ["backends"], ["greet"]):
        assert "ZeroDivisionError" in psnc(*command).error


# --- psnc stages and psnc backends ------------------------------------------------------------

# One of every kind of constructor; `shapes` is imported, and read as text as well.
SHAPES = '''
from __future__ import annotations

import typing as t
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import attrs

import psnc
import psnc as p
from psnc import Filter, Param, Sink, Source
from psnc import Param as Note

T = TypeVar("T")
Token = Annotated[str, Param(description="A token.", secret=True)]
SECRET = Param(secret=True)


class Two(Source[int]):
    def __len__(self): return 2
    def __getitem__(self, index): yield index

class Plain(Two):
    """Reads what is
    there.

    More of it.

    Parameters
    ----------
    place : str
        Where it is, and
        what.
    a, b : int
        Two numbers.
    *rest
        More.
    **extra : Any
        Even more.
    """

    def __init__(
        self, place: str | Path, a: int = 1, /, b=2, *rest: int, key: Sequence[str],
        rate: float | None = None, **extra: Any,
    ) -> None:
        ...

class Secret(Two):
    def __init__(
        self,
        a: Annotated[str, Param(description="The a.", secret=True)] = "hunter1",
        b: t.Annotated[str, psnc.Param(secret=True)] = "hunter2",
        c: Annotated[str, Note(secret=True)] | None = "hunter3",
        d: "Annotated[str, p.Param(secret=True)]" = "hunter4",
        e: Token = "hunter5",
        f: list[Annotated[str, SECRET]] = ["hunter6"],
        g: Annotated[int, "a note", Param(description="The g.")] = 7,
        h: Annotated[str, Param(secret=False)] = "shown",
    ) -> None:
        ...

class Inherits(Secret):
    "Inherits."

class Described(Plain):
    """Describes anew.

    Parameters
    ----------
    place
        Elsewhere.
    """

class Mixin:
    pass

class Mixed(Mixin, Secret):
    "Of two bases."

class Nothing(Two, Generic[T]):
    "Takes nothing."

class Qualified(p.Source[int]):
    "Of a qualified base."
    def __len__(self): return 2
    def __getitem__(self, index): yield index

class Long(Filter[int, int]):
    def __init__(self, table: dict[str, Any] = {"a": [1, 2]}, text: str = "two\\nlines"): ...
    def __call__(self, items): yield from items

class Twice(Sink[int]):
    def __init__(self, first: int) -> None: ...
    def __call__(self, items, index): return []

class Twice(Sink[int]):
    "The one that stays."
    @t.overload
    def __init__(self, second: int) -> None: ...
    @t.overload
    def __init__(self, second: str) -> None: ...
    def __init__(self, second: Any = None) -> None: ...
    def __call__(self, items, index): return []
'''

# Those whose constructor is made of what the text shows.
OF_FIELDS = '''

import dataclasses
from dataclasses import field
from typing import ClassVar

class Outer:
    class Inner(Two):
        "Inside."
        def __init__(self, depth: int = 1) -> None: ...

    class Deeper:
        class Innermost(Two):
            pass

@dataclass
class Data(Filter[int, int]):
    """A dataclass."""

    scale: float
    name: str = "x"
    def __call__(self, items): yield from items

@attrs.define
class Attrs(Filter[int, int]):
    scale: float = 2.0
    def __call__(self, items): yield from items

class OfData(Data):
    "Inherits what is made."

@dataclasses.dataclass(eq=False, kw_only=True)
class MoreData(Data):
    """Adds to what it inherits.

    Parameters
    ----------
    token
        Not for others.
    """

    count: ClassVar[int] = 3
    token: Annotated[str, Param(secret=True)] = "hunter8"
    hidden: int = field(default=3, init=False)
    shown: int = field(default=4, repr=False)

@attrs.frozen
class MoreAttrs(Attrs):
    _private: int = attrs.field(default=1, kw_only=True)
    text: str = attrs.field(default="t", validator=attrs.validators.instance_of(str))

@psnc.filter
def scaled(item, by: float = 2.0, *, shift: int = 0):
    """Scales.

    Parameters
    ----------
    by
        How much.
    """
    yield by * item

@p.sink()
def kept(items, index, /, directory: str, *names: str, token: Token = "hunter9"):
    "Keeps."
    return []
'''

# Those whose constructor the text does not show.
MADE = """

@attrs.define
class ByMethod(Filter[int, int]):
    scale: float = attrs.field()
    @scale.default
    def _scale(self): return 1.0
    def __call__(self, items): yield from items

@attrs.define
class Changed(Attrs):
    "Changes what it inherits."
    scale: float = 3.0

class Says(Sink[int]):
    "Says itself what it takes."
    def __init__(self, **anything): ...
    @classmethod
    def params(cls):
        return [Param(name="alpha", type=int, description="The alpha.")]
    def __call__(self, items, index): return []

class Assigned(Sink[int]):
    "Has a constructor of somebody else's."
    def other(self, beta: int = 3) -> None: ...
    __init__ = other
    def __call__(self, items, index): return []

class Chosen(Sink[int]):
    "Has a constructor by choice."
    if attrs:
        def __init__(self, gamma: int = 4) -> None: ...
    def __call__(self, items, index): return []

class Diamond(Plain, Secret):
    "Has two constructors to choose from."

class Plain(Plain):
    "Has another's name."

class Elsewhere(psnc.FilesSource):
    "Inherits from another module."
"""

STAGES = {
    "Two": "source", "Plain": "source", "Secret": "source", "Inherits": "source",
    "Described": "source", "Mixed": "source", "Nothing": "source", "Qualified": "source",
    "Long": "filter", "Twice": "sink",
}  # fmt: skip
OF_FIELDS_STAGES = {
    "Outer.Inner": "source", "Outer.Deeper.Innermost": "source", "Data": "filter",
    "Attrs": "filter", "OfData": "filter", "MoreData": "filter", "MoreAttrs": "filter",
    "scaled": "filter", "kept": "sink",
}  # fmt: skip
MADE_STAGES = {
    "ByMethod": "filter", "Changed": "filter", "Says": "sink", "Assigned": "sink",
    "Chosen": "sink", "Diamond": "source", "Plain": "source", "Elsewhere": "source",
}  # fmt: skip


@pytest.fixture
def shapes(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("shapes.py", SHAPES)
    write("of_fields.py", SHAPES + OF_FIELDS)
    write("made.py", SHAPES + OF_FIELDS + MADE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()


def _by_text(plugins: PluginManager, module: str, stages: dict[str, str]) -> dict[str, Listed]:
    """Describe stages as they are if a plugin offers them by reference."""

    def of(kind: str) -> dict[str, str]:
        return {name: f"{module}:{name}" for name, each in stages.items() if each == kind}

    class Offers:
        @hookimpl
        def psnc_sources(self) -> dict[str, str]:
            return of("source")

        @hookimpl
        def psnc_filters(self) -> dict[str, str]:
            return of("filter")

        @hookimpl
        def psnc_sinks(self) -> dict[str, str]:
            return of("sink")

    plugins.register(Offers(), "offers")
    listed = [*offered(plugins, "source"), *offered(plugins, "filter"), *offered(plugins, "sink")]
    assert module not in sys.modules
    return {each.name: each for each in listed if each.origin == "offers"}


def _signature(listed: Listed) -> list[str]:
    assert listed.parameters is not None
    return [str(each) for each in listed.parameters]


PLAIN = ["place: str | Path", "a: int = 1", "b=2", "*rest: int", "key: Sequence[str]",
         "rate: float | None = None", "**extra: Any"]  # fmt: skip
SECRETS = ["a: str = …", "b: str = …", "c: str | None = …", "d: str = …", "e: str = …",
           "f: list[str] = …", "g: int = 7", "h: str = 'shown'"]  # fmt: skip


def test_parameters_are_read_from_the_text(plugins: PluginManager, shapes: None) -> None:
    listed = _by_text(plugins, "shapes", STAGES)
    assert _signature(listed["Plain"]) == PLAIN
    assert _signature(listed["Secret"]) == SECRETS
    assert _signature(listed["Inherits"]) == SECRETS
    assert _signature(listed["Mixed"]) == SECRETS
    assert _signature(listed["Nothing"]) == _signature(listed["Qualified"]) == []
    assert _signature(listed["Twice"]) == ["second: Any = None"]
    assert _signature(listed["Long"]) == [
        "table: dict[str, Any] = {'a': [1, 2]}",
        r"text: str = 'two\nlines'",
    ]
    assert "hunter" not in repr(listed)


def test_descriptions_are_those_of_the_param_or_the_documentation(
    plugins: PluginManager, shapes: None
) -> None:
    listed = _by_text(plugins, "shapes", STAGES)
    assert listed["Plain"].description == "Reads what is there."
    described = {each.name: each.description for each in listed["Plain"].parameters or ()}
    assert described == {
        "place": "Where it is, and what.", "a": "Two numbers.", "b": "Two numbers.",
        "*rest": "More.", "key": "", "rate": "", "**extra": "Even more.",
    }  # fmt: skip
    assert [each.description for each in listed["Described"].parameters or ()][:2] == [
        "Elsewhere.",
        "Two numbers.",
    ]
    described = {each.name: each.description for each in listed["Secret"].parameters or ()}
    assert {name: text for name, text in described.items() if text} == {
        "a": "The a.", "e": "A token.", "g": "The g.",
    }  # fmt: skip


def _comparable(parameter: ListedParameter) -> tuple[str, str | None, str, str]:
    # Python keeps an optional type in words, and no type that says nothing.
    type = parameter.type.replace("Optional[str]", "str | None").removesuffix("Any")
    return parameter.name, parameter.default, parameter.description, type


@pytest.mark.parametrize(
    ("module", "stages"), [("shapes", STAGES), ("of_fields", {**STAGES, **OF_FIELDS_STAGES})]
)
def test_the_text_and_the_class_tell_the_same(
    module: str, stages: dict[str, str], plugins: PluginManager, shapes: None
) -> None:
    by_text = _by_text(plugins, module, stages)
    by_class = {each.name: each for each in stages_of_module(importlib.import_module(module))}
    assert by_text.keys() == by_class.keys()
    for name, listed in by_text.items():
        other = by_class[name]
        assert (listed.kind, listed.reference) == (other.kind, other.reference)
        assert listed.description == other.description
        assert list(map(_comparable, listed.parameters or ())) == list(
            map(_comparable, other.parameters or ())
        )


def test_parameters_of_functions_and_fields_are_read_from_the_text(
    plugins: PluginManager, shapes: None
) -> None:
    listed = _by_text(plugins, "of_fields", OF_FIELDS_STAGES)
    assert _signature(listed["scaled"]) == ["by: float = 2.0", "shift: int = 0"]
    assert _signature(listed["kept"]) == ["directory: str", "*names: str", "token: str = …"]
    assert _signature(listed["Data"]) == ["scale: float", "name: str = 'x'"]
    assert _signature(listed["MoreAttrs"]) == [
        "scale: float = 2.0",
        "text: str = 't'",
        "private: int = 1",
    ]
    assert _signature(listed["Outer.Inner"]) == ["depth: int = 1"]
    assert [each.description for each in listed["scaled"].parameters or ()] == ["How much.", ""]
    assert (listed["scaled"].description, listed["Data"].description) == ("Scales.", "A dataclass.")
    assert "hunter" not in repr(listed)


def test_a_class_inside_another_is_offered_by_its_path(
    plugins: PluginManager, shapes: None
) -> None:
    class Offers:
        @hookimpl
        def psnc_sources(self) -> dict[str, str]:
            inner = "of_fields:Outer.Deeper.Innermost"
            return {"inner": inner, "gone": f"{inner}.Gone"}

    plugins.register(Offers())
    assert plugins.stage_class("source", "inner").__qualname__ == "Outer.Deeper.Innermost"
    with pytest.raises(PluginError, match=r"'gone' of plugin .* has no attribute 'Gone'"):
        plugins.stage_class("source", "gone")


def test_what_the_text_does_not_show_is_not_guessed(plugins: PluginManager, shapes: None) -> None:
    listed = _by_text(plugins, "made", MADE_STAGES)
    assert {name for name, each in listed.items() if each.parameters is None} == set(MADE_STAGES)
    assert {each.problem for each in listed.values()} == {""}
    assert listed["Changed"].description == "Changes what it inherits."


def test_what_the_text_does_not_show_is_shown_by_importing(
    psnc: Psnc, shapes: None, write: Write
) -> None:
    said = psnc("stages", "made", "--json")
    assert said.code == 0
    by_class = {each["name"]: each for each in json.loads(said.out)}
    signatures = {
        name: [each["name"] for each in by_class[name]["parameters"]] for name in MADE_STAGES
    }
    assert signatures == {
        "ByMethod": ["scale"], "Changed": ["scale"],
        "Says": ["alpha"], "Assigned": ["beta"], "Chosen": ["gamma"],
        "Diamond": ["place", "a", "b", "*rest", "key", "rate", "**extra"],
        "Plain": ["place", "a", "b", "*rest", "key", "rate", "**extra"],
        "Elsewhere": [each["name"] for each in _files_source(psnc)],
    }  # fmt: skip
    assert by_class["scaled"]["parameters"] == [
        {"name": "by", "type": "float", "default": "2.0", "description": "How much."},
        {"name": "shift", "type": "int", "default": "0", "description": ""},
    ]
    assert [each["name"] for each in by_class["Outer.Inner"]["parameters"]] == ["depth"]
    assert by_class["Says"]["parameters"][0]["description"] == "The alpha."
    assert "hunter" not in said.out


def _files_source(psnc: Psnc) -> list[dict[str, Any]]:
    listed = json.loads(psnc("stages", "psnc.sources", "--json").out)
    (source,) = (each for each in listed if each["name"] == "FilesSource")
    parameters: list[dict[str, Any]] = source["parameters"]
    return parameters


def test_a_module_and_a_file_are_listed_alike(psnc: Psnc, shapes: None, tmp_path: Path) -> None:
    by_name = psnc("stages", "shapes")
    by_path = psnc("stages", tmp_path / "shapes.py")
    assert by_name == by_path
    assert by_name.out.startswith("sources\n  Two\n      shapes:Two (shapes)\n  Plain\n")
    assert "\nfilters\n  Long\n" in by_name.out
    assert (
        "\nsinks\n  Twice\n      shapes:Twice (shapes)\n      The one that stays.\n" in by_name.out
    )


def test_only_what_a_module_defines_and_can_be_made_is_listed(psnc: Psnc, write: Write) -> None:
    write(
        "few.py",
        """
        from psnc import Sink
        from stages_for_tests import Numbers

        class Abstract(Sink):
            pass

        class Concrete(Abstract):
            def __call__(self, items, index):
                return []

        Another = Concrete
        """,
    )
    assert psnc("stages", "few").out == (
        "sources: none\nfilters: none\nsinks\n  Concrete\n      few:Concrete (few)\n"
    )


def test_a_default_without_end_is_cut_short(psnc: Psnc, write: Write) -> None:
    write(
        "long.py",
        """
        from psnc import Filter

        class Long(Filter):
            def __init__(self, table=list(range(1000))): ...
            def __call__(self, items): yield from items
        """,
    )
    assert "999" not in psnc("stages", "long").out
    assert "table=[0, 1, 2" in psnc("stages", "long").out
    assert "998, 999]" in psnc("stages", "long", "--json").out


@pytest.mark.parametrize(
    ("place", "text", "complaint"),
    [
        ("nothing_here", None, "no module named 'nothing_here' here or among the installed"),
        ("nothing_here.py", None, "no file {path}: check the path"),
        ("broken", "def (:", "importing broken raised SyntaxError: invalid syntax"),
        ("broken.py", "1 / 0", "importing {path} raised ZeroDivisionError: division by zero"),
        ("broken", "import nothing_here", "importing broken raised ModuleNotFoundError: No module"),
        (
            "broken",
            "__all__ = ['Thing']\ndef __getattr__(name):\n    import nothing_here",
            "Thing of broken cannot be imported (ModuleNotFoundError: No module named "
            "'nothing_here'): install what it needs",
        ),
    ],
)
def test_a_module_that_cannot_be_listed_is_refused_in_one_line(
    place: str, text: str | None, complaint: str, psnc: Psnc, write: Write, tmp_path: Path
) -> None:
    if text is not None:
        write(f"{place.removesuffix('.py')}.py", text)
    assert psnc("stages", place).error.startswith(complaint.format(path=tmp_path / place))


def test_a_class_that_cannot_say_its_parameters_stops_no_listing(psnc: Psnc, write: Write) -> None:
    write(
        "odd.py",
        """
        from psnc import Filter

        class Odd(Filter):
            @classmethod
            def params(cls):
                return 1 / 0
            def __call__(self, items): yield from items

        class Even(Odd):
            @classmethod
            def params(cls):
                return []
        """,
    )
    assert psnc("stages", "odd").out == (
        "sources: none\nfilters\n  Odd\n      odd:Odd (odd)\n"
        "      parameters unknown: asking the class raised ZeroDivisionError: division by\n"
        "          zero\n  Even\n      odd:Even (odd)\nsinks: none\n"
    )


OFFERS = """
from psnc import hookimpl

@hookimpl
def psnc_sources():
    return {references}
"""


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("nothing_here:Thing", "there is no module nothing_here"),
        ("shapes.inner:Thing", "there is no module shapes.inner"),
        ("broken:Thing", "broken: invalid syntax (broken.py, line 1)"),
        ("shapes:Nobody", "psnc stages shapes imports the module and shows them"),
        ("sys:Thing", "psnc stages sys imports the module and shows them"),
        ("latin:Odd", None),
        ("marked:Odd", None),
        ("warns:Odd", None),
    ],
)
def test_what_cannot_be_read_is_listed_with_the_reason(
    reference: str,
    expected: str | None,
    psnc: Psnc,
    write: Write,
    shapes: None,
    tmp_path: Path,
) -> None:
    text = "from psnc import Source\nclass Odd(Source):\n    '''{}'''\n"
    write("broken.py", "def (:")
    write("warns.py", text.format(r"\d"))
    latin = "# -*- coding: latin-1 -*-\n" + text.format("Zürich")
    (tmp_path / "latin.py").write_bytes(latin.encode("latin-1"))
    (tmp_path / "marked.py").write_bytes(text.format("Zürich").encode("utf-8-sig"))
    write("offers.py", OFFERS.format(references={"thing": reference}))
    said = psnc("stages", "-p", "offers")
    assert (said.code, said.err) == (0, "")
    line = f"      {reference} (offers)\n"
    assert f"  thing\n{line}" in said.out
    unknown = said.out.partition(line)[2].splitlines()[0].strip()
    assert unknown == (f"parameters unknown: {expected}" if expected else unknown)
    assert ("parameters unknown" in unknown) == (expected is not None)


@pytest.mark.parametrize(
    ("references", "complaint"),
    [
        ({"thing": "shapes"}, "psnc_sources names 'thing' 'shapes': give a class, or its"),
        ({"thing": ":Two"}, "psnc_sources names 'thing' ':Two': give a class, or its"),
        ({"thing": 3}, "psnc_sources names 'thing' 3: give a class, or its"),
        ({3: "shapes:Two"}, "psnc_sources names 3 'shapes:Two': give a class, or its"),
        (["shapes:Two"], "psnc_sources returned list: return a mapping of names to classes"),
    ],
)
def test_an_offer_that_is_none_is_refused(
    references: Any, complaint: str, psnc: Psnc, write: Write
) -> None:
    write("offers.py", OFFERS.format(references=references))
    expected = f"plugin 'offers' of -p offers: {complaint}"
    assert psnc("stages", "-p", "offers").error.startswith(expected)


def test_of_equal_names_the_plugin_that_is_loaded_last_is_listed(psnc: Psnc, write: Write) -> None:
    for name in ("first", "second"):
        write(f"{name}.py", OFFERS.format(references={"thing": f"nothing_{name}:Thing"}))
    said = psnc("stages", "-p", "first", "-p", "second")
    assert "nothing_second:Thing (second)" in said.out
    assert "nothing_first" not in said.out


def test_backends_are_listed_with_their_options(psnc: Psnc) -> None:
    listed = {each["name"]: each for each in json.loads(psnc("backends", "--json").out)}
    assert list(listed) == ["process_pool", "sequential", "thread_pool"]
    pool = listed["process_pool"]
    (parameter,) = pool["parameters"]
    assert (parameter["name"], parameter["default"]) == ("start_method", "None")
    assert "forkserver" in parameter["description"]
    assert listed["sequential"]["parameters"] == []
    assert psnc("backends", "-p", "no:backends").out == "no backends\n"


def test_a_backend_that_is_offered_as_a_class_has_its_options_listed(
    psnc: Psnc, write: Write
) -> None:
    write(
        "backs.py",
        """
        from psnc import Backend, hookimpl

        class Far(Backend):
            '''Runs far away.

            Parameters
            ----------
            host : str
                Where.
            '''
            def __init__(self, n_jobs, *, host: str, port: int = 22, **more) -> None: ...

        @hookimpl
        def psnc_backends():
            return {"far": Far, "farther": "backs:Far"}
        """,
    )
    expected = (
        "\n      backs:Far (backs)\n      Runs far away.\n      host: str  Where.\n"
        "      port: int = 22\n      **more\n"
    )
    out = psnc("backends", "-p", "backs").out
    assert f"  far{expected}" in out
    assert f"  farther{expected}" in out


@pytest.mark.parametrize("columns", ["40", "10"])
@pytest.mark.parametrize("command", ["plugins", "stages", "backends", "hooks"])
def test_a_narrow_terminal_gets_narrow_lines(
    command: str, columns: str, psnc: Psnc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "dumb")
    said = psnc(command)
    assert said.code == 0
    assert "\x1b" not in said.out
    # What is to be copied stays in one line.
    assert max(len(line) for line in said.out.splitlines() if "psnc." not in line) <= 40


# --- what a listing imports -------------------------------------------------------------------


@pytest.fixture
def imports(write: Write, tmp_path: Path) -> Callable[..., set[str]]:
    """Run a command in a process of its own, and return the modules that it imported."""
    write("shapes.py", "import numpy, sqlite3\n" + SHAPES)
    write("offers.py", OFFERS.format(references={"thing": "shapes:Plain"}))
    write(
        "imports.py",
        """
        import sys
        before = set(sys.modules)
        from psnc.cli import main
        try:
            main(sys.argv[1:])
        finally:
            # What measures the tests' coverage is imported before.
            modules = set(sys.modules) - before
            print(*{name.partition(".")[0] for name in modules}, file=sys.stderr)
        """,
    )

    def run(*arguments: str) -> set[str]:
        finished = subprocess.run(
            [sys.executable, tmp_path / "imports.py", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        return set(finished.stderr.splitlines()[-1].split())

    return run


@pytest.mark.parametrize("command", ["plugins", "stages", "backends", "hooks", "--help"])
def test_a_listing_imports_nothing_heavy(command: str, imports: Callable[..., set[str]]) -> None:
    options = [] if command == "hooks" else ["-p", "offers"]
    assert imports(*options, command) & HEAVY == set()


def test_the_version_is_told_without_any_plugin(imports: Callable[..., set[str]]) -> None:
    assert imports("-p", "nothing_here", "--version").isdisjoint({*HEAVY, "attrs", "pluggy"})
