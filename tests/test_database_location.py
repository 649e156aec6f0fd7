"""Where the database lies, what it is called, and when it is shared."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import PIPELINE
from drivers import BACKENDS, jobs
from stages_for_tests import (
    TESTS_FIRST,
    Discard,
    Journal,
    Numbers,
    WriteText,
    numbers_pipeline,
    read_journal,
)

from psnc import Pipeline, StoreError, run_pipeline

CONFIG_HASH_16 = numbers_pipeline().config_hash[:16]


# --- directory --------------------------------------------------------------------------------


def test_by_default_the_database_is_in_the_cache_directory_of_the_home(own_home: Path) -> None:
    assert numbers_pipeline().db_path.parent == own_home / ".cache" / "psnc"


def test_xdg_cache_home_goes_before_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert numbers_pipeline().db_path.parent == tmp_path / "xdg" / "psnc"


def test_psnc_cache_dir_goes_before_xdg_cache_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("PSNC_CACHE_DIR", str(tmp_path / "psnc-cache"))
    assert numbers_pipeline().db_path.parent == tmp_path / "psnc-cache"


def test_db_dir_goes_before_psnc_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSNC_CACHE_DIR", str(tmp_path / "psnc-cache"))
    assert numbers_pipeline(db_dir=tmp_path / "mine").db_path.parent == tmp_path / "mine"


def test_db_file_goes_before_everything(tmp_path: Path) -> None:
    file = tmp_path / "elsewhere" / "this.sqlite"
    assert numbers_pipeline(db_dir=tmp_path, resume=True, db_file=file).db_path == file
    assert numbers_pipeline(db_file=str(file)).db_path == file


@pytest.mark.parametrize("name", ["PSNC_CACHE_DIR", "XDG_CACHE_HOME"])
def test_an_empty_variable_is_none_at_all(
    name: str, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "")
    assert numbers_pipeline().db_path.parent == own_home / ".cache" / "psnc"


def test_a_tilde_is_the_home(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert numbers_pipeline(db_dir="~/a").db_path.parent == own_home / "a"
    assert numbers_pipeline(db_file="~/b.db").db_path == own_home / "b.db"
    monkeypatch.setenv("PSNC_CACHE_DIR", "~/c")
    assert numbers_pipeline().db_path.parent == own_home / "c"


def test_the_database_stays_where_it_was_when_the_program_changes_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = numbers_pipeline(db_dir="here")
    pipeline[0]
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    pipeline[1]
    assert pipeline.completed_indices == {0, 1}
    assert pipeline.db_path.parent == tmp_path / "here"


def test_missing_directories_are_made(tmp_path: Path) -> None:
    pipeline = numbers_pipeline(db_dir=tmp_path / "a" / "b" / "c")
    pipeline[0]
    assert pipeline.db_path.is_file()


def test_asking_for_the_path_makes_nothing(tmp_path: Path) -> None:
    assert not numbers_pipeline(db_dir=tmp_path / "a").db_path.exists()
    assert list(tmp_path.iterdir()) == []


# --- file name --------------------------------------------------------------------------------


def test_a_fresh_database_is_named_by_hash_and_time() -> None:
    name = numbers_pipeline().db_path.name
    assert re.fullmatch(rf"{CONFIG_HASH_16}_\d{{8}}T\d+\.db", name)


def test_a_resumed_database_is_named_by_hash_alone() -> None:
    assert numbers_pipeline(resume=True).db_path.name == f"{CONFIG_HASH_16}.db"


def test_another_configuration_has_another_file() -> None:
    assert numbers_pipeline(5, resume=True).db_path != numbers_pipeline(6, resume=True).db_path


def test_two_pipelines_never_share_a_fresh_database() -> None:
    assert len({numbers_pipeline().db_path for _ in range(500)}) == 500


def test_a_pipelines_path_does_not_change() -> None:
    pipeline = numbers_pipeline()
    before = pipeline.db_path
    pipeline[0]
    assert pipeline.db_path == before


def test_every_step_of_building_has_a_database_of_its_own() -> None:
    start = Numbers(3).filter(numbers_pipeline().filters[0])
    one, other = start.write(Discard()), start.write(Discard())
    assert one.config_hash == other.config_hash
    assert one.db_path != other.db_path


# --- fresh and resumed ------------------------------------------------------------------------


def test_a_fresh_pipeline_runs_everything_again(journal: str) -> None:
    for _ in range(2):
        pipeline = Pipeline(source=Journal(3, journal), sink=Discard())
        run_pipeline(pipeline)
        assert pipeline.completed_indices == {0, 1, 2}
    assert read_journal(journal) == [0, 1, 2, 0, 1, 2]


def test_resume_runs_only_what_is_not_completed(journal: str) -> None:
    first = Pipeline(source=Journal(4, journal), sink=Discard(), resume=True)
    first[1], first[2]
    again = Pipeline(source=Journal(4, journal), sink=Discard(), resume=True)
    assert again.completed_indices == {1, 2}
    expected = [[f"out/{index}-0.bin"] for index in range(4)]
    assert [again[index] for index in range(4)] == expected
    assert read_journal(journal) == [1, 2, 0, 3]
    assert run_pipeline(again) == expected
    assert read_journal(journal) == [1, 2, 0, 3]


@pytest.fixture
def odd_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a directory whose name is no UTF-8."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff"))
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_in_a_directory_whose_name_is_no_utf_8_is_recorded_and_resumed(
    odd_directory: Path, backend: str, query: Any
) -> None:
    Path("data").touch()
    for index in (0, 1):
        pipeline = Pipeline(Journal(4, "data"), sink=Discard(), resume=True)
        run_pipeline(pipeline, jobs(backend), backend, indices=[index])
    assert pipeline.completed_indices == {0, 1}
    assert read_journal("data") == [0, 1]
    recorded = query(pipeline.db_path, "SELECT run_dir FROM pipeline_runs")
    assert recorded == [(f"{odd_directory.parent}/odd\\udcff",)]


def test_a_run_of_a_directory_whose_name_is_no_utf_8_is_not_resumed_elsewhere(
    odd_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("data").touch()
    run_pipeline(Pipeline(Journal(1, "data"), sink=Discard(), resume=True))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError) as caught:
        run_pipeline(Pipeline(Journal(1, "data"), sink=Discard(), resume=True))
    assert f"was recorded in {tmp_path}/odd\\udcff, where the relative path" in str(caught.value)


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "en_US.UTF-8"])
def test_the_command_line_works_in_a_directory_whose_name_is_no_utf_8(
    odd_directory: Path, locale: str
) -> None:
    Path("three.py").write_text(PIPELINE)
    # What the standard output is like in most places, of which a test may find no locale.
    strict = {"PYTHONIOENCODING": "utf-8:strict"} if locale == "en_US.UTF-8" else {}
    env = {**os.environ, "PYTHONPATH": TESTS_FIRST, "LC_ALL": locale, **strict}
    for arguments in (["run", "three.py:pipeline", "--db-file", "a.db"], ["status", "a.db"]):
        done = subprocess.run(
            [sys.executable, "-m", "psnc", *arguments], env=env, capture_output=True, check=False
        )
        assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
        assert b"/odd" in done.stdout


def test_resume_finds_a_database_by_db_file(tmp_path: Path, journal: str) -> None:
    for _ in range(2):
        pipeline = Pipeline(
            source=Journal(2, journal), sink=Discard(), db_file=tmp_path / "mine.db"
        )
        pipeline[0]
    assert read_journal(journal) == [0]


def test_pipelines_of_two_configurations_can_share_a_file_without_seeing_each_other(
    tmp_path: Path, query: Any
) -> None:
    small = numbers_pipeline(3, db_file=tmp_path / "both.db")
    large = numbers_pipeline(9, db_file=tmp_path / "both.db")
    small[1], large[7]
    assert small.completed_indices == {1}
    assert large.completed_indices == {7}
    small.reset()
    assert large.completed_indices == {7}
    runs = query(tmp_path / "both.db", "SELECT config_hash, total_indices FROM pipeline_runs")
    assert sorted(runs) == sorted([(small.config_hash, 3), (large.config_hash, 9)])


def test_resume_follows_a_source_that_has_grown(tmp_path: Path, query: Any) -> None:
    names = tmp_path / "names.txt"
    names.write_text("a b")
    first = Pipeline(source=Lines(str(names)), sink=Discard(), resume=True)
    run_pipeline(first)
    names.write_text("a b c")
    grown = Pipeline(source=Lines(str(names)), sink=Discard(), resume=True)
    assert grown.remaining_indices() == [2]
    assert grown.summary()["total"] == 3
    assert query(grown.db_path, "SELECT total_indices FROM pipeline_runs") == [(3,)]


class Lines(Numbers):
    """As many indices as its file has words."""

    def __init__(self, file: str) -> None:
        super().__init__(len(Path(file).read_text().split()))


def test_each_store_has_artifacts_of_its_own() -> None:
    def path(url: str) -> Path:
        pipeline = numbers_pipeline(1, store=url, resume=True)
        return pipeline.artifact_path(1, pipeline.filters[0], 0)

    assert path("x://one") == path("x://one")
    assert path("x://one") != path("x://two")
    # A password that was changed makes no other store.
    assert path("x://ada:old@one") == path("x://ada:new@one")


# --- relative paths ---------------------------------------------------------------------------


def test_resume_from_another_directory_is_refused_where_a_relative_path_means_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    Pipeline(source=Numbers(2), sink=WriteText("out"), resume=True)[0]
    monkeypatch.chdir(tmp_path / "other")
    moved = Pipeline(source=Numbers(2), sink=WriteText("out"), resume=True)
    with pytest.raises(StoreError, match="'out'") as caught:
        moved[1]
    assert str(tmp_path / "one") in str(caught.value)
    monkeypatch.chdir(tmp_path / "one")
    back = Pipeline(source=Numbers(2), sink=WriteText("out"), resume=True)
    assert back.completed_indices == {0}


def test_resume_from_another_directory_works_with_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    Pipeline(source=Numbers(2), sink=WriteText(out), resume=True)[0]
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert Pipeline(source=Numbers(2), sink=WriteText(out), resume=True).completed_indices == {0}


# --- what is in the way -----------------------------------------------------------------------


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="cannot make directory"):
        numbers_pipeline(db_dir=tmp_path / "file" / "sub")[0]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_db_file_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is a directory: name a database file"):
        numbers_pipeline(db_file=tmp_path)[0]


def as_nobody(action: Callable[[], object]) -> str:
    """Return the one line that a user without rights is told, in a process of that user's."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            action()
            said = "nothing was refused"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(theirs, said.encode())
        os._exit(0)
    os.close(theirs)
    with open(ours, encoding="utf-8") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.parametrize(
    ("rights", "complaint"), [(0o555, "cannot open database"), (0o600, "Permission denied")]
)
def test_a_directory_that_may_not_be_used_is_refused_in_one_line(
    rights: int, complaint: str
) -> None:
    numbers_pipeline(1)[0]  # imports everything, which nobody may not be able to
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        closed = Path(name) / "closed"
        closed.mkdir()
        closed.chmod(rights)
        said = as_nobody(lambda: numbers_pipeline(db_dir=closed)[0])
        closed.chmod(0o700)
    assert said.startswith("StoreError: ")
    assert complaint in said
    assert str(closed) in said
    assert "writable" in said
    assert len(said.splitlines()) == 1


def test_a_place_that_no_one_can_write_is_refused() -> None:
    with pytest.raises(StoreError, match=r"/proc.*PSNC_CACHE_DIR"):
        numbers_pipeline(db_dir="/proc/psnc")[0]


def test_an_empty_file_becomes_the_database(tmp_path: Path) -> None:
    (tmp_path / "new.db").touch()
    pipeline = numbers_pipeline(db_file=tmp_path / "new.db")
    pipeline[0]
    assert pipeline.completed_indices == {0}


def test_a_database_whose_making_was_killed_is_made_anew_and_leaves_nothing_behind(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = """
        import os, signal, sys
        from stages_for_tests import numbers_pipeline

        def watch(event, arguments):
            if event == "os.link":
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        numbers_pipeline(db_file="run.db")[0]
    """
    killed = run_python("-c", textwrap.dedent(code), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "run.db").exists()
    assert numbers_pipeline(db_file=tmp_path / "run.db")[0] == ["out/0-0.bin"]
    assert [each.name for each in tmp_path.glob(".*")] == []
