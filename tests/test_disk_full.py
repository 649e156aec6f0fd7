"""A disk that is full ends the run with one line, and costs nothing that was recorded before."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import make_database
from drivers import BACKENDS, integrity, leave_room, only_database, small_disk, write_script
from stages_for_tests import read_journal

from psnc import StoreError
from psnc.builtin.checkpoint.check import check
from psnc.builtin.checkpoint.connection import connect
from psnc.builtin.checkpoint.merge import merge
from psnc.builtin.checkpoint.recover import recover

__all__ = ["small_disk"]

Run = Callable[..., subprocess.CompletedProcess[str]]

COUNT = 400

SCRIPT = """
import resource, sys
from pathlib import Path
from psnc import Pipeline, StoreError, run_pipeline
from stages_for_tests import Discard, Journal

directory, backend, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
if limit:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
pipeline = Pipeline(
    Journal(400, str(Path("journal").absolute())), sink=Discard(40), resume=True, db_dir=directory
)
try:
    results = run_pipeline(
        pipeline, 1 if backend == "sequential" else 2, backend, progress="progress" in sys.argv
    )
except StoreError as error:
    print(error)
    sys.exit(3)
assert [len(paths) for paths in results] == [40] * 400
print("complete")
"""


def _enlarge(directory: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(directory)], check=True)


def _expect_one_line_that_helps(finished: subprocess.CompletedProcess[str], place: Path) -> None:
    assert finished.returncode == 3, finished.stderr
    (line,) = finished.stdout.splitlines()
    assert str(only_database(place)) in line
    assert "resume" in line
    # Nothing of it is left to be said as the program ends.
    assert finished.stderr == ""


def _expect_an_exact_resume(
    place: Path, journal: Path, query: Callable[..., Any], resume: Callable[[], Any]
) -> None:
    database = only_database(place)
    assert integrity(database) == "ok"
    recorded = {idx for (idx,) in query(database, "SELECT idx FROM index_results")}
    files = query(database, "SELECT idx, count(*) FROM output_files GROUP BY idx")
    assert dict(files) == dict.fromkeys(recorded, 40)
    assert len(recorded) < COUNT
    ran_before = len(read_journal(journal))

    assert resume().stdout == "complete\n"
    assert sorted(read_journal(journal)[ran_before:]) == sorted(set(range(COUNT)) - recorded)
    assert query(database, "SELECT count(*), min(status) FROM index_results") == [
        (COUNT, "completed")
    ]
    assert query(database, "SELECT count(*) FROM output_files") == [(40 * COUNT,)]
    assert integrity(database) == "ok"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_disk_ends_the_run_and_a_resume_completes_it(
    backend: str, small_disk: Path, tmp_path: Path, run_python: Run, query: Callable[..., Any]
) -> None:
    script = write_script(tmp_path / "script.py", SCRIPT)
    finished = run_python(script, small_disk, backend, "0", check=False, timeout=30)
    _expect_one_line_that_helps(finished, small_disk)
    assert "disk is full" in finished.stdout
    _enlarge(small_disk)
    _expect_an_exact_resume(
        small_disk,
        tmp_path / "journal",
        query,
        lambda: run_python(script, small_disk, backend, "0"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_limit_on_file_sizes_ends_the_run_and_a_resume_completes_it(
    backend: str, tmp_path: Path, run_python: Run, query: Callable[..., Any]
) -> None:
    script = write_script(tmp_path / "script.py", SCRIPT)
    place = tmp_path / "db"
    finished = run_python(script, place, backend, "300000", check=False, timeout=30)
    _expect_one_line_that_helps(finished, place)
    assert "ulimit -f" in finished.stdout
    _expect_an_exact_resume(
        place, tmp_path / "journal", query, lambda: run_python(script, place, backend, "0")
    )


def test_a_run_that_cannot_be_recorded_still_ends_its_progress(
    tmp_path: Path, run_python: Run
) -> None:
    script = write_script(tmp_path / "script.py", SCRIPT)
    finished = run_python(
        script, tmp_path / "db", "sequential", "300000", "progress", check=False, timeout=30
    )
    assert finished.returncode == 3
    assert finished.stderr.startswith("psnc: ")
    assert "/400 indices" in finished.stderr


def _make(database: Path, make: Callable[[], object]) -> bool:
    """Make a database if there is room; if not, see that nothing of it is left."""
    try:
        make()
    except StoreError as error:
        said = str(error)
    else:
        assert check(database) == []
        database.unlink()
        return True
    assert "free some space" in said
    assert os.listdir(database.parent) == ["ballast"]
    return False


def test_a_database_is_made_whole_or_not_at_all_however_little_room_there_is(
    small_disk: Path,
) -> None:
    database = small_disk / "run.db"
    made = []
    for blocks in range(60):
        leave_room(small_disk, blocks)
        made.append(_make(database, lambda: connect(database, create=True).close()))
    assert set(made) == {False, True}


@pytest.mark.parametrize("command", ["merge", "recover"])
def test_a_new_database_is_whole_or_not_there_however_little_room_there_is(
    small_disk: Path, tmp_path: Path, command: str
) -> None:
    make_database(tmp_path / "run.db", count=20)
    database = small_disk / "new.db"
    commands = {
        "merge": lambda: merge([tmp_path / "run.db"], database),
        "recover": lambda: recover(tmp_path / "run.db", database),
    }
    made = []
    for blocks in range(0, 140, 3):
        leave_room(small_disk, blocks)
        made.append(_make(database, commands[command]))
    assert set(made) == {False, True}


def test_a_database_that_cannot_even_be_made_is_refused_in_one_line(
    small_disk: Path, tmp_path: Path, run_python: Run
) -> None:
    leave_room(small_disk, 0)
    script = write_script(tmp_path / "script.py", SCRIPT)
    finished = run_python(script, small_disk, "sequential", "0", check=False, timeout=30)
    assert finished.returncode == 3
    (line,) = finished.stdout.splitlines()
    assert str(small_disk) in line
    assert "full" in line
    assert finished.stderr == ""
    assert read_journal(tmp_path / "journal") == []


def test_a_full_disk_under_the_output_fails_the_index_and_spares_the_others(
    small_disk: Path, tmp_path: Path, run_python: Run
) -> None:
    script = write_script(
        tmp_path / "script.py",
        """
        import sys
        from pathlib import Path
        from psnc import Sink, atomic_write, run_pipeline
        from stages_for_tests import Numbers

        class Write(Sink):
            def __call__(self, items, index):
                path = Path(sys.argv[1], f"{index}.bin")
                with atomic_write(path) as file:
                    file.write(b"x" * (2_000_000 if index == 1 else 1000))
                return [path]

        pipeline = Numbers(4).write(Write())
        print([bool(paths) for paths in run_pipeline(pipeline)], pipeline.failed_indices)
        """,
    )
    printed = run_python(script, small_disk).stdout
    assert printed.startswith("[True, False, True, True] {1: 'OutputError: ")
    assert "1.bin cannot be written: No space left on device; free some space" in printed
    assert sorted(os.listdir(small_disk)) == ["0.bin", "2.bin", "3.bin"]
