"""Small stages, importable by worker processes and scripts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from psnc import Filter, Pipeline, Sink, Source

TESTS = str(Path(__file__).parent)

logger = logging.getLogger("tests")
logger.setLevel(logging.INFO)


class Numbers(Source[int]):
    """Index ``i`` yields ``i``, and is noted in the file ``journal``."""

    def __init__(self, count: int, journal: str) -> None:
        self.count = count
        self.journal = journal

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Iterator[int]:
        with open(self.journal, "a", encoding="utf-8") as file:
            file.write(f"{index}\n")
        yield index


class Log(Filter[int, int]):
    """Logs each number."""

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            logger.info("number %d", item)
            yield item


class WaitFor(Filter[int, int]):
    """Announces a number as a file ``reached`` and waits for a file ``go`` beside it."""

    def __init__(self, directory: str, number: int) -> None:
        self.directory = directory
        self.number = number

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item == self.number:
                Path(self.directory, "reached").touch()
                wait_until(Path(self.directory, "go").exists)
            yield item


class Total(Filter[int, int]):
    """Adds the numbers up."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.total = 0

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            self.total += item
            yield item

    def flush(self, path: Path) -> None:
        path.write_text(str(self.total))

    def merge(self, shards: Sequence[Path], output: Path) -> None:
        output.write_text(" + ".join(shard.read_text() for shard in shards))


class Discard(Sink[Any]):
    """Writes nothing, and names a path."""

    def __call__(self, items: Iterator[Any], index: int) -> list[str]:
        list(items)
        return [f"out/{index}.bin"]


def numbers_pipeline(url: str, count: int, journal: str | os.PathLike[str], **fields: Any) -> Any:
    """Return a pipeline that touches no file but its journal."""
    return Pipeline(Numbers(count, str(journal)), [Log()], Discard(), store=url, **fields)


def numbers_in(journal: Path) -> list[int]:
    """Return the indices that really ran, in order."""
    return [int(line) for line in journal.read_text().split()] if journal.exists() else []


def wait_until(condition: Any, timeout_s: float = 60.0) -> None:
    """Return once ``condition()`` holds; raise ``TimeoutError`` if it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} did not come true in {timeout_s} s")
        time.sleep(0.01)


def waiting_pipeline(url: str, directory: str | os.PathLike[str]) -> Pipeline[int]:
    """Return a pipeline of four indices, the second of which waits for a file ``go``."""
    place = Path(directory)
    source = Numbers(4, str(place / "journal"))
    return Pipeline(source, [WaitFor(str(place), 1)], Discard(), store=url, resume=True)
