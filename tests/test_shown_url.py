"""A store's URL as people get to see it."""

from __future__ import annotations

import pytest
from stages_for_tests import numbers_pipeline

from psnc import Config, PipelineError
from psnc.cli import main
from psnc.store import shown_url

URL = "postgresql://ada:secret@host/runs"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://ada:secret@host/runs", "postgresql://ada:***@host/runs"),
        ("postgresql://ada:secret@host:5432/runs?a=b", "postgresql://ada:***@host:5432/runs?a=b"),
        ("postgresql://:secret@host/runs", "postgresql://:***@host/runs"),
        ("postgresql://ada:secret@/runs?host=/tmp", "postgresql://ada:***@/runs?host=/tmp"),
        ("postgresql://ada:12345@a:1,b:2/runs", "postgresql://ada:***@a:1,b:2/runs"),
        ("postgresql://host/runs?user=a&password=secret", None),
        ("postgresql://host/runs?user=a&sslpassword=secret&b=c", None),
        ("s3://bucket/runs?session_token=secret&b=c", None),
        # Passwords that should have been escaped.
        ("postgresql://ada:sec/ret@host/runs", "postgresql://ada:***@host/runs"),
        ("postgresql://ada:sec@ret@host/runs", "postgresql://ada:***@host/runs"),
        ("postgresql://ada:sec?ret@host/runs", "postgresql://ada:***@host/runs"),
        ("postgresql://ada:sec#ret@host/runs", "postgresql://ada:***@host/runs"),
        ("postgresql://ada:s:ec:ret@host/runs", "postgresql://ada:***@host/runs"),
        # And users' names.
        ("postgresql://ada@srv:secret@host/runs", "postgresql://ada@srv:***@host/runs"),
        ("postgresql://a#b:secret@host/runs", "postgresql://a#b:***@host/runs"),
    ],
)
def test_a_password_is_masked(url: str, shown: str | None) -> None:
    assert "secret" not in shown_url(url)
    assert "ret" not in shown_url(url)
    assert "***" in shown_url(url)
    assert shown is None or shown_url(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "runs/a.db",
        "/data/a:b@c.db",
        "postgresql:///runs",
        "postgresql://host/runs",
        "postgresql://ada@host:5432/runs",
        "postgresql://host:5432/runs?user=ada@example.org",
        "postgresql://a:1,b:2/runs@home",
        "postgresql://host:/runs?schema=a@b",
        "postgresql://ada@host:5432/runs?user=ada@example.org",
    ],
)
def test_what_has_no_password_is_shown_as_it_is(url: str) -> None:
    assert shown_url(url) == url


def test_neither_a_pipeline_nor_a_configuration_shows_a_password() -> None:
    for holder in (numbers_pipeline(1, store=URL), Config(store=URL)):
        assert "ada:***@host" in repr(holder)
        assert "secret" not in repr(holder)


@pytest.mark.parametrize("field", ["db_file", "db_dir"])
def test_a_url_in_place_of_a_path_is_refused_without_its_password(field: str) -> None:
    with pytest.raises(PipelineError, match=rf"{field}='postgresql://ada:\*\*\*@host/runs' is no"):
        numbers_pipeline(1, **{field: URL})


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", "runs.db", URL),
        ("run", "doubles.py:pipeline", "-j", URL),
        ("stages", URL),
    ],
)
def test_a_misplaced_url_is_quoted_without_its_password(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit):
        main(list(arguments))
    said = capsys.readouterr()
    assert "secret" not in said.out + said.err
    assert "***" in said.err
