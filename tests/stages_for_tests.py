"""Small stages that tests build pipelines of; importable by worker processes and scripts."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from psnc import Filter, Pipeline, Sink, Source, atomic_write

TESTS_PATH = Path(__file__).parent

# For ``PYTHONPATH`` of programs that use this module.
TESTS_FIRST = os.pathsep.join(filter(None, [str(TESTS_PATH), os.environ.get("PYTHONPATH")]))


class Numbers(Source[int]):
    """Index ``i`` yields ``i`` once, or ``items`` times."""

    def __init__(self, count: int, items: int = 1) -> None:
        self.count = count
        self.items = items

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Iterator[int]:
        for _ in range(self.items):
            yield index


class Journal(Source[int]):
    """Like `Numbers`, and appends each index that it really runs to a file."""

    def __init__(self, count: int, journal: str) -> None:
        self.count = count
        self.journal = journal

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Iterator[int]:
        # One write of one short line in append mode: whole lines, from any number of processes.
        with open(self.journal, "a", encoding="utf-8") as file:
            file.write(f"{index}\n")
        yield index


class Pairs(Numbers):
    """Wants each even index in one worker with the odd one after it."""

    def partition_indices(self, indices: Sequence[int]) -> Sequence[Sequence[int]] | None:
        return grouped(indices, 2)


class Double(Filter[int, int]):
    """Doubles."""

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        return (2 * item for item in items)


class Add(Filter[int, int]):
    """Adds."""

    def __init__(self, amount: int = 1) -> None:
        self.amount = amount

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            yield item + self.amount


class FailOn(Filter[int, int]):
    """Raises ``RuntimeError: bad item N`` for some items, as long as no file ``mended`` exists."""

    def __init__(self, bad: Sequence[int], mended: str | None = None) -> None:
        self.bad = set(bad)
        self.mended = mended

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item in self.bad and not (self.mended and os.path.exists(self.mended)):
                raise RuntimeError(f"bad item {item}")
            yield item


class WaitFor(Filter[int, int]):
    """Announces each item as a file ``reached-N`` and waits for a file ``go`` beside it."""

    def __init__(self, directory: str, on: Sequence[int] | None = None) -> None:
        self.directory = directory
        self.on = on

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if self.on is None or item in self.on:
                Path(self.directory, f"reached-{item}").touch()
                wait_until(Path(self.directory, "go").exists)
            yield item


class Log(Filter[int, int]):
    """Logs each item with the logger ``tests.stages``."""

    def __init__(self, level: int = logging.INFO) -> None:
        self.level = level

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            logging.getLogger("tests.stages").log(self.level, "item %d", item)
            yield item


class Die(Filter[int, int]):
    """Ends its process without a word for some items: ``os._exit``, or a signal."""

    def __init__(self, bad: Sequence[int], exit_code: int = 7, signal: int | None = None) -> None:
        self.bad = set(bad)
        self.exit_code = exit_code
        self.signal = signal

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if item in self.bad:
                if self.signal is not None:
                    os.kill(os.getpid(), self.signal)
                os._exit(self.exit_code)
            yield item


class Sum(Filter[int, int]):
    """Stateful: counts and sums the items; its shards are JSON."""

    artifact_suffix = ".json"

    def __init__(self) -> None:
        self.count = 0
        self.total = 0

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            self.count += 1
            self.total += item
            yield item

    def flush(self, path: Path) -> None:
        path.write_text(json.dumps({"count": self.count, "total": self.total}))

    def merge(self, shards: Sequence[Path], output: Path) -> None:
        parts = [json.loads(shard.read_text()) for shard in shards]
        merged = {key: sum(part[key] for part in parts) for key in ("count", "total")}
        output.write_text(json.dumps(merged))


class WriteText(Sink[Any]):
    """Writes the items of index ``i`` to ``{output_dir}/{i}.txt``, one a line."""

    def __init__(self, output_dir: str) -> None:
        self.output_dir = output_dir

    def __call__(self, items: Iterator[Any], index: int) -> list[str]:
        path = f"{self.output_dir}/{index}.txt"
        with atomic_write(path, "w") as file:
            file.writelines(f"{item}\n" for item in items)
        return [path]


class Discard(Sink[Any]):
    """Consumes the items, writes nothing, and names ``files`` paths of its own making."""

    def __init__(self, files: int = 1) -> None:
        self.files = files

    def __call__(self, items: Iterator[Any], index: int) -> list[str]:
        for _ in items:
            pass
        return [f"out/{index}-{number}.bin" for number in range(self.files)]


class GroupedDiscard(Discard):
    """Wants the indices together in blocks of ``size``."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.size = size

    def partition_indices(self, indices: Sequence[int]) -> Sequence[Sequence[int]] | None:
        return grouped(indices, self.size)


def grouped(indices: Sequence[int], size: int) -> list[list[int]]:
    """Group indices by blocks of ``size``."""
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(index // size, []).append(index)
    return list(groups.values())


def wait_until(condition: Any, timeout_s: float = 30.0) -> None:
    """Return once ``condition()`` holds; raise ``TimeoutError`` if it never does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} did not come true in {timeout_s} s")
        time.sleep(0.005)


def read_journal(path: str | os.PathLike[str]) -> list[int]:
    """Return the indices that a `Journal` really ran, in order; empty if none did."""
    try:
        return [int(line) for line in Path(path).read_text(encoding="utf-8").split()]
    except FileNotFoundError:
        return []


def numbers_pipeline(count: int = 4, **fields: Any) -> Pipeline[int]:
    """Return a three-stage pipeline that touches no file but its database."""
    return Pipeline(source=Numbers(count), filters=[Double()], sink=Discard(), **fields)


class Held(Filter[int, int]):
    """Waits for a file ``go``, but only in processes that were started with ``HELD`` set."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            if os.environ.get("HELD"):
                Path(self.directory, f"reached-{item}").touch()
                wait_until(Path(self.directory, "go").exists, timeout_s=600)
            yield item


def held_pipeline(directory: str | os.PathLike[str], count: int = 10) -> Pipeline[int]:
    """Return a pipeline that is recorded in one database, whoever makes it."""
    place = Path(directory)
    return Pipeline(
        source=Journal(count, str(place / "journal.txt")),
        filters=[Held(str(place))],
        sink=Discard(),
        db_file=place / "shared.db",
    )


def again(pipeline: Pipeline[Any]) -> Pipeline[Any]:
    """Return the same pipeline as another program has it."""
    return Pipeline(pipeline.source, pipeline.filters, pipeline.sink, db_file=pipeline.db_path)
