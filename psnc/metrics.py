"""Timing and memory of a recorded pipeline: by run, by index and by stage."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from typing import Any

import attrs
from attrs import frozen

from psnc.atomic import atomic_write
from psnc.store import CheckpointStore, IndexRow, StageTotal

__all__ = ["IndexMetrics", "PipelineMetrics", "StageMetrics"]


@frozen
class StageMetrics:
    """One stage of one index; its own time, in nanoseconds."""

    stage_order: int
    stage_name: str
    wall_time_ns: int


@frozen
class IndexMetrics:
    """One index; times in nanoseconds, sizes in bytes, ``None`` where nothing was measured.

    ``attempts`` is how often it was tried, in all runs since it was last reset.
    """

    index: int
    status: str
    completed_at: str
    wall_time_ns: int
    peak_memory_bytes: int | None
    gpu_memory_bytes: int | None
    error: str | None
    attempts: int | None
    stages: tuple[StageMetrics, ...]


class PipelineMetrics:
    """What ``pipeline.metrics`` returns; asks the store as it is asked.

    Parameters
    ----------
    store : CheckpointStore
        The store, turned to the run.
    progress : dict
        ``pipeline.summary()``.
    """

    def __init__(self, store: CheckpointStore, progress: dict[str, Any]) -> None:
        self._store = store
        self._progress = progress

    @property
    def stages(self) -> list[StageTotal]:
        """The stages in order, each summed over the completed indices."""
        return list(self._store.stage_totals())

    @property
    def indices(self) -> list[IndexMetrics]:
        """Every recorded index in order."""
        return list(self)

    def __iter__(self) -> Iterator[IndexMetrics]:
        """Yield every recorded index in order."""
        stage_rows = iter(self._store.stage_rows())
        row = next(stage_rows, None)
        for index_row in self._store.index_rows():
            stages = []
            while row is not None and row[0] <= index_row.index:
                if row[0] == index_row.index:
                    stages.append(StageMetrics(*row[1:]))
                row = next(stage_rows, None)
            yield _index_metrics(index_row, stages)

    def summary(self) -> dict[str, Any]:
        """Return the run's figures.

        Returns
        -------
        dict
            ``pipeline.summary()``, ``max_peak_memory_bytes`` and ``max_gpu_memory_bytes`` (``None``
            where nothing was measured), and ``stages``: a list of ``order, name, count,
            wall_time_ns, max_wall_time_ns``, each summed over the completed indices.
        """
        rows = list(self._store.index_rows())
        return {
            **self._progress,
            "max_peak_memory_bytes": _largest(row.peak_memory_bytes for row in rows),
            "max_gpu_memory_bytes": _largest(row.gpu_memory_bytes for row in rows),
            "stages": [attrs.asdict(stage) for stage in self.stages],
        }

    def to_console(self) -> None:
        """Print the run's figures and a table of its stages."""
        from rich.console import Console
        from rich.table import Table

        summary = self.summary()
        console = Console(highlight=False)
        console.print(
            f"{summary['completed']} of {summary['total']} completed, {summary['failed']} failed, "
            f"{summary['avg_time_ms']:.1f} ms an index"
        )
        if summary["max_peak_memory_bytes"] is not None:
            console.print(f"peak memory {summary['max_peak_memory_bytes'] / 2**20:.0f} MiB")
        table = Table("stage", "indices", "total s", "mean ms", "max ms", "share")
        everything = sum(stage.wall_time_ns for stage in self.stages) or 1
        for stage in self.stages:
            table.add_row(
                f"{stage.order} {stage.name}",
                str(stage.count),
                f"{stage.wall_time_ns / 1e9:.2f}",
                f"{stage.wall_time_ns / stage.count / 1e6:.2f}",
                f"{stage.max_wall_time_ns / 1e6:.2f}",
                f"{stage.wall_time_ns / everything:.0%}",
            )
        console.print(table)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write ``{"summary": …, "indices": […]}``."""
        content = {"summary": self.summary(), "indices": [attrs.asdict(each) for each in self]}
        with atomic_write(path, "w") as file:
            file.write(json.dumps(content, indent=1) + "\n")

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one line an index; the stages' times in columns ``{order}_{name}_wall_time_ns``."""
        fields = [field.name for field in attrs.fields(IndexMetrics) if field.name != "stages"]
        stages = {row[1]: f"{row[1]}_{row[2]}_wall_time_ns" for row in self._store.stage_rows()}
        stages = dict(sorted(stages.items()))
        with atomic_write(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*fields, *stages.values()])
            for each in self:
                times = {stage.stage_order: stage.wall_time_ns for stage in each.stages}
                values = [getattr(each, name) for name in fields]
                writer.writerow([*values, *(times.get(order) for order in stages)])


def _index_metrics(row: IndexRow, stages: list[StageMetrics]) -> IndexMetrics:
    return IndexMetrics(**attrs.asdict(row), stages=tuple(stages))


def _largest(values: Iterator[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
