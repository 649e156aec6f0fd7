"""What happens to a file, a directory or a clock under a run is said, and nothing begins anew."""

from __future__ import annotations

import logging
import subprocess
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import change, make_database, overwrite, root_page, rows_of, zero_page
from stages_for_tests import again, numbers_pipeline

from psnc import Pipeline, StoreError, run_pipeline
from psnc.builtin.checkpoint import mounts
from psnc.builtin.checkpoint.check import check
from psnc.builtin.checkpoint.mounts import network_filesystem

# --- results that are not as they were written ------------------------------------------------


@pytest.fixture
def recorded(tmp_path: Path) -> Pipeline[int]:
    return make_database(tmp_path / "run.db", 20)


def test_a_changed_output_path_is_an_error_and_no_result(recorded: Pipeline[int]) -> None:
    database = recorded.db_path
    overwrite(database, database.read_bytes().index(b'"out/5-0.bin"') + 5, b"6")
    before = database.read_bytes()
    pipeline = again(recorded)
    for ask in (
        lambda: pipeline[5],
        lambda: run_pipeline(pipeline),
        lambda: pipeline.completed_indices,
        lambda: pipeline.output_paths_for_index(5),
    ):
        with pytest.raises(StoreError, match=r"index 5 is not as it was written.*psnc recover"):
            ask()
    assert pipeline[4] == ["out/4-0.bin", "out/4-1.bin"]
    assert database.read_bytes() == before


def test_a_changed_error_is_an_error_of_the_store(recorded: Pipeline[int]) -> None:
    change(recorded.db_path, "UPDATE index_results SET error = 'all is well' WHERE idx = 7")
    with pytest.raises(StoreError, match="index 7 is not as it was written"):
        _ = again(recorded).failed_indices


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM filter_artifacts WHERE idx = 5",
        "UPDATE filter_artifacts SET path = 'other' WHERE idx = 5",
        "DELETE FROM index_results WHERE idx = 5",
    ],
)
def test_artifacts_that_are_not_those_recorded_are_not_gathered(
    recorded: Pipeline[int], statement: str
) -> None:
    change(recorded.db_path, statement)
    pipeline = again(recorded)
    with pytest.raises(StoreError, match="index 5 is one of those"):
        pipeline.all_filter_artifacts()
    with pytest.raises(StoreError, match="index 5 is one of those"):
        pipeline.filter_artifacts_for_index(5)
    assert len(pipeline.filter_artifacts_for_index(4)) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE pipeline_runs SET config_hash = replace(config_hash, 'a', 'b')",
        "UPDATE pipeline_runs SET config_json = replace(config_json, '20', '21')",
        "DELETE FROM pipeline_runs",
    ],
)
def test_a_run_that_cannot_be_found_is_not_begun_anew(
    recorded: Pipeline[int], statement: str
) -> None:
    change(recorded.db_path, statement)
    for ask in (run_pipeline, lambda pipeline: pipeline[3]):
        with pytest.raises(StoreError, match="is damaged"):
            ask(again(recorded))
    assert len(rows_of(recorded.db_path)["index_results"]) == 20


def test_a_checksum_whose_name_is_damaged_is_missed(recorded: Pipeline[int]) -> None:
    change(recorded.db_path, "ALTER TABLE index_results RENAME COLUMN checksum TO chucksum")
    with pytest.raises(StoreError, match="malformed columns of index_results"):
        run_pipeline(again(recorded))


def test_a_page_of_zeros_ends_the_run_with_the_ways_out(recorded: Pipeline[int]) -> None:
    zero_page(recorded.db_path, root_page(recorded.db_path, "index_results"))
    with pytest.raises(StoreError, match=r"malformed.*psnc recover, or with psnc run --recover"):
        run_pipeline(again(recorded))


# --- earlier and later versions ---------------------------------------------------------------


OLD_TABLE = """
    CREATE TABLE index_results (
        idx INTEGER NOT NULL, run_id INTEGER NOT NULL REFERENCES pipeline_runs (run_id),
        status TEXT NOT NULL CHECK (status IN ('completed', 'error')),
        output_paths TEXT NOT NULL, completed_at TEXT NOT NULL, wall_time_ns INTEGER NOT NULL,
        peak_memory_bytes INTEGER, gpu_memory_bytes INTEGER, error TEXT, worker_id TEXT,
        measurements TEXT, PRIMARY KEY (run_id, idx)
    ) WITHOUT ROWID
"""


def make_old(path: Path) -> None:
    """Make of a database what the psnc that knew no checksums would have written."""
    columns = """
        idx, run_id, status, output_paths, completed_at, wall_time_ns, peak_memory_bytes,
        gpu_memory_bytes, error, worker_id, measurements
    """
    change(
        path,
        f"CREATE TEMP TABLE kept AS SELECT {columns} FROM index_results",
        "DROP TABLE index_results",
        OLD_TABLE,
        "INSERT INTO index_results SELECT * FROM kept",
        "ALTER TABLE output_files DROP COLUMN size_bytes",
        "ALTER TABLE output_files DROP COLUMN content_digest",
        "ALTER TABLE pipeline_runs DROP COLUMN claims",
        "ALTER TABLE pipeline_runs DROP COLUMN code_versions",
    )


def test_a_database_without_checksums_is_looked_at_as_it_is(recorded: Pipeline[int]) -> None:
    from psnc.store import open_store

    make_old(recorded.db_path)
    before = recorded.db_path.read_bytes()
    store = open_store(str(recorded.db_path))
    assert store is not None
    store.select(1)
    assert store.lookup(3) == ("out/3-0.bin", "out/3-1.bin")
    assert len(store.completed_outputs()) == 19
    assert len(store.artifacts()) == 19
    assert {row.attempts for row in store.index_rows()} == {None}
    store.close()
    assert recorded.db_path.read_bytes() == before
    assert check(recorded.db_path) == []


def test_a_database_without_checksums_resumes_and_has_them_from_then_on(
    recorded: Pipeline[int], query: Any
) -> None:
    make_old(recorded.db_path)
    pipeline = again(recorded)
    pipeline.reset_index(3)
    assert pipeline.remaining_indices() == [3]
    run_pipeline(pipeline, indices=[3])
    sums = "SELECT idx FROM index_results WHERE checksum NOT NULL AND details_checksum NOT NULL"
    assert query(recorded.db_path, sums) == [(3,)]
    assert query(recorded.db_path, "SELECT idx FROM index_results WHERE attempts = 1") == [(3,)]
    assert check(recorded.db_path) == []


def test_an_earlier_version_goes_on_in_a_database_of_this_one(recorded: Pipeline[int]) -> None:
    # As its statements are.
    change(
        recorded.db_path,
        """
        INSERT OR REPLACE INTO index_results (
            idx, run_id, status, output_paths, completed_at, wall_time_ns,
            peak_memory_bytes, gpu_memory_bytes, error, worker_id, measurements
        ) SELECT idx, run_id, 'completed', '[]', completed_at, 1, NULL, NULL, NULL, NULL, NULL
        FROM index_results WHERE idx = 7
        """,
        "INSERT OR IGNORE INTO stage_metrics VALUES (7, 1, 4, 'Discard', 1)",
    )
    assert again(recorded)[7] == []
    assert check(recorded.db_path) == []


# --- what is gone, and what cannot be written -------------------------------------------------


def test_a_log_that_is_gone_is_said_and_what_it_held_runs_again(
    tmp_path: Path, run_python: Any, caplog: pytest.LogCaptureFixture
) -> None:
    code = """
        import os
        from stages_for_tests import again, numbers_pipeline
        pipeline = numbers_pipeline(30, db_file="run.db")
        for index in range(30):
            pipeline[index]
        os._exit(0)
    """
    run_python("-c", textwrap.dedent(code))
    (tmp_path / "run.db-wal").unlink()
    pipeline = numbers_pipeline(30, db_file=tmp_path / "run.db")
    assert len(run_pipeline(pipeline)) == 30
    (said,) = [record for record in caplog.records if record.name == "psnc.checkpoint"]
    assert said.levelno == logging.WARNING
    assert "has lost its write-ahead log" in said.getMessage()


def test_an_empty_file_is_taken_but_not_silently(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run.db").touch()
    run_pipeline(numbers_pipeline(3, db_file=tmp_path / "run.db"))
    (said,) = [record for record in caplog.records if record.name == "psnc.checkpoint"]
    assert "is an empty file: a new database begins in it" in said.getMessage()
    assert len(rows_of(tmp_path / "run.db")["index_results"]) == 3


def test_a_directory_that_cannot_be_written_to_is_refused(run_python: Callable[..., Any]) -> None:
    """As another user where the test is root's, to whom nothing is forbidden."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        place.chmod(0o755)
        (place / "locked").mkdir(mode=0o555)
        script = """
            import os, sys
            from psnc import StoreError, run_pipeline
            from stages_for_tests import again, numbers_pipeline

            os.chdir(sys.argv[1])
            # So that all is imported: another user may not reach the modules.
            run_pipeline(numbers_pipeline(3, db_file="run.db"))
            if os.geteuid() == 0:
                os.setuid(1234)
            try:
                run_pipeline(numbers_pipeline(3, db_file="locked/run.db"))
            except StoreError as error:
                print(error)
            print(os.listdir("locked"))
            """
        said, left = run_python("-c", textwrap.dedent(script), place).stdout.splitlines()
    assert "make it and its directory writable" in said
    assert left == "[]"


def test_a_file_system_that_is_read_only_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    place = tmp_path / "ro"
    place.mkdir()
    pipeline = make_database(place / "run.db", 5)
    mounted = subprocess.run(
        f"mount --bind {place} {place} && mount -o remount,ro,bind {place}",
        shell=True,
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(StoreError, match="make it and its directory writable"):
            run_pipeline(again(pipeline))
        assert check(place / "run.db") == []
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    assert run_pipeline(again(pipeline))[0] == ["out/0-0.bin", "out/0-1.bin"]


def test_a_clock_that_goes_backwards_harms_nothing(recorded: Pipeline[int]) -> None:
    change(
        recorded.db_path,
        "UPDATE workers SET started_at = '2999-01-01T00:00:00.000000+00:00'",
        "UPDATE workers SET current_index = 3",
    )
    pipeline = again(recorded)
    assert pipeline.summary()["total_elapsed_s"] >= 0
    run_pipeline(pipeline)
    assert pipeline.summary()["completed"] == 19
    assert check(recorded.db_path) == []


# --- network file systems ---------------------------------------------------------------------


MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
40 27 0:40 / {nfs} rw,relatime shared:30 master:2 - nfs4 server:/export rw,vers=4.2
41 40 0:41 / {local} rw,relatime - xfs /dev/vdb rw
42 27 0:42 / {sshfs} rw,nosuid,nodev - fuse.sshfs ada@host: rw,user_id=0
43 27 0:43 / /over rw - nfs server:/a rw
44 27 0:44 / /over rw - tmpfs tmpfs rw
45 27 0:45 / /mnt/lustre rw - lustre 10.0.0.1@tcp:/fs rw
46 27 0:46 / /mnt/disk rw - fuseblk /dev/sdb1 rw
"""


@pytest.fixture
def mount_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of mounts in which directories of this test are on network file systems."""
    table = tmp_path / "mountinfo"
    (tmp_path / "with space").mkdir()
    (tmp_path / "nfs" / "local").mkdir(parents=True)
    table.write_text(
        MOUNTS.format(
            nfs=tmp_path / "nfs",
            local=tmp_path / "nfs" / "local",
            sshfs=str(tmp_path / "with space").replace(" ", "\\040"),
        )
    )
    monkeypatch.setattr(mounts, "MOUNT_TABLE", table)
    return table


def test_the_innermost_and_latest_mount_of_a_path_counts(tmp_path: Path, mount_table: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nfs")
    for path, kind in {
        tmp_path / "run.db": None,
        tmp_path / "nfs" / "run.db": "nfs4",
        tmp_path / "nfs" / "not" / "there" / "run.db": "nfs4",
        tmp_path / "nfsx" / "run.db": None,
        tmp_path / "nfs" / "local" / "run.db": None,
        tmp_path / "link" / "run.db": "nfs4",
        tmp_path / "with space" / "run.db": "fuse.sshfs",
        Path("/over/run.db"): None,
        Path("/mnt/lustre/run.db"): "lustre",
        Path("/mnt/disk/run.db"): None,
    }.items():
        assert network_filesystem(path, mount_table) == kind, path
    assert network_filesystem(tmp_path, tmp_path / "missing") is None


def test_on_a_network_file_system_there_is_no_log_and_that_is_said_once(
    tmp_path: Path, mount_table: Path, query: Any, caplog: pytest.LogCaptureFixture
) -> None:
    database = tmp_path / "nfs" / "run.db"
    for _ in range(2):
        pipeline = numbers_pipeline(20, db_file=database)
        assert len(run_pipeline(pipeline)) == 20
        assert [path.name for path in database.parent.glob("run.db*")] == ["run.db"]
    (said,) = [record for record in caplog.records if record.name == "psnc.checkpoint"]
    assert f"{database} is on a network file system (nfs4)" in said.getMessage()
    assert query(database, "PRAGMA journal_mode") == [("delete",)]
    assert check(database) == []


def test_a_database_that_has_a_log_does_without_it_once_it_is_on_a_network_file_system(
    tmp_path: Path, mount_table: Path, query: Any
) -> None:
    pipeline = make_database(tmp_path / "run.db", 20)
    assert query(tmp_path / "run.db", "PRAGMA journal_mode") == [("wal",)]
    moved = tmp_path / "nfs" / "run.db"
    (tmp_path / "run.db").rename(moved)
    there = Pipeline(pipeline.source, pipeline.filters, pipeline.sink, db_file=moved)
    assert len(there.completed_indices) == 19
    run_pipeline(there)
    assert query(moved, "PRAGMA journal_mode") == [("delete",)]
    assert [path.name for path in moved.parent.glob("run.db*")] == ["run.db"]


def test_processes_share_a_database_on_a_network_file_system(
    tmp_path: Path, mount_table: Path, query: Any
) -> None:
    pipeline = numbers_pipeline(200, db_file=tmp_path / "nfs" / "run.db")
    assert len(run_pipeline(pipeline, 2, "process_pool")) == 200
    assert len(pipeline.completed_indices) == 200
    assert check(tmp_path / "nfs" / "run.db") == []
