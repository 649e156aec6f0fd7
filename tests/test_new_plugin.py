"""`psnc new plugin` writes a distribution that installs, passes its tests and runs."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from environments import Environment

from psnc.cli import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def with_installed_plugins(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take installed plugins as a user has them."""
    monkeypatch.delenv("PSNC_DISABLE_INSTALLED_PLUGINS")


def psnc(*arguments: object) -> int:
    """Run a command line in this process and return its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_a_new_plugin_installs_passes_its_tests_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert psnc("new", "plugin", "weather-maps") == 0
    assert "pip install -e" in capsys.readouterr().out
    project = tmp_path / "psnc-weather-maps"
    environment = Environment(tmp_path / "environment")
    environment.install(project, editable=True)

    tested = environment.run("-m", "pytest", "-q", "-W", "error", "-p", "no:cov", cwd=project)
    assert tested.returncode == 0, tested.stdout

    (listed,) = [
        plugin
        for plugin in json.loads(environment.psnc("plugins", "--json", cwd=project).stdout)[
            "loaded"
        ]
        if plugin["name"] == "weather-maps"
    ]
    assert listed["distribution"] == "psnc-weather-maps"
    assert "psnc_index_reported" in listed["hooks"]

    ran = environment.psnc("run", "example/pipeline.py:pipeline", "-j", "2", cwd=project)
    assert "2 completed, 0 failed, of 2" in ran.stdout
    written = (project / "example" / "output" / "0.txt").read_text()
    assert written == "An index is a file.\nAn item is a line.\n"


def test_the_templates_are_in_the_wheel(tmp_path: Path) -> None:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", tmp_path, ROOT], check=True
    )
    (wheel,) = tmp_path.glob("psnc-*.whl")
    in_tree = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "psnc" / "templates").rglob("*")
        if path.is_file()
    }
    assert len(in_tree) > 10
    assert in_tree <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize("given", ["maps2", "psnc-maps2"])
def test_the_prefix_may_be_given_or_not(given: str, tmp_path: Path) -> None:
    assert psnc("new", "plugin", given) == 0
    assert (tmp_path / "psnc-maps2" / "psnc_maps2" / "plugin.py").exists()
    entry_points = (tmp_path / "psnc-maps2" / "pyproject.toml").read_text()
    assert 'maps2 = "psnc_maps2.plugin"' in entry_points


def test_another_directory_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert psnc("new", "plugin", "maps", "--directory", "empty") == 0
    assert (tmp_path / "empty" / "pyproject.toml").exists()
    assert (tmp_path / "empty" / ".gitignore").exists()
    assert not (tmp_path / "psnc-maps").exists()


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = tmp_path / "psnc-maps"
    project.mkdir()
    (project / "thesis.txt").write_text("years of work")
    assert psnc("new", "plugin", "maps") == 2
    assert "psnc-maps is there and not empty" in capsys.readouterr().err
    assert [path.name for path in project.iterdir()] == ["thesis.txt"]


def test_a_place_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert psnc("new", "plugin", "maps", "--directory", "file/below") != 0
    said = capsys.readouterr().err
    assert "file/below" in said
    assert "Not a directory" in said


def test_a_file_in_the_directorys_place_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "psnc-maps").write_text("years of work")
    assert psnc("new", "plugin", "maps") != 0
    said = capsys.readouterr().err
    assert "psnc-maps" in said
    assert "Not a directory" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Weather_Maps", "did you mean 'weather-maps'?"),
        ("2maps", "did you mean 'maps'?"),
        ("maps-", "did you mean 'maps'?"),
        ("../maps", "did you mean 'maps'?"),
        ("---", "such as 'weather-maps'"),
        ("psnc-gpu", "'gpu' is the name of a built-in plugin: choose another"),
        ("plugins", "would have the name of local plugins, psnc_plugins.py: choose another"),
    ],
)
def test_a_bad_name_is_refused(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert psnc("new", "plugin", "--", name) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
