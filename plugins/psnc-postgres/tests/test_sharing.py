"""Many processes, in many places, with one run."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from proxy import Proxy
from server import Server
from stages import (
    TESTS,
    Discard,
    Log,
    Numbers,
    WaitFor,
    numbers_in,
    numbers_pipeline,
    wait_until,
    waiting_pipeline,
)

from psnc import DriverConflictError, Pipeline, StoreError, run_pipeline
from psnc.manager import plugin_manager
from psnc.run import Run, run_of
from psnc.testing.store_workplace import completed, messages, paths_of

Query = Callable[..., list[tuple[Any, ...]]]


CLIENTS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'psnc'"


def start_python(code: str, *arguments: object, cwd: Path) -> subprocess.Popen[str]:
    cwd.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": TESTS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    return out


def assert_whole(query: Query) -> set[int]:
    """Check that every index is there whole, and return them."""
    indices = {index for (index,) in query("SELECT idx FROM index_results")}
    for table, rows in (("stage_metrics", 3), ("output_files", 1), ("logs", 1)):
        counts = dict(query(f"SELECT idx, count(*) FROM {table} GROUP BY idx"))
        assert counts == dict.fromkeys(indices, rows), table
    return indices


# As each of several hosts would: a share of the indices, in a directory of its own.
RUN_A_SHARE = """
    import sys
    from stages import numbers_pipeline
    from psnc import run_pipeline
    url, journal, first, step = sys.argv[1:]
    pipeline = numbers_pipeline(url, 200, journal, resume=True)
    run_pipeline(pipeline, 2, indices=range(int(first), 200, int(step)))
    print(pipeline.summary()["completed"])
"""


def test_hosts_that_begin_at_once_share_one_run(
    store_url: str, query: Query, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    hosts = [
        start_python(RUN_A_SHARE, store_url, journal, first, 4, cwd=tmp_path / f"host-{first}")
        for first in range(4)
    ]
    for host in hosts:
        finish(host)
    assert sorted(numbers_in(journal)) == list(range(200))
    assert assert_whole(query) == set(range(200))
    assert query("SELECT count(*) FROM pipeline_runs") == [(1,)]
    assert query("SELECT count(DISTINCT invocation_id) FROM workers") == [(4,)]


def test_another_host_sees_what_is_completed_and_runs_the_rest(
    store_url: str, query: Query, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    pipeline = numbers_pipeline(store_url, 200, journal)
    run_pipeline(pipeline, indices=range(0, 200, 2))
    other = start_python(RUN_A_SHARE, store_url, journal, 0, 1, cwd=tmp_path / "elsewhere")
    assert finish(other) == "200\n"
    assert sorted(numbers_in(journal)) == list(range(200))
    assert assert_whole(query) == set(range(200))
    assert pipeline.completed_indices == set(range(200))


RUN_A_SHARD = """
    import sys
    from stages import numbers_pipeline
    from psnc import run_pipeline
    url, journal, shard = sys.argv[1:]
    print(len(run_pipeline(numbers_pipeline(url, 200, journal, resume=True), shard=shard)))
"""


def test_hosts_run_a_shard_each(store_url: str, query: Query, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    hosts = [
        start_python(RUN_A_SHARD, store_url, journal, f"{part}/4", cwd=tmp_path / f"host-{part}")
        for part in range(1, 5)
    ]
    assert [finish(host) for host in hosts] == ["50\n"] * 4
    assert sorted(numbers_in(journal)) == list(range(200))
    assert assert_whole(query) == set(range(200))
    assert query("SELECT run_id, claims FROM pipeline_runs") == [(1, None)]


RUN_AND_WAIT = """
    import sys
    from stages import waiting_pipeline
    from psnc import run_pipeline
    run_pipeline(waiting_pipeline(*sys.argv[1:]), indices=[1, 2, 3])
"""


def test_a_second_host_is_refused_until_the_first_has_ended_or_died(
    store_url: str, query: Query, tmp_path: Path
) -> None:
    first = start_python(RUN_AND_WAIT, store_url, tmp_path, cwd=tmp_path / "first")
    wait_until((tmp_path / "reached").exists)
    place = store_url.partition("?")[0]
    said = rf"^run 1 of {re.escape(place)}.* is being run by process {first.pid} on "
    with pytest.raises(DriverConflictError, match=said):
        run_pipeline(waiting_pipeline(store_url, tmp_path))
    run_pipeline(waiting_pipeline(store_url, tmp_path), indices=[0])
    # Nobody waits for it, so that it stays as a zombie.
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: psutil.Process(first.pid).status() == psutil.STATUS_ZOMBIE)
    (tmp_path / "go").touch()
    pipeline = waiting_pipeline(store_url, tmp_path)
    run_pipeline(pipeline)
    assert pipeline.completed_indices == {0, 1, 2, 3}
    assert query("SELECT claims FROM pipeline_runs") == [(None,)]
    first.communicate()


@pytest.mark.parametrize("resume", [False, True])
def test_a_late_worker_finds_the_run_of_its_driver_though_another_has_begun(
    store_url: str, tmp_path: Path, resume: bool
) -> None:
    pipeline = numbers_pipeline(store_url, 10, tmp_path / "journal", resume=resume)
    pipeline[0]
    later = numbers_pipeline(store_url, 10, tmp_path / "journal")
    later[9]
    # As one of psnc's workers has it, and as somebody else's.
    copy = pickle.loads(pickle.dumps(pipeline))
    run = Run(copy, plugin_manager())
    run.open_store(create=False)
    assert run.store is not None
    assert run.store.completed_indices() == {0}
    run.close()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(pipeline.__getitem__, 1).result() == ["out/1.bin"]
    run_pipeline(pipeline, 2, "process_pool", indices=[2, 3])
    assert pipeline.completed_indices == {0, 1, 2, 3}
    assert later.completed_indices == {9}
    # Whoever resumes now finds the latest.
    again = numbers_pipeline(store_url, 10, tmp_path / "journal", resume=True)
    assert again.completed_indices == {9}


def test_workers_write_to_the_server_themselves(
    store_url: str, query: Query, tmp_path: Path
) -> None:
    filters = [Log(), WaitFor(str(tmp_path), 3)]
    pipeline = Pipeline(Numbers(4, str(tmp_path / "journal")), filters, Discard(), store=store_url)
    run = threading.Thread(target=run_pipeline, args=(pipeline, 1, "process_pool"))
    run.start()
    wait_until((tmp_path / "reached").exists)
    at_three = "SELECT pid FROM workers WHERE current_index = 3"
    wait_until(lambda: query(at_three))
    assert query(at_three) != [(os.getpid(),)]
    assert len(query(CLIENTS)) >= 2
    (tmp_path / "go").touch()
    run.join()
    assert pipeline.completed_indices == {0, 1, 2, 3}


def test_workers_out_of_reach_send_their_records_home(tmp_path: Path) -> None:
    server = Server()
    server.start()
    try:
        with Proxy(server.directory / ".s.PGSQL.5432", only_for=os.getpid()) as proxy:
            pipeline = numbers_pipeline(proxy.url, 20, tmp_path / "journal")
            run_pipeline(pipeline, 2, "process_pool")
            assert pipeline.completed_indices == set(range(20))
            workers = pipeline.active_workers
            assert os.getpid() not in {worker["pid"] for worker in workers}
            assert sum(worker["completed_count"] for worker in workers) == 20
            store = run_of(pipeline).store
            assert store is not None
            assert sorted(messages(store)) == sorted(f"number {index}" for index in range(20))
            store.close()
    finally:
        server.close()


def test_claims_that_cannot_be_read_are_said_with_a_way_out(
    store_url: str, query: Query, tmp_path: Path
) -> None:
    pipeline = numbers_pipeline(store_url, 4, tmp_path / "journal")
    run_pipeline(pipeline, indices=[0])
    query("UPDATE pipeline_runs SET claims = '{'")
    with pytest.raises(StoreError, match=r"claim of run 1 cannot be read.* to NULL$"):
        run_pipeline(pipeline)
    query("UPDATE pipeline_runs SET claims = NULL")
    assert len(run_pipeline(pipeline)) == 4


@pytest.fixture
def stores(store_url: str, tmp_path: Path) -> Iterator[list[Any]]:
    """Stores of three hosts that share one run."""
    pipeline = numbers_pipeline(store_url, 50, tmp_path / "journal", resume=True)
    runs = [Run(pipeline, plugin_manager()) for _ in range(3)]
    for run in runs:
        run.open_store(create=True)
    yield [run.store for run in runs]
    for run in runs:
        run.close()


WAITING = """
    SELECT pid FROM pg_stat_activity
    WHERE application_name = 'psnc' AND wait_event_type = 'Lock'
"""


def test_a_reset_has_its_turn_before_those_that_come_after_it(
    server_url: str, schema: str, stores: list[Any], query: Query
) -> None:
    def write(store: Any, index: int) -> None:
        store.record(completed(index))
        store.flush()

    def waiting(count: int) -> bool:
        return len(query(WAITING)) == count

    with ThreadPoolExecutor(3) as threads, psycopg.connect(server_url) as other:
        insert = (
            f"INSERT INTO {schema}.index_results "
            "(run_id, idx, status, output_paths, completed_at, wall_time_ns) "
            f"SELECT run_id, 0, 'completed', '[]', '', 0 FROM {schema}.pipeline_runs"
        )
        other.execute(insert)
        # The first can write only when this transaction has ended, and the reset only after it.
        first = threads.submit(write, stores[0], 0)
        wait_until(lambda: waiting(1))
        reset = threads.submit(stores[1].reset)
        wait_until(lambda: waiting(2))
        later = threads.submit(write, stores[2], 1)
        wait_until(lambda: later.done() or waiting(3))
        other.rollback()
        for each in (first, reset, later):
            each.result(60)
    assert stores[0].completed_indices() == {1}


def test_a_reset_among_writers_leaves_whole_indices(stores: list[Any], query: Query) -> None:
    stop = threading.Event()

    def record(store: Any) -> None:
        while not stop.is_set():
            for index in range(20):
                store.record(completed(index))
            store.flush()

    def forget(store: Any) -> None:
        try:
            for turn in range(60):
                store.reset() if turn % 3 == 0 else store.reset_index(turn % 20)
        finally:
            stop.set()

    with ThreadPoolExecutor(3) as threads:
        done = [threads.submit(record, store) for store in stores[:2]]
        done.append(threads.submit(forget, stores[2]))
        for each in done:
            each.result()
    indices = {index for (index,) in query("SELECT idx FROM index_results")}
    for table, rows in (("stage_metrics", 3), ("output_files", 2), ("filter_artifacts", 1)):
        counts = dict(query(f"SELECT idx, count(*) FROM {table} GROUP BY idx"))
        assert counts == dict.fromkeys(indices, rows), table
    assert stores[0].completed_outputs() == {index: paths_of(index) for index in indices}


LOOP = """
    import sys
    from stages import numbers_pipeline
    url, journal = sys.argv[1:]
    pipeline = numbers_pipeline(url, 100_000, journal, resume=True)
    ended = pipeline.completed_indices
    for index in range(100_000):
        if index not in ended:
            pipeline[index]
            print(index, flush=True)
"""


def test_a_loop_that_is_killed_at_any_moment_leaves_whole_indices(
    store_url: str, query: Query, tmp_path: Path
) -> None:
    told: set[int] = set()
    before = set(query(CLIENTS))
    for turn in range(6):
        process = start_python(LOOP, store_url, tmp_path / "journal", cwd=tmp_path)
        assert process.stdout is not None
        for _ in range(10 + 17 * turn):
            told.add(int(process.stdout.readline()))
        process.kill()
        told |= {int(line) for line in process.stdout if line.endswith("\n")}
        process.communicate()
        # The server may still be doing the last that it was asked for.
        wait_until(lambda: set(query(CLIENTS)) <= before)
        assert assert_whole(query) >= told


def test_a_store_that_nobody_holds_any_more_leaves_no_connection(
    store_url: str, query: Query, tmp_path: Path
) -> None:
    before = set(query(CLIENTS))
    for _ in range(5):
        numbers_pipeline(store_url, 5, tmp_path / "journal")[0]
    wait_until(lambda: gc.collect() >= 0 and set(query(CLIENTS)) <= before)


END_IN_ORDER = """
    import os, sys
    from stages import numbers_pipeline
    url, journal = sys.argv[1:]
    pipeline = numbers_pipeline(url, 100, journal, resume=True)
    for index in range(60):
        pipeline[index]
        if index % 20 == 10:
            child = os.fork()
            if child == 0:
                sys.exit(0)  # the ordinary way, with every clean-up there is
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    parent = os.getpid()
    if os.fork() == 0:
        while os.getppid() == parent:
            pass
        for index in range(60, 100):
            pipeline[index]
        print(len(pipeline.completed_indices))
        sys.exit(0)
"""


def test_forked_children_that_end_or_outlive_their_parent_do_no_harm(
    store_url: str, query: Query, tmp_path: Path
) -> None:
    process = start_python(END_IN_ORDER, store_url, tmp_path / "journal", cwd=tmp_path)
    # The output pipe is open in the child too, so that this returns once the child has ended.
    assert finish(process) == "100\n"
    assert assert_whole(query) == set(range(100))
