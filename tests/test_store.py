"""The database as another program finds it, whatever happened to the one that wrote it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from stages_for_tests import (
    TESTS_FIRST,
    Add,
    Discard,
    FailOn,
    Log,
    Numbers,
    Sum,
    WaitFor,
    numbers_pipeline,
    wait_until,
)

from psnc import Config, Pipeline, StoreError, run_pipeline
from psnc.builtin.checkpoint.store import SQLiteStore
from psnc.manager import PluginManager, activated
from psnc.records import WorkerInfo

# --- the schema, as it is documented ----------------------------------------------------------

TABLES: dict[str, dict[str, str]] = {
    "pipeline_runs": {
        "run_id": "INTEGER",
        "config_hash": "TEXT",
        "config_json": "TEXT",
        "started_at": "TEXT",
        "run_dir": "TEXT",
        "total_indices": "INTEGER",
    },
    "index_results": {
        "idx": "INTEGER",
        "run_id": "INTEGER",
        "status": "TEXT",
        "output_paths": "TEXT",
        "completed_at": "TEXT",
        "wall_time_ns": "INTEGER",
        "peak_memory_bytes": "INTEGER",
        "gpu_memory_bytes": "INTEGER",
        "error": "TEXT",
    },
    "stage_metrics": {
        "idx": "INTEGER",
        "run_id": "INTEGER",
        "stage_order": "INTEGER",
        "stage_name": "TEXT",
        "wall_time_ns": "INTEGER",
    },
    "workers": {
        "worker_id": "TEXT",
        "run_id": "INTEGER",
        "pid": "INTEGER",
        "hostname": "TEXT",
        "started_at": "TEXT",
        "last_heartbeat": "TEXT",
        "current_index": "INTEGER",
        "completed_count": "INTEGER",
        "invocation_id": "TEXT",
    },
    "output_files": {
        "path": "TEXT",
        "idx": "INTEGER",
        "run_id": "INTEGER",
        "seq": "INTEGER",
        "size_bytes": "INTEGER",
        "content_digest": "TEXT",
    },
    "filter_artifacts": {
        "path": "TEXT",
        "idx": "INTEGER",
        "run_id": "INTEGER",
        "filter_name": "TEXT",
        "filter_order": "INTEGER",
    },
    "logs": {
        "id": "INTEGER",
        "run_id": "INTEGER",
        "timestamp": "TEXT",
        "level": "INTEGER",
        "level_name": "TEXT",
        "logger_name": "TEXT",
        "message": "TEXT",
        "worker_id": "TEXT",
        "idx": "INTEGER",
    },
}

KEYS = {
    "pipeline_runs": ["run_id"],
    "index_results": ["run_id", "idx"],
    "stage_metrics": ["run_id", "idx", "stage_order"],
    "workers": ["worker_id"],
    "logs": ["id"],
}


@pytest.fixture
def pipeline() -> Pipeline[int]:
    """A run with something in every table: index 2 failed."""
    pipeline = Pipeline(
        source=Numbers(4), filters=[Log(logging.WARNING), Sum(), FailOn([2])], sink=Discard(files=2)
    )
    run_pipeline(pipeline)
    return pipeline


@pytest.mark.parametrize("table", TABLES)
def test_a_table_has_its_documented_columns_and_types(
    table: str, pipeline: Pipeline[int], query: Any
) -> None:
    info = query(pipeline.db_path, f"PRAGMA table_info({table})")
    columns = {name: kind for _, name, kind, *_ in info}
    assert {name: columns.get(name) for name in TABLES[table]} == TABLES[table]


@pytest.mark.parametrize("table", KEYS)
def test_a_table_has_one_row_for_each_of_what_it_lists(
    table: str, pipeline: Pipeline[int], query: Any
) -> None:
    info = query(pipeline.db_path, f"PRAGMA table_info({table})")
    key = {column: name for _, name, _, _, _, column in info if column}
    assert [key[place] for place in sorted(key)] == KEYS[table]


def test_the_database_has_the_seven_tables_and_no_others(
    pipeline: Pipeline[int], query: Any
) -> None:
    names = query(
        pipeline.db_path,
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'",
    )
    assert {name for (name,) in names} == set(TABLES)


def test_the_file_says_what_it_is(pipeline: Pipeline[int], query: Any) -> None:
    ((application_id,),) = query(pipeline.db_path, "PRAGMA application_id")
    assert application_id.to_bytes(4, "big") == b"psnc"
    assert query(pipeline.db_path, "PRAGMA user_version") == [(1,)]
    assert query(pipeline.db_path, "PRAGMA journal_mode") == [("wal",)]


def test_integrity_check_finds_nothing(pipeline: Pipeline[int], query: Any) -> None:
    assert query(pipeline.db_path, "PRAGMA integrity_check") == [("ok",)]
    assert query(pipeline.db_path, "PRAGMA foreign_key_check") == []


def is_timestamp(text: str) -> bool:
    return datetime.fromisoformat(text).utcoffset() is not None


def test_the_run_is_described(pipeline: Pipeline[int], query: Any, tmp_path: Path) -> None:
    columns = ", ".join(TABLES["pipeline_runs"])
    ((run_id, config_hash, config, started_at, run_dir, total),) = query(
        pipeline.db_path, f"SELECT {columns} FROM pipeline_runs"
    )
    assert (run_id, config_hash, total) == (1, pipeline.config_hash, 4)
    assert hashlib.sha256(config.encode()).hexdigest() == config_hash
    assert json.loads(config)["source"]["params"] == {"count": 4, "items": 1}
    assert is_timestamp(started_at)
    assert run_dir == str(tmp_path)


def test_a_completed_index_is_described(pipeline: Pipeline[int], query: Any) -> None:
    columns = ", ".join(TABLES["index_results"])
    ((idx, run_id, status, paths, completed_at, wall_time, peak, gpu, error),) = query(
        pipeline.db_path, f"SELECT {columns} FROM index_results WHERE idx = 1"
    )
    assert (idx, run_id, status, error) == (1, 1, "completed", None)
    assert json.loads(paths) == ["out/1-0.bin", "out/1-1.bin"]
    assert is_timestamp(completed_at)
    assert wall_time > 0
    assert peak > 2**20
    assert gpu is None or gpu >= 0


def test_a_failed_index_is_described(pipeline: Pipeline[int], query: Any) -> None:
    text = "SELECT status, error, output_paths, wall_time_ns > 0 FROM index_results WHERE idx = 2"
    assert query(pipeline.db_path, text) == [("error", "RuntimeError: bad item 2", "[]", 1)]


def test_stages_outputs_and_artifacts_are_described(pipeline: Pipeline[int], query: Any) -> None:
    stages = query(
        pipeline.db_path,
        "SELECT idx, run_id, stage_order, stage_name FROM stage_metrics WHERE idx = 1 ORDER BY 3",
    )
    names = ["Numbers", "Log", "Sum", "FailOn", "Discard"]
    assert stages == [(1, 1, order, name) for order, name in enumerate(names)]
    outputs = query(
        pipeline.db_path, "SELECT path, idx, run_id, seq FROM output_files WHERE idx = 1 ORDER BY 4"
    )
    assert outputs == [("out/1-0.bin", 1, 1, 0), ("out/1-1.bin", 1, 1, 1)]
    ((path, *artifact),) = query(
        pipeline.db_path,
        "SELECT path, run_id, filter_name, filter_order FROM filter_artifacts WHERE idx = 1",
    )
    assert artifact == [1, "Sum", 2]
    assert Path(path).is_file()


def test_workers_are_described(pipeline: Pipeline[int], query: Any) -> None:
    columns = ", ".join(TABLES["workers"])
    ((worker, run_id, pid, _, started, last, current, completed, invocation),) = query(
        pipeline.db_path, f"SELECT {columns} FROM workers"
    )
    assert {uuid.UUID(worker).version, uuid.UUID(invocation).version} == {4}
    assert (run_id, pid, current, completed) == (1, os.getpid(), None, 3)
    assert is_timestamp(started)
    assert is_timestamp(last)


def test_logs_are_described(pipeline: Pipeline[int], query: Any) -> None:
    columns = ", ".join(TABLES["logs"])
    rows = query(pipeline.db_path, f"SELECT {columns} FROM logs WHERE idx = 2 ORDER BY id")
    ((worker,),) = query(pipeline.db_path, "SELECT worker_id FROM workers")
    (_, _, timestamp, *entry), (_, _, _, *failure) = rows
    assert is_timestamp(timestamp)
    assert entry == [30, "WARNING", "tests.stages", "item 2", worker, 2]
    assert failure[:2] == [40, "ERROR"]
    assert "Traceback" in failure[3]
    assert "RuntimeError: bad item 2" in failure[3]


# --- what is refused --------------------------------------------------------------------------


def everything_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def foreign(path: Path, journal_mode: str = "delete") -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode={journal_mode}")
        connection.execute("CREATE TABLE recipes (name TEXT)")
        connection.execute("INSERT INTO recipes VALUES ('soup')")
        connection.commit()


QUESTIONS: list[Callable[[Pipeline[int]], Any]] = [
    lambda pipeline: pipeline[0],
    lambda pipeline: pipeline.summary(),
    lambda pipeline: run_pipeline(pipeline),
]


def assert_refused_untouched(path: Path, message: str) -> None:
    before = everything_in(path.parent)
    for ask in QUESTIONS:
        with pytest.raises(StoreError, match=message) as caught:
            ask(numbers_pipeline(db_file=path))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert everything_in(path.parent) == before


@pytest.mark.parametrize("journal_mode", ["delete", "wal"])
def test_a_database_of_another_program_is_refused_untouched(
    tmp_path: Path, journal_mode: str
) -> None:
    foreign(tmp_path / "recipes.db", journal_mode)
    assert_refused_untouched(tmp_path / "recipes.db", "of another program")


def test_a_database_that_another_program_has_marked_is_refused_untouched(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "map.db")) as connection:
        connection.execute("PRAGMA application_id=1196437808")
    assert_refused_untouched(tmp_path / "map.db", "of another program")


def test_a_database_that_another_program_left_in_the_middle_is_refused_untouched(
    tmp_path: Path, run_python: Any
) -> None:
    leave = """
        import os, sqlite3
        connection = sqlite3.connect("recipes.db")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE recipes (name TEXT)")
        connection.commit()
        os._exit(0)
    """
    run_python("-c", textwrap.dedent(leave))
    wal = tmp_path / "recipes.db-wal"
    assert wal.stat().st_size > 0
    before = {path: path.read_bytes() for path in (tmp_path / "recipes.db", wal)}
    with pytest.raises(StoreError, match="of another program"):
        numbers_pipeline(db_file=tmp_path / "recipes.db")[0]
    assert {path: path.read_bytes() for path in before if path.exists()} == before


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\0" * 4096, b"SQLite", b"x"])
def test_a_file_that_is_no_database_is_refused_untouched(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    assert_refused_untouched(tmp_path / "table.csv", "no SQLite database")


def complete_database(path: Path) -> bytes:
    """Return the bytes of a database with a few hundred indices, and leave no file behind."""
    code = f"""
        from stages_for_tests import numbers_pipeline
        pipeline = numbers_pipeline(300, db_file={str(path)!r})
        for index in range(300):
            pipeline[index]
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": TESTS_FIRST},
        check=True,
    )
    content = path.read_bytes()
    path.unlink()
    return content


def test_a_truncated_database_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "cut.db"
    content = complete_database(path)
    for size in (16, 50, 100, 1000, 4096, len(content) // 2, len(content) - 4096):
        path.write_bytes(content[:size])
        assert_refused_untouched(path, "damaged and was left as it is")
        path.unlink()


def test_a_database_of_a_newer_version_is_refused_by_the_version_that_wrote_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "newer.db"
    path.write_bytes(complete_database(path))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version=2")
        connection.execute("UPDATE pipeline_runs SET psnc_version = '9.8.7'")
        connection.commit()
    assert_refused_untouched(path, r"written by psnc 9\.8\.7 \(schema 2\).*upgrade psnc")


def test_a_newer_database_without_todays_tables_is_refused_too(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "newer.db")) as connection:
        connection.execute(f"PRAGMA application_id={int.from_bytes(b'psnc', 'big')}")
        connection.execute("PRAGMA user_version=7")
    assert_refused_untouched(tmp_path / "newer.db", r"newer version \(schema 7\)")


# --- seen from outside while it runs ----------------------------------------------------------


def in_thread(function: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_records_and_the_current_index_show_while_a_long_index_runs(
    tmp_path: Path, query: Any
) -> None:
    pipeline = Pipeline(source=Numbers(4), filters=[WaitFor(str(tmp_path), on=[3])], sink=Discard())
    running = in_thread(lambda: list(pipeline))
    try:
        wait_until((tmp_path / "reached-3").exists)
        workers = "SELECT current_index, completed_count FROM workers"
        wait_until(lambda: query(pipeline.db_path, workers) == [(3, 3)], timeout_s=5)
        done = "SELECT idx FROM index_results ORDER BY idx"
        assert query(pipeline.db_path, done) == [(0,), (1,), (2,)]
        assert pipeline.remaining_indices() == [3]
    finally:
        (tmp_path / "go").touch()
        running.join()
    wait_until(lambda: query(pipeline.db_path, workers) == [(None, 4)], timeout_s=5)


@pytest.mark.parametrize("durability", ["index", "full"])
def test_with_durability_by_index_a_record_is_there_as_soon_as_its_index_returns(
    durability: Any, query: Any
) -> None:
    manager = PluginManager(Config(durability=durability))
    manager.load()
    with activated(manager):
        pipeline = numbers_pipeline(20)
        for index in range(20):
            pipeline[index]
            (counted,) = query(pipeline.db_path, "SELECT count(*) FROM index_results")
            assert counted == (index + 1,)


def test_a_reader_that_stays_in_its_transaction_stops_no_writer(query: Any) -> None:
    pipeline = numbers_pipeline(50)
    pipeline[0]
    pipeline.summary()
    with closing(sqlite3.connect(pipeline.db_path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        count = "SELECT count(*) FROM index_results"
        assert reader.execute(count).fetchone() == (1,)
        for index in range(1, 50):
            pipeline[index]
        assert len(pipeline.completed_indices) == 50
        assert reader.execute(count).fetchone() == (1,)
        reader.execute("COMMIT")
        assert reader.execute(count).fetchone() == (50,)


LOOK_IN = """
    import sqlite3, sys
    connection = sqlite3.connect(sys.argv[1])
    print(connection.execute("SELECT count(*) FROM index_results").fetchone()[0])
    connection.close()
"""


@pytest.mark.parametrize("opened_twice", [False, True])
def test_a_program_that_looks_in_and_leaves_takes_nothing_away(
    opened_twice: bool, run_python: Any
) -> None:
    pipeline = numbers_pipeline(60, resume=True)
    for index in range(60):
        if index in (20, 40):
            assert len(pipeline.completed_indices) == index
            if opened_twice:
                assert len(numbers_pipeline(60, resume=True).completed_indices) == index
            seen = run_python("-c", textwrap.dedent(LOOK_IN), pipeline.db_path).stdout
            assert seen == f"{index}\n"
        pipeline[index]
    assert len(pipeline.completed_indices) == 60
    assert run_python("-c", textwrap.dedent(LOOK_IN), pipeline.db_path).stdout == "60\n"


def test_a_writer_waits_for_another_that_holds_the_lock() -> None:
    pipeline = numbers_pipeline(2)
    pipeline[0]
    pipeline.summary()
    with closing(sqlite3.connect(pipeline.db_path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        asked: list[Any] = []
        waiting = in_thread(lambda: asked.append(pipeline[1]))
        time.sleep(0.3)
        assert asked == []
        other.execute("COMMIT")
        waiting.join()
    assert asked == [["out/1-0.bin"]]
    assert pipeline.completed_indices == {0, 1}


# --- many at once -----------------------------------------------------------------------------


def assert_whole(database: Path, query: Any, *, stages: int = 3, files: int = 1) -> set[int]:
    """Check that what is there is sound and whole, and return the completed indices."""
    assert query(database, "PRAGMA integrity_check") == [("ok",)]
    assert query(database, "PRAGMA foreign_key_check") == []
    completed = {idx for (idx,) in query(database, "SELECT idx FROM index_results")}
    for table, rows in (("stage_metrics", stages), ("output_files", files)):
        counts = dict(query(database, f"SELECT idx, count(*) FROM {table} GROUP BY idx"))
        assert counts == dict.fromkeys(completed, rows), table
    return completed


def test_eight_threads_at_once_lose_nothing(query: Any) -> None:
    pipeline = numbers_pipeline(400)
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(pipeline.__getitem__, range(400)))
    assert results == [[f"out/{index}-0.bin"] for index in range(400)]
    assert pipeline.completed_indices == set(range(400))
    assert assert_whole(pipeline.db_path, query) == set(range(400))
    workers = pipeline.active_workers
    assert sum(worker["completed_count"] for worker in workers) == 400
    assert len({worker["worker_id"] for worker in workers}) == len(workers) <= 8


def start_python(code: str, *arguments: Any, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": TESTS_FIRST},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# All of them make the file at the same moment, and then record the indices of their own share.
RECORD_A_SHARE = """
    import sys, time
    from pathlib import Path
    from stages_for_tests import numbers_pipeline, wait_until
    share, shares, database = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    pipeline = numbers_pipeline(400, db_file=database)
    print("ready", flush=True)
    wait_until(Path("go").exists)
    for index in range(share, 400, shares):
        pipeline[index]
"""


def test_four_processes_that_make_one_database_at_once_lose_nothing(
    tmp_path: Path, query: Any
) -> None:
    database = tmp_path / "shared.db"
    processes = [
        start_python(RECORD_A_SHARE, share, 4, database, cwd=tmp_path) for share in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    assert assert_whole(database, query) == set(range(400))
    workers = query(database, "SELECT pid, completed_count, current_index FROM workers")
    assert sorted(workers) == sorted((process.pid, 100, None) for process in processes)
    assert len(query(database, "SELECT * FROM pipeline_runs")) == 1


MAKE_MANY = """
    import sys, time
    from pathlib import Path
    from stages_for_tests import numbers_pipeline, wait_until
    for turn in range(25):
        pipeline = numbers_pipeline(2, db_file=f"{turn}.db")
        Path(f"ready-{turn}-{sys.argv[1]}").touch()
        wait_until(Path(f"ready-{turn}-{1 - int(sys.argv[1])}").exists, timeout_s=60)
        pipeline[int(sys.argv[1])]
"""


def test_two_processes_that_make_the_same_file_in_the_same_moment_share_it(
    tmp_path: Path, query: Any
) -> None:
    processes = [start_python(MAKE_MANY, number, cwd=tmp_path) for number in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert errors == ["", ""]
    for turn in range(25):
        assert assert_whole(tmp_path / f"{turn}.db", query) == {0, 1}


# --- forks ------------------------------------------------------------------------------------


def test_a_child_that_ends_does_not_damage_what_its_parent_records(
    tmp_path: Path, query: Any, run_python: Any
) -> None:
    code = """
        import os, sys
        from stages_for_tests import numbers_pipeline
        pipeline = numbers_pipeline(600, db_file="forked.db")
        for index in range(600):
            pipeline[index]
            if index % 60 == 30:
                child = os.fork()
                if child == 0:
                    sys.exit(0)  # the ordinary way, with every clean-up there is
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert pipeline.completed_indices == set(range(600))
    """
    run_python("-c", textwrap.dedent(code))
    assert assert_whole(tmp_path / "forked.db", query) == set(range(600))


def test_children_forked_in_the_middle_record_beside_their_parent(
    tmp_path: Path, query: Any, run_python: Any
) -> None:
    code = """
        import os, sys
        from stages_for_tests import numbers_pipeline
        pipeline = numbers_pipeline(500, db_file="forked.db")
        children = []
        for index in range(100):
            pipeline[index]
            if index % 25 == 10:
                child = os.fork()
                if child == 0:
                    for own in range(100 * len(children) + 100, 100 * len(children) + 200):
                        pipeline[own]
                    sys.exit(0)
                children.append(child)
        for child in children:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert pipeline.completed_indices == set(range(500)), pipeline.remaining_indices()
    """
    run_python("-c", textwrap.dedent(code))
    assert assert_whole(tmp_path / "forked.db", query) == set(range(500))


OUTLIVE = """
    import os, sys
    from pathlib import Path
    from stages_for_tests import numbers_pipeline, wait_until
    pipeline = numbers_pipeline(150, db_file="forked.db")
    for index in range(50):
        pipeline[index]
    pipeline.summary()
    parent = os.getpid()
    if os.fork() == 0:
        if sys.argv[1] == "at-work":
            for index in range(50, 100):
                pipeline[index]
            pipeline.summary()
        Path("reached").touch()
        wait_until(lambda: os.getppid() != parent)
        for index in range(50, 150):
            pipeline[index]
        print(len(pipeline.completed_indices))
        sys.exit(0)
    wait_until(Path("reached").exists)
"""


@pytest.mark.parametrize("child_was", ["at-work", "idle"])
def test_a_forked_child_that_outlives_its_parent_loses_nothing(
    child_was: str, tmp_path: Path, query: Any, run_python: Any
) -> None:
    # The output pipe is open in the child too, so that this returns once the child has ended.
    assert run_python("-c", textwrap.dedent(OUTLIVE), child_was).stdout == "150\n"
    assert assert_whole(tmp_path / "forked.db", query) == set(range(150))


def test_a_fork_while_other_threads_record_leaves_both_sides_working(
    tmp_path: Path, query: Any, run_python: Any
) -> None:
    code = """
        import os, sys, threading
        from stages_for_tests import numbers_pipeline
        pipeline = numbers_pipeline(2020, db_file="forked.db")
        pipeline[0]
        def record(share):
            for index in range(share, 2000, 2):
                pipeline[index]
                if index % 10 == share:
                    pipeline.completed_indices
        threads = [threading.Thread(target=record, args=(share,)) for share in range(2)]
        for thread in threads:
            thread.start()
        children = []
        for turn in range(20):
            child = os.fork()
            if child == 0:
                pipeline[2000 + turn]
                pipeline.summary()
                os._exit(0)
            children.append(child)
        for thread in threads:
            thread.join()
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes == [0] * 20, codes
        assert pipeline.completed_indices == set(range(2020)), pipeline.remaining_indices()
    """
    run_python("-c", textwrap.dedent(code), timeout=40)
    assert assert_whole(tmp_path / "forked.db", query) == set(range(2020))


# --- the end of a process ---------------------------------------------------------------------


@pytest.mark.parametrize("end", ["pass", "sys.exit(0)", "raise ValueError", "os.abort"])
def test_an_ordinary_end_of_the_process_loses_nothing(
    end: str, tmp_path: Path, query: Any, run_python: Any
) -> None:
    if end == "os.abort":
        end = "os.kill(os.getpid(), signal.SIGINT)"  # ends by KeyboardInterrupt
    code = f"""
        import os, signal, sys
        from stages_for_tests import numbers_pipeline
        pipeline = numbers_pipeline(100, db_file="ended.db")
        for index in range(100):
            pipeline[index]
        {end}
    """
    run_python("-c", textwrap.dedent(code), check=False)
    assert assert_whole(tmp_path / "ended.db", query) == set(range(100))


def test_a_pipeline_that_nobody_holds_any_more_has_still_recorded_everything(query: Any) -> None:
    pipeline = numbers_pipeline(10)
    database = pipeline.db_path
    for index in range(10):
        pipeline[index]
    del pipeline
    done = "SELECT count(*) FROM index_results"
    wait_until(lambda: query(database, done) == [(10,)], timeout_s=5)


def test_pipelines_that_nobody_holds_any_more_leave_no_thread_and_no_open_file() -> None:
    import gc

    import psutil

    def use(count: int) -> None:
        for _ in range(count):
            numbers_pipeline(2)[0]

    def held() -> tuple[int, int]:
        gc.collect()
        return threading.active_count(), psutil.Process().num_fds()

    use(1)
    threads, files = held()
    use(20)
    # One of them may still be at work; what each would leave is at least a thread and two files.
    wait_until(lambda: held()[0] < threads + 10 and held()[1] < files + 20, timeout_s=10)


LOOP = """
    import sys
    from psnc import Pipeline
    from stages_for_tests import Add, Discard, Numbers, Sum
    pipeline = Pipeline(
        source=Numbers(100_000), filters=[Add()], sink=Discard(files=2), db_file=sys.argv[1]
    )
    ended = pipeline.completed_indices
    for index in range(100_000):
        if index not in ended:
            pipeline[index]
            print(index, flush=True)
"""


def test_a_process_killed_at_any_moment_leaves_whole_indices_and_at_most_a_moments_loss(
    tmp_path: Path, query: Any
) -> None:
    chance = random.Random(20240607)
    database = tmp_path / "killed.db"
    recorded: set[int] = set()
    for _ in range(15):
        process = start_python(LOOP, database, cwd=tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        reported = [int(line) for line in process.stdout if line.endswith("\n")]
        process.communicate(timeout=60)
        now = assert_whole(database, query, stages=3, files=2)
        assert recorded <= now
        # Recorded in order: what is lost is the end of what was reported, never a part before.
        assert now == set(range(len(now)))
        assert len(now) <= max([*reported, *recorded, 0]) + 2
        recorded = now
    assert len(recorded) > 100


def test_a_killed_run_is_resumed_exactly(tmp_path: Path, query: Any) -> None:
    database = tmp_path / "killed.db"
    process = start_python(LOOP, database, cwd=tmp_path)
    assert process.stdout is not None
    while process.stdout.readline() != "500\n":
        pass
    process.kill()
    process.communicate(timeout=60)
    pipeline = Pipeline(
        source=Numbers(100_000), filters=[Add()], sink=Discard(files=2), db_file=database
    )
    done = pipeline.completed_indices
    assert done == set(range(len(done)))
    assert pipeline[0] == ["out/0-0.bin", "out/0-1.bin"]
    assert run_pipeline(pipeline, indices=range(1000)) == [
        [f"out/{index}-0.bin", f"out/{index}-1.bin"] for index in range(1000)
    ]
    assert assert_whole(database, query, files=2) >= set(range(1000))


# --- what is recorded is recorded or said -----------------------------------------------------


class NotWritable(Discard):
    """Takes the database away while the index runs."""

    def __init__(self, database: str) -> None:
        super().__init__()
        self.database = database

    def __call__(self, items: Iterator[Any], index: int) -> list[str]:
        with closing(sqlite3.connect(self.database)) as connection:
            connection.execute("DROP TABLE output_files")
        return super().__call__(items, index)


def test_a_result_that_cannot_be_recorded_is_said(tmp_path: Path) -> None:
    database = tmp_path / "broken.db"
    pipeline = Pipeline(source=Numbers(2), sink=NotWritable(str(database)), db_file=database)
    with pytest.raises(StoreError, match=re.escape(f"cannot write database {database}")):
        pipeline[0]
    with pytest.raises(StoreError, match=re.escape(f"cannot write database {database}")):
        pipeline.summary()
    # Leave nothing behind that cannot be written when the test ends.
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(
            "CREATE TABLE output_files (path TEXT, idx INTEGER, run_id INTEGER, seq INTEGER, "
            "size_bytes INTEGER, content_digest TEXT)"
        )
    assert pipeline.completed_indices == {0}


def test_error_messages_and_log_entries_of_any_text_are_recorded() -> None:
    pipeline = Pipeline(source=Numbers(1), filters=[RaisesAnyText()], sink=Discard())
    with pytest.raises(RuntimeError):
        pipeline[0]
    assert pipeline.failed_indices[0].startswith("RuntimeError: caf")


class RaisesAnyText(Add):
    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        raise RuntimeError(os.fsdecode(b"caf\xe9 \0 \xf0\x9f\x8d\xb2"))


# --- the end of the process -------------------------------------------------------------------


class _OnAFullDisk(SQLiteStore):
    """A store that is written to in vain."""

    is_full = True
    attempts = 0

    def write_group(self, *group: Any) -> None:
        self.attempts += 1
        if self.is_full:
            raise StoreError("no room")


@pytest.mark.parametrize("is_told", [True, False])
def test_what_cannot_be_written_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_told: bool
) -> None:
    worker = WorkerInfo("worker", os.getpid(), "host", "2026-01-01T00:00:00+00:00", "run")
    store = _OnAFullDisk(tmp_path / "runs.db", create=True, config=Config())
    store.select(1)
    store.index_started(worker, 0)
    wait_until(lambda: store.attempts == 1)
    if is_told:
        with pytest.raises(StoreError, match="no room"):
            store.flush()
        with pytest.raises(StoreError, match="no room"):
            store.index_started(worker, 1)
        # This sign of life cannot be written either, which happens out of everybody's sight.
        store.index_started(worker, 1)
        wait_until(lambda: store.attempts == 3)
    store.close_or_say()
    assert capsys.readouterr().err == ("" if is_told else "psnc: no room\n")
    store.is_full = False


# --- interrupts -------------------------------------------------------------------------------


class _Interrupted(sqlite3.Connection):
    """A connection during whose next use for a statement Ctrl-C is pressed."""

    statement = ""

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        cursor = super().execute(sql, *arguments)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if sql == _Interrupted.statement and in_main_thread:
            _Interrupted.statement = ""
            raise KeyboardInterrupt
        return cursor


@pytest.fixture
def interrupted_pipeline(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline[int]]:
    connect = sqlite3.connect

    def connect_interrupted(*given: Any, **options: Any) -> sqlite3.Connection:
        return connect(*given, **{**options, "factory": _Interrupted})

    manager = PluginManager(Config(load_installed=False, durability="index"))
    manager.load()
    with activated(manager):
        pipeline = Pipeline(Numbers(3), filters=[Log(logging.WARNING)], sink=Discard())
        pipeline.summary()  # makes the database
        pipeline.__dict__["_run"].close()
        del pipeline.__dict__["_run"]
        monkeypatch.setattr(sqlite3, "connect", connect_interrupted)
        yield pipeline
        monkeypatch.undo()


def test_an_interrupt_during_a_commit_records_no_log_entry_twice(
    interrupted_pipeline: Pipeline[int], query: Any
) -> None:
    pipeline = interrupted_pipeline
    pipeline[0]
    _Interrupted.statement = "COMMIT"
    with pytest.raises(KeyboardInterrupt):
        pipeline[1]
    pipeline[2]
    assert pipeline.completed_indices == {0, 1, 2}
    entries = query(pipeline.db_path, "SELECT idx, message FROM logs ORDER BY idx")
    assert len(entries) == len(set(entries)) == 3


def test_an_interrupt_at_the_beginning_of_a_transaction_locks_nobody_out(
    interrupted_pipeline: Pipeline[int],
) -> None:
    pipeline = interrupted_pipeline
    pipeline[0]
    _Interrupted.statement = "BEGIN IMMEDIATE"
    with pytest.raises(KeyboardInterrupt):
        pipeline[1]
    with closing(sqlite3.connect(pipeline.db_path, timeout=5, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
    pipeline[2]
    assert {0, 2} <= pipeline.completed_indices


# --- many pipelines ---------------------------------------------------------------------------

MANY = """
    import os, resource
    from psnc import run_pipeline
    from stages_for_tests import numbers_pipeline
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (120, most))
    pipelines = [numbers_pipeline(2, db_file=f"{number}.db") for number in range(60)]
    for pipeline in pipelines:
        run_pipeline(pipeline, indices=[0])
    for pipeline in reversed(pipelines):
        assert pipeline.summary()["completed"] == 1
    for pipeline in pipelines:
        pipeline[1]
        assert pipeline.completed_indices == {0, 1}
    print(len(os.listdir("/proc/self/fd")) < 60)
"""


def test_many_pipelines_that_have_run_leave_the_process_its_files(run_python: Any) -> None:
    assert run_python("-c", textwrap.dedent(MANY)).stdout == "True\n"


ASKED_AGAIN = """
    import os
    from psnc import run_pipeline
    from stages_for_tests import numbers_pipeline
    pipelines = [numbers_pipeline(2, db_file=f"{number}.db") for number in range(8)]
    for pipeline in pipelines:
        run_pipeline(pipeline)
    def opened():
        names = sorted(os.listdir("/proc/self/fd"), key=int)
        return [(name, os.readlink(f"/proc/self/fd/{name}")) for name in names[:-1]]
    before = opened()
    for pipeline in pipelines * 3:
        assert pipeline.completed_indices == {0, 1}
    print(opened() == before)
"""


def test_a_few_pipelines_keep_their_connections(run_python: Any) -> None:
    assert run_python("-c", textwrap.dedent(ASKED_AGAIN)).stdout == "True\n"


NOTHING_LEFT = """
    import os, resource
    from psnc import StoreError
    from stages_for_tests import numbers_pipeline
    # Once with files to spare, so that all is imported.
    numbers_pipeline(2, db_file="a.db" if MADE else "other.db")[0]
    pipeline = numbers_pipeline(2, db_file="a.db")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, most))
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    try:
        pipeline[0]
    except StoreError as error:
        print(error)
"""


@pytest.mark.parametrize("made", [False, True])
def test_a_process_that_has_too_many_files_open_is_told_so(run_python: Any, made: bool) -> None:
    said = run_python("-c", f"MADE = {made}\n{textwrap.dedent(NOTHING_LEFT)}").stdout
    (line,) = said.splitlines()
    assert "a.db" in line
    assert "this process has too many files open: raise the limit (ulimit -n)" in line
