"""``psnc merge`` makes one database of several, loses nothing, and decides nothing by itself."""

from __future__ import annotations

import signal
import textwrap
from pathlib import Path
from typing import Any

import pytest
from command_line import Psnc, psnc, write
from damage import change, rows_of, zero_page
from stages_for_tests import Discard, FailOn, Log, Numbers, Sum, numbers_pipeline

from psnc import Pipeline, run_pipeline
from psnc.builtin.checkpoint.check import check

__all__ = ["psnc", "write"]


def shard(path: Path, indices: list[int], bad: str = "mended", count: int = 12) -> Path:
    """Record some of the indices; 3 fails unless the file is there."""
    pipeline = Pipeline(
        source=Numbers(count),
        filters=[Log(30), Sum(), FailOn([3], bad)],
        sink=Discard(files=2),
        db_file=path,
    )
    run_pipeline(pipeline, indices=indices)
    pipeline.__dict__["_run"].close()
    return path


def indices_of(path: Path) -> dict[int, str]:
    return {row[0]: row[2] for row in rows_of(path)["index_results"]}


def test_shards_become_one_run_with_all_that_is_recorded(tmp_path: Path, psnc: Psnc) -> None:
    paths = [shard(tmp_path / f"{n}.db", list(range(n, 12, 3))) for n in range(3)]
    before = [path.read_bytes() for path in paths]
    said = psnc("merge", *paths, "-o", "all.db")
    assert said.code == 0
    assert said.out == (
        "11 completed and 1 failed indices of 1 configuration, 13 log entries, 3 workers\n"
        "database all.db\n"
    )
    assert [path.read_bytes() for path in paths] == before
    new = tmp_path / "all.db"
    assert check(new) == []
    rows = rows_of(new)
    for table in ("index_results", "stage_metrics", "output_files", "filter_artifacts", "workers"):
        parts = [row for path in paths for row in rows_of(path)[table]]
        assert sorted(rows[table], key=repr) == sorted(parts, key=repr), table
    messages = [row[1:] for path in paths for row in rows_of(path)["logs"]]
    assert sorted(row[1:] for row in rows["logs"]) == sorted(messages)
    assert len(rows["pipeline_runs"]) == 1


def test_a_merged_database_resumes(tmp_path: Path, psnc: Psnc) -> None:
    (tmp_path / "mended").touch()
    paths = [shard(tmp_path / f"{n}.db", list(range(n, 9, 3))) for n in range(3)]
    assert psnc("merge", *paths, "-o", "all.db").code == 0
    shard(tmp_path / "all.db", list(range(12)))
    rows = rows_of(tmp_path / "all.db")
    assert len(rows["index_results"]) == 12
    assert sum(row[7] for row in rows["workers"]) == 12


def test_different_configurations_stay_different_runs(tmp_path: Path, psnc: Psnc) -> None:
    (tmp_path / "mended").touch()
    paths = [shard(tmp_path / "a.db", [0, 1]), shard(tmp_path / "b.db", [1, 2], count=13)]
    said = psnc("merge", *paths, "-o", "all.db")
    assert said.out.startswith("4 completed and 0 failed indices of 2 configurations")
    assert check(tmp_path / "all.db") == []
    assert sorted(row[:2] for row in rows_of(tmp_path / "all.db")["index_results"]) == [
        (0, 1),
        (1, 1),
        (1, 2),
        (2, 2),
    ]


@pytest.mark.parametrize("reverse", [False, True])
def test_an_error_never_displaces_a_completion(tmp_path: Path, psnc: Psnc, reverse: bool) -> None:
    failed = shard(tmp_path / "failed.db", [3, 4])
    (tmp_path / "mended").touch()
    done = shard(tmp_path / "done.db", [3, 5])
    paths = [done, failed] if reverse else [failed, done]
    assert psnc("merge", *paths, "-o", "all.db", "--prefer", "last").code == 0
    assert indices_of(tmp_path / "all.db") == dict.fromkeys([3, 4, 5], "completed")
    assert check(tmp_path / "all.db") == []


def test_the_same_outputs_are_no_conflict(tmp_path: Path, psnc: Psnc) -> None:
    paths = [shard(tmp_path / f"{n}.db", [0, 1]) for n in range(2)]
    said = psnc("merge", *paths, "-o", "all.db")
    assert said.code == 0
    assert "2 indices were in several databases" in said.out


def with_other_outputs(path: Path, folder: str) -> Path:
    pipeline = numbers_pipeline(4, db_file=path)
    run_pipeline(pipeline)
    pipeline.__dict__["_run"].close()
    change(
        path,
        f"UPDATE index_results SET output_paths = replace(output_paths, 'out/', '{folder}/'), "
        "checksum = NULL, details_checksum = NULL WHERE idx = 2",
        f"UPDATE output_files SET path = replace(path, 'out/', '{folder}/') WHERE idx = 2",
    )
    assert check(path) == []
    return path


def test_different_outputs_are_refused_unless_one_is_preferred(tmp_path: Path, psnc: Psnc) -> None:
    paths = [with_other_outputs(tmp_path / f"{name}.db", name) for name in ("a", "b")]
    said = psnc("merge", *paths, "-o", "all.db")
    assert said.code == 3
    assert f"index 2 in {paths[0]} and {paths[1]}" in said.err
    assert "--prefer first" in said.err
    assert {path.name for path in tmp_path.glob("*all.db*")} == set()
    for prefer, folder in (("first", "a"), ("last", "b")):
        said = psnc("merge", *paths, "-o", f"{prefer}.db", "--prefer", prefer)
        assert said.code == 0
        assert "1 of them with different outputs" in said.out
        rows = rows_of(tmp_path / f"{prefer}.db")["output_files"]
        assert [row[0] for row in rows if row[1] == 2] == [f"{folder}/2-0.bin"]
        assert check(tmp_path / f"{prefer}.db") == []


def test_a_copy_of_a_database_adds_nothing(tmp_path: Path, psnc: Psnc) -> None:
    path = shard(tmp_path / "a.db", list(range(12)))
    (tmp_path / "copy.db").write_bytes(path.read_bytes())
    assert psnc("merge", path, "copy.db", "-o", "all.db").code == 0
    found, truth = rows_of(tmp_path / "all.db"), rows_of(path)
    assert found == truth


def test_nothing_is_overwritten_and_nothing_damaged_is_merged(tmp_path: Path, psnc: Psnc) -> None:
    paths = [shard(tmp_path / f"{n}.db", [n]) for n in range(2)]
    (tmp_path / "all.db").write_text("mine")
    said = psnc("merge", *paths, "-o", "all.db")
    assert said.code == 3
    assert (tmp_path / "all.db").read_text() == "mine"
    zero_page(paths[1], 5)
    said = psnc("merge", *paths, "-o", "new.db")
    assert said.code == 3
    assert f"{paths[1]} is damaged" in said.err
    assert "psnc recover" in said.err
    assert not (tmp_path / "new.db").exists()
    assert psnc("merge", *paths, "-o", "postgresql://host/db").code == 3


@pytest.mark.parametrize("step", ["before", "after"])
def test_a_merge_that_was_killed_leaves_nothing_behind_once_it_is_done_again(
    tmp_path: Path, psnc: Psnc, run_python: Any, step: str
) -> None:
    paths = [shard(tmp_path / f"{n}.db", list(range(n, 12, 3))) for n in range(3)]
    code = """
        import os, signal, sys
        from pathlib import Path
        from psnc.builtin.checkpoint.merge import merge

        def watch(event, arguments):
            # The new database is given its name.
            if event == "os.link" and str(arguments[1]).endswith("/all.db"):
                if "/." not in str(arguments[1]):
                    if sys.argv[1] == "after":
                        sys.setprofile(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                    else:
                        os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        merge([Path(f"{n}.db").absolute() for n in range(3)], Path("all.db").absolute())
    """
    killed = run_python("-c", textwrap.dedent(code), step, check=False)
    assert killed.returncode == -signal.SIGKILL
    new = tmp_path / "all.db"
    assert new.exists() == (step == "after")
    if step == "before":
        assert psnc("merge", *paths, "-o", new).code == 0
    pipeline = Pipeline(
        source=Numbers(12),
        filters=[Log(30), Sum(), FailOn([3], "mended")],
        sink=Discard(files=2),
        db_file=new,
    )
    assert len(pipeline.completed_indices) == 11
    run_pipeline(pipeline)
    assert [each.name for each in tmp_path.glob(".*")] == []


def test_databases_at_work_can_be_merged(tmp_path: Path, run_python: Any, query: Any) -> None:
    pipeline = numbers_pipeline(5, db_file=tmp_path / "live.db")
    run_pipeline(pipeline, indices=[0, 1])
    run_python("-m", "psnc", "merge", "live.db", "-o", "all.db")
    run_pipeline(pipeline)
    assert len(indices_of(tmp_path / "all.db")) == 2
    assert query(tmp_path / "live.db", "SELECT count(*) FROM index_results") == [(5,)]
