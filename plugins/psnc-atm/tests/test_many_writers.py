"""Several processes, killed or not, give the store that one process gives."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from data import assert_same_store, contents

from psnc import Pipeline, Source, run_pipeline
from psnc_atm import ASELMDBSource, AtomicData, AtomicDataZarrSink

# Chunks that do not fit the indices in any way, so that nearly each one is shared.
CHUNKS = {"atoms_per_chunk": 97, "systems_per_chunk": 11}


SHARDS = {"atoms_per_shard": 97 * 4, "systems_per_shard": 11 * 3}


def pipeline(dataset: Path, store: Path, *, shards: bool = False, **options: Any) -> Pipeline[Any]:
    return Pipeline(
        source=ASELMDBSource(dataset, rows_per_index=3),
        sink=AtomicDataZarrSink(store, **CHUNKS, **(SHARDS if shards else {})),
        **options,
    )


@pytest.fixture
def sequential(dataset: Path, tmp_path: Path) -> Path:
    """The store of an uninterrupted run in one process."""
    run_pipeline(pipeline(dataset, tmp_path / "sequential.zarr"), progress=False)
    assert contents(tmp_path / "sequential.zarr")["meta/samples_mask"].all()
    return tmp_path / "sequential.zarr"


class ManySmall(Source[AtomicData]):
    """Index i has i % 3 structures of i % 5 + 1 atoms each; one in a hundred cannot be read."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if index % 100 == 42:
            raise OSError(f"{index} is damaged")
        atoms = index % 5 + 1
        for structure in range(index % 3):
            positions = np.full((atoms, 3), index + structure / 10)
            yield AtomicData(atomic_numbers=np.full(atoms, 6), positions=positions)


def test_indices_that_several_processes_count_have_the_places_that_one_gives_them(
    tmp_path: Path,
) -> None:
    pipelines = [
        Pipeline(source=ManySmall(1500), sink=AtomicDataZarrSink(tmp_path / name, **CHUNKS))
        for name in ("one.zarr", "two.zarr")
    ]
    for jobs, each in enumerate(pipelines, 1):
        run_pipeline(each, jobs, progress=False)
        damaged = {index: f"OSError: {index} is damaged" for index in range(42, 1500, 100)}
        assert each.failed_indices == damaged
    assert_same_store(tmp_path / "one.zarr", tmp_path / "two.zarr")
    positions = contents(tmp_path / "two.zarr")["core/positions"]
    assert positions[0].tolist() == [1.0, 1.0, 1.0]
    assert positions[-1].tolist() == [1499.1, 1499.1, 1499.1]


def _write_some(
    dataset: str, store: str, first: int, step: int, barrier: Any, shards: bool
) -> None:
    mine = pipeline(Path(dataset), Path(store), shards=shards, track_metrics=False)
    assert mine.sink is not None
    barrier.wait()  # all lay out the store at once
    mine.sink.prepare(mine)
    for index in range(first, len(mine.source), step):
        mine.sink(iter(mine.items(index)), index)


@pytest.mark.parametrize(
    ("method", "shards"), [("spawn", False), ("forkserver", False), ("spawn", True)]
)
def test_processes_that_lay_out_and_write_at_once(
    dataset: Path, sequential: Path, tmp_path: Path, method: str, shards: bool
) -> None:
    context = multiprocessing.get_context(method)
    writers = 4
    barrier = context.Barrier(writers)
    store = tmp_path / "together.zarr"
    processes = [
        context.Process(
            target=_write_some, args=(str(dataset), str(store), n, writers, barrier, shards)
        )
        for n in range(writers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * writers
    assert_same_store(store, sequential, apart_from=["psnc/identity"] if shards else [])
    assert sorted(path.name for path in tmp_path.glob("*.draft")) == []
    assert sorted(path.name for path in tmp_path.glob(".*.draft")) == []


@pytest.mark.parametrize("backend", ["process_pool", "thread_pool"])
def test_the_backends_of_psnc(
    dataset: Path, sequential: Path, tmp_path: Path, backend: str
) -> None:
    store = tmp_path / "pool.zarr"
    made = pipeline(dataset, store)
    results = run_pipeline(made, n_jobs=4, backend=backend, progress=False)
    assert results == [[str(store)]] * len(made.source)
    assert_same_store(store, sequential)


def _rows_written(store: Path) -> int:
    try:
        mask = zarr.open_group(store, mode="r")["meta/samples_mask"]
    except (FileNotFoundError, KeyError):
        return 0
    assert isinstance(mask, zarr.Array)
    return int(np.asarray(mask[:]).sum())


def test_killed_again_and_again_and_resumed(
    dataset: Path, sequential: Path, tmp_path: Path
) -> None:
    store = tmp_path / "killed.zarr"
    script = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
from psnc import run_pipeline
from test_many_writers import pipeline
if __name__ == "__main__":
    made = pipeline(Path({str(dataset)!r}), Path({str(store)!r}),
                    resume=True, db_dir=Path({str(tmp_path / "db")!r}))
    run_pipeline(made, n_jobs=2, progress=False)
"""
    (tmp_path / "script.py").write_text(script)
    kills = 0
    for share in (0.05, 0.3, 0.5, 0.7):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py")], start_new_session=True
        )
        while _rows_written(store) < share * 200 and process.poll() is None:
            time.sleep(0.001)
        kills += process.poll() is None
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert kills >= 2
    assert _rows_written(store) > 0
    made = pipeline(dataset, store, resume=True, db_dir=tmp_path / "db")
    run_pipeline(made, n_jobs=2, progress=False)
    assert made.completed_indices == set(range(len(made.source)))
    assert_same_store(store, sequential)
