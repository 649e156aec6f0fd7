"""More structures behind those of a store: in place, from other sources, and killed at any step."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from data import (
    assert_same_store,
    change_raw_row,
    contents,
    molecules,
    raw_row,
    write_database,
    write_dataset,
)

from psnc import Pipeline, Source, StageError, gather_pipeline, run_pipeline
from psnc_atm import (
    ASELMDBSource,
    AtomicData,
    AtomicDataZarrSink,
    NeighbourList,
    open_dataset,
    verify_store,
)


def months(tmp_path: Path, *, files: int = 2, rows: int = 15) -> tuple[Path, Path]:
    """Two datasets whose files have the same names."""
    first = write_dataset(tmp_path / "one", files=files, rows=rows)
    second = tmp_path / "two"
    second.mkdir()
    for number in range(files):
        write_database(
            second / f"data{number:04}.aselmdb",
            molecules(rows + 3, seed=50 + number),
            data={"charge": 0, "gap": 1.0},
        )
    return first, second


def pipeline_of(
    data: Path, store: Path, *, append: bool = True, rows: int | None = None, **options: Any
) -> Pipeline[Any]:
    chunks = {"atoms_per_chunk": 64, "systems_per_chunk": 8}
    return Pipeline(
        source=ASELMDBSource(data, rows_per_index=rows),
        sink=AtomicDataZarrSink(store, append=append, **{**chunks, **options}),
        resume=True,
        db_dir=store.parent / f"db-{data.name}",
    )


def write(data: Path, store: Path, n_jobs: int = 1, **options: Any) -> Pipeline[Any]:
    pipeline = pipeline_of(data, store, **options)
    run_pipeline(pipeline, n_jobs=n_jobs, progress=False)
    return pipeline


def read_structures(store: Path) -> list[dict[str, Any]]:
    """What a reader of the layout finds: the active rows, each by its place in the arrays."""
    root = zarr.open(store, mode="r")
    assert isinstance(root, zarr.Group)
    levels = dict(root.attrs["fields"]["core"])
    pointer, mask = root["meta/atoms_ptr"][:], root["meta/samples_mask"][:]
    assert len(mask) == root.attrs["num_samples"] == len(pointer) - 1
    assert (np.diff(pointer) >= 0).all()
    arrays = {name: root[f"core/{name}"] for name in levels}
    found = []
    for row in np.flatnonzero(mask):
        place = {"atom": slice(*pointer[row : row + 2]), "system": slice(row, row + 1)}
        found.append({name: arrays[name][place[level]] for name, level in levels.items()})
    return found


def assert_holds(store: Path, *pipelines: Pipeline[Any]) -> None:
    expected = [
        one for each in pipelines for i in range(len(each.source)) for one in each.source[i]
    ]
    found = read_structures(store)
    assert len(found) == len(expected)
    for stored, one in zip(found, expected, strict=True):
        np.testing.assert_array_equal(stored["positions"], one.positions)
        np.testing.assert_array_equal(stored["forces"], one.forces)
        assert stored["energy"] == one.energy


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("shards", [{}, {"atoms_per_shard": 128, "systems_per_shard": 16}])
def test_another_dataset_comes_behind_what_is_there_and_nothing_there_is_touched(
    tmp_path: Path, jobs: int, shards: dict[str, int]
) -> None:
    one, two = months(tmp_path)
    store = tmp_path / "out.zarr"
    first = write(one, store, jobs, append=False, **shards)
    before = {path: path.stat().st_mtime_ns for path in (store / "core/positions").glob("c*")}
    inside = sorted(before, key=lambda path: int(path.name.split(".")[1]))[:-1]
    second = write(two, store, jobs, **shards)
    assert second.completed_indices == {0, 1}
    assert all(path.stat().st_mtime_ns == before[path] for path in inside)
    assert inside
    assert_holds(store, first, second)


def test_each_dataset_finds_its_part_again(tmp_path: Path) -> None:
    one, two = months(tmp_path)
    store = tmp_path / "out.zarr"
    pipelines = [write(data, store) for data in (one, two)]
    before = contents(store)
    times = [[row.completed_at for row in each.metrics] for each in pipelines]
    again = [write(data, store) for data in (two, one)][::-1]
    assert [[row.completed_at for row in each.metrics] for each in again] == times
    # Without append too: what is in the store is known by what it was made from.
    write(two, store, append=False)
    after = contents(store)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    # A run that has nothing on record writes the same in the same place.
    sink = AtomicDataZarrSink(store, append=True, atoms_per_chunk=64, systems_per_chunk=8)
    run_pipeline(Pipeline(source=ASELMDBSource(two), sink=sink, db_file=tmp_path / "new.db"))
    assert_holds(store, *pipelines)


def test_the_store_is_that_of_one_dataset_with_all_files(tmp_path: Path) -> None:
    one, two = months(tmp_path)
    store, whole = tmp_path / "out.zarr", tmp_path / "whole"
    whole.mkdir()
    for number, path in enumerate([*sorted(one.glob("*.aselmdb")), *sorted(two.glob("*.aselmdb"))]):
        (whole / f"{number}.aselmdb").write_bytes(path.read_bytes())
    write(one, store)
    write(two, store)
    write(whole, tmp_path / "clean.zarr")
    assert_same_store(store, tmp_path / "clean.zarr", apart_from=["psnc/identity"])


def test_files_behind_the_others_are_added_in_place_to_either_part(tmp_path: Path) -> None:
    one, two = months(tmp_path)
    store = tmp_path / "out.zarr"
    write(one, store)
    write(two, store)
    inode = os.stat(store).st_ino
    write_database(one / "data0002.aselmdb", molecules(7, seed=90), data={"charge": 1, "gap": 0.0})
    first = write(one, store)
    assert first.completed_indices == {0, 1, 2}
    write_database(two / "data0002.aselmdb", molecules(5, seed=91), data={"charge": 1, "gap": 0.0})
    second = write(two, store)
    assert second.completed_indices == {0, 1, 2}
    assert os.stat(store).st_ino == inode
    assert len(read_structures(store)) == 30 + 36 + 7 + 5
    arrays = contents(store)
    energies = [s.energy for index in (first.source[2], second.source[2]) for s in index]
    assert arrays["core/energy"][66:].ravel().tolist() == energies
    before = contents(store)
    write(one, store)
    write(two, store)
    after = contents(store)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_files_are_added_with_several_indices_a_file_too(tmp_path: Path) -> None:
    one, _ = months(tmp_path)
    store = tmp_path / "out.zarr"
    write(one, store, rows=4)
    write_database(one / "data0002.aselmdb", molecules(7, seed=90), data={"charge": 1, "gap": 0.0})
    pipeline = write(one, store, rows=4)
    assert pipeline.completed_indices == set(range(10))
    assert_holds(store, pipeline)


def test_a_repair_in_one_part_keeps_the_other(tmp_path: Path) -> None:
    one, two = months(tmp_path)
    store = tmp_path / "out.zarr"
    path = one / "data0001.aselmdb"
    value = raw_row(path, b"9")
    change_raw_row(path, b"9", b"\0" + value[1:])
    assert write(one, store).failed_indices.keys() == {1}
    second = write(two, store)
    change_raw_row(path, b"9", value)
    first = write(one, store)
    assert first.completed_indices == {0, 1}
    assert write(two, store).completed_indices == {0, 1}
    assert_holds(store, first, second)


def test_an_unreadable_file_of_an_appended_dataset_gets_its_room_later(tmp_path: Path) -> None:
    one, two = months(tmp_path)
    store = tmp_path / "out.zarr"
    first = write(one, store)
    path = two / "data0000.aselmdb"
    content = path.read_bytes()
    os.truncate(path, len(content) // 2)
    assert write(two, store).failed_indices.keys() == {0}
    path.write_bytes(content)
    second = write(two, store)
    assert second.completed_indices == {0, 1}
    assert_holds(store, first, second)


def test_what_would_be_in_the_store_twice_is_refused(tmp_path: Path) -> None:
    one, two = months(tmp_path)
    store = tmp_path / "out.zarr"
    write(one, store)
    (one / "data0001.aselmdb").rename(two / "x.aselmdb")
    (two / "x.aselmdb").rename(two / "data0001.aselmdb")
    (two / "data0000.aselmdb").unlink()
    with pytest.raises(StageError, match=r"data0001\.aselmdb is in it already") as refused:
        write(two, store)
    assert "\n" not in str(refused.value)


def test_other_options_or_no_append_are_refused(tmp_path: Path) -> None:
    one, two = months(tmp_path)
    store = tmp_path / "out.zarr"
    write(one, store)
    with pytest.raises(StageError, match=r"codec was \['blosc-lz4', 5\] and is \['gzip', 6\]"):
        write(two, store, codec="gzip")
    with pytest.raises(StageError, match=r"data0000\.aselmdb changed"):
        write(two, store, append=False)
    assert len(read_structures(store)) == 30


def test_a_source_that_does_not_describe_its_input_cannot_be_appended(tmp_path: Path) -> None:
    class Plain(Source[AtomicData]):
        """Says nothing of its input."""

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Iterator[AtomicData]:
            return iter(())

    sink = AtomicDataZarrSink(tmp_path / "out.zarr", append=True)
    with pytest.raises(StageError, match=r"append=True needs a source that tells .* Plain has no"):
        run_pipeline(Pipeline(source=Plain(), sink=sink, db_file=tmp_path / "x.db"))


def test_structures_with_other_fields_fail_in_their_own_part(tmp_path: Path) -> None:
    one, two = months(tmp_path)
    store = tmp_path / "out.zarr"
    write(one, store)
    for path in two.glob("*.aselmdb"):
        path.unlink()
    write_database(two / "other.aselmdb", molecules(3))  # no charge
    assert "has no charge" in write(two, store).failed_indices[0]
    assert len(read_structures(store)) == 30


def _append(data: str, store: str, half: int, barrier: Any) -> None:
    pipeline = pipeline_of(Path(data), Path(store))
    assert pipeline.sink is not None
    barrier.wait()
    pipeline.sink.prepare(pipeline)
    for index in range(half, len(pipeline.source), 2):
        pipeline.sink(iter(pipeline.items(index)), index)


def test_processes_that_append_at_once(tmp_path: Path) -> None:
    one, two = months(tmp_path)
    three = tmp_path / "three"
    three.mkdir()
    for name in ("x", "y", "z"):
        seed = ord(name)
        write_database(three / f"{name}.aselmdb", molecules(9, seed), data={"charge": 0, "gap": 1})
    store = tmp_path / "out.zarr"
    write(one, store)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    processes = [
        context.Process(target=_append, args=(str(data), str(store), half, barrier))
        for data in (two, three)
        for half in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    found = read_structures(store)
    assert len(found) == 30 + 36 + 27
    parts = json.loads((store / "psnc/zarr.json").read_text())["attributes"]["parts"]
    assert len(parts) == 3
    energies = {float(one["energy"].item()) for one in found}
    for data in (one, two, three):
        source = ASELMDBSource(data)
        assert {s.energy for i in range(len(source)) for s in source[i]} <= energies


def test_a_reader_that_has_the_store_open_goes_on_reading_what_it_saw(tmp_path: Path) -> None:
    one, two = months(tmp_path)
    store = tmp_path / "out.zarr"
    write(one, store)
    root = zarr.open_group(store, mode="r")
    before = contents(store)
    write(two, store)
    for name in ("core/positions", "meta/atoms_ptr", "meta/samples_mask"):
        array = root[name]
        assert isinstance(array, zarr.Array)
        np.testing.assert_array_equal(array[:], before[name])


KILLED = """
import os, shutil, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_append import pipeline_of
import psnc_atm.zarr_array as zarr_array

output, data = Path({output!r}), Path({data!r})
replace = os.replace
for steps in range(1000):
    copy = output / str(steps) / "out.zarr"
    shutil.copytree(output / "before.zarr", copy)
    pid = os.fork()
    if pid == 0:
        left = steps

        def counted(*names):
            global left
            if left == 0:
                os.kill(os.getpid(), 9)
            left -= 1
            replace(*names)

        zarr_array.os.replace = counted
        pipeline = pipeline_of(data, copy)
        pipeline.sink.prepare(pipeline)
        os._exit(0)
    if os.waitpid(pid, 0)[1] == 0:
        print(steps)
        break
"""


def test_a_kill_at_any_step_of_making_room_leaves_a_store_that_is_read_and_continued(
    tmp_path: Path,
) -> None:
    one, two = months(tmp_path)
    output = tmp_path / "killed"
    output.mkdir()
    first = write(one, output / "before.zarr")
    script = KILLED.format(tests=os.path.dirname(__file__), output=str(output), data=str(two))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    steps = int(done.stdout)
    assert steps > 15
    write(one, tmp_path / "clean.zarr")
    second = write(two, tmp_path / "clean.zarr")
    small = tmp_path / "small"
    small.mkdir()
    write_database(small / "x.aselmdb", molecules(5, seed=70), data={"charge": 0, "gap": 1.0})
    for step in range(steps):
        store = output / str(step) / "out.zarr"
        assert_holds(store, first)
        if step % 2:
            # Another dataset comes before the one whose room was being made.
            third = write(small, store)
            write(two, store)
            assert_holds(store, first, third, second)
            continue
        write(two, store)
        assert_holds(store, first, second)
        left, right = contents(store), contents(tmp_path / "clean.zarr")
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_each_appended_source_is_compared_with_its_own_part(tmp_path: Path) -> None:
    first, second = months(tmp_path)
    store = tmp_path / "out.zarr"
    pipelines = [write(first, store), write(second, store)]
    for pipeline in pipelines:
        report = verify_store(pipeline)
        assert report, str(report)
        assert report.structures == sum(1 for _ in all_structures(pipeline))
    other = write_dataset(tmp_path / "three", files=1, rows=5)
    with pytest.raises(StageError, match="structures of 2 sources, and none of them is this one"):
        verify_store(ASELMDBSource(other), store)


def test_edges_of_appended_sources_are_joined_with_those_that_are_there(tmp_path: Path) -> None:
    first, second = months(tmp_path)
    store = tmp_path / "out.zarr"

    def with_edges(data: Path) -> Pipeline[Any]:
        pipeline = pipeline_of(data, store, edges_per_chunk=32)
        return Pipeline(
            source=pipeline.source,
            filters=[NeighbourList(2.0)],
            sink=pipeline.sink,
            resume=True,
            db_dir=tmp_path / f"db-{data.name}",
        )

    pipelines = []
    for data in (first, second):
        pipelines.append(with_edges(data))
        run_pipeline(pipelines[-1], progress=False)
        assert open_dataset(store).fields.get("neighbor_list") is None
        gather_pipeline(pipelines[-1])
        for pipeline in pipelines:
            report = verify_store(pipeline)
            assert report, str(report)
            assert "edge_index" not in report.not_stored
    found = list(open_dataset(store))
    expected = [one for pipeline in pipelines for one in all_structures(pipeline)]
    assert [one.edge_index.shape for one in found if one.edge_index is not None] == [
        one.edge_index.shape for one in expected if one.edge_index is not None
    ]
    assert len(found) == len(expected)


def all_structures(pipeline: Pipeline[Any]) -> Iterator[AtomicData]:
    for index in range(len(pipeline.source)):
        yield from pipeline.items(index)


def test_a_wrong_append_can_be_put_right(tmp_path: Path) -> None:
    first, second = months(tmp_path)
    store = tmp_path / "out.zarr"
    write(first, store)
    wrong = Pipeline(
        source=ASELMDBSource(second, dtype="float32"),
        sink=pipeline_of(second, store).sink,
        db_dir=tmp_path / "db-wrong",
    )
    run_pipeline(wrong, progress=False)
    assert set(wrong.failed_indices) == {0, 1}
    right = write(second, store)
    assert right.completed_indices == {0, 1}
    for pipeline in (pipeline_of(first, store), right):
        report = verify_store(pipeline)
        assert report, str(report)


def test_a_dataset_that_is_open_can_be_read_on_while_another_is_appended(tmp_path: Path) -> None:
    first, second = months(tmp_path)
    store = tmp_path / "out.zarr"
    write(first, store)
    dataset = open_dataset(store, cache_bytes=0)
    before = list(dataset)
    write(second, store)
    assert list(dataset) == before
    dataset.refresh()
    assert list(dataset)[: len(before)] == before
    assert len(dataset) > len(before)
