"""The tables as another program finds them, and what is refused as it stands."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from server import Server
from stages import numbers_pipeline

from psnc import Pipeline, StoreError
from psnc.sql_store import CHUNK
from psnc.testing.store_workplace import completed, failed
from psnc_postgres.store import PostgresStore

Query = Callable[..., list[tuple[Any, ...]]]

ITS_OWN = {"psnc_schema", "pipeline_instances"}
# A server has checksums of its pages instead.
SQLITES_OWN = {"checksum", "details_checksum"}


@pytest.fixture
def pipeline(store_url: str, tmp_path: Path) -> Pipeline[Any]:
    """A pipeline of which one index is recorded."""
    pipeline: Pipeline[Any] = numbers_pipeline(store_url, 5, tmp_path / "journal", resume=True)
    pipeline[0]
    return pipeline


def test_the_tables_have_the_columns_of_a_sqlite_database(
    pipeline: Pipeline[Any], query: Query, schema: str, tmp_path: Path
) -> None:
    Pipeline(pipeline.source, pipeline.filters, pipeline.sink, db_file=tmp_path / "a.db")[0]
    with closing(sqlite3.connect(tmp_path / "a.db")) as sqlite:
        expected = {
            table: [
                column[1]
                for column in sqlite.execute(f"PRAGMA table_info({table})")
                if column[1] not in SQLITES_OWN
            ]
            for (table,) in sqlite.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
            if not table.startswith("sqlite_")
        }
    columns: dict[str, list[str]] = {}
    text = """
        SELECT table_name, column_name FROM information_schema.columns
        WHERE table_schema = %s ORDER BY table_name, ordinal_position
    """
    for table, column in query(text, schema):
        columns.setdefault(table, []).append(column)
    assert columns.keys() - ITS_OWN == expected.keys()
    assert {table: columns[table] for table in expected} == expected


def test_an_index_is_described(pipeline: Pipeline[Any], query: Query) -> None:
    ((idx, status, paths, error, wall_time_ns, measurements),) = query(
        "SELECT idx, status, output_paths, error, wall_time_ns, measurements FROM index_results"
    )
    assert (idx, status, paths, error, measurements) == (
        0,
        "completed",
        '["out/0.bin"]',
        None,
        None,
    )
    assert wall_time_ns > 0
    assert query("SELECT message, level FROM logs") == [("number 0", 20)]
    assert query("SELECT config_hash FROM pipeline_runs") == [(pipeline.config_hash,)]


def test_each_schema_is_a_place_of_its_own(
    pipeline: Pipeline[Any], store_url: str, server_url: str, tmp_path: Path
) -> None:
    other_schema = re.sub("schema=psnc", "schema=Other", store_url)
    other = numbers_pipeline(other_schema, 5, tmp_path / "journal", resume=True)
    try:
        assert other.completed_indices == set()
        other[3]
        assert (pipeline.completed_indices, other.completed_indices) == ({0}, {3})
    finally:
        name = other_schema.rpartition("=")[2]
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(f'DROP SCHEMA "{name}" CASCADE')


# --- what is refused --------------------------------------------------------------------------


def expect_refusal(url: str, message: str, *, create: bool = True) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        PostgresStore(url, create=create)
    assert "\n" not in str(caught.value)


def test_tables_of_a_newer_version_are_refused_by_the_version_that_made_them(
    pipeline: Pipeline[Any], query: Query, store_url: str
) -> None:
    query("UPDATE psnc_schema SET version = 2, written_by = 'psnc-postgres 9.8.7'")
    refusal = r"was made by psnc-postgres 9\.8\.7 \(schema 2\).*upgrade psnc-postgres"
    for create in (True, False):
        expect_refusal(store_url, refusal, create=create)
    query("UPDATE psnc_schema SET version = 1")


def test_tables_of_another_program_are_refused_untouched(
    query: Query, schema: str, store_url: str
) -> None:
    query(f"CREATE SCHEMA {schema}")
    query("CREATE TABLE logs (line TEXT)")
    query("INSERT INTO logs VALUES ('mine')")
    for create in (True, False):
        expect_refusal(store_url, r"tables of another program .* \(logs\)", create=create)
    assert query("SELECT * FROM logs") == [("mine",)]
    assert query("SELECT tablename FROM pg_tables WHERE schemaname = %s", schema) == [("logs",)]


def test_tables_beside_those_of_another_program_are_fine(
    query: Query, schema: str, store_url: str
) -> None:
    query(f"CREATE SCHEMA {schema}")
    query("CREATE TABLE recipes (name TEXT)")
    PostgresStore(store_url, create=True).close()
    PostgresStore(store_url, create=False).close()


def test_a_table_that_has_gone_is_said_in_one_line(
    pipeline: Pipeline[Any], query: Query, store_url: str
) -> None:
    query("ALTER TABLE output_files RENAME TO hidden")
    with pytest.raises(StoreError, match=r"cannot write .*output_files.*restore them") as caught:
        pipeline[1]
    assert "\n" not in str(caught.value)
    # What could not be written is kept, and written once it can be.
    query("ALTER TABLE hidden RENAME TO output_files")
    assert pipeline.completed_indices == {0, 1}
    assert query("SELECT idx, count(*) FROM stage_metrics GROUP BY idx ORDER BY idx") == [
        (0, 3),
        (1, 3),
    ]


# --- servers of another kind ------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    """A server whose users and databases the tests of this file may make."""
    server = Server()
    server.start()
    yield server
    server.close()


def execute(server: Server, *statements: str, database: str = "postgres") -> None:
    with psycopg.connect(server.url(database), autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def test_a_database_that_is_not_there_is_refused(own_server: Server) -> None:
    expect_refusal(own_server.url("nowhere"), 'database "nowhere" does not exist')


def test_a_server_that_is_not_there_is_refused(tmp_path: Path) -> None:
    url = f"postgresql://ada:secret@/runs?host={tmp_path}"
    with pytest.raises(StoreError, match="see that the server runs") as caught:
        PostgresStore(url, create=True)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_password_is_refused_without_being_said(own_server: Server) -> None:
    execute(own_server, "CREATE ROLE locked LOGIN PASSWORD 'right'")
    url = own_server.url(user="locked:wrong")
    expect_refusal(url, r"locked:\*\*\*@.*password authentication failed")
    with pytest.raises(StoreError) as caught:
        PostgresStore(url, create=True)
    assert "wrong" not in str(caught.value)
    execute(own_server, "GRANT CREATE ON DATABASE postgres TO locked")
    PostgresStore(own_server.url(user="locked:right"), create=True).close()


def test_a_user_who_may_not_make_tables_is_told_so(own_server: Server, tmp_path: Path) -> None:
    execute(own_server, "CREATE DATABASE shared", "CREATE ROLE grace LOGIN")
    url = own_server.url("shared", user="grace")
    expect_refusal(url, "permission denied.*grant this user")
    PostgresStore(own_server.url("shared"), create=True).close()
    expect_refusal(url, "permission denied.*schema psnc")
    execute(
        own_server,
        "GRANT USAGE ON SCHEMA psnc TO grace",
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA psnc TO grace",
        database="shared",
    )
    # As the README says, that is all it takes.
    pipeline = numbers_pipeline(url, 5, tmp_path / "journal")
    pipeline[1]
    pipeline.reset()
    pipeline[2]
    assert pipeline.completed_indices == {2}


def test_a_schema_that_an_administrator_has_made_is_used(own_server: Server) -> None:
    execute(own_server, "CREATE DATABASE prepared", "CREATE ROLE joan LOGIN")
    execute(own_server, "CREATE SCHEMA psnc AUTHORIZATION joan", database="prepared")
    PostgresStore(own_server.url("prepared", user="joan"), create=True).close()


def test_a_server_that_takes_no_writes_is_said_in_one_line(own_server: Server) -> None:
    execute(own_server, "CREATE DATABASE standby")
    execute(own_server, "ALTER DATABASE standby SET default_transaction_read_only = on")
    expect_refusal(own_server.url("standby"), "takes no writes")


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "EUC_JP"])
def test_text_is_recorded_in_databases_of_every_encoding(
    own_server: Server, encoding: str, tmp_path: Path
) -> None:
    name = encoding.lower()
    execute(
        own_server, f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'"
    )
    url = own_server.url(name)
    pipeline = numbers_pipeline(url, 5, tmp_path / "journal", resume=True)
    pipeline[0]
    store = PostgresStore(url, create=False)
    store.select(1)
    path = "out/Grüße, 東京 🍲.bin"
    store.record(completed(1, output_paths=(path,)))
    store.record(failed(2, "ValueError: Grüße, 東京 🍲"))
    store.close()
    store = PostgresStore(url, create=False)
    store.select(1)
    assert store.lookup(1) == (path,)
    assert store.index_for_path(path) == 1
    (error,) = store.failed_indices().values()
    readable = {"SQL_ASCII": "Grüße, 東京 🍲"}.get(
        encoding, r"Gr\xfc\xdfe, \u6771\u4eac \U0001f372"
    )
    assert error == f"ValueError: {readable}"
    store.close()


@pytest.mark.parametrize(
    ("setting", "durability", "expected"),
    [
        ("on", "grouped", "on"),
        ("off", "grouped", "off"),
        ("off", "index", "off"),
        ("off", "full", "on"),
        ("local", "full", "on"),
        ("remote_apply", "full", "remote_apply"),
    ],
)
def test_full_durability_waits_for_the_disk_however_the_server_is_set_up(
    own_server: Server, setting: str, durability: Any, expected: str, tmp_path: Path
) -> None:
    url = own_server.url()
    numbers_pipeline(url, 5, tmp_path / "journal", resume=True)[0]
    execute(
        own_server,
        f"ALTER DATABASE postgres SET synchronous_commit = {setting}",
        "CREATE TABLE IF NOT EXISTS public.seen (setting TEXT)",
        "TRUNCATE public.seen",
        """
        CREATE OR REPLACE FUNCTION public.see() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO public.seen VALUES (current_setting('synchronous_commit'));
            RETURN NEW;
        END $$
        """,
        "CREATE OR REPLACE TRIGGER see AFTER INSERT OR UPDATE ON psnc.index_results"
        " FOR EACH ROW EXECUTE FUNCTION public.see()",
    )
    store = PostgresStore(url, create=False, durability=durability)
    store.select(1)
    store.record(completed(1))
    store.close()
    execute(own_server, "DROP TRIGGER see ON psnc.index_results")
    with psycopg.connect(own_server.url()) as connection:
        assert connection.execute("SELECT setting FROM public.seen").fetchall() == [(expected,)]


def test_answers_about_very_many_indices_are_whole(
    pipeline: Pipeline[Any], store_url: str, query: Query, schema: str
) -> None:
    ((run_id,),) = query(f'SELECT run_id FROM "{schema}".pipeline_runs')
    last = 2 * CHUNK + 3
    many = """
        INSERT INTO {schema}.index_results
            (idx, run_id, status, output_paths, completed_at, wall_time_ns, error)
        SELECT n, ?, CASE n % 2 WHEN 1 THEN 'completed' ELSE 'error' END,
            CASE n % 2 WHEN 1 THEN '["out/' || n || '"]' ELSE '[]' END, '2026-01-01', 1,
            CASE n % 2 WHEN 1 THEN NULL ELSE 'ValueError: ' || n END
        FROM generate_series(1, ?) AS n
    """
    store = PostgresStore(store_url, create=False)
    store.select(run_id)
    # In a statement with arguments a % is written twice.
    store.change([(many.replace("%", "%%"), (run_id, last))])
    expected = {index: [f"out/{index}"] for index in range(1, last + 1, 2)}
    outputs = store.completed_outputs()
    outputs.pop(0)
    assert outputs == expected
    assert store.completed_indices() == {0, *expected}
    assert store.failed_indices() == {n: f"ValueError: {n}" for n in range(2, last + 1, 2)}
    store.close()
