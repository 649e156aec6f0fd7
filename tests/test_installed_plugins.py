"""Plugins as their users have them: distributions installed in a real virtual environment.

Every built-in plugin can be kept out, and replaced from outside; what is wrong with an installed
plugin is said in one line that names the distribution and the line to mend.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from environments import Environment, Finished, write_distribution

from psnc.manager import BUILT_IN_PLUGINS
from psnc.testing import check_filter, check_sink, check_source

EXAMPLE = Path(__file__).parents[1] / "plugins" / "psnc-example"
THROW_AWAY = Path(__file__).parent / "throw_away"

LOOKING = """\
import logging
import sys

import psnc


class Numbers(psnc.Source):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        yield index


@psnc.filter
def look(item):
    logging.getLogger("looking").warning("item %d", item)
    return f"{item} {'pynvml' in sys.modules}"


@psnc.sink
def write(items, index):
    with open(f"{index}.txt", "w") as file:
        file.writelines(items)
    return file.name


pipeline = Numbers().filter(look()).write(write())
"""

Psnc = Callable[..., Finished]


@pytest.fixture(autouse=True)
def with_installed_plugins(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take installed plugins as a user has them."""
    monkeypatch.delenv("PSNC_DISABLE_INSTALLED_PLUGINS")


@pytest.fixture
def looking(tmp_path: Path) -> Path:
    """Write a module with a pipeline of four indices, and return its directory."""
    (tmp_path / "looking.py").write_text(LOOKING)
    return tmp_path


def modules(*names: str) -> dict[str, str]:
    return {name: (THROW_AWAY / f"{name}.py").read_text() for name in names}


def database_of(finished: Finished) -> Path:
    found = re.search(r"^database (.*)$", finished.stdout, re.MULTILINE)
    assert found is not None, finished.stdout + finished.stderr
    return Path(found[1])


def recorded(finished: Finished, query: str) -> list[tuple[Any, ...]]:
    assert finished.returncode == 0, finished.stderr
    with closing(sqlite3.connect(database_of(finished))) as connection:
        return connection.execute(query).fetchall()


# --- nothing of psnc's is beyond reach --------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment in which nothing is installed but what the tests' own has."""
    return Environment(tmp_path_factory.mktemp("bare"))


# The built-in plugins that only offer things by name: the command that lists them, and one of them.
OFFERS = {"backends": "psnc.builtin.backends.sequential:", "stages": "psnc.sources:FilesSource"}


def run_bare(bare: Environment, directory: Path, *choices: str) -> dict[str, Any]:
    """Run the pipeline and say what each built-in plugin left of itself."""
    options = [part for choice in choices for part in ("-p", choice)]
    finished = bare.psnc("run", "looking:pipeline", *options, cwd=directory)
    left: dict[str, Any] = {"exit code": finished.returncode, "said": finished.stderr}
    left["progress"] = "4/4 indices" in finished.stderr
    if finished.returncode == 0:
        left["gpu"] = (directory / "3.txt").read_text() == "3 True"
        left["checkpoint"] = "database" in finished.stdout
    if left.get("checkpoint"):
        peaks = recorded(finished, "SELECT peak_memory_bytes FROM index_results")
        left["memory"] = all(peak is not None for (peak,) in peaks)
        left["logcapture"] = len(recorded(finished, "SELECT * FROM logs")) == 4
    return left


def test_every_built_in_plugin_leaves_something_of_itself(bare: Environment, looking: Path) -> None:
    left = run_bare(bare, looking)
    assert left["exit code"] == 0
    assert {name for name, there in left.items() if there is True} == (
        BUILT_IN_PLUGINS.keys() - OFFERS.keys()
    )


@pytest.mark.parametrize("name", sorted(BUILT_IN_PLUGINS.keys() & OFFERS.keys()))
def test_what_a_built_in_plugin_offers_is_gone_with_it(name: str, bare: Environment) -> None:
    cwd = bare.directory
    assert OFFERS[name] in bare.psnc(name, cwd=cwd).stdout
    listed = bare.psnc(name, "-p", f"no:{name}", cwd=cwd)
    assert listed.returncode == 0
    assert OFFERS[name] not in listed.stdout


def test_without_backends_a_run_says_that_there_is_none(bare: Environment, looking: Path) -> None:
    left = run_bare(bare, looking, "no:backends")
    assert left["exit code"] == 2
    assert "unknown backend 'sequential': choose one of none" in left["said"]


@pytest.mark.parametrize("name", sorted(BUILT_IN_PLUGINS.keys() - OFFERS.keys()))
def test_a_built_in_plugin_can_be_kept_out(name: str, bare: Environment, looking: Path) -> None:
    left = run_bare(bare, looking, f"no:{name}")
    assert left["exit code"] == 0
    assert left[name] is False
    expected = BUILT_IN_PLUGINS.keys() - OFFERS.keys() - {name}
    if name == "checkpoint":
        expected -= {"memory", "logcapture"}  # There is no database to find them in.
    assert {each for each, there in left.items() if there is True} == expected


# --- replacements -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replacements(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with something in place of everything."""
    directory = tmp_path_factory.mktemp("replacements")
    measuring = {"own-memory": "own_memory", "own-gpu": "own_gpu"}
    showing = {"own-logs": "own_logs", "own-progress": "own_progress"}
    offering = {"own": "own_backends", "own-stages": "own_stages"}
    environment = Environment(directory / "environment")
    environment.install(
        write_distribution(
            directory, "psnc-own-store", modules("own_store"), {"own-store": "own_store"}
        ),
        write_distribution(
            directory, "psnc-own-figures", modules("own_memory", "own_gpu"), measuring
        ),
        write_distribution(
            directory, "psnc-own-display", modules("own_logs", "own_progress"), showing
        ),
        write_distribution(
            directory, "psnc-own-offers", modules("own_backends", "own_stages"), offering
        ),
        EXAMPLE,
    )
    return environment


def run_two_jobs(environment: Environment, directory: Path, *options: str) -> Finished:
    return environment.psnc("run", "looking:pipeline", "-j", "2", *options, cwd=directory)


def test_another_memory_collector_measures_in_its_place(
    replacements: Environment, looking: Path
) -> None:
    finished = run_two_jobs(replacements, looking, "-p", "no:memory")
    rows = recorded(finished, "SELECT peak_memory_bytes FROM index_results ORDER BY idx")
    assert rows == [(1000,), (1001,), (1002,), (1003,)]


def test_another_gpu_monitor_measures_in_its_place(
    replacements: Environment, looking: Path
) -> None:
    finished = run_two_jobs(replacements, looking, "-p", "no:gpu")
    rows = recorded(finished, "SELECT gpu_memory_bytes FROM index_results ORDER BY idx")
    assert rows == [(2000,), (2001,), (2002,), (2003,)]
    assert (looking / "0.txt").read_text() == "0 False"


def test_another_log_capture_captures_in_its_place(
    replacements: Environment, looking: Path
) -> None:
    finished = run_two_jobs(replacements, looking, "-p", "no:logcapture")
    rows = recorded(finished, "SELECT idx, message FROM logs ORDER BY idx")
    assert rows == [(index, f"own: item {index}") for index in range(4)]


def test_another_progress_display_is_shown_in_its_place(
    replacements: Environment, looking: Path
) -> None:
    finished = run_two_jobs(replacements, looking, "-p", "no:progress")
    shown = [line for line in finished.stderr.splitlines() if "progress" in line]
    assert shown[0] == "own progress: 4 to do"
    assert sorted(shown[1:]) == [f"own progress: index {index}" for index in range(4)]
    assert "4/4 indices" not in finished.stderr


def test_another_backend_runs_by_its_name(replacements: Environment, looking: Path) -> None:
    options = ("--backend", "spawned", "-p", "no:backends", "-p", "no:memory")
    finished = run_two_jobs(replacements, looking, *options)
    assert "own backend: 2 processes" in finished.stdout
    # The workers have the plugins too, and the figures that they measure arrive.
    rows = recorded(finished, "SELECT peak_memory_bytes FROM index_results ORDER BY idx")
    assert rows == [(1000,), (1001,), (1002,), (1003,)]
    ((workers,),) = recorded(finished, "SELECT count(DISTINCT pid) FROM workers")
    assert 1 <= workers <= 2


def test_a_distributions_name_is_not_its_plugins_which_is_said(
    replacements: Environment, looking: Path
) -> None:
    finished = replacements.psnc("run", "-p", "psnc-example", "x:y", cwd=looking)
    assert finished.returncode == 2
    assert "the plugin of the distribution psnc-example is 'example'" in finished.stderr


def test_another_stage_goes_by_the_name_of_psncs_own(
    replacements: Environment, tmp_path: Path
) -> None:
    listed = json.loads(replacements.psnc("stages", "--json", cwd=tmp_path).stdout)
    (files,) = [each for each in listed if each["name"] == "files"]
    assert files["reference"] == "own_stages:OwnFiles"


def test_another_store_is_opened_for_its_scheme(replacements: Environment, looking: Path) -> None:
    place = looking / "kept" / "run.jsonl"
    url = f"lines://{place}"
    finished = run_two_jobs(replacements, looking, "--store", url)
    assert finished.returncode == 0, finished.stderr
    assert f"database {url}" in finished.stdout
    header, *lines = map(json.loads, place.read_text().splitlines())
    assert header["run"][-1] == 4
    assert sorted((line["index"], *line["paths"]) for line in lines) == [
        (index, f"{index}.txt") for index in range(4)
    ]
    # Workers, which have the plugin as well, write their own records.
    assert header["written_by"] not in {line["written_by"] for line in lines}
    again = run_two_jobs(replacements, looking, "--store", url, "--resume")
    assert "0 completed, 4 completed before, 0 failed, of 4" in again.stdout
    status = replacements.psnc("status", url, cwd=looking)
    assert "4 of 4 completed, 0 failed, 0 remaining" in status.stdout
    assert list(Path(os.environ["HOME"]).rglob("*.db")) == []


@pytest.fixture(scope="module")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment in which psnc's own store and process pool are others'."""
    directory = tmp_path_factory.mktemp("defaults")
    environment = Environment(directory / "environment")
    environment.install(
        write_distribution(
            directory,
            "psnc-own-defaults",
            modules("own_store", "own_default_store", "own_backends", "own_pool"),
            {"own-default-store": "own_default_store", "own-pool": "own_pool"},
        )
    )
    return environment


def test_the_default_store_and_process_pool_are_replaced_by_answering_first(
    defaults: Environment, looking: Path
) -> None:
    finished = run_two_jobs(defaults, looking)
    assert finished.returncode == 0, finished.stderr
    assert "own backend: 2 processes" in finished.stdout
    home = Path(os.environ["HOME"])
    assert list(home.rglob("*.db")) == []
    (kept,) = home.rglob("*.jsonl")
    assert kept.parent == home / ".cache" / "psnc"
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert sorted(line["index"] for line in lines if "index" in line) == [0, 1, 2, 3]


def test_without_the_replacements_the_defaults_are_back(
    defaults: Environment, looking: Path
) -> None:
    finished = run_two_jobs(defaults, looking, "-p", "no:own-pool", "-p", "no:own-default-store")
    assert "own backend" not in finished.stdout
    assert recorded(finished, "SELECT count(*) FROM index_results") == [(4,)]


# --- what is wrong with an installed plugin ---------------------------------------------------

BROKEN = {
    "psnc-twin-a": ("twin", "twin_a", ""),
    "psnc-twin-b": ("twin", "twin_b", ""),
    "psnc-absent": ("absent", "module_that_is_not_there", None),
    "psnc-lacking": ("lacking", "lacking:plugin", "other = 1\n"),
    "psnc-raising": ("raising", "raising", "\nnumber = 1 / 0\n"),
    "psnc-misspelt-hook": (
        "hooked",
        "hooked",
        "from psnc import hookimpl\n\n\n@hookimpl\ndef psnc_index_donne(record):\n    pass\n",
    ),
    "psnc-misspelt-argument": (
        "argued",
        "argued",
        "from psnc import hookimpl\n\n\n@hookimpl\ndef psnc_index_done(recrod):\n    pass\n",
    ),
    "psnc-unmarked": ("unmarked", "unmarked", "def psnc_run_done(run):\n    pass\n"),
    "psnc-builtin-name": ("gpu", "gpu_of_another", ""),
}

# What one line must say, besides the plugin's name and the distribution's.
SAID = {
    "psnc-twin-a": ["psnc-twin-b", 'twin = "twin_a"', 'twin = "twin_b"', "-p no:twin"],
    "psnc-absent": ['absent = "module_that_is_not_there"', "-p no:absent"],
    "psnc-lacking": ['lacking = "lacking:plugin"', "-p no:lacking"],
    "psnc-raising": ["ZeroDivisionError", "raising.py:2", "-p no:raising"],
    "psnc-misspelt-hook": ["'psnc_index_donne'", "hooked.py:5", "did you mean 'psnc_index_done'"],
    "psnc-misspelt-argument": ["'recrod'", "argued.py:5", "did you mean 'record'"],
    "psnc-unmarked": ["psnc_run_done", "unmarked.py:1", "psnc.hookimpl"],
    "psnc-builtin-name": ['gpu = "gpu_of_another"', "-p no:gpu"],
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with every plugin that is wrong."""
    directory = tmp_path_factory.mktemp("broken")
    environment = Environment(directory / "environment")
    environment.install(
        *(
            write_distribution(
                directory,
                distribution,
                {} if source is None else {reference.partition(":")[0]: source},
                {name: reference},
            )
            for distribution, (name, reference, source) in BROKEN.items()
        )
    )
    return environment


@pytest.mark.parametrize("distribution", SAID)
def test_a_broken_plugin_ends_the_run_with_the_line_to_mend(
    distribution: str, broken: Environment, looking: Path
) -> None:
    name = BROKEN[distribution][0]
    others = {other for other, *_ in BROKEN.values()} - {name}
    options = [part for other in sorted(others) for part in ("-p", f"no:{other}")]
    finished = broken.psnc("run", "looking:pipeline", *options, cwd=looking)
    assert finished.returncode == 2, finished.stderr
    (said,) = finished.stderr.splitlines()
    for words in (repr(name), distribution, *SAID[distribution]):
        assert words in said
    assert not (looking / "0.txt").exists()


def test_a_listing_shows_every_broken_plugin_beside_what_is_loaded(
    broken: Environment, tmp_path: Path
) -> None:
    finished = broken.psnc("plugins", "--json", cwd=tmp_path)
    assert finished.returncode == 2
    listed = json.loads(finished.stdout)
    failed = {plugin["distribution"] for plugin in listed["failed"]}
    # Of twins the first is loaded.
    assert failed == BROKEN.keys() - {"psnc-twin-a"}
    loaded = {plugin["name"] for plugin in listed["loaded"]}
    assert loaded >= {*BUILT_IN_PLUGINS, "twin"}


def test_a_plugin_that_is_kept_out_does_no_harm(broken: Environment, looking: Path) -> None:
    names = {name for name, *_ in BROKEN.values()}
    finished = broken.psnc(
        "run", "looking:pipeline", PSNC_PLUGINS=",".join(f"no:{name}" for name in names),
        cwd=looking,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr


# --- what a distribution's entry_points.txt may say -------------------------------------------


def distribute(directory: Path, name: str, entry_points: str) -> None:
    """Write what an installer leaves of a distribution."""
    info = directory / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


PLUGIN_OBJECT = """
from psnc import hookimpl

class Plugin:
    @hookimpl
    def psnc_sources(self):
        return {}

class Holder:
    plugin = Plugin()

plugin = Plugin()
"""


@pytest.mark.parametrize(
    "reference", ["mod : plugin", "mod:  Holder.plugin", "mod [extra]", "mod : plugin [one, two]"]
)
def test_an_entry_point_is_read_as_python_reads_it(
    reference: str, bare: Environment, tmp_path: Path
) -> None:
    (tmp_path / "mod.py").write_text(PLUGIN_OBJECT)
    distribute(tmp_path, "spaced", f"[psnc]\nspaced = {reference}\n")
    finished = bare.psnc("plugins", "--json", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert finished.returncode == 0, finished.stderr
    assert "spaced" in {each["name"] for each in json.loads(finished.stdout)["loaded"]}


def test_a_line_that_is_no_entry_point_is_its_distributions_failure(
    bare: Environment, tmp_path: Path, looking: Path
) -> None:
    place = tmp_path / "installed"
    place.mkdir()
    (place / "mod.py").write_text(PLUGIN_OBJECT)
    text = "# psnc's\n[psnc]\nthirteen\nfine = mod\n\n[console_scripts]\nstray = mod:main\n"
    distribute(place, "careless", text)
    distribute(place, "stranger", "[console_scripts]\nstray\n")
    finished = bare.psnc("plugins", "--json", cwd=tmp_path, PYTHONPATH=str(place))
    assert (finished.returncode, finished.stderr) == (2, ""), finished.stderr
    listed = json.loads(finished.stdout)
    assert "fine" in {each["name"] for each in listed["loaded"]}
    (failed,) = listed["failed"]
    assert (failed["name"], failed["distribution"]) == ("thirteen", "careless")
    finished = bare.psnc("run", "looking:pipeline", cwd=looking, PYTHONPATH=str(place))
    assert finished.returncode == 2
    (said,) = finished.stderr.splitlines()
    assert "careless 1.0 has the line 'thirteen' under [psnc] in its entry_points.txt" in said
    options = ("-p", "no:thirteen")
    finished = bare.psnc("run", "looking:pipeline", *options, cwd=looking, PYTHONPATH=str(place))
    assert finished.returncode == 0, finished.stderr


# --- the example ------------------------------------------------------------------------------

TABLES = {"north.csv": "name,kind\nada,human\nrex,dog\n", "south.csv": "name,kind\neve,human\n"}

PIPELINE = """\
[source]
stage = "csv-rows"
params = { pattern = "tables" }

[[filters]]
stage = "where"
params = { column = "kind", value = "human" }

[sink]
stage = "json-lines"
params = { output_dir = "found" }
"""


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    (tmp_path / "tables").mkdir()
    for name, text in TABLES.items():
        (tmp_path / "tables" / name).write_text(text)
    (tmp_path / "pipeline.toml").write_text(PIPELINE)
    return tmp_path


def test_the_example_is_short() -> None:
    lines = sum(
        len(path.read_text().splitlines())
        for path in EXAMPLE.rglob("*")
        if path.suffix in (".py", ".toml")
    )
    assert lines < 100


def test_the_example_adds_stages_a_backend_a_command_and_a_hook(
    replacements: Environment, tables: Path
) -> None:
    (plugin,) = [
        each
        for each in json.loads(replacements.psnc("plugins", "--json", cwd=tables).stdout)["loaded"]
        if each["name"] == "example"
    ]
    assert (plugin["distribution"], plugin["version"]) == ("psnc-example", "0.1.0")
    stages = replacements.psnc("stages", cwd=tables).stdout
    for name in ("csv-rows", "where", "json-lines"):
        assert re.search(rf"^  {name}$", stages, re.MULTILINE)
    assert re.search("^  profiled$", replacements.psnc("backends", cwd=tables).stdout, re.MULTILINE)
    said = replacements.psnc("columns", "tables/*.csv", cwd=tables)
    assert said.stdout == "tables/north.csv: name, kind\ntables/south.csv: name, kind\n"

    options = ("--backend", "profiled", "-p", "no:progress")
    ran = replacements.psnc("run", "pipeline.toml", *options, cwd=tables)
    assert "2 completed, 0 failed, of 2" in ran.stdout
    assert re.search(r"^\d+ indices a second$", ran.stderr, re.MULTILINE)
    assert json.loads((tables / "found" / "0.jsonl").read_text()) == {
        "name": "ada", "kind": "human",
    }  # fmt: skip
    profile = replacements.run("-m", "pstats", "run.prof", cwd=tables)
    assert profile.returncode == 0, profile.stderr


def test_the_stages_of_the_example_keep_the_rules(
    tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import psnc_example as example

    check_source(example.CSVRows("tables/*.csv"))
    rows = [[{"kind": "human"}, {"kind": "dog"}], [{"kind": "cat"}]]
    check_filter(example.where("kind", "human"), rows, lazy=True)
    check_sink(lambda directory: example.json_lines(str(directory)), rows)
