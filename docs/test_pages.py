"""What the pages say of the code in tables, compared with the code."""

from __future__ import annotations

import re
import sqlite3
from importlib import resources
from pathlib import Path

import attrs
import click
import pytest
from click.testing import CliRunner

import psnc
import psnc.errors
import psnc.testing
from psnc import hookspecs
from psnc.cli import cli
from psnc.cli.options import plugin_commands
from psnc.manager import BUILT_IN_PLUGINS, PluginManager
from psnc.settings import SETTINGS

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = [
    *sorted(DOCS.glob("*.md")),
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("*/*/README.md")),
]


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """Return what is between a heading and the next one of any level, without code."""
    match = re.search(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", without_code(text), re.DOTALL | re.MULTILINE
    )
    assert match is not None, f"no heading {heading!r}"
    return match[1]


def without_code(text: str) -> str:
    """Take out the blocks of code, whose comments look like headings."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables in a text, without their headers."""
    found, in_body = [], False
    for line in text.splitlines():
        if not line.startswith("|"):
            in_body = False
        elif set(line) <= set("|- "):
            in_body = True
        elif in_body:
            found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def schema_tables() -> dict[str, list[tuple[str, str]]]:
    schema = resources.files("psnc.builtin.checkpoint").joinpath("schema.sql")
    connection = sqlite3.connect(":memory:")
    connection.executescript(schema.read_text(encoding="utf-8"))
    names = connection.execute(
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    ).fetchall()
    tables = {
        name: [(row[1], row[2]) for row in connection.execute(f"PRAGMA table_info({name})")]
        for (name,) in names
    }
    connection.close()
    return tables


@pytest.mark.parametrize("table", schema_tables())
def test_tables_have_the_columns_of_the_schema(table):
    documented = rows(section(page("checkpointing.md"), table))
    assert [(name.strip("`"), kind) for name, kind, _ in documented] == schema_tables()[table]


def test_query_table_names_what_a_pipeline_has():
    for name, *_ in rows(section(page("checkpointing.md"), "Ask the pipeline")):
        name = name.strip("`")
        attribute = getattr(psnc.Pipeline, name.partition("(")[0])
        assert callable(attribute) == ("(" in name), name


def test_errors_table_has_every_error_and_its_exit_code():
    documented = {name.strip("`"): int(code) for name, code, _ in rows(page("errors.md"))}
    errors = {name: getattr(psnc.errors, name) for name in psnc.errors.__all__}
    del errors["PsncError"]
    assert documented == {name: error.exit_code for name, error in errors.items()}


def test_exit_codes_include_those_of_the_errors():
    documented = {int(code) for code, _ in rows(section(page("command_line.md"), "Exit codes"))}
    assert documented == {0, 1, 70, 74, 130, 141} | {
        getattr(psnc.errors, name).exit_code for name in psnc.errors.__all__
    }


def commands() -> list[str]:
    """Return psnc's own commands, and then those that its built-in plugins add."""
    own = cli.list_commands(click.Context(cli))
    manager = PluginManager(psnc.Config(load_installed=False))
    manager.load()
    return [*own, *plugin_commands(manager, own)]


def test_every_command_has_a_section():
    sections = re.findall(r"^## psnc (\S+)$", page("command_line.md"), re.MULTILINE)
    assert sections == commands()


@pytest.mark.parametrize("name", commands())
def test_command_tables_have_every_option(name):
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    options = {
        option
        for each in (command, *inner)
        for parameter in each.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    }
    documented = {
        option
        for first, _ in rows(section(page("command_line.md"), f"psnc {name}"))
        for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", first)
    }
    assert documented == options


@pytest.mark.parametrize("name", ["plugins.md", "writing_plugins.md", "architecture.md"])
def test_pages_name_hooks_that_exist(name):
    named = set(re.findall(r"(psnc_\w+)(?:`|\()", page(name)))
    no_hooks = {"psnc_home", "psnc_runner", "psnc_hooks", "psnc_plugins"}
    misspelt_on_purpose = {"psnc_index_reportd"}
    assert named - no_hooks - misspelt_on_purpose <= set(vars(hookspecs))


def test_hooks_page_is_what_the_command_prints():
    printed = CliRunner().invoke(cli, ["hooks", "--markdown"])
    assert printed.output == page("hooks.md"), "psnc hooks --markdown > docs/hooks.md"


def test_plugin_table_has_every_built_in_plugin():
    documented = rows(section(page("plugins.md"), "The built-in plugins"))
    assert [name.strip("`") for name, *_ in documented] == list(BUILT_IN_PLUGINS)


def test_configuration_tables_have_every_key_and_field():
    text = page("configuration.md")
    keys = [name.strip("`") for name, *_ in rows(section(text, "The file"))]
    assert keys == [name.replace("_", "-") for name in SETTINGS]
    fields = [name.strip("`") for name, _ in rows(section(text, "In Python"))]
    assert fields == [field.name for field in attrs.fields(psnc.Config)]


def test_configuration_table_has_every_environment_variable():
    documented = {
        name.strip("`")
        for name, _ in rows(section(page("configuration.md"), "Environment variables"))
    }
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "psnc").rglob("*.py")]
    asked_for = {
        name for source in sources for name in re.findall(r'environ.*?"([A-Z_]+)"', source)
    }
    assert {name for name in asked_for if name.startswith("PSNC_")} == {
        name for name in documented if name.startswith("PSNC_")
    }


def test_pipeline_file_tables_have_every_form_and_field(tmp_path):
    text = page("pipeline_files.md")
    forms = section(text, "Values that such files lack")
    documented = {form for cell, _ in rows(forms) for form in re.findall(r'"(\$\w+)":', cell)}
    keys = rows(section(text, "Write one by hand"))
    (about,) = (about for key, about in keys if key == "`pipeline`")
    fields = re.findall(r"`(\w+)`", about)
    file = tmp_path / "wrong.yaml"
    file.write_text(
        "source: {stage: psnc.sources:SequenceSource, params: {sequence: {$zzz: 0}}}\n"
        "pipeline: {zzz: 0}\n"
    )
    with pytest.raises(psnc.PipelineError) as caught:
        psnc.Pipeline.load(file)
    _, about_form, about_field = str(caught.value).splitlines()
    assert set(re.findall(r"\$\w+", about_form)) == documented | {"$zzz", "$dict"}
    assert about_field.rpartition("there are ")[2].split(", ") == fields


def test_reference_has_every_public_name():
    reference = page("api.md")
    missing = [
        name
        for name in psnc.__all__
        if f"psnc.{name}\n" not in reference
        and not hasattr(psnc.errors, name)
        and name not in ("hookimpl", "hookspec")
    ]
    assert missing == []
    assert [
        name for name in psnc.testing.__all__ if f"psnc.testing.{name}\n" not in reference
    ] == []


def anchors(path: Path) -> set[str]:
    text = without_code(path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name) if name else path
        assert target.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{path.name}: {link}"


def test_readme_has_one_command_to_try_and_one_to_test():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert [block.count("\n") for block in blocks] == [1, 1]
    assert "psnc run examples/molecules.py:pipeline" in blocks[0]
    assert blocks[1].rstrip().endswith("tox")
