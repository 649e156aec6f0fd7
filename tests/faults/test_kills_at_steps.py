"""Kill what makes, gathers, merges and salvages databases at each step, and do it again."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from damage import make_database, root_page, rows_of, zero_page
from drivers import integrity
from lives import Nursery
from trials import Many, Tried
from whole import assert_rows_are_whole, files_of, new_directory, said

from psnc.builtin.checkpoint.check import check

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

COUNT = 12

Prepare = Callable[[Path], None]
Look = Callable[[Path, bool], None]


class Command:
    """Something that is done in a directory, and what it must leave if it is killed.

    Parameters
    ----------
    prepare : callable
        Makes the directory's files.
    act : tuple
        What is done: the name of a life's act, and its arguments.
    look : callable
        Checks a directory, given whether the act went through.
    """

    def __init__(self, prepare: Prepare, act: tuple[object, ...], look: Look) -> None:
        self.prepare = prepare
        self.act = act
        self.look = look


# --- what is there before ---------------------------------------------------------------------


def nothing(directory: Path) -> None:
    """Leave the directory empty."""


def two_databases(directory: Path) -> None:
    for name, bad in (("a.db", None), ("b.db", 7)):
        make_database(directory / name, count=20, bad=bad)


def torn_database(directory: Path) -> None:
    make_database(directory / "run.db", count=20)
    # What the answers to a question would be found by.
    zero_page(directory / "run.db", root_page(directory / "run.db", "output_files_by_path"))


# --- what must be there afterwards ------------------------------------------------------------


def look_at_run(directory: Path, done: bool) -> None:
    database = directory / "run.db"
    if database.exists() or done:
        assert check(database) == []
        completed = assert_rows_are_whole(database)
        assert completed == {0} or not done


def look_at_merged(directory: Path, done: bool) -> None:
    merged = directory / "merged.db"
    for name in ("a.db", "b.db"):
        assert check(directory / name) == []
    if merged.exists() or done:
        assert check(merged) == []
        assert len(rows_of(merged)["index_results"]) == 40


def look_at_recovered(directory: Path, done: bool) -> None:
    assert check(directory / "run.db") != []
    if (directory / "new.db").exists() or done:
        assert_recovered(directory / "new.db")


def look_at_recovered_here(directory: Path, done: bool) -> None:
    damaged = list(directory.glob("run.db.damaged-*"))
    assert check(directory / "run.db") != [] or damaged
    if check(directory / "run.db") == []:
        assert_recovered(directory / "run.db")
    assert damaged or not done


def assert_recovered(database: Path) -> None:
    assert check(database) == []
    assert integrity(database) == "ok"
    assert len(rows_of(database)["index_results"]) == 20


COMMANDS = {
    "make": Command(nothing, ("run_one", COUNT), look_at_run),
    "merge": Command(two_databases, ("merge_all",), look_at_merged),
    "recover": Command(torn_database, ("recover_aside",), look_at_recovered),
    "recover in place": Command(torn_database, ("recover_here",), look_at_recovered_here),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_killed_at_any_step_can_be_done_again(
    name: str, lives: Nursery, tmp_path: Path, chance: Random, many: Many, tried: Tried
) -> None:
    command = COMMANDS[name]
    before, whole = new_directory(tmp_path / "before"), tmp_path / "whole"
    command.prepare(before)
    steps = live(lives, command, before, whole, last=0)
    assert steps > 0
    command.look(whole, True)
    left = names_of(whole)
    kills = sorted(chance.sample(range(1, steps + 1), min(many(15), steps)))
    killed = 0
    for step in kills:
        directory = tmp_path / "killed"
        killed += live(lives, command, before, directory, last=step)
        command.look(directory, False)
        # What is in place already is refused, as it should be.
        act, *arguments = command.act
        status = lives.fork(directory, str(act), *arguments).wait()
        assert status == 0 or "there already" in said(directory), (step, said(directory))
        command.look(directory, True)
        if status == 0:
            assert names_of(directory) == left, step
    tried(f"kills at a step of: {name}", killed)


def live(lives: Nursery, command: Command, before: Path, directory: Path, *, last: int) -> int:
    """Act in a copy of a directory; return the steps, or with a last one how many have died."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(before, directory)
    act, *arguments = command.act
    life = lives.fork(directory, str(act), *arguments, last=last)
    status = life.wait()
    if last:
        assert status in (0, -signal.SIGKILL), said(directory)
        return int(status != 0)
    assert status == 0, said(directory)
    lives.warm_up(directory)
    return int((directory / "steps").read_text())


def names_of(directory: Path) -> list[str]:
    """Return the names of what is left, without the time in the name of what was set aside."""
    return sorted({name.partition(".damaged-")[0] for name in files_of(directory)})
