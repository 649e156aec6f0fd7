"""From ``.aselmdb`` files to a store, beside reading the files alone, in one process and in two.

python benchmarks/zarr_end_to_end.py DATASET [--repeats 5]

The ways take turns; times are medians, without the start of the processes and the plan. The
processor time of one process tells more where others use the machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from psnc import Pipeline
from psnc_atm import ASELMDBSource, AtomicDataZarrSink


def work(dataset: str, store: str | None, first: int, step: int, barrier: Any, times: Any) -> None:
    source = ASELMDBSource(dataset)
    sink = None if store is None else AtomicDataZarrSink(store)
    if sink is not None:
        sink.prepare(Pipeline(source=source, sink=sink, track_metrics=False))
    barrier.wait()
    started, used = time.perf_counter(), time.process_time()
    for index in range(first, len(source), step):
        if sink is None:
            for _ in source[index]:
                pass
        else:
            sink(source[index], index)
    times.put((time.perf_counter() - started, time.process_time() - used))


def timed(dataset: str, processes: int, *, write: bool) -> tuple[float, float]:
    """Return the wall time, and the processor time of all."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=".") as directory:
        store = str(Path(directory) / "store.zarr") if write else None
        barrier, times = context.Barrier(processes), context.Queue()
        workers = [
            context.Process(target=work, args=(dataset, store, n, processes, barrier, times))
            for n in range(processes)
        ]
        for worker in workers:
            worker.start()
        found = [times.get() for _ in workers]
        for worker in workers:
            worker.join()
    return max(wall for wall, _ in found), sum(used for _, used in found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare reading with reading and writing.")
    parser.add_argument("dataset")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    source = ASELMDBSource(options.dataset)
    structures = sum(len(source.atom_counts(index)) for index in range(len(source)))
    found: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    for _ in range(options.repeats):
        for processes in (1, 2):
            for write in (False, True):
                measured = timed(options.dataset, processes, write=write)
                found.setdefault((processes, write), []).append(measured)
    wall, used = (
        {way: statistics.median(one[kind] for one in times) for way, times in found.items()}
        for kind in (0, 1)
    )
    for (processes, write), seconds in wall.items():
        each, cpu = (time * 1e6 / structures for time in (seconds, used[processes, write]))
        what = "read and written" if write else "read"
        print(f"{processes} processes, {what:16} {each:6.1f} us a structure, {cpu:6.1f} us of CPU")
    for name, times in (("wall", wall), ("CPU", used)):
        print(f"{name}: writing reaches {times[1, False] / times[1, True]:.2f} of reading alone")
    print(f"two processes: {wall[1, True] / wall[2, True]:.2f} times one")


if __name__ == "__main__":
    main()
