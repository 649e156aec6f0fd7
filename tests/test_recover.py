"""``psnc recover`` brings across what is whole, nothing else, and leaves the damaged file alone."""

from __future__ import annotations

import sqlite3
import textwrap
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from command_line import Psnc, psnc, write
from damage import (
    PAGE,
    Rows,
    change,
    foreign,
    make_database,
    newer,
    overwrite,
    root_page,
    rows_of,
    text,
    zero_page,
    zeros,
)

from psnc import StoreError, run_pipeline
from psnc.builtin.checkpoint.check import check
from psnc.builtin.checkpoint.recover import Recovered, recover

__all__ = ["psnc", "write"]

INDEX_TABLES = ("index_results", "stage_metrics", "output_files", "filter_artifacts")


def salvaged(database: Path) -> tuple[Recovered, Rows]:
    """Recover a database, check the new one and that the old one is as it was."""
    new = database.with_name("new.db")
    before = {path: path.read_bytes() for path in database.parent.glob(f"{database.name}*")}
    found = recover(database, new)
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in database.parent.glob("*.db*")} == {
        *(path.name for path in before),
        "new.db",
    }
    assert check(new) == []
    return found, rows_of(new)


def assert_part_of(rows: Rows, truth: Rows) -> set[int]:
    """Check that every row is a true one and every index whole; return the indices."""
    for table, found in rows.items():
        assert set(found) <= set(truth[table]), table
    indices = {row[0] for row in rows["index_results"]}
    for table in INDEX_TABLES[1:]:
        place = 0 if table == "stage_metrics" else 1
        of_indices = {row for row in truth[table] if row[place] in indices}
        assert set(rows[table]) == of_indices, table
    return indices


@pytest.fixture
def database(tmp_path: Path) -> Path:
    make_database(tmp_path / "run.db", 300)
    return tmp_path / "run.db"


def test_a_sound_database_comes_across_whole(database: Path) -> None:
    truth = rows_of(database)
    found, rows = salvaged(database)
    assert rows == truth
    assert (found.completed, found.failed, found.by_page) == (299, 1, False)
    assert not +found.dropped


HEADERS = {
    "its first 100 bytes are zeros": (0, b"\0" * 100),
    "its first 100 bytes are ones": (0, b"\xff" * 100),
    "its first page is zeros": (0, b"\0" * PAGE),
    "its magic is torn": (0, b"\0" * 16),
    "its size of a page is another": (16, b"\x20\0"),
    "its mark is another": (68, b"\0\0\0\0"),
    "its count of pages is another": (28, b"\0\0\0\x05"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_torn_header_costs_no_row(database: Path, what: str) -> None:
    truth = rows_of(database)
    overwrite(database, *HEADERS[what])
    _, rows = salvaged(database)
    assert rows == truth


@pytest.mark.parametrize("table", [*INDEX_TABLES, "logs"])
def test_a_lost_root_costs_no_row_below_it(database: Path, table: str) -> None:
    truth = rows_of(database)
    zero_page(database, root_page(database, table))
    found, rows = salvaged(database)
    assert_part_of(rows, truth)
    # A root above leaves may hold a row of its own here and there, in tables that go by key.
    assert len(rows["index_results"]) > 250
    assert found.lost_pages == 1


@pytest.mark.parametrize("number", [10, 20, 30, 40, 50])
def test_a_lost_page_costs_its_own_indices_only(database: Path, number: int) -> None:
    truth = rows_of(database)
    zero_page(database, number)
    _, rows = salvaged(database)
    assert len(assert_part_of(rows, truth)) > 150


@pytest.mark.parametrize("pages", [16, 25, 40, 50])
def test_of_a_cut_off_file_what_is_left_comes_across(database: Path, pages: int) -> None:
    truth = rows_of(database)
    with open(database, "r+b") as file:
        file.truncate(pages * PAGE)
    _, rows = salvaged(database)
    assert_part_of(rows, truth)
    if pages == 50:
        assert rows["index_results"]


def test_a_digit_that_became_another_is_left_behind(database: Path) -> None:
    truth = rows_of(database)
    content = database.read_bytes()
    at = content.index(b'"out/5-0.bin"')
    overwrite(database, at + 5, b"6")
    found, rows = salvaged(database)
    assert assert_part_of(rows, truth) == set(range(300)) - {5}
    assert sum(found.reasons.values()) == 1


@pytest.mark.parametrize("torn", [None, "header"])
def test_what_was_reset_does_not_come_back(database: Path, torn: str | None, psnc: Psnc) -> None:
    arguments = [part for index in range(40, 200) for part in ("--index", index)]
    assert psnc("reset", database, "--yes", *arguments).code == 0
    truth = rows_of(database)
    if torn:
        overwrite(database, 0, b"\0" * 100)
    zero_page(database, root_page_of_standard("stage_metrics"))
    _, rows = salvaged(database)
    indices = assert_part_of(rows, truth)
    assert not indices & set(range(40, 200))


def root_page_of_standard(table: str) -> int:
    return {"index_results": 5, "stage_metrics": 6}[table]


KILLED = """
    import os
    from stages_for_tests import numbers_pipeline
    pipeline = numbers_pipeline(60, db_file="run.db")
    for index in range(60):
        pipeline[index]
    os._exit(0)
"""


@pytest.mark.parametrize("torn", ["", "file", "log", "index"])
def test_what_waits_in_the_log_comes_across(tmp_path: Path, run_python: Any, torn: str) -> None:
    run_python("-c", textwrap.dedent(KILLED))
    database, log = tmp_path / "run.db", tmp_path / "run.db-wal"
    assert log.stat().st_size > 100 * PAGE
    truth = rows_of(copy_of(database))
    if torn == "file":
        overwrite(database, 0, b"\0" * PAGE)
    elif torn == "log":
        overwrite(log, log.stat().st_size // 2, b"\xff" * 100)
    elif torn == "index":
        (tmp_path / "run.db-shm").write_bytes(b"\0" * 100)
    _, rows = salvaged(database)
    indices = assert_part_of_log(rows, truth)
    if torn == "log":
        assert 0 < len(indices) < 60
    else:
        assert indices == set(range(60))


def copy_of(database: Path) -> Path:
    directory = database.parent / "copy"
    directory.mkdir()
    for path in database.parent.glob("run.db*"):
        (directory / path.name).write_bytes(path.read_bytes())
    return directory / database.name


def assert_part_of_log(rows: Rows, truth: Rows) -> set[int]:
    # The worker's row was another at an earlier moment.
    return assert_part_of({**rows, "workers": []}, truth)


def test_a_recovered_database_resumes(tmp_path: Path) -> None:
    pipeline = make_database(tmp_path / "run.db", 80)
    zero_page(tmp_path / "run.db", root_page(tmp_path / "run.db", "output_files"))
    (tmp_path / "other").mkdir()
    truth = run_pipeline(make_database(tmp_path / "other" / "run.db", 80))
    _, rows = salvaged(tmp_path / "run.db")
    again = type(pipeline)(
        pipeline.source, pipeline.filters, pipeline.sink, db_file=tmp_path / "new.db"
    )
    done = again.completed_indices
    assert done == {row[0] for row in rows["index_results"] if row[2] == "completed"}
    assert run_pipeline(again) == truth


def test_nothing_is_overwritten(database: Path, psnc: Psnc) -> None:
    new = database.with_name("new.db")
    new.write_text("mine")
    said = psnc("recover", database, "-o", new)
    assert said.code == 3
    assert "new.db is there already" in said.err
    assert new.read_text() == "mine"
    new.unlink()
    database.with_name("new.db-wal").write_text("mine")
    assert psnc("recover", database, "-o", new).code == 3


def test_the_command_counts_what_came_across(database: Path, psnc: Psnc) -> None:
    change(database, "UPDATE index_results SET wall_time_ns = 1 WHERE idx = 3")
    said = psnc("recover", database)
    assert said.code == 0
    assert said.out.startswith("298 completed and 1 failed indices came across; 1 were not whole")
    assert "  index_results: 299 rows, 1 left behind\n" in said.out
    assert said.out.endswith(f"database {database.with_name('run.recovered.db')}\n")
    assert check(database.with_name("run.recovered.db")) == []


def without_run(path: Path) -> None:
    make_database(path, 2)
    zero_page(path, root_page(path, "pipeline_runs"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign, "of another program"),
        (newer, "newer psnc"),
        (text, "nothing of a psnc database"),
        (zeros, "nothing of a psnc database"),
        (without_run, "the configuration of no run"),
    ],
)
def test_what_is_not_this_psncs_is_refused(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "some.db")
    before = (tmp_path / "some.db").read_bytes()
    with pytest.raises(StoreError, match=message):
        recover(tmp_path / "some.db", tmp_path / "new.db")
    assert (tmp_path / "some.db").read_bytes() == before
    assert not (tmp_path / "new.db").exists()


def test_a_database_at_work_is_refused(tmp_path: Path, run_python: Any, psnc: Psnc) -> None:
    make_database(tmp_path / "run.db", 3)
    with closing(sqlite3.connect(tmp_path / "run.db")) as connection:
        connection.execute("SELECT count(*) FROM logs").fetchall()
        said = run_python("-m", "psnc", "recover", "run.db", check=False)
        assert said.returncode == 3
        assert "in use" in said.stderr


def test_a_disk_without_room_for_the_new_file_is_said_and_nothing_is_left(
    database: Path, run_python: Any
) -> None:
    before = {path.name for path in database.parent.iterdir()}
    code = """
        import resource, sys
        from psnc.cli import main
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), most))
        main(["recover", "run.db", "-o", "new.db"])
    """
    # Too little for a copy of the old one, and for all rows of the new one.
    for limit in (20_000, database.stat().st_size + 1000):
        said = run_python("-c", textwrap.dedent(code), limit, check=False)
        assert said.returncode == 3, said.stderr
        assert "cannot write database" in said.stderr
        assert {path.name for path in database.parent.iterdir()} == before
