"""What is said of a plugin that is wrong: which one, where, and what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
from command_line import TELL, Psnc, Write, psnc, write

from psnc import Config, PluginError, PluginManager, hookimpl
from psnc.execution import IndexContext
from psnc.records import IndexRecord

__all__ = ["psnc", "write"]


def _line(text: str) -> int:
    """Return the line of this file that has a text first."""
    with open(__file__, encoding="utf-8") as file:
        return next(number for number, line in enumerate(file, 1) if text in line)


def _refused(plugin: Any, name: str | None = None) -> str:
    manager = PluginManager()
    with pytest.raises(PluginError) as refused:
        manager.register(plugin, name)
    message = str(refused.value)
    assert "\n" not in message
    assert manager.origins == {}
    return message


# --- modules ----------------------------------------------------------------------------------

MODULES = [
    pytest.param(
        "from psnc import hookimpl\n\n@hookimpl\ndef psnc_index_dome(record): pass",
        "plugin 'bad' of -p bad: there is no hook 'psnc_index_dome' ({file}:4): did you mean "
        "'psnc_index_done'?",
        id="misspelt hook",
    ),
    pytest.param(
        "from psnc import hookimpl\n\n@hookimpl\ndef on_batch(batch): pass",
        "plugin 'bad' of -p bad: there is no hook 'on_batch' ({file}:4): psnc hooks lists those "
        "there are",
        id="another framework's hook",
    ),
    pytest.param(
        "from psnc import hookimpl\n\n@hookimpl(\n    tryfirst=True\n)\n"
        "def psnc_index_done(contxt):\n    pass",
        "plugin 'bad' of -p bad: psnc_index_done has no argument 'contxt' ({file}:6): did you mean "
        "'context'?",
        id="misspelt argument",
    ),
    pytest.param(
        "from psnc import hookimpl\n\n@hookimpl\ndef psnc_sources(run): pass",
        "plugin 'bad' of -p bad: psnc_sources has no argument 'run' ({file}:4): the hook has no "
        "arguments",
        id="argument of a hook without",
    ),
    pytest.param(
        "from psnc import hookimpl\n\n@hookimpl(specname='psnc_run_strat')\ndef begin(run): pass",
        "plugin 'bad' of -p bad: there is no hook 'psnc_run_strat' ({file}:4): did you mean "
        "'psnc_run_start'?",
        id="misspelt name of a specification",
    ),
    pytest.param(
        "def psnc_index_done(record): pass",
        "plugin 'bad' of -p bad: psnc_index_done is not marked as a hook ({file}:1): decorate it "
        "with @psnc.hookimpl",
        id="unmarked",
    ),
    pytest.param(
        "from psnc import hookimpl\n\n@hookimpl\nasync def psnc_index_done(record): pass",
        "plugin 'bad' of -p bad: psnc_index_done is async ({file}:4): write it with a plain def",
        id="async",
    ),
    pytest.param(
        "from psnc import hookimpl\n\n@hookimpl\ndef psnc_index_done(record):\n    yield",
        "plugin 'bad' of -p bad: psnc_index_done yields, so that its body would never run "
        "({file}:4): return instead, or mark a wrapper with @psnc.hookimpl(wrapper=True)",
        id="generator",
    ),
    pytest.param(
        "from psnc import hookimpl\n\n@hookimpl(wrapper=True)\ndef psnc_index_done(): pass",
        "plugin 'bad' of -p bad: psnc_index_done is a wrapper that does not yield ({file}:4): "
        "yield once",
        id="wrapper without yield",
    ),
    pytest.param(
        "from psnc import hookimpl\n\n@hookimpl\ndef psnc_index_done(**given: object): pass",
        "plugin 'bad' of -p bad: psnc_index_done has '**given', which is never filled ({file}:4): "
        "name the arguments that it needs",
        id="arguments by no name",
    ),
    pytest.param(
        "from psnc import hookimpl\n\n@hookimpl\ndef psnc_index_done(*, record): pass",
        "plugin 'bad' of -p bad: psnc_index_done has 'record', which is never filled ({file}:4): "
        "name the arguments that it needs, and no * before them",
        id="argument by keyword only",
    ),
    pytest.param(
        "from psnc import hookimpl\n\n@hookimpl\n"
        "def psnc_index_done(context, record: object = None): pass",
        "plugin 'bad' of -p bad: psnc_index_done has 'record=None', which is never filled "
        "({file}:4): name the arguments that it needs, and give them no default",
        id="argument with a default",
    ),
    pytest.param(
        "from psnc import hookimpl\n\n@hookimpl\ndef psnc_index_done(context, recrd=None): pass",
        "plugin 'bad' of -p bad: psnc_index_done has 'recrd=None', which is never filled ({file}:4"
        "): name the arguments",
        id="misspelt argument with a default",
    ),
    pytest.param(
        "from psnc import hookimpl\n\n@hookimpl\ndef psnc_index_done(*, record=()): pass",
        "plugin 'bad' of -p bad: psnc_index_done has 'record=()', which is never filled ({file}:4)",
        id="argument with a default by keyword only",
    ),
    pytest.param(
        "import helper",
        "-p bad: importing it raised ZeroDivisionError: division by zero at {helper}:2",
        id="raises elsewhere",
    ),
    pytest.param(
        "import psnc\n\n@psnc.hookimp\ndef psnc_index_done(record): pass",
        "-p bad: importing it raised AttributeError: module 'psnc' has no attribute 'hookimp' at "
        "{file}:3",
        id="misspelt mark",
    ),
    pytest.param(
        "from pathlib import Path\nPath('no_such_file').read_text()",
        "-p bad: importing it raised FileNotFoundError: [Errno 2] No such file or directory: "
        "'no_such_file' at {file}:2",
        id="raises in the library",
    ),
    pytest.param(
        "import nothing_here",
        "-p bad: importing it raised ModuleNotFoundError: No module named 'nothing_here' at "
        "{file}:1",
        id="lacks a module",
    ),
    pytest.param(
        "from psnc import hookimp",
        "-p bad: importing it raised ImportError: cannot import name 'hookimp' from 'psnc' ",
        id="lacks a name",
    ),
    pytest.param(
        "import sys\nsys.exit('no licence')",
        "-p bad: importing it raised SystemExit: no licence at {file}:2",
        id="exits",
    ),
]


@pytest.mark.parametrize(("text", "complaint"), MODULES)
def test_a_module_that_is_wrong_is_refused_with_its_line(
    text: str, complaint: str, psnc: Psnc, write: Write
) -> None:
    helper = write("helper.py", "\n1 / 0")
    file = write("bad.py", text)
    expected = complaint.format(file=file, helper=helper)
    assert psnc("run", "three:pipeline", "-p", "bad").error.startswith(expected)
    assert psnc("run", "three:pipeline", "-p", "bad", "-p", "no:bad").code == 0


@pytest.mark.parametrize("hook", ["psnc_addoptions", "psnc_backends", "psnc_open_store"])
def test_a_hook_that_exits_ends_no_command_as_if_all_were_done(
    hook: str, psnc: Psnc, write: Write
) -> None:
    write("bad.py", f"import psnc\n\n@psnc.hookimpl\ndef {hook}(): raise SystemExit(0)")
    assert psnc("run", "three:pipeline", "-p", "bad").error == (
        f"plugin 'bad' of -p bad raised in {hook} (SystemExit: 0): mend it, or run with -p no:bad"
    )


def test_a_plugin_that_exits_as_it_is_set_up_ends_no_command_as_if_all_were_done(
    psnc: Psnc, write: Write
) -> None:
    write("bad.py", "import psnc\n\n@psnc.hookimpl\ndef psnc_configure(): raise SystemExit(0)")
    assert psnc("run", "three:pipeline", "-p", "bad").error.startswith(
        "a plugin called exit(0) in psnc_configure: "
    )


def test_an_offered_class_whose_module_exits_is_refused(psnc: Psnc, write: Write) -> None:
    write("leaves.py", "raise SystemExit(0)")
    write("bad.py", "import psnc\n@psnc.hookimpl\ndef psnc_backends(): return {'far': 'leaves:A'}")
    assert psnc("run", "three:pipeline", "-p", "bad", "--backend", "far").error.startswith(
        "'far' of plugin 'bad' of -p bad cannot be imported from 'leaves:A' (SystemExit: 0)"
    )


def test_of_an_answer_that_is_no_store_the_plugins_are_named(psnc: Psnc, write: Write) -> None:
    write("bad.py", "import psnc\n\n@psnc.hookimpl\ndef psnc_open_store(): return 42")
    assert psnc("run", "three:pipeline", "-p", "bad", "--db-file", "a.db").error.startswith(
        "psnc_open_store of one of the plugins bad answered "
    )


def test_of_several_the_first_is_told_and_the_others_are_named(psnc: Psnc, write: Write) -> None:
    for name in ("one", "two", "three_more"):
        write(f"{name}.py", "1 / 0")
    options = ["-p", "one", "-p", "two", "-p", "three_more"]
    error = psnc("run", "three:pipeline", *options).error
    assert error.startswith("-p one: importing it raised ZeroDivisionError")
    assert error.endswith("(nor could be loaded: two, three_more)")
    assert psnc("plugins", *options).out.count("failed to load: ") == 3


def test_hooks_that_are_imported_or_helpers_need_no_mark(psnc: Psnc, write: Write) -> None:
    write("tell.py", TELL)
    write("bad.py", "from tell import psnc_index_reported\ndef psnc_helper(): pass\n")
    # The hook came with its mark.
    assert psnc("run", "three:pipeline", "-p", "bad").told() == ["0", "1", "2"]


# --- objects of a program ---------------------------------------------------------------------


class MisspeltHook:
    @hookimpl
    def psnc_index_dome(self) -> None: ...


class MisspeltArgument:
    @hookimpl
    def psnc_index_done(self, recrod: Any) -> None: ...


class Unmarked:
    def psnc_run_done(self, run: Any) -> None: ...


class Async:
    @hookimpl
    async def psnc_run_start(self, run: Any) -> None: ...


class NoGenerator:
    @hookimpl(wrapper=True)
    def psnc_index_done(self, record: Any) -> None: ...


class Fine:
    @hookimpl
    def psnc_index_done(self, record: IndexRecord) -> None: ...


@pytest.mark.parametrize(
    ("plugin", "complaint"),
    [
        (MisspeltHook(), "there is no hook 'psnc_index_dome' ({file}:{line}): did you mean"),
        (MisspeltArgument(), "psnc_index_done has no argument 'recrod' ({file}:{line}): did you"),
        (Unmarked(), "psnc_run_done is not marked as a hook ({file}:{line}): decorate it with"),
        (Async(), "psnc_run_start is async ({file}:{line}): write it with a plain def"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_object_that_is_wrong_is_refused_with_the_line(plugin: Any, complaint: str) -> None:
    name = type(plugin).__name__
    line = _line(f"class {name}:") + (1 if name == "Unmarked" else 2)
    expected = complaint.format(file=__file__, line=line)
    assert _refused(plugin).startswith(f"plugin {name!r} of the program: {expected}")


def test_a_wrapper_that_is_no_generator_is_refused() -> None:
    line = _line("class NoGenerator:") + 2
    assert _refused(NoGenerator()).startswith(
        "plugin 'NoGenerator' of the program: psnc_index_done is a wrapper that does not yield "
        f"({__file__}:{line}): "
    )


def test_a_class_in_place_of_an_object_is_refused() -> None:
    line = _line("class Fine:") + 2
    assert _refused(Fine).startswith(
        "plugin 'Fine' of the program: psnc_index_done needs an object of the class Fine "
        f"({__file__}:{line}): make one, as in plugin = Fine()"
    )


def test_a_class_whose_hooks_need_no_object_is_a_plugin() -> None:
    class Static:
        @staticmethod
        @hookimpl
        def psnc_sources() -> dict[str, str]:
            return {"thing": "nothing_here:Thing"}

    manager = PluginManager()
    manager.register(Static)
    assert set(manager.offers("source")) == {"thing"}


def test_a_hook_that_is_no_def_counts_as_marked() -> None:
    class Short:
        psnc_sources = staticmethod(hookimpl(lambda: {"thing": "nothing_here:Thing"}))

    manager = PluginManager()
    manager.register(Short())
    assert set(manager.offers("source")) == {"thing"}


def test_a_hook_of_tomorrow_may_be_implemented_today() -> None:
    class Ahead:
        @hookimpl(optionalhook=True)
        def psnc_of_tomorrow(self) -> None: ...

    manager = PluginManager()
    manager.register(Ahead())
    assert list(manager.origins) == ["Ahead"]


def test_objects_go_by_the_names_of_their_classes() -> None:
    manager = PluginManager()
    assert [manager.register(Fine()) for _ in range(3)] == ["Fine", "Fine-2", "Fine-3"]
    assert manager.register(Fine(), "another") == "another"


def test_an_object_is_registered_once() -> None:
    manager, plugin = PluginManager(), Fine()
    manager.register(plugin)
    for name in (None, "another"):
        with pytest.raises(PluginError, match="plugin 'Fine' is registered already"):
            manager.register(plugin, name)


def test_a_name_is_given_once() -> None:
    manager = PluginManager(Config(load_installed=False))
    manager.load()
    manager.register(Fine(), "fine")
    with pytest.raises(PluginError) as refused:
        manager.register(Fine(), "fine")
    assert str(refused.value) == (
        "there is a plugin named 'fine' already, of the program: give this one another name"
    )
    with pytest.raises(PluginError) as refused:
        manager.register(Fine(), "gpu")
    assert str(refused.value) == (
        "plugin 'gpu' of the program has the name of a built-in plugin: give it another name; to "
        "replace the built-in, run with -p no:gpu besides"
    )
    manager.close()


def test_a_plugin_that_is_taken_away_is_asked_no_more() -> None:
    class Counts:
        calls = 0

        @hookimpl
        def psnc_index_measure(self, context: IndexContext) -> None:
            self.calls += 1

    manager, counts = PluginManager(), Counts()
    name = manager.register(counts)
    manager.call_contained("psnc_index_measure", context=None)
    manager.unregister(counts)
    manager.call_contained("psnc_index_measure", context=None)
    assert counts.calls == 1
    assert name not in manager.origins
    manager.register(counts)
    assert list(manager.origins) == ["Counts"]


# --- hooks that nobody has --------------------------------------------------------------------


def _functions_called(function: Any, **arguments: Any) -> Iterator[str]:
    called: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            called.append(frame.f_code.co_name)
        elif event == "c_call":
            called.append(argument.__name__)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function(**arguments)
    finally:
        sys.setprofile(before)
    yield from called


def test_a_hook_that_nobody_implements_costs_one_look_up() -> None:
    manager = PluginManager()

    def call() -> None:
        manager.call_contained("psnc_stage_start", context=None, stage=None)

    call()
    called = list(_functions_called(call))
    # The last is what takes the note-taking away again.
    assert called == ["call", "call_contained", "get", "setprofile"]
    assert not manager.implements("psnc_stage_start")


def test_a_hook_that_a_plugin_brings_later_is_called() -> None:
    manager = PluginManager()
    assert manager.call_contained("psnc_index_measure", context=None) == []

    class Measures:
        @hookimpl
        def psnc_index_measure(self) -> dict[str, int]:
            return {"rows": 7}

    manager.register(Measures())
    assert manager.implements("psnc_index_measure")
    assert manager.call_contained("psnc_index_measure", context=None) == [{"rows": 7}]
