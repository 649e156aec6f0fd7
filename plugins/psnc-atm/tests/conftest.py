from __future__ import annotations

from pathlib import Path

import pytest
from data import write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files of 40 molecules; for tests that only read."""
    return write_dataset(tmp_path_factory.mktemp("input") / "molecules", files=5, rows=40)


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSNC_CACHE_DIR", str(tmp_path / "cache"))
