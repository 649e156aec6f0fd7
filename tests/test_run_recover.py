"""``psnc run --recover`` sets a damaged database aside, and goes on with what is whole of it."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from command_line import Psnc, Write, psnc, write
from damage import (
    change,
    foreign,
    newer,
    overwrite,
    root_page,
    rows_of,
    text,
    zero_page,
    zeros,
)

from psnc import group_commit
from psnc.builtin.checkpoint.check import check

__all__ = ["psnc", "write"]

TWENTY = """
from stages_for_tests import Discard, Journal

pipeline = Journal(20, "journal").write(Discard(files=2))
"""


@pytest.fixture
def run(psnc: Psnc, write: Write, tmp_path: Path) -> Any:
    """Run a pipeline of twenty indices with more options; the first run is done."""
    write("twenty.py", TWENTY)

    def run_it(*options: str) -> Any:
        (tmp_path / "journal").unlink(missing_ok=True)
        said = psnc("run", "twenty.py:pipeline", "--db-file", tmp_path / "run.db", *options)
        # As at the end of a process.
        for store in list(group_commit._open_stores):
            store.close()
        return said

    assert run_it().code == 0
    assert [path.name for path in tmp_path.glob("run.db*")] == ["run.db"]
    return run_it


def ran(tmp_path: Path) -> list[int]:
    journal = tmp_path / "journal"
    return sorted(map(int, journal.read_text().split())) if journal.exists() else []


def set_aside(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob("run.db.damaged-*"))


def header(database: Path) -> None:
    overwrite(database, 0, b"\0" * 100)


def root_of_outputs(database: Path) -> None:
    zero_page(database, root_page(database, "output_files"))


def digit(database: Path) -> None:
    overwrite(database, database.read_bytes().index(b'"out/5-0.bin"') + 5, b"6")


def page_of_runs(database: Path) -> None:
    zero_page(database, root_page(database, "pipeline_runs"))


def configuration(database: Path) -> None:
    overwrite(database, database.read_bytes().index(b'{"filters"'), b'["filters"')


def hash_of_configuration(database: Path) -> None:
    change(database, "UPDATE pipeline_runs SET config_hash = replace(config_hash, 'a', 'b')")


def rows_of_details(database: Path) -> None:
    change(database, "DELETE FROM stage_metrics WHERE idx = 5")


DAMAGE = {
    header: [],
    page_of_runs: [],
    configuration: [],
    hash_of_configuration: [],
    root_of_outputs: list(range(20)),
    digit: [5],
    rows_of_details: [5],
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_database_is_set_aside_and_what_is_lost_runs_again(
    run: Any, tmp_path: Path, damage: Any
) -> None:
    database = tmp_path / "run.db"
    damage(database)
    before = database.read_bytes()
    said = run("--recover")
    assert said.code == 0
    (aside,) = set_aside(tmp_path)
    assert re.fullmatch(r"run\.db\.damaged-\d{8}T\d{6}Z", aside.name)
    assert aside.read_bytes() == before
    (line,) = [line for line in said.err.splitlines() if "damaged" in line]
    kept = 20 - len(DAMAGE[damage])
    assert f"is now {aside}: {kept} completed and 0 failed indices came across" in line
    assert ran(tmp_path) == DAMAGE[damage]
    assert check(database) == []
    assert len(rows_of(database)["index_results"]) == 20


def test_another_pipeline_is_no_witness_for_a_lost_configuration(
    run: Any, tmp_path: Path, psnc: Psnc
) -> None:
    page_of_runs(tmp_path / "run.db")
    before = (tmp_path / "run.db").read_bytes()
    said = psnc("run", "three.py:pipeline", "--recover", "--db-file", tmp_path / "run.db")
    assert said.code == 3
    assert "configuration of no run" in said.err
    assert (tmp_path / "run.db").read_bytes() == before


@pytest.mark.parametrize(
    "damage", [header, configuration, digit], ids=lambda damage: damage.__name__
)
def test_without_the_option_it_is_refused_with_the_ways_out(
    run: Any, tmp_path: Path, damage: Any
) -> None:
    damage(tmp_path / "run.db")
    before = (tmp_path / "run.db").read_bytes()
    said = run()
    assert (said.code, said.out) == (3, "")
    assert "psnc recover" in said.err
    assert (tmp_path / "run.db").read_bytes() == before
    assert set_aside(tmp_path) == []
    assert ran(tmp_path) == []


def test_a_sound_database_stays_where_it_is(run: Any, tmp_path: Path) -> None:
    said = run("--recover")
    assert said.code == 0
    assert "20 completed before" in said.out
    assert "damaged" not in said.err
    assert set_aside(tmp_path) == []


def test_where_there_is_none_one_is_made(psnc: Psnc, tmp_path: Path) -> None:
    assert psnc("run", "three.py:pipeline", "--recover", "--db-file", "new.db").code == 0
    assert len(rows_of(tmp_path / "new.db")["index_results"]) == 3


def test_what_belongs_to_it_is_set_aside_too(run: Any, tmp_path: Path) -> None:
    database = tmp_path / "run.db"
    header(database)
    log = tmp_path / "run.db-wal"
    log.write_bytes(b"x" * 5000)
    assert run("--recover").code == 0
    aside, *_, log_aside = set_aside(tmp_path)
    assert log_aside.name == f"{aside.name}-wal"
    assert log_aside.read_bytes() == b"x" * 5000


def test_damage_upon_damage_is_kept_each_under_its_name(run: Any, tmp_path: Path) -> None:
    for count in (1, 2, 3):
        digit(tmp_path / "run.db")
        assert run("--recover").code == 0
        assert len(set_aside(tmp_path)) == count


def test_of_several_processes_one_salvages_and_one_at_a_time_goes_on(
    run: Any, tmp_path: Path, run_python: Any
) -> None:
    header(tmp_path / "run.db")
    arguments = ("-m", "psnc", "run", "twenty.py:pipeline", "--db-file", "run.db", "--recover")
    with ThreadPoolExecutor(3) as threads:
        started = [threads.submit(run_python, *arguments, check=False) for _ in range(3)]
    said = [each.result() for each in started]
    went_on = [each for each in said if "20 completed before" in each.stdout]
    refused = [each for each in said if "is being run by process" in each.stderr]
    assert went_on
    assert len(went_on) + len(refused) == 3, said
    assert len([each for each in said if "was damaged" in each.stderr]) == 1
    assert len(set_aside(tmp_path)) == 1
    assert not list(tmp_path.glob(".run.db*"))


@pytest.mark.parametrize("make", [foreign, newer, text, zeros])
def test_what_is_not_this_psncs_is_refused_as_ever(psnc: Psnc, tmp_path: Path, make: Any) -> None:
    path = tmp_path / "some.db"
    make(path)
    before = {each: each.read_bytes() for each in tmp_path.glob("some.db*")}
    said = psnc("run", "three.py:pipeline", "--recover", "--db-file", path)
    assert said.code == 3
    assert {each: each.read_bytes() for each in tmp_path.glob("some.db*")} == before


def test_a_lost_database_whose_log_is_left_is_no_reason_to_begin_anew(
    run: Any, tmp_path: Path
) -> None:
    (tmp_path / "run.db").rename(tmp_path / "elsewhere.db")
    (tmp_path / "run.db-wal").write_bytes(b"x" * 5000)
    for options in ((), ("--recover",)):
        said = run(*options)
        assert said.code == 3
        assert not (tmp_path / "run.db").exists()
        assert (tmp_path / "run.db-wal").read_bytes() == b"x" * 5000
    assert "nothing of a psnc database" in said.err


def test_a_database_cut_off_to_nothing_whose_log_is_left_is_refused(
    run: Any, tmp_path: Path
) -> None:
    (tmp_path / "run.db").write_bytes(b"")
    (tmp_path / "run.db-wal").write_bytes(b"x" * 5000)
    said = run()
    assert said.code == 3
    assert "is empty, and" in said.err
    assert (tmp_path / "run.db").read_bytes() == b""
