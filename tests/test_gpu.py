"""GPU memory: recorded where there is a GPU, and without a word where there is none."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pynvml
import pytest
from drivers import BACKENDS, jobs
from stages_for_tests import numbers_pipeline

from psnc import run_pipeline

Query = Callable[..., Any]


def _gpus() -> int:
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0


without_gpu = pytest.mark.skipif(_gpus() > 0, reason="this machine has a GPU")


def _gpu_memory(pipeline: Any, query: Query) -> list[int | None]:
    return [
        value for (value,) in query(pipeline.db_path, "SELECT gpu_memory_bytes FROM index_results")
    ]


@without_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_gpu_nothing_is_recorded_and_nothing_said(
    backend: str, query: Query, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline = numbers_pipeline(4)
    # Not from a fork server, which may hold the standard error of an earlier test.
    options = {"start_method": "spawn"} if backend == "process_pool" else {}
    run_pipeline(pipeline, jobs(backend), backend, **options)
    assert _gpu_memory(pipeline, query) == [None] * 4
    assert query(pipeline.db_path, "SELECT * FROM logs") == []
    assert capfd.readouterr() == ("", "")


def test_gpu_memory_that_is_not_tracked_is_null(query: Query) -> None:
    pipeline = numbers_pipeline(2, track_gpu=False)
    run_pipeline(pipeline)
    assert _gpu_memory(pipeline, query) == [None] * 2


def test_a_run_that_does_not_track_the_gpu_does_not_load_its_library(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    program = (
        "import sys\n"
        "from psnc import run_pipeline\n"
        "from stages_for_tests import numbers_pipeline\n"
        "run_pipeline(numbers_pipeline(2, track_gpu=False))\n"
        "print('pynvml' in sys.modules)\n"
    )
    assert run_python("-c", program).stdout == "False\n"
