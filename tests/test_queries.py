"""What one can ask a pipeline about its runs, and how to make it forget."""

from __future__ import annotations

import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stages_for_tests import (
    Add,
    Discard,
    Double,
    FailOn,
    Journal,
    Log,
    Numbers,
    Sum,
    WriteText,
    numbers_pipeline,
    read_journal,
)

from psnc import IndexRangeError, Pipeline, PipelineError, Sink, run_pipeline


class SharedFile(Sink[Any]):
    """Every index writes a part of the same file, and one of its own."""

    def __call__(self, items: Iterator[Any], index: int) -> list[str]:
        list(items)
        return ["all.bin", f"part-{index}.bin", "all.bin"]


def half_done() -> Pipeline[int]:
    """Return a pipeline of 6 indices: 0 and 2 completed, 1 failed."""
    pipeline = Pipeline(source=Numbers(6), filters=[FailOn([1, 3])], sink=Discard(files=2))
    run_pipeline(pipeline, indices=[0, 1, 2])
    return pipeline


# --- how far ----------------------------------------------------------------------------------


def test_nothing_is_done_before_anything_ran() -> None:
    pipeline = numbers_pipeline(3)
    assert pipeline.completed_indices == set()
    assert pipeline.failed_indices == {}
    assert pipeline.remaining_indices() == [0, 1, 2]
    assert pipeline.active_workers == []
    assert pipeline.all_filter_artifacts() == {}
    assert pipeline.index_for_path("out/0-0.bin") is None
    summary = pipeline.summary()
    assert (summary["total"], summary["remaining"]) == (3, 3)
    assert (summary["completed"], summary["failed"], summary["workers"]) == (0, 0, 0)
    assert (summary["avg_time_ms"], summary["total_elapsed_s"]) == (0.0, 0.0)


def test_completed_failed_and_remaining_are_told_apart() -> None:
    pipeline = half_done()
    assert pipeline.completed_indices == {0, 2}
    assert pipeline.failed_indices == {1: "RuntimeError: bad item 1"}
    assert pipeline.remaining_indices() == [3, 4, 5]


def test_failed_indices_come_sorted() -> None:
    pipeline = Pipeline(source=Numbers(5), filters=[FailOn(range(5))], sink=Discard())
    run_pipeline(pipeline, indices=[4, 0, 3])
    assert list(pipeline.failed_indices) == [0, 3, 4]


SUMMARY_KEYS = [
    "total",
    "completed",
    "failed",
    "remaining",
    "errors",
    "avg_time_ms",
    "total_elapsed_s",
    "workers",
    "config_hash",
    "db_path",
]


def test_the_summary_has_its_documented_keys_and_counts() -> None:
    pipeline = half_done()
    summary = pipeline.summary()
    assert list(summary) == SUMMARY_KEYS
    counts = {key: summary[key] for key in SUMMARY_KEYS[:5]}
    assert counts == {"total": 6, "completed": 2, "failed": 1, "remaining": 3, "errors": 1}
    assert summary["workers"] == 1
    assert summary["config_hash"] == pipeline.config_hash
    assert summary["db_path"] == str(pipeline.db_path)
    assert json.loads(json.dumps(summary)) == summary


def test_the_summarys_times_follow_from_the_tables(query: Any) -> None:
    pipeline = half_done()
    summary = pipeline.summary()
    times = query(
        pipeline.db_path, "SELECT wall_time_ns FROM index_results WHERE status = 'completed'"
    )
    mean_ms = sum(row[0] for row in times) / len(times) / 1e6
    assert summary["avg_time_ms"] == pytest.approx(mean_ms, abs=5e-4)
    ((started, last),) = query(pipeline.db_path, "SELECT started_at, last_heartbeat FROM workers")
    span = datetime.fromisoformat(last) - datetime.fromisoformat(started)
    assert summary["total_elapsed_s"] == pytest.approx(span.total_seconds(), abs=5e-4)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    total=st.integers(0, 12),
    chosen=st.lists(st.integers(0, 11), max_size=12),
    bad=st.sets(st.integers(0, 11), max_size=5),
)
def test_the_counts_and_the_lists_always_agree(
    total: int, chosen: list[int], bad: set[int]
) -> None:
    pipeline = Pipeline(source=Numbers(total), filters=[FailOn(sorted(bad))], sink=Discard())
    run_pipeline(pipeline, indices=[index for index in chosen if index < total])
    summary = pipeline.summary()
    assert summary["remaining"] == len(pipeline.remaining_indices())
    assert summary["completed"] == len(pipeline.completed_indices)
    assert summary["failed"] == summary["errors"] == len(pipeline.failed_indices)
    every = {*pipeline.remaining_indices(), *pipeline.completed_indices, *pipeline.failed_indices}
    assert every == set(range(total))
    assert total == summary["remaining"] + summary["completed"] + summary["failed"]


def test_questions_see_an_index_as_soon_as_it_is_done() -> None:
    pipeline = numbers_pipeline(50)
    for index in range(50):
        pipeline[index]
        assert index in pipeline.completed_indices


def test_a_second_pipeline_on_the_database_sees_an_index_as_soon_as_it_is_done() -> None:
    one, other = numbers_pipeline(6, resume=True), numbers_pipeline(6, resume=True)
    for index in range(6):
        one[index]
        assert other.completed_indices == set(range(index + 1))


# --- paths ------------------------------------------------------------------------------------


def test_paths_lead_to_their_index_and_back() -> None:
    pipeline = half_done()
    assert pipeline.output_paths_for_index(2) == ["out/2-0.bin", "out/2-1.bin"]
    assert pipeline.index_for_path("out/2-1.bin") == 2
    assert pipeline.index_for_path(Path("out") / "0-0.bin") == 0


def test_unknown_paths_and_indices_without_outputs_lead_nowhere() -> None:
    pipeline = half_done()
    assert pipeline.index_for_path("nowhere") is None
    assert pipeline.output_paths_for_index(1) == []
    assert pipeline.output_paths_for_index(5) == []


def test_a_file_of_many_indices_leads_to_the_lowest_and_order_is_kept() -> None:
    pipeline = Pipeline(source=Numbers(4), sink=SharedFile())
    pipeline[3], pipeline[1], pipeline[2]
    assert pipeline.index_for_path("all.bin") == 1
    assert pipeline.output_paths_for_index(2) == ["all.bin", "part-2.bin", "all.bin"]


@pytest.mark.parametrize("index", [np.int64(2), -4])
def test_questions_take_an_index_as_running_it_does(index: int) -> None:
    pipeline = Pipeline(source=Numbers(6), filters=[Sum()], sink=Discard())
    assert pipeline[index] == ["out/2-0.bin"]
    assert pipeline.output_paths_for_index(index) == ["out/2-0.bin"]
    assert len(pipeline.filter_artifacts_for_index(index)) == 1
    pipeline.reset_index(index)
    assert pipeline.completed_indices == set()


class NotText(Discard):
    """Names a file whose name is no UTF-8, as a directory listing may give it."""

    def __call__(self, items: Iterator[Any], index: int) -> list[str]:
        list(items)
        return [os.fsdecode(b"out/\xff%d" % index)]


def test_a_file_name_that_is_no_utf8_is_recorded_like_any_other() -> None:
    pipeline = Pipeline(source=Numbers(2), sink=NotText())
    path = os.fsdecode(b"out/\xff1")
    assert pipeline[1] == [path]
    assert pipeline.completed_indices == {1}
    assert pipeline[1] == [path]
    assert pipeline.output_paths_for_index(1) == [path]
    assert pipeline.index_for_path(path) == 1


# --- artifacts --------------------------------------------------------------------------------


def summing() -> Pipeline[int]:
    return Pipeline(
        source=Numbers(4, items=3), filters=[Double(), Sum(), Add(1), Sum()], sink=Discard()
    )


def test_a_stateful_filter_leaves_one_artifact_an_index() -> None:
    pipeline = summing()
    pipeline[1], pipeline[3]
    artifacts = pipeline.filter_artifacts_for_index(3)
    assert [(each["filter_name"], each["filter_order"]) for each in artifacts] == [
        ("Sum", 2),
        ("Sum", 4),
    ]
    shards = [json.loads(Path(each["path"]).read_text()) for each in artifacts]
    assert shards == [{"count": 3, "total": 18}, {"count": 3, "total": 21}]
    everything = pipeline.all_filter_artifacts()
    assert sorted(everything) == [1, 3]
    assert everything[3] == artifacts
    paths = {each["path"] for rows in everything.values() for each in rows}
    assert len(paths) == 4


def test_a_failed_index_leaves_no_artifact_on_record() -> None:
    pipeline = Pipeline(source=Numbers(2), filters=[Sum(), FailOn([1])], sink=Discard())
    run_pipeline(pipeline)
    assert sorted(pipeline.all_filter_artifacts()) == [0]
    assert pipeline.filter_artifacts_for_index(1) == []


def test_one_index_leaves_nothing_in_the_state_of_the_next() -> None:
    pipeline = Pipeline(source=Numbers(3, items=2), filters=[Sum()], sink=Discard())
    run_pipeline(pipeline)
    counts = [
        json.loads(Path(rows[0]["path"]).read_text())["count"]
        for rows in pipeline.all_filter_artifacts().values()
    ]
    assert counts == [2, 2, 2]


def test_filters_without_state_leave_no_artifacts() -> None:
    pipeline = numbers_pipeline()
    pipeline[0]
    assert pipeline.all_filter_artifacts() == {}


# --- workers ----------------------------------------------------------------------------------

WORKER_COLUMNS = [
    "worker_id",
    "run_id",
    "pid",
    "hostname",
    "started_at",
    "last_heartbeat",
    "current_index",
    "completed_count",
    "invocation_id",
]


def test_a_worker_is_described_by_its_documented_columns() -> None:
    pipeline = half_done()
    (worker,) = pipeline.active_workers
    assert list(worker) == WORKER_COLUMNS
    assert uuid.UUID(worker["worker_id"]).version == 4
    assert worker["worker_id"] == uuid.UUID(worker["worker_id"]).hex
    assert (worker["pid"], worker["hostname"]) == (os.getpid(), socket.gethostname())
    assert (worker["current_index"], worker["completed_count"]) == (None, 2)
    started, last = (datetime.fromisoformat(worker[key]) for key in WORKER_COLUMNS[4:6])
    assert started.tzinfo is not None
    assert started <= last


@pytest.mark.parametrize("backend", ["thread_pool", "process_pool"])
def test_the_workers_of_one_call_share_an_invocation_and_their_counts_add_up(backend: str) -> None:
    pipeline = Pipeline(source=Numbers(20), filters=[FailOn([7])], sink=Discard(), resume=True)
    run_pipeline(pipeline, n_jobs=2, backend=backend)
    workers = pipeline.active_workers
    assert 1 <= len(workers) <= 2
    assert len({worker["invocation_id"] for worker in workers}) == 1
    assert sum(worker["completed_count"] for worker in workers) == 19
    assert all(worker["current_index"] is None for worker in workers)
    if backend == "process_pool":
        assert os.getpid() not in {worker["pid"] for worker in workers}
    again = Pipeline(source=Numbers(20), filters=[FailOn([7])], sink=Discard(), resume=True)
    run_pipeline(again, n_jobs=2, backend=backend)
    assert len({worker["invocation_id"] for worker in again.active_workers}) == 2


# --- forgetting -------------------------------------------------------------------------------

RUN_TABLES = [
    "index_results",
    "stage_metrics",
    "output_files",
    "filter_artifacts",
    "logs",
    "workers",
]


def noisy(journal: str) -> Pipeline[int]:
    return Pipeline(
        source=Journal(4, journal),
        filters=[Log(logging.WARNING), Sum(), FailOn([2])],
        sink=Discard(),
        resume=True,
    )


def rows_of(query: Any, pipeline: Pipeline[Any], table: str, where: str = "1") -> int:
    ((count,),) = query(pipeline.db_path, f"SELECT count(*) FROM {table} WHERE {where}")
    return int(count)


def test_reset_forgets_everything_of_the_run(journal: str, query: Any) -> None:
    pipeline = noisy(journal)
    run_pipeline(pipeline)
    assert [table for table in RUN_TABLES if not rows_of(query, pipeline, table)] == []
    pipeline.reset()
    assert [table for table in RUN_TABLES if rows_of(query, pipeline, table)] == []
    assert pipeline.remaining_indices() == [0, 1, 2, 3]
    run_pipeline(pipeline)
    assert read_journal(journal) == [0, 1, 2, 3, 0, 1, 2, 3]


def test_reset_starts_the_workers_count_afresh() -> None:
    pipeline = numbers_pipeline(4)
    pipeline[0], pipeline[1]
    pipeline.reset()
    pipeline[2]
    assert [worker["completed_count"] for worker in pipeline.active_workers] == [1]


def test_reset_index_forgets_one_index_and_nothing_else(journal: str, query: Any) -> None:
    pipeline = noisy(journal)
    run_pipeline(pipeline)
    pipeline.reset_index(1)
    for table in RUN_TABLES[:-1]:
        assert rows_of(query, pipeline, table, "idx = 1") == 0
        assert rows_of(query, pipeline, table, "idx = 0") > 0
    assert rows_of(query, pipeline, "workers") == 1
    assert pipeline.completed_indices == {0, 3}
    assert pipeline[1] == ["out/1-0.bin"]
    assert read_journal(journal) == [0, 1, 2, 3, 1]


def test_reset_index_forgets_a_failure(journal: str) -> None:
    pipeline = noisy(journal)
    run_pipeline(pipeline)
    pipeline.reset_index(2)
    assert pipeline.failed_indices == {}
    assert pipeline.remaining_indices() == [2]


def test_forgetting_what_never_ran_does_no_harm() -> None:
    pipeline = numbers_pipeline(3)
    pipeline.reset()
    pipeline.reset_index(0)
    assert pipeline.remaining_indices() == [0, 1, 2]


def test_reset_index_refuses_what_is_no_index() -> None:
    pipeline = numbers_pipeline(3)
    with pytest.raises(IndexRangeError):
        pipeline.reset_index(3)
    with pytest.raises(PipelineError):
        pipeline.reset_index("0")  # type: ignore[arg-type]


def test_a_second_attempt_replaces_the_first_and_adds_to_its_log(
    tmp_path: Path, query: Any
) -> None:
    mended = str(tmp_path / "mended")
    pipeline = Pipeline(
        source=Numbers(2),
        filters=[Log(logging.WARNING), FailOn([1], mended)],
        sink=WriteText("out"),
    )
    run_pipeline(pipeline)
    Path(mended).touch()
    run_pipeline(pipeline)
    for table, expected in (("index_results", 1), ("stage_metrics", 4), ("output_files", 1)):
        assert rows_of(query, pipeline, table, "idx = 1") == expected
    messages = query(pipeline.db_path, "SELECT message FROM logs WHERE idx = 1 ORDER BY id")
    assert [text.split("\n")[0] for (text,) in messages] == [
        "item 1",
        "index 1 failed in FailOn",
        "item 1",
    ]
