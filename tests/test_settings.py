"""Where a process's settings come from: a configuration file, the environment, the command line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import TELL, Psnc, Write, psnc, write

from psnc import Config, ConfigurationError, PluginManager
from psnc.settings import read_config

__all__ = ["psnc", "write"]

LOG = """
import logging
from stages_for_tests import Discard, Log, Numbers

pipeline = Numbers(1).filter(Log(logging.DEBUG)).filter(Log(logging.INFO)).write(Discard())
"""

ADDS_OPTION = """
from psnc import hookimpl

@hookimpl
def psnc_addoptions(parser):
    parser.add_option("--alert-channel", default="#runs")
"""


@pytest.fixture(autouse=True)
def with_installed_plugins(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take installed plugins as a user has them."""
    monkeypatch.delenv("PSNC_DISABLE_INSTALLED_PLUGINS")


# --- which file -------------------------------------------------------------------------------


def test_without_a_file_the_settings_are_the_defaults() -> None:
    assert read_config() == Config()


@pytest.mark.parametrize("head", ["psnc.toml", "pyproject.toml"])
def test_a_file_gives_every_setting(head: str, write: Write) -> None:
    table = "" if head == "psnc.toml" else "[project]\nname = 'other'\n[tool.psnc]\n"
    path = write(
        head,
        table + 'plugins = ["a", "no:gpu"]\nstrict-plugins = true\nlog-level = "warning"\n'
        'durability = "full"\nstore = "runs.db"\nalert-channel = "#x"\n',
    )
    assert read_config() == Config(
        plugins=("a", "no:gpu"),
        strict_plugins=True,
        log_level=logging.WARNING,
        durability="full",
        store="runs.db",
        file=str(path),
        file_options={"alert_channel": "#x"},
    )


def test_underscores_are_as_good_as_dashes(write: Write) -> None:
    write("psnc.toml", "strict_plugins = true")
    assert read_config().strict_plugins


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({"psnc.toml": "above"}, "above", id="above"),
        pytest.param({"psnc.toml": "above", "in/psnc.toml": "near"}, "near", id="nearest"),
        pytest.param({"psnc.toml": "above", "in/pyproject.toml": "near"}, "near", id="either name"),
        pytest.param(
            {"in/psnc.toml": "own", "in/pyproject.toml": "shared"}, "own", id="psnc.toml first"
        ),
        pytest.param(
            {"psnc.toml": "above", "in/deeper/psnc.toml": "below"}, "above", id="never below"
        ),
    ],
)
def test_the_nearest_file_at_or_above_the_working_directory_is_read(
    files: dict[str, str],
    expected: str,
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, store in files.items():
        table = "[tool.psnc]\n" if name.endswith("pyproject.toml") else ""
        write(name, f'{table}store = "{store}"')
    (tmp_path / "in").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "in")
    assert read_config().store == expected


def test_files_are_not_merged(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("psnc.toml", 'plugins = ["far"]')
    write("in/psnc.toml", "strict-plugins = true")
    monkeypatch.chdir(tmp_path / "in")
    assert read_config().plugins == ()


@pytest.mark.parametrize(
    "text", ["", "[tool.other]\nx = 1", "tool = 3", "tool = 'psnc'", "[project]\nname = 'psnc'"]
)
def test_a_pyproject_that_says_nothing_of_psnc_is_passed_over(
    text: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("psnc.toml", 'store = "above"')
    write("in/pyproject.toml", text)
    monkeypatch.chdir(tmp_path / "in")
    assert read_config().store == "above"


@pytest.mark.parametrize("text", ["\ufeffstore = 'x'", "store = 'x'\r\nplugins = []\r\n"])
def test_files_of_other_systems_are_read(text: str, write: Write) -> None:
    write("psnc.toml", text)
    assert read_config().store == "x"


def test_an_empty_file_sets_nothing_and_ends_the_search(write: Write) -> None:
    path = write("psnc.toml", "")
    assert read_config() == Config(file=str(path))


# --- bad files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("store = ", "{file} is not valid TOML: Invalid value (at end of document)"),
        ('[store', "{file} is not valid TOML: Expected ']' at the end of a table declaration (at end of document)"),  # noqa: E501
        ("plugins = 'tell'", "{file}: plugins is 'tell': give a list such as [\"NAME\", \"no:NAME\"]"),  # noqa: E501
        ("plugins = [3]", "{file}: plugins is [3]: give a list such as [\"NAME\", \"no:NAME\"]"),
        ("plugins = ['']", "{file}: plugins: '' names no plugin: write NAME or no:NAME"),
        ("plugins = ['no:']", "{file}: plugins: 'no:' names no plugin: write NAME or no:NAME"),
        ("plugins = [' tell']", "{file}: plugins: ' tell' names no plugin: write NAME or no:NAME"),
        ("plugins = ['a,b']", "{file}: plugins: 'a,b' has a comma: name one plugin at a time"),
        ("strict-plugins = 1", "{file}: strict-plugins is 1: give true or false"),
        ("strict_plugins = 'yes'", "{file}: strict-plugins is 'yes': give true or false"),
        ("log-level = 10", "{file}: log-level is 10: choose one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),  # noqa: E501
        ("log-level = 'loud'", "{file}: log-level is 'loud': choose one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),  # noqa: E501
        ("log-level = 'notset'", "{file}: log-level is 'notset': choose one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),  # noqa: E501
        ("durability = 'fast'", "{file}: durability is 'fast': choose one of grouped, index, full"),
        ("durability = []", "{file}: durability is []: choose one of grouped, index, full"),
        ("store = 3", "{file}: store is 3: give a URL or the path of a database, such as \"runs.db\""),  # noqa: E501
        ("store = ''", "{file}: store is '': give a URL or the path of a database, such as \"runs.db\""),  # noqa: E501
        ("pluginz = []", "{file}: unknown key 'pluginz': did you mean 'plugins'?"),
        ("Log-Level = 'info'", "{file}: unknown key 'Log-Level': did you mean 'log-level'?"),
        ("colour = 'red'", "{file}: unknown key 'colour': the keys are plugins, strict-plugins, log-level, durability, store"),  # noqa: E501
        ("[tool.psnc]\nstore = 'x'", "{file}: unknown key 'tool': write psnc's keys side by side, and no table among them"),  # noqa: E501
        ("[alerts]\nchannel = 'x'", "{file}: unknown key 'alerts': write psnc's keys side by side, and no table among them"),  # noqa: E501
        ("log-level = 'info'\nlog_level = 'info'", "{file}: 'log_level' is there twice, with - and with _: remove one"),  # noqa: E501
    ],
)  # fmt: skip
def test_what_a_file_says_wrong_is_refused_in_one_line(
    text: str, complaint: str, psnc: Psnc, write: Write
) -> None:
    file = write("psnc.toml", text)
    assert psnc("run", "three:pipeline").error == complaint.format(file=file)


@pytest.mark.parametrize("text", ["[tool]\npsnc = 3", "[[tool.psnc]]\nstore = 'x'"])
def test_what_a_pyproject_has_for_psnc_must_be_a_table(text: str, psnc: Psnc, write: Write) -> None:
    file = write("pyproject.toml", text)
    assert (
        psnc("run", "three:pipeline").error == f"{file}: tool.psnc is no table: write [tool.psnc]"
    )


def test_a_broken_pyproject_is_refused_rather_than_passed_over(psnc: Psnc, write: Write) -> None:
    file = write("pyproject.toml", "[tool.psnc\n")
    assert psnc("plugins").error.startswith(f"{file} is not valid TOML: ")


def test_a_file_in_another_encoding_is_refused(psnc: Psnc, tmp_path: Path) -> None:
    (tmp_path / "psnc.toml").write_bytes("store = 'Zürich'".encode("latin-1"))
    assert psnc("plugins").error.startswith(f"{tmp_path / 'psnc.toml'} is not valid TOML: 'utf-8'")


def _directory(path: Path) -> None:
    path.mkdir()


def _link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_directory, "Is a directory"),
        (_link_to_nothing, "No such file or directory"),
        (_link_to_itself, "Too many levels of symbolic links"),
    ],
)
def test_a_psnc_toml_that_cannot_be_read_is_refused(
    make: Callable[[Path], None], reason: str, psnc: Psnc, tmp_path: Path
) -> None:
    make(tmp_path / "psnc.toml")
    expected = f"{tmp_path / 'psnc.toml'} cannot be read ({reason}): mend it, or move it away"
    assert psnc("plugins").error == expected


def test_a_working_directory_that_is_gone_is_said(
    psnc: Psnc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert psnc("plugins").error.startswith("the working directory is not there any more")


# --- keys of plugins --------------------------------------------------------------------------


def test_a_plugins_key_is_known_once_the_plugin_is_loaded(psnc: Psnc, write: Write) -> None:
    write("alerts.py", ADDS_OPTION)
    file = write("psnc.toml", 'alert-channel = "#x"')
    assert f"{file}: unknown key 'alert-channel'" in psnc("run", "three:pipeline").error
    assert psnc("run", "three:pipeline", "-p", "alerts").code == 0


def test_the_key_of_a_plugin_beside_a_pipeline_does_no_harm_where_it_is_not_loaded(
    psnc: Psnc, write: Write, tmp_path: Path
) -> None:
    (tmp_path / "with_plugin").mkdir()
    write("with_plugin/psnc_plugins.py", ADDS_OPTION)
    write("with_plugin/beside.py", (tmp_path / "three.py").read_text())
    file = write("psnc.toml", 'alert-channel = "#x"')
    assert psnc("run", "with_plugin/beside.py:pipeline", "--db-file", "runs.db").code == 0
    for arguments in (["status", "runs.db"], ["errors", "runs.db"], ["stages"], ["backends"],
                      ["plugins"], ["hooks"], ["reset", "--yes", "runs.db"]):  # fmt: skip
        said = psnc(*arguments)
        assert (said.code, "unknown key" in said.err) == (0, False), arguments
    assert f"{file}: unknown key 'alert-channel'" in psnc("run", "three:pipeline").error


@pytest.mark.parametrize("command", ["status", "stages"])
def test_a_misspelt_key_is_refused_by_whatever_sets_plugins_up(
    command: str, psnc: Psnc, write: Write
) -> None:
    assert psnc("run", "three:pipeline", "--db-file", "runs.db").code == 0
    file = write("psnc.toml", 'durabilty = "full"')
    said = psnc(command, *(["runs.db"] if command == "status" else []))
    assert said.code == 2
    assert f"{file}: unknown key 'durabilty': did you mean 'durability'?" in said.err


def test_the_keys_of_a_plugin_that_is_kept_out_do_no_harm(psnc: Psnc, write: Write) -> None:
    write("alerts.py", ADDS_OPTION)
    write("psnc.toml", 'plugins = ["alerts"]\nalert-channel = "#x"')
    assert psnc("run", "three:pipeline").code == 0
    assert psnc("run", "three:pipeline", "-p", "no:alerts").code == 0


def test_a_misspelt_key_is_refused_also_where_a_plugin_is_kept_out(
    psnc: Psnc, write: Write
) -> None:
    write("psnc.toml", 'durabilty = "full"')
    said = psnc("run", "three:pipeline", "-p", "no:alerts")
    assert "unknown key 'durabilty': did you mean 'durability'?" in said.error


@pytest.mark.parametrize("choices", [["no:gpu"], ["no:alerts", "three"], ["no:three", "three"]])
def test_keys_are_refused_where_no_plugin_that_is_kept_out_can_have_them(
    choices: list[str], psnc: Psnc, write: Write
) -> None:
    write("psnc.toml", 'colour = "red"')
    options = [part for choice in choices for part in ("-p", choice)]
    if "no:alerts" in choices:
        assert psnc("run", "three:pipeline", *options).code == 0
    else:
        assert "unknown key 'colour'" in psnc("run", "three:pipeline", *options).error


# --- precedence -------------------------------------------------------------------------------


def test_plugins_are_those_of_the_file_the_environment_and_the_command_line_in_this_order(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("psnc.toml", 'plugins = ["of_file"]')
    monkeypatch.setenv("PSNC_PLUGINS", " of_environment , no:gpu,, ")
    assert read_config(plugins=["given"]).plugins == (
        "of_file",
        "of_environment",
        "no:gpu",
        "given",
    )


@pytest.mark.parametrize(
    ("file", "environment", "given", "loaded"),
    [
        ("no:gpu", "", [], False),
        ("no:gpu", "gpu", [], True),
        ("no:gpu", "gpu", ["no:gpu"], False),
        ("no:gpu", "", ["gpu"], True),
        ("gpu", "no:gpu", [], False),
        ("gpu", "", ["no:gpu", "gpu"], True),
        ("gpu", "", ["gpu", "no:gpu"], False),
    ],
)
def test_of_two_choices_about_a_plugin_the_later_one_wins(
    file: str,
    environment: str,
    given: list[str],
    loaded: bool,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write("psnc.toml", f'plugins = ["{file}"]')
    monkeypatch.setenv("PSNC_PLUGINS", environment)
    manager = PluginManager(read_config(plugins=given))
    manager.load_plugins()
    assert manager.has_plugin("gpu") == loaded


def test_the_environment_names_plugins(
    psnc: Psnc, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("tell.py", TELL)
    monkeypatch.setenv("PSNC_PLUGINS", "tell,no:checkpoint")
    said = psnc("run", "three:pipeline")
    assert said.told() == ["0", "1", "2"]
    assert "database" not in said.out
    assert psnc("run", "three:pipeline", "-p", "no:tell").told() == []


def test_a_store_is_the_command_lines_or_the_environments_or_the_files(
    psnc: Psnc, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("psnc.toml", 'store = "of_file.db"')
    assert f"database {tmp_path / 'of_file.db'}\n" in psnc("run", "three:pipeline").out
    for blank in ("", "  "):
        monkeypatch.setenv("PSNC_STORE", blank)
        assert f"database {tmp_path / 'of_file.db'}\n" in psnc("run", "three:pipeline").out
    monkeypatch.setenv("PSNC_STORE", "of_environment.db")
    assert f"database {tmp_path / 'of_environment.db'}\n" in psnc("run", "three:pipeline").out
    said = psnc("run", "three:pipeline", "--store", "given.db")
    assert f"database {tmp_path / 'given.db'}\n" in said.out


def test_a_store_that_the_pipeline_names_itself_is_the_pipelines(
    psnc: Psnc, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        "own.py",
        """
        from psnc import Pipeline
        from stages_for_tests import Discard, Numbers

        pipeline = Pipeline(Numbers(1), [], Discard(), db_file="own.db")
        """,
    )
    monkeypatch.setenv("PSNC_STORE", "of_environment.db")
    assert f"database {tmp_path / 'own.db'}\n" in psnc("run", "own:pipeline").out


@pytest.mark.parametrize(
    ("level", "option", "expected"),
    [
        ("", [], {"INFO"}),
        ("log-level = 'debug'", [], {"DEBUG", "INFO"}),
        ("log-level = 'debug'", ["--log-level", "info"], {"INFO"}),
        ("log-level = 'error'", ["--log-level", "debug"], {"DEBUG", "INFO"}),
    ],
)
def test_the_level_of_the_command_line_comes_before_the_files(
    level: str,
    option: list[str],
    expected: set[str],
    psnc: Psnc,
    write: Write,
    query: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Where somebody handles entries, the loggers' own levels are theirs to set.
    caplog.set_level(logging.DEBUG)
    write("psnc.toml", level)
    write("logs.py", LOG)
    assert psnc("run", "logs:pipeline", "--db-file", "logs.db", *option).code == 0
    assert {name for (name,) in query("logs.db", "SELECT level_name FROM logs")} == expected


def test_a_file_can_ask_for_strict_plugins(psnc: Psnc, write: Write) -> None:
    write("careless.py", TELL.replace("print(", "raise ValueError("))
    assert psnc("run", "three:pipeline", "-p", "careless").code == 0
    write("psnc.toml", "strict-plugins = true")
    said = psnc("run", "three:pipeline", "-p", "careless")
    assert said.code == 2
    assert "careless: psnc_index_reported" in said.err


# --- what names a plugin ----------------------------------------------------------------------


def test_names_in_the_environment_have_commas_between_them(
    psnc: Psnc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PSNC_PLUGINS", "no:gpu no:memory")
    assert psnc("run", "three:pipeline").error.startswith(
        "PSNC_PLUGINS: 'no:gpu no:memory' has a space, as no plugin's name has: "
    )


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ("", "-p: '' names no plugin: write NAME or no:NAME"),
        ("no:", "-p: 'no:' names no plugin: write NAME or no:NAME"),
        ("tell,no:gpu", "-p: 'tell,no:gpu' has a comma: name one plugin at a time"),
        ("no:gpu no:me", "-p: 'no:gpu no:me' has a space, as no plugin's name has: PSNC_PLUGINS "
         "wants commas between names, -p and plugins one at a time"),
        ("nope", "-p nope: no installed plugin has this name, and it cannot be imported as a "
         "module (No module named 'nope'): check the spelling"),
        ("tell.py", "-p tell.py: no installed plugin has this name, and it cannot be imported as a "
         "module (No module named 'tell.py'; 'tell' is not a package): give a module's name, not "
         "a file's, such as tell"),
        ("./tell.py", "-p ./tell.py: no installed plugin has this name, and it cannot be imported "
         "as a module (the 'package' argument is required to perform a relative import for "
         "'./tell.py'): give a module's name, not a file's, such as tell"),
    ],
)  # fmt: skip
def test_a_choice_that_names_no_plugin_is_refused_in_one_line(
    choice: str, complaint: str, psnc: Psnc, write: Write
) -> None:
    write("tell.py", TELL)
    assert psnc("run", "three:pipeline", "-p", choice).error == complaint
    assert psnc("-p", choice, "run", "three:pipeline").error == complaint


def test_a_name_that_cannot_be_loaded_is_traced_to_where_it_stands(
    psnc: Psnc, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write("psnc.toml", 'plugins = ["of_file"]')
    assert psnc("run", "three:pipeline").error.startswith(f"{file} names of_file: no installed")
    file.unlink()
    monkeypatch.setenv("PSNC_PLUGINS", "of_environment")
    said = psnc("run", "three:pipeline")
    assert said.error.startswith("PSNC_PLUGINS names of_environment: no installed plugin has")
    monkeypatch.setenv("PSNC_PLUGINS", "no:")
    assert psnc("plugins").error == "PSNC_PLUGINS: 'no:' names no plugin: write NAME or no:NAME"


# --- installed plugins ------------------------------------------------------------------------


@pytest.fixture
def installed(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Lay a distribution with a plugin on the path, and return the plugin's name."""
    place = "site/teller-1.5.dist-info"
    write(f"{place}/METADATA", "Metadata-Version: 2.1\nName: teller\nVersion: 1.5\n")
    write(f"{place}/entry_points.txt", "[psnc]\ntell = teller_module\n")
    write("site/teller_module.py", TELL)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return "tell"


def _loaded(*choices: str) -> list[str]:
    manager = PluginManager(read_config(plugins=choices))
    manager.load_plugins()
    manager.require_plugins()
    return [name for name, origin in manager.origins.items() if origin.kind == "installed"]


@pytest.mark.parametrize(("value", "expected"), [("", True), ("0", True), ("1", False)])
def test_a_variable_keeps_installed_plugins_out(
    value: str, expected: bool, installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PSNC_DISABLE_INSTALLED_PLUGINS", value)
    assert (installed in _loaded()) == expected


def test_a_plugin_is_loaded_once_and_in_its_place_if_it_is_named_besides(installed: str) -> None:
    assert _loaded(installed, installed) == _loaded()
    # By its module it is the same plugin.
    manager = PluginManager(read_config(plugins=["teller_module"]))
    manager.load_plugins()
    assert "teller_module" not in manager.origins
    assert _loaded(f"no:{installed}") == [name for name in _loaded() if name != installed]


def test_of_installed_plugins_that_are_kept_out_one_can_be_named(
    installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PSNC_DISABLE_INSTALLED_PLUGINS", "1")
    assert _loaded() == []
    assert _loaded(installed) == [installed]


def test_the_name_of_an_installed_plugin_is_suggested(installed: str) -> None:
    manager = PluginManager(read_config(plugins=["telll"]))
    manager.load_plugins()
    (failure,) = manager.failures
    assert failure.reason.endswith("did you mean 'tell'?")


def test_settings_of_a_program_are_checked_as_those_of_a_command(write: Write) -> None:
    file = write("psnc.toml", "durability = 'fast'")
    with pytest.raises(ConfigurationError, match=f"{file}: durability is 'fast'"):
        read_config()
