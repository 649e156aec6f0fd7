"""What recording one index costs, beside one bare SQLite transaction of the same rows.

Run it by hand: ``python benchmarks/recording.py``. Everything is measured in turn in each round, on
the disk of the working directory, and reported as ratios of medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import socket
import sqlite3
import statistics
import tempfile
import uuid
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from time import perf_counter

from psnc import Config, Filter, Pipeline, Sink, Source, run_pipeline
from psnc.manager import PluginManager, activated

WORKER, INVOCATION = uuid.uuid4().hex, uuid.uuid4().hex
HOST = socket.gethostname()


class Numbers(Source[int]):
    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Iterator[int]:
        yield index


class Double(Filter[int, int]):
    def __call__(self, items: Iterator[int]) -> Iterator[int]:
        for item in items:
            yield 2 * item


class Nowhere(Sink[int]):
    def __call__(self, items: Iterator[int], index: int) -> list[str]:
        return [f"/data/{sum(items)}.bin"]


def chain(count: int, folder: Path) -> None:
    """Run the three stages and nothing else."""
    source, double, sink = Numbers(count), Double(), Nowhere()
    for index in range(count):
        sink(iter(double(iter(source[index]))), index)


def untracked_loop(count: int, folder: Path) -> None:
    pipeline = Pipeline(Numbers(count), [Double()], Nowhere(), track_metrics=False)
    for index in range(count):
        pipeline[index]


def untracked_run(count: int, folder: Path) -> None:
    pipeline = Pipeline(Numbers(count), [Double()], Nowhere(), track_metrics=False)
    run_pipeline(pipeline, progress=False)


def tracked_loop(count: int, folder: Path) -> None:
    pipeline = Pipeline(Numbers(count), [Double()], Nowhere(), db_dir=folder)
    for index in range(count):
        pipeline[index]
    assert len(pipeline.completed_indices) == count


def tracked_run(count: int, folder: Path) -> None:
    pipeline = Pipeline(Numbers(count), [Double()], Nowhere(), db_dir=folder)
    run_pipeline(pipeline, progress=False)


def tracked_run_index_durability(count: int, folder: Path) -> None:
    manager = PluginManager(Config(durability="index"))
    manager.load()
    with activated(manager):
        tracked_run(count, folder)


def bare_transactions(count: int, folder: Path) -> None:
    """Write an index's rows in one transaction on a connection that is kept open."""
    connection = _empty_database(folder / "bare.db")
    for index in range(count):
        _write_rows(connection, index)
    connection.close()


def connection_per_index(count: int, folder: Path) -> None:
    """Write in the naive way: a new connection for every index."""
    path = folder / "naive.db"
    _empty_database(path).close()
    for index in range(count):
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA synchronous=NORMAL")
        _write_rows(connection, index)
        connection.close()


def _empty_database(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    schema = resources.files("psnc.builtin.checkpoint").joinpath("schema.sql")
    connection.executescript(schema.read_text())
    return connection


def _write_rows(connection: sqlite3.Connection, index: int) -> None:
    paths = [f"/data/{index}.bin"]
    now = "2026-01-01T00:00:00.000000+00:00"
    connection.execute("BEGIN IMMEDIATE")
    figures = (now, 9999, 2**25, None, None, WORKER, None)
    result = (index, 1, "completed", json.dumps(paths), *figures, 2**31, 2**31, 1, None)
    connection.execute(f"INSERT INTO index_results VALUES ({','.join('?' * 15)})", result)
    names = ("Numbers", "Double", "Nowhere")
    stages = [(index, 1, order, name, 1000) for order, name in enumerate(names)]
    connection.executemany("INSERT INTO stage_metrics VALUES (?,?,?,?,?)", stages)
    output = (paths[0], index, 1, 0, 1000, None)
    connection.execute("INSERT INTO output_files VALUES (?,?,?,?,?,?)", output)
    worker = (WORKER, 1, 12345, HOST, now, now, None, index, INVOCATION)
    connection.execute("INSERT OR REPLACE INTO workers VALUES (?,?,?,?,?,?,?,?,?)", worker)
    connection.execute("COMMIT")


def seconds_per_index(function: Callable[[int, Path], None], count: int) -> float:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        started = perf_counter()
        function(count, Path(folder))
        return (perf_counter() - started) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    counts = {
        chain: options.count,
        untracked_loop: options.count,
        untracked_run: options.count,
        bare_transactions: options.count,
        tracked_loop: options.count,
        tracked_run: options.count,
        tracked_run_index_durability: options.count,
        connection_per_index: max(options.count // 50, 1),
    }
    for function in counts:  # imports, caches
        seconds_per_index(function, 10)
    times: dict[Callable[[int, Path], None], list[float]] = {each: [] for each in counts}
    for _ in range(options.rounds):
        for function, count in counts.items():
            times[function].append(seconds_per_index(function, count))
    medians = {function: statistics.median(each) for function, each in times.items()}
    transaction, bare = medians[bare_transactions], medians[chain]
    print(f"medians of {options.rounds} rounds of {options.count} indices, three stages")
    print(f"{'':32}µs an index   over the chain, in bare transactions")
    for function, median in medians.items():
        over = (median - bare) / transaction
        print(f"{function.__name__:32}{median * 1e6:11.1f}   {over:6.2f}")


if __name__ == "__main__":
    main()
