"""The pipeline of the state machine, which a life and the tests' own process both run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from stages_for_tests import Discard, Log, Numbers, Sum

from psnc import Filter, Pipeline

COUNT = 12


class Refuse(Filter[int, int]):
    """Raises an error for the items that a file lists."""

    def __init__(self, listed: str) -> None:
        self.listed = listed

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        bad = json.loads(Path(self.listed).read_text())
        for item in items:
            if item in bad:
                raise ValueError(f"{item} is refused")
            yield item


def error_of(index: int) -> str:
    """Return what is recorded of an index that failed."""
    return f"ValueError: {index} is refused"


def outputs_of(index: int) -> list[str]:
    """Return what is recorded of an index that was completed."""
    return [f"out/{index}-0.bin", f"out/{index}-1.bin"]


def pipeline_at(directory: Path, name: str) -> Pipeline[int]:
    """Return the pipeline with a database in a directory."""
    return Pipeline(
        source=Numbers(COUNT),
        filters=[Log(30), Refuse(str(directory / "bad.json")), Sum()],
        sink=Discard(files=2),
        resume=True,
        db_file=directory / f"{name}.db",
    )
