"""Record to a file of JSON lines, for URLs such as ``lines:///data/run.jsonl``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psnc
from psnc import Counts, IndexRecord, IndexRow, Run, RunRow, StageTotal, WorkerInfo, hookimpl


class LineStore(psnc.CheckpointStore):
    """Adds a line for each index, from any number of processes; holds one run."""

    def __init__(self, path: Path, create: bool) -> None:
        if not create and not path.exists():
            raise psnc.StoreError(f"{path} does not exist: check the path")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.path = path

    def attach(self, run: Run) -> None:
        if not self.runs():
            header = [run.config_hash, run.pipeline.config_json, "", run.run_dir, run.total_indices]
            self._add({"run": [1, *header], "written_by": os.getpid()})

    def select(self, run_id: int) -> None: ...

    def runs(self) -> list[RunRow]:
        return [RunRow(*line["run"]) for line in self._lines() if "run" in line]

    def lookup(self, index: int) -> tuple[str, ...] | None:
        row = self._rows().get(index, {})
        return tuple(row["paths"]) if row.get("status") == "completed" else None

    def index_started(self, worker: WorkerInfo, index: int) -> None: ...

    def worker_idle(self, worker: WorkerInfo) -> None: ...

    def record(self, record: IndexRecord) -> None:
        row = {"index": record.index, "status": record.status, "paths": record.output_paths}
        self._add({**row, "error": record.error, "written_by": os.getpid()})

    def flush(self) -> None: ...

    def reset(self) -> None:
        for index in self._rows():
            self.reset_index(index)

    def reset_index(self, index: int) -> None:
        self._add({"index": index, "status": "forgotten"})

    def close(self) -> None: ...

    def completed_outputs(self) -> dict[int, list[str]]:
        return {i: row["paths"] for i, row in self._rows().items() if row["status"] == "completed"}

    def completed_indices(self) -> set[int]:
        return set(self.completed_outputs())

    def failed_indices(self) -> dict[int, str]:
        return {i: row["error"] for i, row in self._rows().items() if row["status"] == "error"}

    def counts(self, total: int) -> Counts:
        return Counts(len(self.completed_indices()), len(self.failed_indices()), 0, 0, 0.0)

    def workers(self) -> list[dict[str, Any]]:
        return []

    def index_for_path(self, path: str) -> int | None:
        return next((i for i, paths in self.completed_outputs().items() if path in paths), None)

    def output_paths(self, index: int) -> list[str]:
        return self.completed_outputs().get(index, [])

    def artifacts(self, index: int | None = None) -> dict[int, list[Mapping[str, Any]]]:
        return {}

    def logs(self, index: int | None = None) -> list[dict[str, Any]]:
        return []

    def index_rows(self) -> Iterator[IndexRow]:
        return iter(())

    def stage_rows(self) -> Iterator[tuple[int, int, str, int]]:
        return iter(())

    def stage_totals(self) -> list[StageTotal]:
        return []

    def _add(self, line: dict[str, Any]) -> None:
        # One short write in append mode: whole lines, from any number of processes.
        with self.path.open("a") as file:
            file.write(f"{json.dumps(line)}\n")

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def _rows(self) -> dict[int, dict[str, Any]]:
        return {line["index"]: line for line in self._lines() if "index" in line}


@hookimpl
def psnc_open_store(url: str, create: bool) -> LineStore | None:
    scheme, _, path = url.partition("://")
    return LineStore(Path(path), create) if scheme == "lines" else None
