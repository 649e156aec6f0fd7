"""What must hold after every kill and every write that fails, and in the end."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from drivers import integrity
from lives import contents

from psnc.builtin.checkpoint.check import check

STAGES = 5

Tables = dict[str, list[tuple[Any, ...]]]


def new_directory(path: Path) -> Path:
    """Make a directory for the pipeline to run in."""
    (path / "tried").mkdir(parents=True)
    return path


def said(directory: Path) -> str:
    """Return what was printed in a directory, or the end of it.

    It has room for where all threads of some processes are.
    """
    return (directory / "said").read_text()[-30_000:]


def completed_afterwards(directory: Path, before: set[int], *, untouched: bool = False) -> set[int]:
    """Look at all that a life has left; return the indices that are completed.

    Whether the files are left ``untouched`` for the next, by a look that only reads.
    """
    assert_outputs_are_whole(directory)
    database = directory / "run.db"
    if not database.exists():
        assert before == set()
        return before
    if not untouched:
        assert check(database) == []
    aside = directory.with_name("looked-at")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    # The life that goes on finds everything as it was left.
    for path in (database, database.with_name("run.db-wal")):
        if path.exists():
            shutil.copyfile(path, aside / path.name)
    assert integrity(aside / "run.db") == "ok"
    assert check(aside / "run.db") == []
    completed = assert_rows_are_whole(aside / "run.db")
    assert before <= completed, "what was recorded is gone"
    for index in completed:
        assert_files_are_there(directory, index)
    return completed


def assert_rows_are_whole(database: Path) -> set[int]:
    """Check that each index has all of its rows, or none; return the completed ones."""
    tables = read(database)
    completed = {idx for idx, status in tables["results"] if status == "completed"}
    assert len(tables["results"]) == len({idx for idx, _ in tables["results"]})
    outputs = [(idx, seq, path) for idx in completed for seq, path in enumerate(paths_of(idx))]
    assert sorted(tables["outputs"]) == sorted(outputs)
    assert sorted(idx for idx, _ in tables["artifacts"]) == sorted(completed)
    recorded = [idx for idx, _ in tables["results"]]
    # The driver records for a worker that is dead, and knows of no stages.
    of_stages = {idx: [order for i, order in tables["stages"] if i == idx] for idx in recorded}
    for idx, orders in of_stages.items():
        assert sorted(orders) == list(range(STAGES)) or (not orders and idx not in completed)
    assert {idx for idx, _ in tables["stages"]} <= set(recorded)
    assert len(tables["logs"]) == len(set(tables["logs"]))
    return completed


def read(database: Path) -> Tables:
    queries = {
        "results": "SELECT idx, status FROM index_results",
        "outputs": "SELECT idx, seq, path FROM output_files",
        "artifacts": "SELECT idx, path FROM filter_artifacts",
        "stages": "SELECT idx, stage_order FROM stage_metrics",
        "logs": "SELECT idx, worker_id, timestamp, message FROM logs WHERE level_name != 'ERROR'"
        " GROUP BY id",
        "runs": "SELECT config_hash, total_indices FROM pipeline_runs",
    }
    with closing(sqlite3.connect(database)) as connection:
        return {name: connection.execute(query).fetchall() for name, query in queries.items()}


def paths_of(index: int) -> list[str]:
    return [*contents(index), *([f"out/{index}"] if index % 5 == 0 else [])]


def assert_outputs_are_whole(directory: Path) -> None:
    """Check that what has an output's name is that output, whole."""
    for path in directory.glob("out/[0-9]*"):
        index = int(path.name.partition("-")[0])
        if path.is_dir():
            assert {each.name: each.read_text() for each in path.iterdir()} == {
                f"{index}.txt": f"{index}"
            }
        else:
            assert path.read_text() == contents(index)[f"out/{path.name}"]


def assert_files_are_there(directory: Path, index: int) -> None:
    for path in paths_of(index):
        assert (directory / path).exists(), path


def assert_equal_to_clean(directory: Path, clean: Path) -> None:
    """Compare what a run came to that was killed with one that was not."""
    ours, theirs = (read(each / "run.db") for each in (directory, clean))
    for table in ("results", "outputs", "stages", "runs"):
        assert sorted(ours[table]) == sorted(theirs[table]), table
    assert shards(directory, ours) == shards(clean, theirs)
    names = files_of(clean)
    assert files_of(directory) == names
    for name in names - {str(path) for _, path in theirs["artifacts"]} - {"run.db"}:
        assert (directory / name).read_bytes() == (clean / name).read_bytes(), name


def shards(directory: Path, tables: Tables) -> dict[int, str]:
    return {idx: (directory / path).read_text() for idx, path in tables["artifacts"]}


def files_of(directory: Path) -> set[str]:
    """Return the names of all files that a run leaves; drafts would be among them."""
    own = ("run.db-wal", "run.db-shm", "began", "said", "steps", "modules", "died")
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)) for path in paths} - set(own)
