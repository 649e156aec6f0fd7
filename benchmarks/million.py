"""What it costs to go on with a million finished indices, beside plain Python that reads the rows.

Run it by hand: ``python benchmarks/million.py``. The store's own writer makes a database of
finished indices once. Then everything is measured in turn in each round, each in a process of its
own: Python from after the imports on, commands with their imports. Reported are medians over the
rounds, their ratios to reading the million rows one by one with ``json.loads``, and the largest
resident memory of each process.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

from attrs import frozen

from psnc import ArtifactRecord, IndexRecord, Pipeline, Sink, Source, StageRecord, run_pipeline
from psnc.run import run_of
from psnc.sql_store import SQLStore

COUNT = "PSNC_BENCHMARK_COUNT"
GROUP = 20_000


class Numbers(Source[int]):
    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Iterator[int]:
        yield index


class Nowhere(Sink[int]):
    def __call__(self, items: Iterator[int], index: int) -> list[str]:
        return [path_of(item) for item in items]


def path_of(index: int) -> str:
    return f"/data/converted/{index % 1000:03}/{index:07}.bin"


def pipeline() -> Pipeline[int]:
    return Numbers(int(os.environ[COUNT])).write(Nowhere())


def recorded(path: Path) -> Pipeline[int]:
    return Pipeline(Numbers(int(os.environ[COUNT])), [], Nowhere(), db_file=path)


# --- what is measured -------------------------------------------------------------------------


def make(path: Path) -> None:
    """Record every index as a worker would, in large groups."""
    finished = recorded(path)
    run = run_of(finished)
    store = run.store
    assert isinstance(store, SQLStore)
    worker, digest, count = run.worker(), run.code.digest, len(finished)
    for start in range(0, count, GROUP):
        records = [
            IndexRecord(
                index,
                "completed",
                (path_of(index),),
                wall_time_ns=9999,
                worker=worker,
                stages=(StageRecord(0, "Numbers", 1000), StageRecord(1, "Nowhere", 1000)),
                artifacts=(ArtifactRecord(f"/data/shards/{index}", "Total", 1),),
                measurements={"peak_memory_bytes": 2**25},
                code_digest=digest,
            )
            for index in range(start, min(start + GROUP, count))
        ]
        with store.gate:
            store.write_group(store.run_id, records, [])
    run.close()


def rows_one_by_one(path: Path) -> None:
    connection = sqlite3.connect(path)
    query = "SELECT idx, output_paths FROM index_results WHERE status = 'completed'"
    outputs = {index: json.loads(paths) for index, paths in connection.execute(query)}
    assert len(outputs) == int(os.environ[COUNT])


def resume(path: Path) -> None:
    outputs = run_pipeline(recorded(path), progress=False)
    assert outputs[-1] == [path_of(len(outputs) - 1)]


def resume_without_list(path: Path) -> None:
    summary = run_pipeline(recorded(path), progress=False, collect=False)
    assert summary.cached == int(os.environ[COUNT])


def completed_indices(path: Path) -> None:
    assert len(recorded(path).completed_indices) == int(os.environ[COUNT])


def remaining_indices(path: Path) -> None:
    assert recorded(path).remaining_indices() == []


def all_filter_artifacts(path: Path) -> None:
    assert len(recorded(path).all_filter_artifacts()) == int(os.environ[COUNT])


IN_PYTHON: dict[str, Callable[[Path], None]] = {
    "rows, json.loads one by one": rows_one_by_one,
    "run_pipeline": resume,
    "run_pipeline(collect=False)": resume_without_list,
    "completed_indices": completed_indices,
    "remaining_indices()": remaining_indices,
    "all_filter_artifacts()": all_filter_artifacts,
}
COMMANDS = {
    "psnc status": ["status", "{path}"],
    "psnc run": ["run", f"{__file__}:pipeline", "--db-file", "{path}", "--no-progress"],
    "psnc check": ["check", "{path}"],
}


# --- measuring --------------------------------------------------------------------------------


@frozen
class Measured:
    """What one process took: seconds, and MB of resident memory at the most."""

    seconds: float
    peak_mb: float


def in_python(function: Callable[[Path], None], path: Path) -> Measured:
    return measured([__file__, "--only", function.__name__, str(path)])


def command(arguments: list[str], path: Path) -> Measured:
    return measured(["-m", "psnc", *(each.format(path=path) for each in arguments)])


def measured(arguments: list[str]) -> Measured:
    started = perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{arguments} ended with code {process.returncode}: {said}")
    own = said.partition("seconds: ")[2]
    return Measured(float(own) if own else elapsed, usage.ru_maxrss / 1024)


def say_seconds(name: str, path: Path) -> None:
    (function,) = (each for each in (make, *IN_PYTHON.values()) if each.__name__ == name)
    started = perf_counter()
    function(path)
    print(f"seconds: {perf_counter() - started}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help="The database, made if it is not there.")
    given = parser.parse_args()
    if given.only:
        say_seconds(given.only[0], Path(given.only[1]))
        return
    os.environ[COUNT] = str(given.count)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = (given.keep or Path(folder, "finished.db")).absolute()
        if not path.exists():
            print(f"made in {in_python(make, path).seconds:.0f} s")
        print_table(path, given.rounds)


def print_table(path: Path, rounds: int) -> None:
    figures: dict[str, list[Measured]] = {name: [] for name in (*IN_PYTHON, *COMMANDS)}
    for _ in range(rounds):
        for name, function in IN_PYTHON.items():
            figures[name].append(in_python(function, path))
        for name, arguments in COMMANDS.items():
            figures[name].append(command(arguments, path))
    medians = {name: statistics.median(each.seconds for each in figures[name]) for name in figures}
    bare = medians["rows, json.loads one by one"]
    print(f"{'':30} seconds   ratio   MB at the most")
    for name, each in figures.items():
        peak = max(one.peak_mb for one in each)
        print(f"{name:30} {medians[name]:7.2f} {medians[name] / bare:7.2f} {peak:9.0f}")


if __name__ == "__main__":
    main()
