"""A server for all tests, and a schema of its own for each."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from server import Server

Query = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """URL of a database: ``$PSNC_TEST_POSTGRES_URL``, else one on a server of the tests' own."""
    given = os.environ.get("PSNC_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    server = Server()
    try:
        server.start()
        yield server.url()
    finally:
        server.close()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's settings, caches and working directory out of every test."""
    for name in list(os.environ):
        if name.startswith(("PSNC_", "XDG_", "PG")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def schema() -> str:
    """Name of a schema that does not exist yet."""
    return f"psnc_test_{uuid.uuid4().hex}"


@pytest.fixture
def store_url(server_url: str, schema: str) -> Iterator[str]:
    """URL of a store with nothing in it."""
    yield f"{server_url}{'&' if '?' in server_url else '?'}schema={schema}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE")


@pytest.fixture
def query(server_url: str, store_url: str, schema: str) -> Query:
    """Ask the server over a connection of its own, as another program would."""

    def ask(text: str, *arguments: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(f"SET search_path TO {schema}")
            cursor = connection.execute(text, arguments)
            return cursor.fetchall() if cursor.description else []

    return ask
