"""The options that plugins add to ``psnc run`` and to the configuration file."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from command_line import Psnc, Write, psnc, write
from drivers import BACKENDS, jobs

from psnc import Config, OptionParser, PluginError, PluginManager, hookimpl

__all__ = ["psnc", "write"]

# Writes down what it is told in each process, in the order of the calls.
ALERTS = """
import json
import os
from pathlib import Path

from psnc import hookimpl

@hookimpl
def psnc_addoptions(parser):
    parser.add_option("--alert-channel", default="#runs", help="Where alerts go.")
    parser.add_option("--alert-level", type=int, default=3, choices=[1, 2, 3], help="How bad.")
    parser.add_option("--alert-rate", type=float, help="How often.")
    parser.add_option("--alert-file", type=Path, multiple=True, help="Also there.")
    parser.add_option("--alert-loud", type=bool, help="With a bell.")
    parser.add_option("--alert-kind", choices=("mail", "chat"), multiple=True, default=["mail"])

@hookimpl
def psnc_configure(config):
    names = ["channel", "level", "rate", "file", "loud", "kind"]
    values = [config.option(f"--alert-{name}") for name in names]
    with open("told.txt", "a") as file:
        file.write(json.dumps([os.getpid(), *values], default=repr) + "\\n")
"""

FILE_PATHS = ["PosixPath('a')", "PosixPath('b')"]
DEFAULTS = ["#runs", 3, None, [], False, ["mail"]]


@pytest.fixture(autouse=True)
def alerts(write: Write) -> None:
    write("alerts.py", ALERTS)


def _told(directory: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (directory / "told.txt").read_text().splitlines()]


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "given", "expected"),
    [
        pytest.param("", [], DEFAULTS, id="defaults"),
        pytest.param(
            "",
            "--alert-channel x --alert-level 2 --alert-rate 1e-3 --alert-file a --alert-file b "
            "--alert-loud --alert-kind chat",
            ["x", 2, 0.001, FILE_PATHS, True, ["chat"]],
            id="command line",
        ),
        pytest.param(
            "alert-channel = 'y'\nalert-level = 1\nalert_rate = 2\nalert-file = ['a', 'b']\n"
            "alert_loud = true\nalert-kind = ['chat', 'mail']",
            "",
            ["y", 1, 2.0, FILE_PATHS, True, ["chat", "mail"]],
            id="file",
        ),
        pytest.param(
            "alert-channel = 'y'\nalert-level = 1\nalert-file = ['a', 'b']\nalert-rate = 5.0",
            "--alert-channel= --alert-level=3 --alert-file c --alert-rate 0",
            ["", 3, 0.0, ["PosixPath('c')"], False, ["mail"]],
            id="command line before file",
        ),
        pytest.param("alert-kind = []", "", [*DEFAULTS[:5], []], id="none of several"),
    ],
)
def test_a_value_is_the_command_lines_or_the_files_or_the_default(
    file: str, given: str, expected: list[Any], psnc: Psnc, write: Write, tmp_path: Path
) -> None:
    write("psnc.toml", file)
    options = given.split() if given else []
    assert psnc("run", "three:pipeline", "-p", "alerts", *options).code == 0
    ((_, *told),) = _told(tmp_path)
    assert told == expected


def test_an_option_may_stand_before_the_plugin_that_has_it(psnc: Psnc, tmp_path: Path) -> None:
    assert psnc("run", "--alert-loud", "three:pipeline", "-palerts").code == 0
    assert psnc("-p", "alerts", "run", "--alert-loud", "three:pipeline").code == 0
    assert [told[5] for told in _told(tmp_path)] == [True, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_reach_every_worker(backend: str, psnc: Psnc, write: Write, tmp_path: Path) -> None:
    write("psnc.toml", "alert-level = 1")
    options = ["--alert-file", "a", "--backend", backend, "--jobs", jobs(backend)]
    assert psnc("run", "three:pipeline", "-p", "alerts", *options).code == 0
    told = _told(tmp_path)
    assert {tuple(map(str, values)) for _, *values in told} == {
        ("#runs", "1", "None", "[\"PosixPath('a')\"]", "False", "['mail']")
    }
    pids = {pid for pid, *_ in told}
    assert len(pids) == len(told)
    assert len(told) == 1 if backend != "process_pool" else len(told) >= 2


def test_a_program_reads_the_values_of_the_file(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("psnc.toml", "plugins = ['alerts']\nalert-channel = 'y'")
    monkeypatch.syspath_prepend(".")
    from psnc.settings import read_config

    manager = PluginManager(read_config())
    manager.load()
    assert manager.config.option("alert-channel") == "y"
    assert manager.config.option("--alert_level") == 3


def test_an_option_that_nobody_declares_is_an_error_in_the_plugin() -> None:
    config = Config(options={"alert_channel": "x"})
    with pytest.raises(PluginError, match="no loaded plugin declares an option 'chanel': there"):
        config.option("chanel")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("alert-channel = 3", "alert-channel is 3: give text, as in \"text\""),
        ("alert-level = 7", "alert-level is 7: choose one of 1, 2, 3"),
        ("alert-level = '1'", "alert-level is '1': give a whole number"),
        ("alert-level = true", "alert-level is True: give a whole number"),
        ("alert-level = 1.0", "alert-level is 1.0: give a whole number"),
        ("alert-rate = '1'", "alert-rate is '1': give a number"),
        ("alert-file = 'a'", "alert-file is 'a': give a list"),
        ("alert-file = ['a', 3]", "alert-file is 3: give a path, as in \"path\""),
        ("alert-loud = 1", "alert-loud is 1: give true or false"),
        ("alert-kind = ['smoke']", "alert-kind is 'smoke': choose one of mail, chat"),
        ("alert-kin = []", "unknown key 'alert-kin': did you mean 'alert-kind'?"),
    ],
)  # fmt: skip
def test_a_wrong_value_in_the_file_is_refused_in_one_line(
    text: str, complaint: str, psnc: Psnc, write: Write
) -> None:
    file = write("psnc.toml", text)
    assert psnc("run", "three:pipeline", "-p", "alerts").error.startswith(f"{file}: {complaint}")


def test_the_command_line_is_asked_first_also_where_the_file_is_wrong(
    psnc: Psnc, write: Write
) -> None:
    write("psnc.toml", "alert-level = 7")
    assert psnc("run", "three:pipeline", "-p", "alerts", "--alert-level", "1").code == 0


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("--alert-level 7", "Invalid value for '--alert-level': '7' is not one of '1', '2', '3'."),
        ("--alert-level x", "Invalid value for '--alert-level': 'x' is not one of '1', '2', '3'."),
        ("--alert-rate x", "Invalid value for '--alert-rate': 'x' is not a valid float."),
        ("--alert-loud=no", "Option '--alert-loud' does not take a value."),
        ("--alert-channel", "Option '--alert-channel' requires an argument."),
        ("--alert-chanel x", "No such option '--alert-chanel'"),
    ],
)
def test_a_wrong_value_on_the_command_line_is_a_usage_error(
    given: str, complaint: str, psnc: Psnc, tmp_path: Path
) -> None:
    said = psnc("run", "three:pipeline", "-p", "alerts", *given.split())
    assert said.code == 2
    assert f"Error: {complaint}" in said.err
    assert not (tmp_path / "told.txt").exists()


# --- help -------------------------------------------------------------------------------------


def test_help_shows_options_under_the_plugins_name(psnc: Psnc, write: Write) -> None:
    write("psnc_plugins.py", ALERTS.replace("--alert", "--local-alert"))
    said = psnc("run", "--help", "-p", "alerts")
    assert said.code == 0
    own, alerts, local = said.out.split("\nOptions of the plugin ")
    assert "--resume" in own
    assert "--alert" not in own
    assert alerts.startswith("alerts:\n")
    assert [line.split()[:2] for line in alerts.splitlines()[1:7]] == [
        ["--alert-channel", "TEXT"],
        ["--alert-level", "[1|2|3]"],
        ["--alert-rate", "FLOAT"],
        ["--alert-file", "PATH"],
        ["--alert-loud", "/"],
        ["--alert-kind", "[mail|chat]"],
    ]
    assert local.startswith("psnc_plugins:\n  --local-alert-channel")
    assert "--alert" not in psnc("run", "--help", "-p", "no:psnc_plugins").out


@pytest.mark.parametrize(
    ("declared", "shown"),
    [
        ("type=int, default=0", "[default: 0]"),
        ("type=float, default=0.0", "[default: 0.0]"),
        ("multiple=True, default=['a', 'b']", "[default: a, b]"),
        ("type=bool, default=True", "[default: fresh]"),
        ("default=''", None),
        ("multiple=True", None),
        ("type=bool", None),
        ("", None),
    ],
)
def test_help_shows_what_counts_where_nothing_is_given(
    declared: str, shown: str | None, psnc: Psnc, write: Write
) -> None:
    write("dry.py", f"""
        import psnc

        @psnc.hookimpl
        def psnc_addoptions(parser):
            parser.add_option("--fresh", help="How fresh.", {declared})
    """)  # fmt: skip
    said = psnc("run", "--help", "-p", "dry").out.partition("Options of the plugin dry:")[2]
    assert "How fresh." in said
    assert re.findall(r"\[default: .*\]", said) == ([] if shown is None else [shown])


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_asked_for_as_of_any_command(flag: str, psnc: Psnc) -> None:
    said = psnc("run", flag)
    assert (said.code, said.err) == (0, "")
    assert "-h, --help" in said.out


# --- declarations -----------------------------------------------------------------------------


def _declare(write: Write, name: str, flag: str, kind: str = "str") -> None:
    write(
        f"{name}.py",
        f"""
        from psnc import hookimpl

        @hookimpl
        def psnc_addoptions(parser):
            parser.add_option({flag!r}, type={kind})
        """,
    )


@pytest.mark.parametrize("flag", ["--jobs", "--db-file", "--help", "--debug"])
def test_an_option_of_psncs_own_is_not_to_be_taken(flag: str, psnc: Psnc, write: Write) -> None:
    _declare(write, "greedy", flag)
    assert psnc("run", "three:pipeline", "-p", "greedy").error == (
        f"plugin 'greedy' declares the option {flag}, which psnc run has already: rename it, or "
        "run with -p no:greedy"
    )


def test_nor_is_one_by_the_other_form_of_a_flag(psnc: Psnc, write: Write) -> None:
    _declare(write, "greedy", "--progress", "bool")
    assert psnc("run", "three:pipeline", "-p", "greedy").error == (
        "plugin 'greedy' declares the option --no-progress, which psnc run has already: rename "
        "it, or run with -p no:greedy"
    )
    _declare(write, "first", "--bell", "bool")
    _declare(write, "second", "--no-bell")
    assert psnc("run", "three:pipeline", "-p", "first", "-p", "second").error == (
        "plugin 'second' declares the option --no-bell, which plugin 'first' has already: rename "
        "it, or run with -p no:second"
    )


@pytest.mark.parametrize("flag", ["--plugins", "--durability", "--store", "--strict-plugins"])
def test_a_key_of_psncs_own_is_not_to_be_taken(flag: str, psnc: Psnc, write: Write) -> None:
    _declare(write, "greedy", flag)
    assert f"the option {flag}, which psnc has already" in psnc("stages", "-p", "greedy").error


def test_two_plugins_cannot_have_one_option(psnc: Psnc, write: Write) -> None:
    _declare(write, "other", "--alert-level")
    error = psnc("run", "three:pipeline", "-p", "alerts", "-p", "other").error
    assert error == (
        "plugin 'other' of -p other declares the option --alert-level, which plugin 'alerts' has "
        "already: rename it, or run with -p no:other"
    )


@pytest.mark.parametrize(
    ("declaration", "complaint"),
    [
        ("'alert'", "the option 'alert': write --words-with-dashes"),
        ("'-a'", "the option '-a': write --words-with-dashes"),
        ("'--Alert'", "the option '--Alert': write --words-with-dashes"),
        ("'--alert_it'", "the option '--alert_it': write --words-with-dashes"),
        ("'--no/yes'", "the option '--no/yes': write --words-with-dashes"),
        ("3", "the option 3: write --words-with-dashes"),
        ("'--a', type=list", "--a of type list: choose one of str, int, float, bool, Path"),
        ("'--a', type='int'", "--a of type 'int': choose one of str, int, float, bool, Path"),
        ("'--a', type=int, default='x'", "--a with the default 'x': give one of type int"),
        ("'--a', type=int, default=True", "--a with the default True: give one of type int"),
        ("'--a', type=bool, default=1", "--a with the default 1: give one of type bool"),
        ("'--a', multiple=True, default='x'", "--a with the default 'x': give a list"),
        ("'--a', multiple=True, default=[1]", "--a with the default (1,): give one of type str"),
        ("'--a', choices='abc'", "--a with the choices 'abc': give a list"),
        ("'--a', type=int, choices=['1']", "--a with the choice '1': give one of type int"),
        ("'--a', choices=['x'], default='y'", "--a with the default 'y': give one of the choices"),
        ("'--a', type=bool, choices=[True]", "--a of type bool with choices or multiple: a flag has"),  # noqa: E501
        ("'--a', type=bool, multiple=True", "--a of type bool with choices or multiple: a flag has"),  # noqa: E501
    ],
)  # fmt: skip
def test_a_declaration_that_means_nothing_is_refused(
    declaration: str, complaint: str, psnc: Psnc, write: Write
) -> None:
    write(
        "odd.py",
        f"""
        from psnc import hookimpl

        @hookimpl
        def psnc_addoptions(parser):
            parser.add_option({declaration})
        """,
    )
    error = psnc("run", "three:pipeline", "-p", "odd").error
    assert error.startswith(f"plugin 'odd' declares {complaint}")


def test_a_declaration_may_write_numbers_and_paths_as_one_does() -> None:
    parser = OptionParser("alerts")
    parser.add_option("--rate", type=float, default=3, choices=[1, 2.5, 3])
    parser.add_option("--place", type=Path, default="out")
    parser.add_option("--places", type=Path, multiple=True, default=["a", Path("b")])
    rate, place, places = parser.options
    assert (rate.default, rate.choices) == (3.0, (1.0, 2.5, 3.0))
    assert type(rate.default) is float
    assert place.default == Path("out")
    assert places.default == (Path("a"), Path("b"))


def test_a_plugin_that_raises_as_it_declares_is_named(psnc: Psnc, write: Write) -> None:
    write("odd.py", textwrap.dedent(ALERTS).replace("parser.add", "parser.ad"))
    assert psnc("run", "three:pipeline", "-p", "odd").error == (
        "plugin 'odd' of -p odd raised in psnc_addoptions (AttributeError: 'OptionParser' object "
        "has no attribute 'ad_option'): mend it, or run with -p no:odd"
    )


def test_an_object_of_a_program_has_options_too() -> None:
    class Alerts:
        channel = ""

        @hookimpl
        def psnc_addoptions(self, parser: OptionParser) -> None:
            parser.add_option("--alert-channel", default="#runs")

        @hookimpl
        def psnc_configure(self, config: Config) -> None:
            self.channel = config.option("alert-channel")

    manager, alerts = PluginManager(), Alerts()
    manager.register(alerts)
    manager.configure({"alert_channel": "x"})
    assert alerts.channel == "x"


# --- flags ------------------------------------------------------------------------------------


def test_a_flag_that_the_file_switches_on_is_switched_off_on_the_command_line(
    psnc: Psnc, write: Write
) -> None:
    write(
        "psnc_plugins.py",
        """
        import psnc

        @psnc.hookimpl
        def psnc_addoptions(parser):
            parser.add_option("--shout", type=bool, help="Say it louder.")

        @psnc.hookimpl
        def psnc_run_start():
            print("shout", psnc.plugin_manager().config.option("shout"))
        """,
    )
    write("psnc.toml", "shout = true\n")
    assert psnc("run", "three:pipeline").out.startswith("shout True\n")
    assert psnc("run", "three:pipeline", "--no-shout").out.startswith("shout False\n")
