"""The server of the tests leaves nothing behind, however they end."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import psycopg
import pytest
from server import Server
from stages import TESTS, wait_until


def test_a_server_ends_with_the_process_that_started_it() -> None:
    code = f"""
        import sys, time
        sys.path.insert(0, {TESTS!r})
        from server import Server
        server = Server()
        server.start()
        print(server.url(), server.directory, flush=True)
        time.sleep(600)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    url, directory = process.stdout.readline().split()
    psycopg.connect(url).close()
    process.kill()
    process.communicate()
    wait_until(lambda: not Path(directory).exists())
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(url)


def test_what_was_committed_is_there_when_a_server_is_started_again() -> None:
    server = Server()
    try:
        server.start()
        with psycopg.connect(server.url()) as connection:
            connection.execute("CREATE TABLE kept (number INTEGER)")
        server.stop()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(server.url())
        server.start()
        with psycopg.connect(server.url()) as connection:
            assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)
    finally:
        server.close()
    assert not server.directory.exists()
