"""The rules that psnc has for every store."""

from __future__ import annotations

from psnc.testing import StoreSuite


class TestPostgresStore(StoreSuite):
    """One URL is the place of many runs."""
