from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis
import pytest
from data import write_dataset
from hypothesis.configuration import set_hypothesis_home_dir

# The same examples in every run, however busy the machine is, and no directory of them here.
hypothesis.settings.register_profile(
    "psnc-atm",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("psnc-atm")
set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "psnc-atm-hypothesis")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files of 40 molecules; for tests that only read."""
    return write_dataset(tmp_path_factory.mktemp("input") / "molecules", files=5, rows=40)


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSNC_CACHE_DIR", str(tmp_path / "cache"))
