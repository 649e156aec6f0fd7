"""A store's URL as people get to see it."""

from __future__ import annotations

import pytest

from psnc.store import shown_url


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
    ],
)
def test_what_has_no_password_is_shown_as_it_is(url: str) -> None:
    assert shown_url(url) == url
