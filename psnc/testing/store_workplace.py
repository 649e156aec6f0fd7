"""What the tests of a checkpoint store work with: stages, records, other processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import attrs

from psnc.claims import Claim
from psnc.hookspecs import hookimpl
from psnc.manager import PluginManager
from psnc.pipeline import Pipeline
from psnc.records import ArtifactRecord, IndexRecord, LogRecord, StageRecord, WorkerInfo
from psnc.run import Run, run_of
from psnc.stages import Filter, Sink, Source
from psnc.store import CheckpointStore, open_store

__all__ = [
    "LARGE",
    "SPAWN",
    "FailOn",
    "Log",
    "Numbers",
    "OpenedStores",
    "StoreWorkplace",
    "Sum",
    "TwoPaths",
    "a_claim",
    "a_log",
    "a_worker",
    "completed",
    "contents",
    "failed",
    "fork_among_threads",
    "fork_while_recording",
    "in_another_process",
    "messages",
    "paths_of",
    "record_as_told",
    "run_one_by_one",
    "wait_until",
    "without_id",
]


# --- stages -----------------------------------------------------------------------------------


class Numbers(Source[int]):
    """Index ``i`` yields ``i``, and is noted in a file ``journal``, if there is to be one."""

    def __init__(self, count: int, journal: str | None = None) -> None:
        self.count = count
        self.journal = journal

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Iterator[int]:
        if self.journal is not None:
            # One short line in append mode: whole lines, from any number of processes.
            with open(self.journal, "a", encoding="utf-8") as file:
                file.write(f"{index}\n")
        yield index


class FailOn(Filter[int, int]):
    """Raises ``ValueError: 3 is not wanted`` for some numbers, until a file ``mended`` exists."""

    def __init__(self, unwanted: Sequence[int], mended: str) -> None:
        self.unwanted = unwanted
        self.mended = mended

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        """Let the other numbers pass."""
        for item in items:
            if item in self.unwanted and not os.path.exists(self.mended):
                raise ValueError(f"{item} is not wanted")
            yield item


class Log(Filter[int, int]):
    """Logs each number."""

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        """Let every number pass."""
        for item in items:
            logging.getLogger(__name__).warning("number %d", item)
            yield item


class Sum(Filter[int, int]):
    """Adds up; each index has a file of its own with what it added."""

    artifact_suffix = ".txt"

    def __init__(self) -> None:
        self.total = 0

    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        """Let every number pass."""
        for item in items:
            self.total += item
            yield item

    def flush(self, path: Path) -> None:
        """Write what was added."""
        path.write_text(str(self.total))


class TwoPaths(Sink[int]):
    """Writes nothing, and names two paths for each index."""

    def __call__(self, items: Iterator[int], index: int) -> list[str]:
        """Consume the numbers."""
        list(items)
        return paths_of(index)


def paths_of(index: int) -> list[str]:
    """Return what :class:`TwoPaths` returns; not in the order of the alphabet."""
    return [f"out/{index}/z.bin", f"out/{index}/a.bin"]


# --- records ----------------------------------------------------------------------------------

_INVOCATION = uuid.uuid4().hex


def a_worker(number: int = 0, **fields: Any) -> WorkerInfo:
    """Return a worker; a higher number began later."""
    started_at = f"2024-05-06T07:08:09.{number:06}+00:00"
    known = {"pid": 1000 + number, "hostname": "here", "started_at": started_at}
    return WorkerInfo(
        **{"worker_id": uuid.uuid4().hex, "invocation_id": _INVOCATION, **known, **fields}
    )


def a_claim(invocation_id: str, **fields: Any) -> Claim:
    """Return the claim of a driver that nothing else is known of."""
    known = {"hostname": "there", "pid": 1, "machine": "another", "process_started_at": "17"}
    began = {"started_at": "2024-05-06T07:08:09.000000+00:00", "beat": 0, "indices": "all"}
    return Claim(invocation_id=invocation_id, **{**known, **began, **fields})


def a_log(message: str, second: int = 0, **fields: Any) -> LogRecord:
    """Return a log entry of a certain second."""
    known = {"level": 30, "level_name": "WARNING", "logger_name": "somewhere"}
    return LogRecord(
        timestamp=f"2024-05-06T07:08:{second:02}.000000+00:00",
        message=message,
        **{**known, **fields},
    )


def completed(index: int, **fields: Any) -> IndexRecord:
    """Return the record of an index that went well, with something of everything."""
    known: dict[str, Any] = {
        "output_paths": tuple(paths_of(index)),
        "wall_time_ns": 1_000_000 + index,
        "worker": a_worker(),
        "stages": (
            StageRecord(0, "Numbers", 100),
            StageRecord(1, "Sum", 200 + index),
            StageRecord(2, "TwoPaths", 300),
        ),
        "artifacts": (ArtifactRecord(f"sums/{index}.txt", "Sum", 1),),
        "logs": (a_log(f"number {index}"), a_log("the same"), a_log("the same")),
        "measurements": {"peak_memory_bytes": 2**30 + index, "gpu_memory_bytes": 5, "watts": 7.5},
    }
    return IndexRecord(index, "completed", **{**known, **fields})


def failed(index: int, error: str = "ValueError: no", **fields: Any) -> IndexRecord:
    """Return the record of an index that failed."""
    known: dict[str, Any] = {
        "worker": a_worker(),
        "stages": (StageRecord(0, "Numbers", 11), StageRecord(1, "Sum", 22)),
        "logs": (a_log(f"index {index} failed", level=40, level_name="ERROR"),),
    }
    return IndexRecord(index, "error", error=error, **{**known, **fields})


def contents(store: CheckpointStore) -> dict[str, Any]:
    """Return everything that a store says of its run, but for the workers' signs of life."""
    store.flush()
    ended = sorted(store.completed_indices() | store.failed_indices().keys())
    return {
        "completed": store.completed_indices(),
        "completed_outputs": store.completed_outputs(),
        "failed": store.failed_indices(),
        "output_paths": {index: store.output_paths(index) for index in ended},
        "artifacts": store.artifacts(),
        "logs": [without_id(entry) for entry in store.logs()],
        "index_rows": list(store.index_rows()),
        "stage_rows": list(store.stage_rows()),
        "stage_totals": list(store.stage_totals()),
        "found": {index: store.lookup(index) for index in ended},
    }


def messages(store: CheckpointStore, index: int | None = None) -> list[str]:
    """Return the messages of the log entries."""
    return [entry["message"] for entry in store.logs(index)]


def without_id(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a log entry without what the store made up."""
    return {name: value for name, value in entry.items() if name not in ("id", "run_id")}


# --- other processes --------------------------------------------------------------------------

SPAWN = multiprocessing.get_context("spawn")

_PATIENCE_S = 120


def run_one_by_one(pipeline: Pipeline[Any], indices: Iterable[int], told: Connection) -> None:
    """Run indices and say of each that it is done."""
    for index in indices:
        pipeline[index]
        told.send(index)


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once a condition holds.

    Raises
    ------
    AssertionError
        If it does not within two minutes.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"nothing came of it in {_PATIENCE_S} s")
        time.sleep(0.01)


LARGE = 4000


def record_as_told(pipeline: Pipeline[Any], told: Connection) -> None:
    """Record an index for each that comes, of which one part is large; until ``None`` comes."""
    store = run_of(pipeline).store
    assert store is not None
    for index, large in iter(told.recv, None):
        count = dict.fromkeys(("result", "log", "artifacts", "stages"), 1) | {large: LARGE}
        artifact = ArtifactRecord(f"sums/{index}.txt", "Sum", 1)
        record = completed(
            index,
            output_paths=tuple(f"out/{index}/{number}" for number in range(count["result"])),
            logs=(a_log("the same"),) * count["log"],
            artifacts=tuple(
                attrs.evolve(artifact, path=f"sums/{index}-{number}.txt")
                for number in range(count["artifacts"])
            ),
            stages=tuple(StageRecord(order, "Stage", 1) for order in range(count["stages"])),
        )
        store.record(record)
        store.flush()
        told.send(index)


def fork_while_recording(pipeline: Pipeline[Any], told: Connection) -> None:
    """Record indices 0 to 99; fork now and then, and have each child record ten of its own."""
    children: list[int] = []
    for index in range(100):
        pipeline[index]
        if index % 25 == 10:
            child = os.fork()
            if child == 0:
                first = 100 + 10 * len(children)
                for own in range(first, first + 10):
                    pipeline[own]
                raise SystemExit(0)
            children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    told.send((codes, pipeline.completed_indices))


def fork_among_threads(pipeline: Pipeline[Any], told: Connection) -> None:
    """Record indices 0 to 199 in two threads, and fork meanwhile; each child records one."""

    def record(share: int) -> None:
        for index in range(share, 200, 2):
            pipeline[index]

    # What a thread is importing while the process forks, no child could ever import.
    pipeline[0]
    threads = [threading.Thread(target=record, args=(share,)) for share in range(2)]
    for thread in threads:
        thread.start()
    children: list[int] = []
    for turn in range(5):
        child = os.fork()
        if child == 0:
            pipeline[200 + turn]
            os._exit(0)
        children.append(child)
    for thread in threads:
        thread.join()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    told.send((codes, pipeline.completed_indices))


def in_another_process(target: Callable[..., None], *arguments: Any) -> Any:
    """Call a function in a process of its own, and return what it sends.

    Raises
    ------
    AssertionError
        If it sends nothing, for two minutes or ever.
    """
    here, there = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=target, args=(*arguments, there))
    process.start()
    there.close()
    try:
        if not here.poll(_PATIENCE_S):
            process.kill()
            raise AssertionError(f"the process was still at work after {_PATIENCE_S} s")
        return here.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"the process ended with exit code {process.exitcode}") from None
    finally:
        here.close()
        process.join()


# --- the workplace ----------------------------------------------------------------------------


class OpenedStores:
    """A plugin that notes every store that is opened in this process."""

    def __init__(self) -> None:
        self.stores: list[CheckpointStore] = []

    @hookimpl(wrapper=True)
    def psnc_open_store(self) -> Any:
        """Note the store that another plugin has opened."""
        store = yield
        if store is not None:
            self.stores.append(store)
        return store


class StoreWorkplace:
    """What the tests of :class:`StoreSuite` work with.

    Attributes
    ----------
    url : str
        Where the store is.
    plugins : PluginManager
        The plugins of this process.
    """

    def __init__(self, url: str, plugins: PluginManager) -> None:
        self.url = url
        self.plugins = plugins

    def pipeline(
        self,
        count: int = 10,
        filters: Sequence[Filter[Any, Any]] = (),
        journal: str | None = None,
        **fields: Any,
    ) -> Pipeline[Any]:
        """Return a pipeline of ``count`` indices that records to the store."""
        fields = {"resume": True, **fields}
        return Pipeline(Numbers(count, journal), filters, TwoPaths(), store=self.url, **fields)

    def open(self, pipeline: Pipeline[Any], *, create: bool = True) -> CheckpointStore:
        """Open the store for a pipeline, as a process does that begins to run it."""
        store = open_store(self.url, Run(pipeline, self.plugins), create=create)
        assert store is not None, f"no plugin opens {self.url}"
        store.attach(Run(pipeline, self.plugins))
        return store
