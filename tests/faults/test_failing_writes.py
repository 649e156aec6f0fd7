"""Let each write of a run fail, and those of commands on databases; then there is room again."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from damage import make_database, root_page, zero_page
from drivers import leave_room, small_disk
from lives import Nursery
from trials import Many, Tried
from whole import assert_equal_to_clean, completed_afterwards, files_of, new_directory, said

from psnc.builtin.checkpoint.check import check

__all__ = ["small_disk"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

COUNT = 12
BLOCK = 4096
# Enough for anything here, however long the write-ahead log gets.
DISK = 32 * 1024 * 1024

# Of `psnc run`: all went well, indices failed, the store and an output cannot be written, and a
# stage raised an error of its own as its files were put together.
DONE, FAILED, NO_STORE, NO_OUTPUT, STAGE_RAISED = 0, 1, 3, 74, 70
REMEDIES = ("free some space", "ulimit -f")

RUN = """
from lives import pipeline_of
pipeline = pipeline_of(12)
"""
OPTIONS = ("--retries", "1", "--retry-delay", "0")
BACKENDS = {
    "sequential": ("--backend", "sequential"),
    "process_pool": ("--backend", "process_pool", "--jobs", "2"),
}


def prepared(directory: Path) -> Path:
    new_directory(directory)
    (directory / "pipeline.py").write_text(RUN)
    return directory


def run(
    lives: Nursery,
    directory: Path,
    backend: str = "sequential",
    largest: int | None = None,
    tell: bool = False,
) -> int:
    (directory / "said").write_text("")
    arguments = ("run", "pipeline.py:pipeline", *OPTIONS, *BACKENDS[backend])
    life = lives.fork(directory, "command", *arguments, largest=largest, tell=tell)
    status = life.wait()
    life.wait_for_orphans()
    return status


@pytest.fixture
def clean(lives: Nursery, tmp_path: Path) -> Path:
    """A run for which there was room enough."""
    directory = prepared(tmp_path / "clean")
    assert run(lives, directory, tell=True) == DONE, said(directory)
    lives.warm_up(directory)
    return directory


def look_after_failure(directory: Path, status: int) -> None:
    """Check what was said, and that what is there is whole."""
    text = said(directory)
    assert status in (DONE, FAILED, NO_STORE, NO_OUTPUT, STAGE_RAISED), (status, text)
    lines = [line for line in text.splitlines() if line.startswith("psnc: ")]
    if status == STAGE_RAISED:
        assert "in merge" in text
        assert "OSError: [Errno 28] No space left on device" in text
    else:
        assert "Traceback" not in text
    if status in (NO_STORE, NO_OUTPUT):
        (line,) = (line for line in lines if "indices" not in line)
        assert str(directory / "run.") in line
        assert any(remedy in line for remedy in REMEDIES), line
    completed_afterwards(directory, set())


def drafts_in(directory: Path) -> list[str]:
    return [name for name in files_of(directory) if ".draft" in name]


def resume_and_compare(lives: Nursery, directory: Path, clean: Path) -> None:
    assert run(lives, directory) == DONE, said(directory)
    assert_equal_to_clean(directory, clean)


# --- a limit on the size of files -------------------------------------------------------------


@pytest.mark.parametrize(("backend", "trials"), [("sequential", 40), ("process_pool", 8)])
def test_a_run_resumes_exactly_whatever_file_became_too_large(
    backend: str,
    trials: int,
    lives: Nursery,
    clean: Path,
    tmp_path: Path,
    chance: Random,
    many: Many,
    tried: Tried,
) -> None:
    steps = sizes(many(trials), largest_file(clean) + 2 * BLOCK)
    seen: Counter[int] = Counter()
    for limit in steps:
        directory = prepared(tmp_path / "limited")
        status = run(lives, directory, backend, largest=limit - chance.randrange(BLOCK))
        seen[status] += 1
        look_after_failure(directory, status)
        # Workers are ended in the middle of what they do.
        assert backend == "process_pool" or drafts_in(directory) == []
        resume_and_compare(lives, directory, clean)
        shutil.rmtree(directory)
    assert {NO_STORE, DONE} <= set(seen), seen
    tried("runs with a write that failed", seen.total() - seen[DONE])


def sizes(number: int, largest: int) -> list[int]:
    """Return sizes, more of them where they are small, and in the end one that is enough."""
    spread = [2 * BLOCK + int(largest * (each / number) ** 2) for each in range(number + 1)]
    return [*spread, DISK]


def largest_file(directory: Path) -> int:
    return max(path.stat().st_size for path in directory.rglob("*"))


# --- a disk that is full ----------------------------------------------------------------------


def test_a_run_resumes_exactly_wherever_the_disk_was_full(
    lives: Nursery, clean: Path, small_disk: Path, tmp_path: Path, many: Many, tried: Tried
) -> None:
    subprocess.run(["mount", "-o", f"remount,size={DISK}", str(small_disk)], check=True)
    # The write-ahead log and its index take some, too.
    needed = sum(-(-path.stat().st_size // BLOCK) for path in clean.rglob("*")) + 200
    seen: Counter[int] = Counter()
    for room in sizes(many(40), needed * BLOCK):
        directory = prepared(small_disk / "run")
        # What is printed is not to fail.
        (directory / "said").symlink_to(tmp_path / "said")
        leave_room(small_disk, room // BLOCK)
        status = run(lives, directory)
        seen[status] += 1
        os.remove(small_disk / "ballast")
        look_after_failure(directory, status)
        assert drafts_in(directory) == []
        resume_and_compare(lives, directory, clean)
        shutil.rmtree(directory)
    assert {NO_STORE, DONE} <= set(seen), seen
    tried("runs on a disk that was full", seen.total() - seen[DONE])


# --- commands ---------------------------------------------------------------------------------


def two_databases(directory: Path) -> None:
    for name, bad in (("a.db", None), ("b.db", 7)):
        make_database(directory / name, count=20, bad=bad)


def torn_database(directory: Path) -> None:
    make_database(directory / "run.db", count=40)
    zero_page(directory / "run.db", root_page(directory / "run.db", "output_files_by_path"))


COMMANDS = {
    "merge": (two_databases, ("merge", "a.db", "b.db", "-o", "new.db")),
    "recover": (torn_database, ("recover", "run.db", "-o", "new.db")),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_cannot_write_leaves_all_as_it_was(
    name: str, lives: Nursery, tmp_path: Path, many: Many, tried: Tried
) -> None:
    prepare, arguments = COMMANDS[name]
    directory = new_directory(tmp_path / "work")
    prepare(directory)
    before = contents_of(directory)
    failed = 0
    for limit in sizes(many(15), largest_file(directory) * 3):
        status = lives.fork(directory, "command", *arguments, largest=limit, tell=False).wait()
        new = directory / "new.db"
        text = said(directory)
        if status == DONE:
            assert check(new) == []
            new.unlink()
        else:
            assert status == NO_STORE, text
            (line,) = text.splitlines()
            assert line.startswith("psnc: ")
            assert "ulimit -f" in line
            failed += 1
        assert contents_of(directory) == before
        (directory / "said").unlink()
    assert failed
    assert lives.fork(directory, "command", *arguments).wait() == DONE
    assert check(directory / "new.db") == []
    tried("commands with a write that failed", failed)


def contents_of(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in files_of(directory)}
