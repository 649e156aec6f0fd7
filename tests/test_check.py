"""``psnc check`` finds what is wrong, counts it, and changes nothing."""

from __future__ import annotations

import json
import os
import sqlite3
import textwrap
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from command_line import Psnc, psnc, write
from damage import PAGE, change, copy, make_database, overwrite, root_page, zero_page

from psnc.builtin.checkpoint import check as check_module
from psnc.builtin.checkpoint import connection
from psnc.builtin.checkpoint.check import check
from psnc.builtin.checkpoint.connection import refuse_other_databases

__all__ = ["psnc", "write"]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    make_database(tmp_path / "run.db")
    return tmp_path / "run.db"


def test_a_sound_database_has_no_findings(database: Path, psnc: Psnc) -> None:
    before = database.read_bytes()
    said = psnc("check", database)
    assert (said.code, said.out) == (0, f"{database} is sound\n")
    assert psnc("check", database, "--json").out == "[]\n"
    assert database.read_bytes() == before
    assert [path.name for path in database.parent.glob("run.db-*")] == []


@pytest.fixture
def written_meanwhile(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], None]:
    """Have the first looks find the file in the middle of being written, which it is then."""

    def make(looks: int) -> None:
        torn = copy(database, tmp_path / "torn.db")
        for table in ("index_results", "stage_metrics"):
            zero_page(torn, root_page(database, table))
        overwrite(torn, 4, b"\xff" * 60)
        left = [torn] * looks

        def open_to_look(path: Path) -> sqlite3.Connection:
            if left:
                os.utime(path)
            return really(left.pop() if left else path)

        really = connection.open_to_look
        monkeypatch.setattr(connection, "open_to_look", open_to_look)
        monkeypatch.setattr(check_module, "open_to_look", open_to_look)

    return make


def test_a_database_that_somebody_begins_to_write_is_not_taken_for_damaged(
    database: Path, written_meanwhile: Callable[[int], None]
) -> None:
    written_meanwhile(1)
    assert check(database) == []
    written_meanwhile(1)
    refuse_other_databases(database)


INCONSISTENT = {
    "UPDATE index_results SET output_paths = '[\"x\"]' WHERE idx = 3": "result is not what was",
    "UPDATE index_results SET wall_time_ns = 1 WHERE idx = 3": "figures are not what was",
    "UPDATE index_results SET idx = 1000 WHERE idx = 3": "beyond the end",
    "UPDATE index_results SET idx = -3 WHERE idx = 3": "beyond the end",
    "UPDATE index_results SET error = 'x', checksum = NULL WHERE idx = 3": "status and error",
    "UPDATE index_results SET error = NULL, checksum = NULL WHERE idx = 7": "status and error",
    "UPDATE index_results SET output_paths = '[', checksum = NULL WHERE idx = 3": "no JSON array",
    "UPDATE index_results SET measurements = 'x' WHERE idx = 3": "no JSON object",
    "UPDATE output_files SET path = 'x' WHERE idx = 3": "output_files are not those",
    "DELETE FROM output_files WHERE idx = 3 AND seq = 1": "output_files are not those",
    "UPDATE output_files SET size_bytes = 1 WHERE idx = 3": "stages, artifacts or figures",
    "UPDATE index_results SET attempts = 9 WHERE idx = 3": "stages, artifacts or figures",
    "UPDATE index_results SET code_digest = 'x' WHERE idx = 3": "stages, artifacts or figures",
    "DELETE FROM stage_metrics WHERE idx = 3 AND stage_order = 1": "stages, artifacts or figures",
    "DELETE FROM filter_artifacts WHERE idx = 3": "stages, artifacts or figures",
    "DELETE FROM index_results WHERE idx = 3": "but no result",
    "UPDATE stage_metrics SET run_id = 9 WHERE idx = 3": "belong to no run",
    "UPDATE logs SET run_id = 9": "rows of logs belong to no run",
    "UPDATE workers SET run_id = 9": "rows of workers belong to no run",
    "UPDATE pipeline_runs SET config_json = '{}'": "another hash",
    "PRAGMA user_version=0": "user_version 0",
}


@pytest.mark.parametrize("statement", INCONSISTENT)
def test_tables_that_do_not_agree_are_found(database: Path, psnc: Psnc, statement: str) -> None:
    change(database, "PRAGMA foreign_keys=OFF", statement)
    before = database.read_bytes()
    said = psnc("check", database)
    assert said.code == 1
    assert INCONSISTENT[statement] in said.out
    assert database.read_bytes() == before
    assert json.loads(psnc("check", database, "--json").out)


def test_rows_of_an_earlier_version_are_judged_by_what_they_say(database: Path) -> None:
    change(database, "UPDATE index_results SET checksum = NULL, details_checksum = NULL")
    assert check(database) == []
    change(database, "DELETE FROM stage_metrics WHERE idx = 3 AND stage_order = 1")
    (finding,) = check(database)
    assert "without a row for each stage: 3 of run 1" in finding.message


def test_findings_of_a_kind_are_counted(database: Path) -> None:
    change(database, "UPDATE index_results SET wall_time_ns = 1")
    (finding,) = check(database)
    assert (finding.kind, finding.count) == ("index", 60)
    assert finding.message.count("of run") == 3


def test_a_page_of_zeros_is_found(database: Path, psnc: Psnc) -> None:
    zero_page(database, root_page(database, "stage_metrics"))
    said = psnc("check", database)
    assert said.code == 1
    assert "integrity: " in said.out
    assert "index: " in said.out


def test_a_column_that_has_become_another_is_found(database: Path, psnc: Psnc) -> None:
    change(database, "ALTER TABLE index_results RENAME COLUMN checksum TO chucksum")
    said = psnc("check", database)
    assert said.code == 1
    assert "malformed columns of index_results" in said.out


@pytest.mark.parametrize("content", [b"\0" * 100, b"\xff" * 512, b"\0" * PAGE])
def test_a_torn_header_is_found(database: Path, psnc: Psnc, content: bytes) -> None:
    overwrite(database, 0, content)
    assert psnc("check", database).code == 1


def test_a_cut_off_database_is_found(database: Path, psnc: Psnc) -> None:
    overwrite(database, 0, b"")
    with open(database, "r+b") as file:
        file.truncate(3 * PAGE)
    assert psnc("check", database).code == 1


def test_a_database_is_checked_with_the_log_that_waits_beside_it(
    tmp_path: Path, run_python: Any, psnc: Psnc
) -> None:
    code = """
        import os
        from stages_for_tests import numbers_pipeline
        pipeline = numbers_pipeline(30, db_file="killed.db")
        for index in range(30):
            pipeline[index]
        os._exit(0)
    """
    run_python("-c", textwrap.dedent(code))
    database, wal = tmp_path / "killed.db", tmp_path / "killed.db-wal"
    before = database.read_bytes(), wal.read_bytes()
    assert psnc("check", database).code == 0
    assert (database.read_bytes(), wal.read_bytes()) == before
    wal.unlink()
    said = psnc("check", database)
    assert said.code == 1
    assert "write-ahead log killed.db-wal is gone" in said.out


def test_a_transaction_that_was_cut_off_is_rolled_back_in_a_copy(
    database: Path, run_python: Any, psnc: Psnc
) -> None:
    code = """
        import os, sqlite3
        connection = sqlite3.connect("run.db", isolation_level=None)
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("PRAGMA cache_size=1")
        connection.execute("BEGIN")
        connection.execute("UPDATE index_results SET wall_time_ns = wall_time_ns + 1")
        connection.execute("UPDATE stage_metrics SET stage_name = stage_name || 'x'")
        os._exit(0)
    """
    run_python("-c", textwrap.dedent(code))
    before = {path: path.read_bytes() for path in database.parent.glob("run.db*")}
    assert database.with_name("run.db-journal") in before
    assert psnc("check", database).code == 0
    assert {path: path.read_bytes() for path in database.parent.glob("run.db*")} == before


def test_what_is_no_database_of_this_psnc_is_refused(tmp_path: Path, psnc: Psnc) -> None:
    assert psnc("check", "missing.db").code == 3
    with closing(sqlite3.connect(tmp_path / "recipes.db")) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    said = psnc("check", "recipes.db")
    assert said.code == 3
    assert "of another program" in said.err
    make_database(tmp_path / "newer.db", 2)
    change(tmp_path / "newer.db", "PRAGMA user_version=2")
    said = psnc("check", "newer.db")
    assert said.code == 3
    assert "newer psnc (schema 2)" in said.err
    said = psnc("check", "postgresql://ada:secret@host/runs")
    assert said.code == 3
    assert said.err == (
        "psnc: postgresql://ada:***@host/runs is no SQLite file: this command is for those only\n"
    )


def test_a_text_file_is_not_taken_for_sound(tmp_path: Path, psnc: Psnc) -> None:
    (tmp_path / "notes.txt").write_text("no database at all\n" * 100)
    said = psnc("check", "notes.txt")
    assert said.code == 1
    assert "not a database" in said.out
