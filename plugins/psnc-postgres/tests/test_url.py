"""What a URL may say, and what nobody gets to see of it."""

from __future__ import annotations

import pytest

from psnc import StoreError
from psnc_postgres.url import parse_url


@pytest.mark.parametrize(
    ("url", "schema", "parameters"),
    [
        ("postgresql:///runs", "psnc", {"dbname": "runs"}),
        ("postgres://ada@host/runs", "psnc", {"user": "ada", "host": "host", "dbname": "runs"}),
        ("postgresql:///runs?schema=mine", "mine", {"dbname": "runs"}),
        (
            "postgresql://h:1,i:2/runs?a_=1".replace("a_=1", "schema=Mine_2&sslmode=require"),
            "Mine_2",
            {"host": "h,i", "port": "1,2", "dbname": "runs", "sslmode": "require"},
        ),
        (
            "postgresql://ada:p%40ss%2Fword@host/runs?options=-c%20geqo%3Doff&schema=m",
            "m",
            {
                "user": "ada",
                "password": "p@ss/word",
                "host": "host",
                "dbname": "runs",
                "options": "-c geqo=off",
            },
        ),
    ],
)
def test_a_url_is_libpqs_and_names_a_schema(
    url: str, schema: str, parameters: dict[str, str]
) -> None:
    place = parse_url(url)
    assert (place.schema, place.parameters) == (schema, parameters)


@pytest.mark.parametrize(
    "schema", ["", "two words", "1st", "a-b", "pg_catalog", "information_schema", "x" * 64, 'a"b']
)
def test_a_schema_that_cannot_be_one_is_refused(schema: str) -> None:
    with pytest.raises(StoreError, match="is no name for a schema"):
        parse_url(f"postgresql:///runs?schema={schema}")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ada:sec%ret@host/runs",
        "postgresql://ada:sec@ret@host/runs",
        "postgresql://ada:sec/ret@host/runs",
        "postgresql://ada:sec%2Fret@host:port/runs",
        "postgresql://ada:secret@host/runs?no_such_option=1",
    ],
)
def test_a_url_that_cannot_be_read_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(
        StoreError, match=r"ada:\*\*\*@.* cannot be read as postgresql://"
    ) as caught:
        parse_url(url)
    assert "sec" not in str(caught.value)
    assert "ret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert "\n" not in str(caught.value)


def test_the_password_does_not_show_where_the_place_is_printed() -> None:
    place = parse_url("postgresql://ada:secret@host/runs")
    assert "secret" not in repr(place)
    assert place.shown == "postgresql://ada:***@host/runs"
