"""Times and memory as they are recorded and reported."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from stages_for_tests import Discard, Double, FailOn, Numbers, Sum, numbers_pipeline

from psnc import Filter, Pipeline, PipelineMetrics, run_pipeline


class Allocate(Filter[int, int]):
    """Holds an array of so many bytes while each item passes."""

    def __init__(self, size: int, on: int) -> None:
        self.size = size
        self.on = on

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            held = bytearray(self.size if item == self.on else 1)
            held[::4096] = b"x" * len(held[::4096])
            yield item
            del held


class Slow(Filter[int, int]):
    """Sleeps at each item."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            time.sleep(self.seconds)
            yield item


@pytest.fixture
def pipeline() -> Pipeline[int]:
    """Three of five indices, one of them failed."""
    pipeline = Pipeline(source=Numbers(5), filters=[Double(), FailOn([2])], sink=Discard())
    run_pipeline(pipeline, indices=[0, 1, 3])
    return pipeline


# --- what is measured -------------------------------------------------------------------------


def test_a_stages_time_is_its_own_and_they_add_up_to_at_most_the_indexs() -> None:
    pipeline = Pipeline(
        source=Numbers(1, items=4), filters=[Double(), Slow(0.01), Double()], sink=Discard()
    )
    pipeline[0]
    (index,) = pipeline.metrics.indices
    own = [stage.wall_time_ns for stage in index.stages]
    assert [stage.stage_order for stage in index.stages] == [0, 1, 2, 3, 4]
    assert own[2] >= 4 * 10_000_000
    assert sum(own) <= index.wall_time_ns


def test_each_index_has_its_own_peak_memory() -> None:
    size = 200 * 2**20
    pipeline = Pipeline(source=Numbers(3), filters=[Allocate(size, on=1)], sink=Discard())
    run_pipeline(pipeline)
    before, during, after = (index.peak_memory_bytes for index in pipeline.metrics.indices)
    assert before is not None
    assert during is not None
    assert after is not None
    assert during - before > 0.9 * size
    assert during - after > 0.9 * size


def test_pythons_own_allocations_can_be_measured_instead() -> None:
    import tracemalloc

    size = 20 * 2**20
    pipeline = Pipeline(
        source=Numbers(2), filters=[Allocate(size, on=1)], sink=Discard(), track_memory="python"
    )
    try:
        run_pipeline(pipeline)
    finally:
        tracemalloc.stop()
    small, large = (index.peak_memory_bytes for index in pipeline.metrics.indices)
    assert small is not None
    assert large is not None
    assert large - small > 0.9 * size
    assert small < size


def test_memory_is_null_where_it_is_not_tracked(query: Any) -> None:
    pipeline = numbers_pipeline(2, track_memory=False)
    pipeline[0]
    assert pipeline.metrics.indices[0].peak_memory_bytes is None
    assert query(pipeline.db_path, "SELECT peak_memory_bytes FROM index_results") == [(None,)]


def test_gpu_memory_is_null_where_it_is_not_tracked(query: Any) -> None:
    pipeline = numbers_pipeline(2, track_gpu=False)
    pipeline[0]
    assert pipeline.metrics.indices[0].gpu_memory_bytes is None


# --- what is reported -------------------------------------------------------------------------


def test_metrics_list_every_recorded_index_with_its_stages(pipeline: Pipeline[int]) -> None:
    metrics = pipeline.metrics
    assert isinstance(metrics, PipelineMetrics)
    rows = [(each.index, each.status, each.error) for each in metrics]
    assert rows == [
        (0, "completed", None),
        (1, "error", "RuntimeError: bad item 2"),
        (3, "completed", None),
    ]
    names = [[stage.stage_name for stage in each.stages] for each in metrics]
    assert names == [["Numbers", "Double", "FailOn", "Discard"]] * 3
    assert metrics.indices == list(metrics)


def test_stage_totals_are_sums_over_the_completed_indices(pipeline: Pipeline[int]) -> None:
    metrics = pipeline.metrics
    completed = [each for each in metrics if each.status == "completed"]
    assert [stage.name for stage in metrics.stages] == ["Numbers", "Double", "FailOn", "Discard"]
    for stage in metrics.stages:
        times = [each.stages[stage.order].wall_time_ns for each in completed]
        assert stage.count == 2
        assert (stage.wall_time_ns, stage.max_wall_time_ns) == (sum(times), max(times))


def test_the_metrics_summary_extends_the_pipelines_summary(pipeline: Pipeline[int]) -> None:
    summary = pipeline.metrics.summary()
    own = pipeline.summary()
    assert {key: summary[key] for key in own} == own
    assert summary.keys() - own.keys() == {
        "max_peak_memory_bytes",
        "max_gpu_memory_bytes",
        "stages",
    }
    peaks = [each.peak_memory_bytes for each in pipeline.metrics]
    assert summary["max_peak_memory_bytes"] == max(peak for peak in peaks if peak is not None)
    assert summary["stages"] == [attrs.asdict(stage) for stage in pipeline.metrics.stages]


def test_to_json_writes_the_summary_and_every_index(
    pipeline: Pipeline[int], tmp_path: Path
) -> None:
    pipeline.metrics.to_json(tmp_path / "metrics.json")
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["summary"] == pipeline.metrics.summary()
    assert content["indices"] == [
        json.loads(json.dumps(attrs.asdict(each))) for each in pipeline.metrics
    ]


def test_to_csv_writes_one_line_an_index_and_one_column_a_stage(
    pipeline: Pipeline[int], tmp_path: Path
) -> None:
    pipeline.metrics.to_csv(str(tmp_path / "metrics.csv"))
    with (tmp_path / "metrics.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["index"] for line in lines] == ["0", "1", "3"]
    assert [line["error"] for line in lines] == ["", "RuntimeError: bad item 2", ""]
    for line, each in zip(lines, pipeline.metrics, strict=True):
        assert line["wall_time_ns"] == str(each.wall_time_ns)
        for stage in each.stages:
            column = f"{stage.stage_order}_{stage.stage_name}_wall_time_ns"
            assert line[column] == str(stage.wall_time_ns)


def test_to_csv_has_the_stages_columns_though_every_index_failed(tmp_path: Path) -> None:
    pipeline = Pipeline(source=Numbers(2), filters=[FailOn([0, 1])], sink=Discard())
    run_pipeline(pipeline)
    pipeline.metrics.to_csv(tmp_path / "metrics.csv")
    with (tmp_path / "metrics.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2
    assert int(lines[0]["1_FailOn_wall_time_ns"]) > 0


def test_to_console_prints_the_figures_and_every_stage(
    pipeline: Pipeline[int], capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.metrics.to_console()
    printed = capsys.readouterr().out
    assert "2 of 5 completed, 1 failed" in printed
    assert "MiB" in printed
    for name in ("0 Numbers", "1 Double", "2 FailOn", "3 Discard"):
        assert name in printed


def test_everything_can_be_asked_before_anything_ran(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = numbers_pipeline(3).metrics
    assert metrics.indices == []
    assert metrics.stages == []
    assert metrics.summary()["max_peak_memory_bytes"] is None
    metrics.to_console()
    assert "0 of 3 completed" in capsys.readouterr().out
    metrics.to_json(tmp_path / "metrics.json")
    assert json.loads((tmp_path / "metrics.json").read_text())["indices"] == []
    metrics.to_csv(tmp_path / "metrics.csv")
    assert (tmp_path / "metrics.csv").read_text().startswith("index,status,completed_at,")


def test_flushing_a_stateful_filter_counts_as_its_time() -> None:
    class SlowToFlush(Sum):
        def flush(self, path: Path) -> None:
            time.sleep(0.02)
            super().flush(path)

    pipeline = Pipeline(source=Numbers(1), filters=[SlowToFlush()], sink=Discard())
    pipeline[0]
    (index,) = pipeline.metrics.indices
    assert index.stages[1].wall_time_ns >= 20_000_000
    assert index.wall_time_ns >= sum(stage.wall_time_ns for stage in index.stages)
