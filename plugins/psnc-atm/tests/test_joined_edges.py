"""Edges in a store, read by pointers as readers of the layout do, are those of the filter."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from attrs import evolve
from data import contents, crystals, molecules, write_database, write_dataset

from psnc import Filter, Pipeline, StageError, gather_pipeline, run_pipeline
from psnc.testing import check_sink
from psnc_atm import ASELMDBSource, AtomicData, AtomicDataZarrSink, NeighbourList
from psnc_atm.zarr_store import open_store

Edges = list[list[int]]

POINTER = "meta/edges_ptr"
LIST, SHIFTS = "core/neighbor_list", "core/neighbor_list_shifts"


class Keep(Filter[AtomicData, AtomicData]):
    """Keeps structures of at most so many atoms."""

    def __init__(self, at_most: int) -> None:
        self.at_most = at_most

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        return (structure for structure in items if len(structure) <= self.at_most)


class Flaky(Filter[AtomicData, AtomicData]):
    """Cannot do structures of one charge while a file is there."""

    def __init__(self, broken: Path, charge: int) -> None:
        self.broken, self.charge = broken, charge

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        for structure in items:
            if structure.charge == self.charge and self.broken.exists():
                raise OSError("not at the moment")
            yield structure


class Without(Filter[AtomicData, AtomicData]):
    """Takes a field from the third structure of the index whose structures have this charge."""

    def __init__(self, charge: float, **fields: Any) -> None:
        self.charge, self.fields = charge, fields

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        for number, structure in enumerate(items):
            changed = structure.charge == self.charge and number == 2
            yield evolve(structure, **self.fields) if changed else structure


def pipeline_of(
    data: Path, output: Path, *filters: Filter[Any, Any], **options: Any
) -> Pipeline[Any]:
    chosen = {"atoms_per_chunk": 64, "systems_per_chunk": 8, "edges_per_chunk": 100, **options}
    return Pipeline(
        source=ASELMDBSource(data),
        filters=filters or [NeighbourList(2.0)],
        sink=AtomicDataZarrSink(output / "out.zarr", **chosen),
        resume=True,
        db_dir=output,
    )


def run(pipeline: Pipeline[Any], n_jobs: int = 1, **options: Any) -> None:
    run_pipeline(pipeline, n_jobs=n_jobs, progress=False, **options)


def rows_of(store: Path, *, consolidated: bool | None = None) -> dict[int, Edges]:
    """Read, for each visible row, start, end and shift of its edges, atoms counted from its own."""
    root = zarr.open_group(store, mode="r", use_consolidated=consolidated)
    atoms, edges = root["meta/atoms_ptr"][:], root[POINTER][:]
    visible = np.flatnonzero(root["meta/samples_mask"][:])
    assert edges[0] == 0
    assert (np.diff(edges) >= 0).all()
    if LIST not in root:
        return {}
    lengths = {root[name].shape[0] for name in (LIST, SHIFTS, "meta/edges_mask")}
    assert lengths == {edges[-1]}
    assert root["meta/edges_mask"][:].all()
    pairs, shifts = root[LIST][:], root[SHIFTS][:]
    assert pairs.dtype == shifts.dtype == np.int64
    found = {}
    for row in map(int, visible):
        own = slice(edges[row], edges[row + 1])
        found[row] = np.concatenate([pairs[own] - atoms[row], shifts[own]], axis=1).tolist()
    return found


def expected_rows(pipeline: Pipeline[Any], indices: Iterable[int]) -> dict[int, Edges]:
    """What the filters make of these indices, by the row that each structure has."""
    expected = {}
    row = 0
    chosen = set(indices)
    for index in range(len(pipeline.source)):
        for number, structure in enumerate(pipeline.items(index) if index in chosen else ()):
            columns = np.concatenate([structure.edge_index, structure.unit_shifts.T])
            expected[row + number] = columns.T.tolist()
        row += len(pipeline.source.atom_counts(index))
    return expected


def assert_joined(pipeline: Pipeline[Any], store: Path, indices: Iterable[int]) -> None:
    expected = expected_rows(pipeline, indices)
    assert any(expected.values())
    for consolidated in (True, False):
        assert rows_of(store, consolidated=consolidated) == expected
    levels = zarr.open_group(store, mode="r").attrs["fields"]["core"]
    assert levels["neighbor_list"] == levels["neighbor_list_shifts"] == "edge"
    assert levels["cutoff"] == "system"


def assert_not_joined(store: Path) -> None:
    """No edges are there, rather than edges that say that there are no neighbours."""
    for consolidated in (True, False):
        assert rows_of(store, consolidated=consolidated) == {}
        root = zarr.open_group(store, mode="r", use_consolidated=consolidated)
        assert not root[POINTER][:].any()
        assert root["meta/edges_mask"].shape == (0,)
    assert "edge" not in root.attrs["fields"]["core"].values()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Molecules in three files, and crystals that are periodic in two or three directions."""
    data = write_dataset(tmp_path / "in", files=3, rows=15)
    write_database(data / "yy.aselmdb", molecules(4), data={"charge": 3, "gap": 0.0})
    return data


@pytest.mark.parametrize("jobs", [1, 2])
def test_edges_are_those_of_the_structures(tmp_path: Path, jobs: int) -> None:
    data = tmp_path / "in"
    data.mkdir()
    for number in range(4):
        write_database(data / f"{number}.aselmdb", crystals(5, seed=number), data={"spin": 1})
    pipeline = pipeline_of(data, tmp_path, NeighbourList(3.5))
    order = list(range(4))
    random.Random(jobs).shuffle(order)
    run(pipeline, jobs, indices=order)
    assert_not_joined(tmp_path / "out.zarr")
    for _ in range(2):
        assert gather_pipeline(pipeline) == [str(tmp_path / "out.zarr")]
        assert_joined(pipeline, tmp_path / "out.zarr", range(4))
    rows = rows_of(tmp_path / "out.zarr").values()
    assert any(any(edge[2:]) for edges in rows for edge in edges)


@pytest.mark.parametrize("edges_per_chunk", [1, 7, 65_536])
def test_structures_that_are_dropped_and_indices_that_fail_have_no_edges(
    mixed: Path, tmp_path: Path, edges_per_chunk: int
) -> None:
    (tmp_path / "broken").touch()
    filters = [Keep(5), NeighbourList(1.5), Flaky(tmp_path / "broken", charge=0)]
    pipeline = pipeline_of(mixed, tmp_path, *filters, edges_per_chunk=edges_per_chunk)
    run(pipeline)
    assert pipeline.failed_indices.keys() == {1}
    gather_pipeline(pipeline)
    assert_joined(pipeline, tmp_path / "out.zarr", [0, 2, 3])
    (tmp_path / "broken").unlink()
    run(pipeline)
    # The index that is mended now is visible, and so has to have edges, or no structure has.
    assert_not_joined(tmp_path / "out.zarr")
    gather_pipeline(pipeline)
    assert_joined(pipeline, tmp_path / "out.zarr", range(4))


def test_several_drivers_and_an_index_that_runs_again(mixed: Path, tmp_path: Path) -> None:
    first, second = pipeline_of(mixed, tmp_path), pipeline_of(mixed, tmp_path)
    run(first, indices=[3, 1])
    gather_pipeline(first)
    assert_joined(first, tmp_path / "out.zarr", [1, 3])
    run(second, indices=[0, 2])
    assert_not_joined(tmp_path / "out.zarr")
    gather_pipeline(first)
    assert_joined(first, tmp_path / "out.zarr", range(4))
    second.reset_index(1)
    run(second)
    assert_not_joined(tmp_path / "out.zarr")
    gather_pipeline(second)
    assert_joined(first, tmp_path / "out.zarr", range(4))


def test_another_cutoff_over_the_same_store(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    flaky = Flaky(tmp_path / "broken", charge=0)
    first = pipeline_of(mixed, tmp_path, NeighbourList(1.5))
    run(first)
    gather_pipeline(first)
    second = pipeline_of(mixed, tmp_path, NeighbourList(2.5), flaky)
    run(second)
    gather_pipeline(second)
    assert_joined(second, tmp_path / "out.zarr", [0, 2, 3])
    (tmp_path / "broken").unlink()
    run(second)
    gather_pipeline(second)
    assert_joined(second, tmp_path / "out.zarr", range(4))
    # The earlier run finds that none of its indices is there any more.
    run(first)
    gather_pipeline(first)
    assert_joined(first, tmp_path / "out.zarr", range(4))


def test_a_repaired_file_and_one_that_is_added(mixed: Path, tmp_path: Path) -> None:
    damaged = mixed / "data0001.aselmdb"
    whole = damaged.read_bytes()
    os.truncate(damaged, len(whole) // 2)
    pipeline = pipeline_of(mixed, tmp_path)
    run(pipeline)
    assert pipeline.failed_indices.keys() == {1}
    gather_pipeline(pipeline)
    assert sum(map(bool, rows_of(tmp_path / "out.zarr").values())) > 20
    damaged.write_bytes(whole)
    pipeline = pipeline_of(mixed, tmp_path)
    times = {i: row.completed_at for i, row in enumerate(pipeline.metrics) if i != 1}
    run(pipeline, 2)
    gather_pipeline(pipeline)
    assert_joined(pipeline, tmp_path / "out.zarr", range(4))
    write_database(mixed / "zz.aselmdb", molecules(7, seed=9), data={"charge": 1, "gap": 0.0})
    pipeline = pipeline_of(mixed, tmp_path)
    run(pipeline)
    gather_pipeline(pipeline)
    assert_joined(pipeline, tmp_path / "out.zarr", range(5))
    after = {i: row.completed_at for i, row in enumerate(pipeline.metrics) if i in times}
    assert after == times


def test_a_store_without_edges_stays_as_it_was(mixed: Path, tmp_path: Path) -> None:
    pipeline = pipeline_of(mixed, tmp_path, Keep(9))
    run(pipeline)
    before = files_of(tmp_path / "out.zarr")
    assert gather_pipeline(pipeline) == []
    assert files_of(tmp_path / "out.zarr") == before
    assert_not_joined(tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr/psnc/edges").exists()


def files_of(store: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


def test_what_was_joined_before_is_left_for_its_readers_once(mixed: Path, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    pipeline = pipeline_of(mixed, tmp_path)
    run(pipeline, indices=[0, 1])
    gather_pipeline(pipeline)
    earlier = zarr.open_group(store, mode="r")
    pairs = earlier[LIST][:]
    run(pipeline)
    gather_pipeline(pipeline)
    assert (earlier[LIST][:] == pairs).all()
    assert zarr.open_group(store, mode="r")[LIST].shape[0] > len(pairs)
    both = set(files_of(store))
    gather_pipeline(pipeline)
    one = set(files_of(store))
    assert one < both
    assert all("neighbor_list" in name or "edges_ptr" in name for name in both - one)
    assert_joined(pipeline, store, range(4))


# --- which fields -----------------------------------------------------------------------------


def test_fields_say_whether_edges_are_stored(mixed: Path, tmp_path: Path) -> None:
    for name, fields, arrays in (
        ("none", ["energy", "cutoff"], set()),
        ("pairs", ["edge_index"], {LIST}),
        ("both", ["unit_shifts", "edge_index"], {LIST, SHIFTS}),
    ):
        output = tmp_path / name
        output.mkdir()
        pipeline = pipeline_of(mixed, output, fields=fields)
        run(pipeline)
        assert gather_pipeline(pipeline) == ([str(output / "out.zarr")] if arrays else [])
        found = contents(output / "out.zarr")
        assert {LIST, SHIFTS} & found.keys() == arrays
        assert ("core/cutoff" in found) == ("cutoff" in fields)


def test_fields_that_edges_cannot_have(mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="'unit_shifts', which say nothing without 'edge_index'"):
        AtomicDataZarrSink(tmp_path / "out.zarr", fields=["unit_shifts"])
    with pytest.raises(StageError, match="edges_per_chunk is 0; give a whole number from 1 on"):
        AtomicDataZarrSink(tmp_path / "out.zarr", edges_per_chunk=0)
    with pytest.raises(StageError, match=r"'edge_index' is to be stored, but the first"):
        run(pipeline_of(mixed, tmp_path, Keep(99), fields=["edge_index"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"edge_index": None, "unit_shifts": None}, "has no edge_index, unit_shifts, unlike the"),
        ({"unit_shifts": None}, "has no unit_shifts, unlike the first"),
        (
            {"edge_index": np.array([[0], [99]]), "unit_shifts": np.zeros((1, 3), int)},
            r"edge_index goes from atom 0 to 99; the structure has \d+ atoms, counted from 0",
        ),
        (
            {"edge_index": np.array([[0.5], [0]]), "unit_shifts": np.zeros((1, 3), int)},
            "edge_index is float64; give integers",
        ),
    ],
)
def test_a_structure_whose_edges_do_not_fit_fails_its_index(
    mixed: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    pipeline = pipeline_of(mixed, tmp_path, NeighbourList(2.0), Without(0, **fields))
    run(pipeline)
    [(index, error)] = pipeline.failed_indices.items()
    assert index == 1
    assert error.startswith("StageError: index 1, structure 2: ")
    assert re.search(message, error)
    gather_pipeline(pipeline)
    assert_joined(pipeline, tmp_path / "out.zarr", [0, 2, 3])


def test_edges_in_a_later_structure_alone_fail_its_index(mixed: Path, tmp_path: Path) -> None:
    edges = np.zeros((2, 0), dtype=int)
    pipeline = pipeline_of(mixed, tmp_path, Without(0, edge_index=edges))
    run(pipeline)
    [error] = pipeline.failed_indices.values()
    assert error.startswith("StageError: index 1, structure 2: has edge_index, unlike the first")


# --- damage, and others at work ---------------------------------------------------------------


@pytest.mark.parametrize("damage", ["gone", "cut off", "changed", "another file"])
def test_a_file_of_edges_that_is_damaged_is_named_and_what_was_joined_stays(
    mixed: Path, tmp_path: Path, damage: str
) -> None:
    store = tmp_path / "out.zarr"
    pipeline = pipeline_of(mixed, tmp_path)
    run(pipeline, indices=[0, 1, 2])
    file = store / "psnc/edges/1.edges"
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "cut off":
        file.write_bytes(content[:-20])
    elif damage == "changed":
        file.write_bytes(content[:-20] + bytes(20))
    else:
        file.write_bytes(b"something else")
    with pytest.raises(StageError, match=r"edges/1\.edges.* edges of index 1, cannot be read"):
        gather_pipeline(pipeline)
    assert_not_joined(store)
    pipeline.reset_index(1)
    run(pipeline)
    gather_pipeline(pipeline)
    assert_joined(pipeline, store, range(4))


def test_a_damaged_file_of_edges_of_an_appended_source_is_named_as_that_source_counts(
    mixed: Path, tmp_path: Path
) -> None:
    first, second = (
        pipeline_of(mixed / name, tmp_path, append=True)
        for name in ("data0000.aselmdb", "data0001.aselmdb")
    )
    for pipeline in (first, second):
        run(pipeline)
    (tmp_path / "out.zarr/psnc/edges/1.edges").unlink()
    message = (
        r"edges/1\.edges, which has the edges of index 0 of source 2 in the store, cannot be "
        r"read .* run the index again \(psnc reset DB_OF_THAT_SOURCE --index 0\)"
    )
    with pytest.raises(StageError, match=message):
        gather_pipeline(first)
    second.reset_index(0)
    run(second)
    assert gather_pipeline(first) == [str(tmp_path / "out.zarr")]


def test_edges_of_another_run_than_wrote_the_index_are_refused(mixed: Path, tmp_path: Path) -> None:
    first, second = pipeline_of(mixed, tmp_path), pipeline_of(mixed, tmp_path, NeighbourList(1.0))
    run(first)
    file = tmp_path / "out.zarr/psnc/edges/2.edges"
    earlier = file.read_bytes()
    run(second)
    file.write_bytes(earlier)
    with pytest.raises(StageError, match=r"2\.edges is not of the run that wrote index 2"):
        gather_pipeline(second)


def test_an_index_that_is_written_while_edges_are_joined_leaves_them_for_later(
    mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = pipeline_of(mixed, tmp_path)
    run(pipeline, indices=[0, 1, 2])
    path = tmp_path / "out.zarr"
    store = open_store(path)
    assert store is not None
    gathered: list[list[str]] = []
    gathering = threading.Thread(target=lambda: gathered.append(gather_pipeline(pipeline)))
    # As someone who writes does, and so it cannot come to its end.
    with store.lock(), caplog.at_level(logging.WARNING, "psnc_atm"):
        gathering.start()
        while not (path / POINTER / "c").exists():
            assert gathering.is_alive()
            time.sleep(0.01)
        run(pipeline_of(mixed, tmp_path), indices=[3])
    gathering.join()
    assert gathered == [[]]
    [record] = [record for record in caplog.records if record.name == "psnc_atm"]
    assert "edges are not joined, since index 3 was written meanwhile" in record.getMessage()
    assert_not_joined(path)
    gather_pipeline(pipeline)
    assert_joined(pipeline, path, range(4))


def _read_again_and_again(
    store: Path, expected: dict[int, Edges], readings: Any, stop: Any, said: Any
) -> None:
    answer = "all right"
    while answer == "all right" and not stop.is_set():
        try:
            found = rows_of(store)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        else:
            wrong = [row for row, edges in found.items() if expected[row] != edges]
            answer = f"other edges in rows {wrong}" if wrong else answer
        readings.value += 1
    said.put(answer)


def test_a_reader_sees_the_right_edges_or_none_while_indices_are_written_and_gathered(
    mixed: Path, tmp_path: Path
) -> None:
    pipeline = pipeline_of(mixed, tmp_path)
    run(pipeline)
    gather_pipeline(pipeline)
    context = multiprocessing.get_context("spawn")
    readings, stop, said = context.Value("q", 0), context.Event(), context.Queue()
    expected = expected_rows(pipeline, range(4))
    reader = context.Process(
        target=_read_again_and_again,
        args=(tmp_path / "out.zarr", expected, readings, stop, said),
    )
    reader.start()
    for number in range(12):
        pipeline.reset_index(number % 4)
        run(pipeline)
        # What a reader has open is there until edges are joined twice.
        until = readings.value + 1
        while readings.value < until and reader.is_alive():
            time.sleep(0.01)
        gather_pipeline(pipeline)
    stop.set()
    assert said.get() == "all right"
    reader.join()


# --- kills ------------------------------------------------------------------------------------


_GATHERING = """
import os, signal, sys
from pathlib import Path
from psnc import gather_pipeline
from test_joined_edges import pipeline_of

data, output, moment = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
pipeline = pipeline_of(data, output, edges_per_chunk=1000)
seen = 0

def die(event, arguments):
    # Just before a file takes its place, or is removed.
    global seen
    if event in ("os.rename", "os.remove") and "out.zarr" in os.fsdecode(arguments[0]):
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
gather_pipeline(pipeline)
"""


def _in_child(script: str, *arguments: Any) -> int:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(here)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, check=False).returncode


@pytest.mark.parametrize("state", ["first", "withdrawn"])
def test_a_kill_at_any_step_of_joining_leaves_edges_that_fit_or_none(
    mixed: Path, tmp_path: Path, state: str
) -> None:
    store, kept = tmp_path / "out.zarr", tmp_path / "kept.zarr"
    pipeline = pipeline_of(mixed, tmp_path, edges_per_chunk=1000)
    run(pipeline)
    if state == "withdrawn":
        gather_pipeline(pipeline)
        pipeline.reset_index(2)
        run(pipeline)
    shutil.copytree(store, kept)
    expected = expected_rows(pipeline, range(4))
    for moment in range(1, 100):
        status = _in_child(_GATHERING, mixed, tmp_path, moment)
        for consolidated in (True, False):
            assert rows_of(store, consolidated=consolidated) in ({}, expected)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        # Another that comes after, from the start or from where the last one was killed.
        if moment % 2:
            gather_pipeline(pipeline)
            assert_joined(pipeline, store, range(4))
            shutil.rmtree(store)
            shutil.copytree(kept, store)
    assert moment > 8
    gather_pipeline(pipeline)
    assert_joined(pipeline, store, range(4))


_RUNNING = """
import sys
from pathlib import Path
from psnc import gather_pipeline, run_pipeline
from test_joined_edges import pipeline_of

if __name__ == "__main__":
    pipeline = pipeline_of(Path(sys.argv[1]), Path(sys.argv[2]), edges_per_chunk=20)
    run_pipeline(pipeline, progress=False)
    gather_pipeline(pipeline)
"""


def _files_below(directory: Path) -> int:
    # Unlike Path.rglob it bears that directories go away meanwhile.
    return sum(len(names) for _, _, names in os.walk(directory))


def test_after_kills_at_random_moments_of_runs_and_gathers_it_is_that_of_a_clean_run(
    mixed: Path, tmp_path: Path
) -> None:
    chosen = random.Random(5)
    here = Path(__file__).parent
    command = [sys.executable, "-c", _RUNNING, str(mixed), str(tmp_path)]
    store = tmp_path / "out.zarr"
    pipeline = pipeline_of(mixed, tmp_path, edges_per_chunk=20)
    expected = expected_rows(pipeline, range(4))
    clean = pipeline_of(mixed, tmp_path / "clean", edges_per_chunk=20)
    run(clean)
    files_laid_out = _files_below(tmp_path / "clean/out.zarr") // 3
    gather_pipeline(clean)
    files_at_the_end = _files_below(tmp_path / "clean/out.zarr")
    for attempt in range(8):
        child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(here)})
        until = chosen.randint(files_laid_out, files_at_the_end)
        while child.poll() is None and _files_below(store) < until:
            pass
        child.kill()
        child.wait()
        if store.exists():
            for consolidated in (True, False):
                found = rows_of(store, consolidated=consolidated)
                assert all(expected[row] == edges for row, edges in found.items())
        if attempt % 3 == 2 and store.exists():
            with_record = pipeline_of(mixed, tmp_path, edges_per_chunk=20)
            with_record.reset_index(chosen.randrange(4))
    run(pipeline)
    gather_pipeline(pipeline)
    assert_joined(pipeline, store, range(4))


def test_the_sink_keeps_the_rules_of_sinks_that_gather(mixed: Path) -> None:
    source = ASELMDBSource(mixed)
    items = [list(NeighbourList(2.0)(iter(source[index]))) for index in range(3)]
    check_sink(
        lambda directory: AtomicDataZarrSink(directory / "out.zarr", edges_per_chunk=50), items
    )


class OnlyCharge(Filter[AtomicData, AtomicData]):
    """Keeps the structures of one index."""

    def __init__(self, charge: float) -> None:
        self.charge = charge

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        return (one for one in items if one.charge == self.charge)


def test_an_index_that_keeps_no_structure_has_no_edges_and_is_joined(
    mixed: Path, tmp_path: Path
) -> None:
    pipeline = pipeline_of(mixed, tmp_path, NeighbourList(2.0), OnlyCharge(1.0))
    run(pipeline)
    gather_pipeline(pipeline)
    assert rows_of(tmp_path / "out.zarr")


def test_rows_that_a_killed_process_made_visible_are_hidden_when_edges_are_joined(
    mixed: Path, tmp_path: Path
) -> None:
    pipeline = pipeline_of(mixed, tmp_path)
    run(pipeline)
    path = tmp_path / "out.zarr"
    store = open_store(path)
    assert store is not None
    store.clear("psnc/written", 1, 2)  # what is written last
    gather_pipeline(pipeline)
    assert_joined(pipeline, path, [0, 2, 3])
