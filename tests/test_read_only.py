"""What is recorded can be looked at where nothing can be written, and not a byte of it changes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from drivers import Start, start
from stages_for_tests import Discard, FailOn, Numbers, wait_until

from psnc import Pipeline, run_pipeline
from psnc.run import run_of

__all__ = ["start"]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def writable(tmp_path: Path) -> Path:
    """Return the directory that shows as `read_only`."""
    directory = tmp_path / "writable"
    directory.mkdir()
    return directory


@pytest.fixture
def read_only(writable: Path, tmp_path: Path) -> Iterator[Path]:
    """Show a directory at another place where nobody, not even root, can write to it."""
    directory = tmp_path / "read_only"
    directory.mkdir()
    try:
        subprocess.run(
            ["mount", "--bind", writable, directory], check=True, capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"mounting a directory is not permitted here: {error.stderr.strip()}")
    subprocess.run(["mount", "-o", "remount,bind,ro", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def _content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _record(database: Path) -> None:
    filters = [FailOn([1])]
    pipeline = Pipeline(Numbers(3), filters, Discard(), db_file=database)
    run_pipeline(pipeline)
    run_of(pipeline).close()


def test_a_database_that_cannot_be_written_can_be_looked_at(
    writable: Path, read_only: Path, run_python: Run
) -> None:
    _record(writable / "a.db")
    before = _content(writable)
    said = run_python("-m", "psnc", "status", read_only / "a.db").stdout
    assert "2 of 3 completed, 1 failed, 0 remaining" in said
    said = run_python("-m", "psnc", "errors", "--traceback", read_only / "a.db").stdout
    assert said.startswith("1: RuntimeError: bad item 1\n")
    assert "Traceback" in said
    assert list(before) == ["a.db"]
    assert _content(writable) == before


RECORD_AND_WAIT = """
    import sys
    from pathlib import Path
    from psnc import Pipeline
    from stages_for_tests import Discard, FailOn, Numbers, wait_until
    pipeline = Pipeline(Numbers(3), [FailOn([1])], Discard(), db_file=sys.argv[1])
    pipeline[0], pipeline[2]
    Path("recorded").touch()
    wait_until(Path("go").exists, 120)
"""


def test_a_run_at_work_can_be_looked_at_from_where_nothing_can_be_written(
    writable: Path, read_only: Path, run_python: Run, start: Start, tmp_path: Path
) -> None:
    driver = start(RECORD_AND_WAIT, writable / "a.db")
    wait_until((tmp_path / "recorded").exists)
    said = run_python("-m", "psnc", "status", read_only / "a.db").stdout
    assert "2 of 3 completed, 0 failed, 1 remaining" in said
    # A kill leaves the log and its index beside the database.
    driver.kill()
    before = _content(writable)
    said = run_python("-m", "psnc", "status", read_only / "a.db").stdout
    assert "2 of 3 completed, 0 failed, 1 remaining" in said
    assert sorted(before) == ["a.db", "a.db-shm", "a.db-wal"]
    assert _content(writable) == before


def test_a_log_that_cannot_be_read_without_writing_is_told_of(
    writable: Path, read_only: Path, run_python: Run, start: Start, tmp_path: Path
) -> None:
    driver = start(RECORD_AND_WAIT, tmp_path / "a.db")
    wait_until((tmp_path / "recorded").exists)
    driver.kill()
    for name in ("a.db", "a.db-wal"):
        shutil.copy(tmp_path / name, writable)
    before = _content(writable)
    finished = run_python("-m", "psnc", "status", read_only / "a.db", check=False)
    assert finished.returncode == 3
    (line,) = finished.stderr.splitlines()
    assert "copy it and its -wal file to a directory that is writable" in line
    assert _content(writable) == before


def test_what_would_write_says_that_it_cannot(
    writable: Path, read_only: Path, run_python: Run
) -> None:
    _record(writable / "a.db")
    before = _content(writable)
    finished = run_python("-m", "psnc", "reset", "--yes", read_only / "a.db", check=False)
    assert finished.returncode == 3
    (line,) = finished.stderr.splitlines()
    assert "make it and its directory writable" in line
    assert _content(writable) == before
