"""What an index costs beside its work: psnc, which records everything, and bare pools.

Run it by hand: ``python benchmarks/overhead.py``. In each round everything is measured in turn, on
indices that do nothing and on those that keep a core busy for 1 ms and 10 ms of CPU time. Reported
are medians over the rounds, and ratios of those. What all processes together spend of CPU time on
an index besides its work tells more where other programs are at work too.

Two workers on two cores would at best take half of the work each. What that takes is measured in
the same round: two bare processes that do half of the indices each in a loop, from the moment when
both are up until both are done.

The start of a pool is left out everywhere. Pools that can be started beforehand are, and have run
a few indices. A run of psnc begins with its pool: its clock starts once both workers have handed in
an index, and it is divided by the indices that come after.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import psutil
from joblib import Parallel, delayed

from psnc import Pipeline, Sink, Source, hookimpl, run_pipeline
from psnc.manager import plugin_manager

WORKERS = 2
COUNTS = {0.0: 20_000, 0.001: 2_000, 0.01: 300}
CHUNK_SIZES = {0.0: (100, 1000), 0.001: (10, 100), 0.01: (10,)}


def work(seconds: float, index: int) -> list[str]:
    """Keep a core busy for so much CPU time."""
    end = time.thread_time() + seconds
    while seconds and time.thread_time() < end:
        pass
    return [f"/data/{index}.bin"]


class Numbers(Source[int]):
    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Iterator[int]:
        yield index


class Work(Sink[int]):
    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, items: Iterator[int], index: int) -> list[str]:
        return [path for item in items for path in work(self.seconds, item)]


# --- what is measured -------------------------------------------------------------------------


class Cost(NamedTuple):
    """Seconds for an index: by the clock, and of CPU time in all processes together."""

    wall: float
    cpu: float


def now() -> Cost:
    # That of workers counts while they live.
    workers = sum(sum(each.cpu_times()[:2]) for each in psutil.Process().children(recursive=True))
    return Cost(perf_counter(), time.process_time() + workers)


def since(before: Cost, count: int) -> Cost:
    wall = perf_counter()
    return Cost((wall - before.wall) / count, (now().cpu - before.cpu) / count)


def bare_loop(seconds: float, count: int) -> Cost:
    started = now()
    for index in range(count):
        work(seconds, index)
    return since(started, count)


def psnc_sequential(seconds: float, count: int) -> Cost:
    return psnc(seconds, count, 1)


def bare_processes(seconds: float, count: int) -> Cost:
    """Have two processes do half of it each."""
    fork = multiprocessing.get_context("fork")
    barrier, times = fork.Barrier(WORKERS), fork.SimpleQueue()

    def run_share() -> None:
        barrier.wait()
        started = perf_counter()
        cost = bare_loop(seconds, count // WORKERS)
        times.put((started, perf_counter(), cost.cpu))

    processes = [fork.Process(target=run_share) for _ in range(WORKERS)]
    for process in processes:
        process.start()
    starts, ends, cpu = zip(*(times.get() for _ in processes), strict=True)
    for process in processes:
        process.join()
    return Cost((max(ends) - min(starts)) / (count // WORKERS * WORKERS), sum(cpu) / WORKERS)


def psnc_processes(seconds: float, count: int) -> Cost:
    return psnc(seconds, count, WORKERS)


def executor_map(seconds: float, count: int, chunksize: int = 1) -> Cost:
    with started_executor() as executor:
        started = now()
        results = list(executor.map(partial(work, seconds), range(count), chunksize=chunksize))
        assert len(results) == count
        return since(started, count)


def executor_submit(seconds: float, count: int) -> Cost:
    with started_executor() as executor:
        started = now()
        futures = [executor.submit(work, seconds, index) for index in range(count)]
        results = [future.result() for future in futures]
        assert len(results) == count
        return since(started, count)


def joblib_parallel(seconds: float, count: int, batch_size: int | str = "auto") -> Cost:
    with Parallel(n_jobs=WORKERS, batch_size=batch_size) as parallel:
        parallel(delayed(work)(0.1, index) for index in range(2 * WORKERS))
        started = now()
        results = parallel(delayed(work)(seconds, index) for index in range(count))
        assert len(results) == count
        return since(started, count)


@contextmanager
def started_executor() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(WORKERS) as executor:
        list(executor.map(partial(work, 0.1), range(2 * WORKERS)))
        yield executor


class Clock:
    """Runs from when every worker has handed in an index, to the end of the last index."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.seen: set[str] = set()
        self.started: Cost | None = None
        self.left = self.count = 0
        self.cost = Cost(0.0, 0.0)

    @hookimpl
    def psnc_run_start(self, indices: Sequence[int]) -> None:
        self.left = len(indices)

    @hookimpl
    def psnc_index_reported(self, record: Any) -> None:
        self.left -= 1
        if self.started is None:
            self.seen.add(record.worker.worker_id)
            if len(self.seen) == self.workers:
                self.started, self.count = now(), self.left
        elif not self.left:
            self.cost = since(self.started, self.count)


def psnc(seconds: float, count: int, workers: int) -> Cost:
    plugins, clock = plugin_manager(), Clock(workers)
    plugins.register(clock)
    try:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            pipeline = Pipeline(Numbers(count), [], Work(seconds), db_dir=Path(folder))
            results = run_pipeline(pipeline, workers, progress=False)
    finally:
        plugins.unregister(clock)
    assert all(results)
    assert clock.count > count // 2, "one worker was late: run again on a machine with time"
    return clock.cost


Measure = Callable[[float, int], Cost]


def measures(seconds: float) -> dict[str, Measure]:
    chunked = {
        f"ProcessPoolExecutor.map, chunksize={size}": partial(executor_map, chunksize=size)
        for size in CHUNK_SIZES[seconds]
    }
    return {
        "bare loop": bare_loop,
        "psnc, sequential": psnc_sequential,
        "two bare processes": bare_processes,
        "psnc, process_pool": psnc_processes,
        "ProcessPoolExecutor.map": executor_map,
        "ProcessPoolExecutor.submit": executor_submit,
        **chunked,
        "joblib.Parallel": joblib_parallel,
        "joblib.Parallel, batch_size=1": partial(joblib_parallel, batch_size=1),
    }


def print_table(seconds: float, costs: dict[str, list[Cost]]) -> None:
    medians = {
        name: Cost(*map(statistics.median, zip(*costs[name], strict=True))) for name in costs
    }
    print(
        f"\nindices of {seconds * 1000:g} ms{'':27}µs   over the ideal   of psnc's   CPU µs besides"
    )
    for name, median in medians.items():
        of_one = name in ("bare loop", "psnc, sequential")
        ideal = medians["bare loop" if of_one else "two bare processes"]
        own = medians["psnc, sequential" if of_one else "psnc, process_pool"]
        over = f"{median.wall / ideal.wall - 1:+.1%}" if seconds else ""
        besides = (median.cpu - seconds) * 1e6
        print(
            f"{name:38} {median.wall * 1e6:8.1f} {over:>16} {median.wall / own.wall:12.2f} "
            f"{besides:16.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ms", type=float, help="Only indices of so long.")
    given = parser.parse_args()
    chosen = [each for each in COUNTS if given.ms is None or given.ms == each * 1000]
    times: dict[float, dict[str, list[Cost]]] = {
        seconds: {name: [] for name in measures(seconds)} for seconds in chosen
    }
    for _ in range(given.rounds):
        for seconds in chosen:
            for name, measure in measures(seconds).items():
                times[seconds][name].append(measure(seconds, COUNTS[seconds]))
    print(f"medians of {given.rounds} rounds, {WORKERS} workers")
    for seconds in chosen:
        print_table(seconds, times[seconds])


if __name__ == "__main__":
    main()
