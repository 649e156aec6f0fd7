"""Damage real databases at random: what is read is right or an error, what is recovered is true."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from damage import PAGE, Rows, rows_of
from stages_for_tests import TESTS_FIRST
from trials import FACTOR, Tried

from psnc import Config, StoreError
from psnc.builtin.checkpoint.check import check
from psnc.builtin.checkpoint.recover import recover
from psnc.builtin.checkpoint.store import SQLiteStore

pytestmark = pytest.mark.slow

COUNT = 120
TRIALS = max(round(12 * FACTOR), 1)
INDEX_TABLES = ("index_results", "stage_metrics", "output_files", "filter_artifacts")

# Indices that failed, that were run again, and that were forgotten; in the end it closes the
# database, or leaves all that it wrote last in the write-ahead log.
RECORD = """
    import os, sqlite3, sys
    from psnc import Pipeline, run_pipeline
    from stages_for_tests import Discard, FailOn, Log, Numbers, Sum
    pipeline = Pipeline(
        source=Numbers(120),
        filters=[Log(30), Sum(), FailOn([7, 70], "mended")],
        sink=Discard(files=2),
        db_file="run.db",
    )
    run_pipeline(pipeline)
    with sqlite3.connect("run.db") as connection, sqlite3.connect("earlier.db") as earlier:
        connection.backup(earlier)
    for index in (*range(20, 50), 90):
        pipeline.reset_index(index)
    open("mended", "w").close()
    run_pipeline(pipeline, indices=[7, *range(30, 40)])
    if sys.argv[1] == "killed":
        os._exit(0)
"""


@pytest.fixture(scope="module", params=["closed", "killed"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that is sound, closed or left by a process that was killed."""
    directory = tmp_path_factory.mktemp(request.param)
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RECORD), request.param],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": TESTS_FIRST, "PSNC_DISABLE_INSTALLED_PLUGINS": "1"},
        capture_output=True,
        check=True,
    )
    assert (directory / "run.db-wal").exists() == (request.param == "killed")
    return directory / "run.db"


class Moment:
    """What the undamaged database said at one time."""

    def __init__(self, path: Path) -> None:
        rows = rows_of(path)
        self.answers = ask(path)
        # The rows of each index, in all tables.
        self.indices: dict[int, set[tuple[Any, ...]]] = {}
        for table, index, row in rows_by_index(rows):
            self.indices.setdefault(index, set()).add((table, *row))


def rows_by_index(rows: Rows) -> Iterator[tuple[str, int, tuple[Any, ...]]]:
    for table in INDEX_TABLES:
        for row in rows[table]:
            index = row[0] if table in ("index_results", "stage_metrics") else row[1]
            # A checksum that is lost leaves the rest as it was.
            yield table, index, row[:11]


def moments(sound: Path, directory: Path) -> list[Moment]:
    """Return what may be read: the latest, or what an older log still held."""
    latest = Moment(copied(sound, directory / "truth"))
    if not sound.with_name("run.db-wal").exists():
        return [latest]
    return [latest, Moment(copied(sound.with_name("earlier.db"), directory / "earlier"))]


def copied(database: Path, directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for ending in ("", "-wal"):
        beside = database.with_name(database.name + ending)
        if beside.exists():
            shutil.copyfile(beside, directory / f"run.db{ending}")
    return directory / "run.db"


# --- damage -----------------------------------------------------------------------------------


def flip(content: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice([1, 3, 30])):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def scribble(content: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(content))
    content[at : at + 40] = chance.randbytes(len(content[at : at + 40]))


def zero_pages(content: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice([1, 1, 4])):
        at = PAGE * chance.randrange(max(len(content) // PAGE, 1))
        content[at : at + PAGE] = bytes(len(content[at : at + PAGE]))


def zero_sectors(content: bytearray, chance: random.Random) -> None:
    at = 512 * chance.randrange(max(len(content) // 512, 1))
    content[at : at + 512] = bytes(len(content[at : at + 512]))


def write_elsewhere(content: bytearray, chance: random.Random) -> None:
    pages = max(len(content) // PAGE, 1)
    source, target = PAGE * chance.randrange(pages), PAGE * chance.randrange(pages)
    content[target : target + PAGE] = content[source : source + PAGE]


def truncate(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(len(content)) :]


def tear_header(content: bytearray, chance: random.Random) -> None:
    size = chance.choice([16, 32, 100, 512])
    content[:size] = chance.choice([bytes(size), chance.randbytes(size)])


DAMAGE: list[Callable[[bytearray, random.Random], None]] = [
    flip,
    scribble,
    zero_pages,
    zero_sectors,
    write_elsewhere,
    truncate,
    tear_header,
]


def damage_file(path: Path, do: Callable[..., None], chance: random.Random) -> None:
    log = path.with_name("run.db-wal")
    if log.exists() and chance.random() < 0.5:
        path = log
    content = bytearray(path.read_bytes())
    do(content, chance)
    path.write_bytes(content)


# --- what is read -----------------------------------------------------------------------------


def ask(path: Path) -> dict[str, Any]:
    """Ask a store all that a resumed run and a gather rely on; an error for an answer."""
    questions: dict[str, Callable[[SQLiteStore], Any]] = {
        "completed_outputs": lambda store: store.completed_outputs(),
        "completed_indices": lambda store: dict.fromkeys(store.completed_indices()),
        "failed_indices": lambda store: store.failed_indices(),
        "lookup": lambda store: by_index(store.lookup),
        "output_paths": lambda store: by_index(store.output_paths),
        "artifacts": lambda store: store.artifacts(),
    }
    answers: dict[str, Any] = {}
    try:
        store = SQLiteStore(path, create=False, config=Config())
    except StoreError:
        return answers
    store.select(1)
    for name, question in questions.items():
        try:
            answers[name] = question(store)
        except StoreError:
            continue
    store.close()
    return answers


def by_index(question: Callable[[int], Any]) -> dict[int, Any]:
    answers = {}
    for index in range(COUNT):
        try:
            answers[index] = question(index)
        except StoreError:
            continue
    return {index: answer for index, answer in answers.items() if answer}


def assert_true(path: Path, truth: list[Moment]) -> set[int]:
    """Check that every index that a database holds is, in all tables, as it once was."""
    found: dict[int, set[tuple[Any, ...]]] = {}
    for table, index, row in rows_by_index(rows_of(path)):
        found.setdefault(index, set()).add((table, *row))
    for index, rows in found.items():
        assert any(rows == moment.indices.get(index) for moment in truth), index
    return set(found)


@pytest.mark.parametrize("do", DAMAGE, ids=lambda do: do.__name__)
def test_damage_never_gives_a_wrong_result(
    sound: Path, do: Callable[..., None], tmp_path: Path, record_property: Any, tried: Tried
) -> None:
    truth = moments(sound, tmp_path)
    everything = set(truth[0].indices)
    seen: Counter[str] = Counter()
    for trial in range(TRIALS):
        chance = random.Random(f"{do.__name__} {sound.parent.name} {trial}")
        damaged = copied(sound, tmp_path / "damaged")
        damage_file(damaged, do, chance)

        # An index that the damage hides runs again; what is answered is true.
        for name, answers in ask(copied(damaged, tmp_path / "asked")).items():
            for index, answer in answers.items():
                true = [moment.answers[name].get(index, "none") for moment in truth]
                assert answer in true, (trial, name, index)
            seen["answers"] += 1

        checked = copied(damaged, tmp_path / "checked")
        try:
            is_clean = not check(checked)
        except StoreError:
            is_clean = False
        if is_clean:
            seen["clean"] += 1
            indices = assert_true(checked, truth)
            # Of a log that is cut off nobody can tell how long it was.
            assert indices == everything or damaged.with_name("run.db-wal").exists(), trial

        new = tmp_path / "new.db"
        new.unlink(missing_ok=True)
        try:
            recover(damaged, new)
        except StoreError:
            seen["refused"] += 1
            assert not new.exists()
            continue
        assert check(new) == [], trial
        seen["indices"] += len(assert_true(new, truth))
        seen["recovered"] += 1
    for what, count in seen.items():
        record_property(what, count)
    tried("databases damaged", TRIALS)
    tried("indices compared after damage", seen["indices"])
    assert seen["recovered"] + seen["refused"] == TRIALS
    assert seen["recovered"] > TRIALS // 3
