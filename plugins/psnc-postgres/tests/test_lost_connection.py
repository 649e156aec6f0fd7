"""Connections that are lost and servers that stop lose and double nothing that was recorded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from proxy import Proxy
from server import Server
from stages import TESTS, numbers_in, numbers_pipeline, wait_until

from psnc import Pipeline, StoreError, run_pipeline
from psnc.manager import plugin_manager
from psnc.run import Run
from psnc.testing.store_workplace import completed, contents, messages

Query = Callable[..., list[tuple[Any, ...]]]

END_THE_OTHERS = """
    SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
    WHERE application_name = 'psnc' AND pid <> pg_backend_pid()
"""


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server that the test may stop and start."""
    server = Server()
    server.start()
    yield server
    server.close()


@pytest.fixture
def proxy(own_server: Server) -> Iterator[Proxy]:
    """A proxy before the test's own server."""
    with Proxy(own_server.directory / ".s.PGSQL.5432") as proxy:
        yield proxy


def open_store(pipeline: Pipeline[Any]) -> Any:
    run = Run(pipeline, plugin_manager())
    run.open_store(create=True)
    return run.store


def test_a_connection_that_was_ended_is_made_again(
    store_url: str, query: Query, tmp_path: Path
) -> None:
    pipeline = numbers_pipeline(store_url, 20, tmp_path / "journal")
    for index in range(20):
        pipeline[index]
        if index % 3 == 0:
            assert query(END_THE_OTHERS)[0][0] >= 1
        if index % 4 == 0:
            assert pipeline.completed_indices == set(range(index + 1))
    assert pipeline.completed_indices == set(range(20))
    assert numbers_in(tmp_path / "journal") == list(range(20))
    store = open_store(pipeline)
    assert messages(store) == [f"number {index}" for index in range(20)]
    store.close()


@pytest.mark.parametrize("what", ["request", "answer"])
def test_a_connection_lost_during_a_commit_neither_loses_nor_doubles_anything(
    own_server: Server, proxy: Proxy, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    through_proxy = numbers_pipeline(proxy.url, 5, tmp_path / "journal", resume=True)
    store = open_store(through_proxy)
    store.record(completed(0))
    store.flush()
    proxy.lose_next(what)
    records = [completed(index) for index in (1, 2)]  # with two equal log entries each
    for record in records:
        store.record(record)
    store.flush()
    assert proxy.lost == 1
    # psycopg would say that it has ignored an error, which nobody has to know.
    assert caplog.messages == []
    direct = open_store(numbers_pipeline(own_server.url(), 5, tmp_path / "journal", resume=True))
    assert contents(direct) == contents(store)
    assert direct.completed_indices() == {0, 1, 2}
    for record in records:
        assert messages(direct, record.index) == [log.message for log in record.logs]
    # From here on, the same entries are new ones again.
    store.record(records[0])
    store.flush()
    assert len(direct.logs(1)) == 2 * len(records[0].logs)
    store.close()
    direct.close()


@pytest.mark.parametrize("what", ["request", "answer"])
def test_what_is_in_doubt_while_the_server_is_away_is_settled_when_it_is_back(
    proxy: Proxy, tmp_path: Path, what: str
) -> None:
    store = open_store(numbers_pipeline(proxy.url, 5, tmp_path / "journal", resume=True))
    proxy.lose_next(what, be_away=True)
    store.record(completed(1))
    with pytest.raises(StoreError, match="see that the server runs"):
        store.flush()
    proxy.away = False
    store.record(completed(2))
    store.flush()
    for index in (1, 2):
        assert messages(store, index) == [f"number {index}", "the same", "the same"]
    assert store.completed_indices() == {1, 2}
    store.close()


def test_a_server_that_stops_gives_one_clear_error_and_a_resume_completes(
    own_server: Server, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    url = own_server.url().replace("psnc@", "psnc:secret@")

    def make() -> Pipeline[Any]:
        pipeline: Pipeline[Any] = numbers_pipeline(url, 2000, journal, resume=True)
        return pipeline

    def stop_in_the_middle() -> None:
        wait_until(lambda: len(numbers_in(journal)) > 200)
        own_server.stop()

    stopper = threading.Thread(target=stop_in_the_middle)
    stopper.start()
    with pytest.raises(StoreError, match=r"cannot connect to .*\*\*\*.*and resume") as caught:
        run_pipeline(make())
    stopper.join()
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)

    own_server.start()
    pipeline = make()
    recorded = pipeline.completed_indices
    assert 0 < len(recorded) < 2000
    ran_before = numbers_in(journal)
    results = run_pipeline(pipeline)
    assert results == [[f"out/{index}.bin"] for index in range(2000)]
    ran_again = numbers_in(journal)[len(ran_before) :]
    assert sorted(ran_again) == sorted(set(range(2000)) - recorded)
    store = open_store(make())
    assert len(list(store.stage_rows())) == 3 * 2000
    assert sorted(messages(store)) == sorted(f"number {index}" for index in range(2000))
    store.close()


SCRIPT = """
    import sys
    from stages import numbers_pipeline
    from psnc import StoreError, run_pipeline
    url, journal, backend = sys.argv[1:]
    pipeline = numbers_pipeline(url, 4000, journal, resume=True)
    try:
        run_pipeline(pipeline, 1 if backend == "sequential" else 2, backend)
    except StoreError as error:
        print(error)
        sys.exit(3)
"""


@pytest.mark.parametrize("backend", ["sequential", "thread_pool", "process_pool"])
def test_a_program_whose_server_stops_says_so_once(
    own_server: Server, tmp_path: Path, backend: str
) -> None:
    journal = tmp_path / "journal"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), own_server.url(), str(journal), backend],
        env={**os.environ, "PYTHONPATH": TESTS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(numbers_in(journal)) > 200)
    own_server.stop()
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (3, "")
    (line,) = out.splitlines()
    assert line.startswith("cannot connect to postgresql://")
    own_server.start()
    pipeline = numbers_pipeline(own_server.url(), 4000, journal, resume=True)
    assert 0 < len(pipeline.completed_indices) < 4000
    run_pipeline(pipeline, 2)
    assert pipeline.completed_indices == set(range(4000))


def test_a_server_that_is_started_again_in_the_middle_is_not_even_noticed(
    own_server: Server, tmp_path: Path
) -> None:
    pipeline = numbers_pipeline(own_server.url(), 10, tmp_path / "journal")
    for index in range(10):
        pipeline[index]
        if index == 5:
            own_server.stop()
            own_server.start()
    assert pipeline.completed_indices == set(range(10))


def test_an_interrupt_in_the_middle_of_a_question_leaves_the_store_usable(
    store_url: str, query: Query, tmp_path: Path
) -> None:
    pipeline = numbers_pipeline(store_url, 5, tmp_path / "journal")
    pipeline[0]
    main = threading.get_ident()

    def interrupt() -> None:
        wait_until(lambda: query("SELECT 1 FROM pg_locks WHERE NOT granted"))
        signal.pthread_kill(main, signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    server_url = store_url.partition("?schema")[0].partition("&schema")[0]
    schema = store_url.rpartition("=")[2]
    with psycopg.connect(server_url) as other:
        other.execute(f"LOCK TABLE {schema}.index_results IN ACCESS EXCLUSIVE MODE")
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            pipeline.summary()
        interrupter.join()
    pipeline[1]
    assert pipeline.completed_indices == {0, 1}
