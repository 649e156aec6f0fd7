from __future__ import annotations

import json
import multiprocessing
import os
import shutil
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

from psnc import Pipeline, SourceError, StageError, run_pipeline
from psnc_atm import ASELMDBSource, AtomicData, AtomicDataZarrSink
from psnc_atm.lmdb_header import read_header
from psnc_atm.zarr_relayout import changed_indices

# What the store was laid out for before stays in front of what it is laid out for now.
IDENTITY = ("psnc/identity",)


def pipeline_with(
    data: Path, output: Path, rows: int | None = None, resume: bool = True
) -> Pipeline[Any]:
    return Pipeline(
        source=ASELMDBSource(data, rows_per_index=rows),
        sink=AtomicDataZarrSink(output / "out.zarr", atoms_per_chunk=64, systems_per_chunk=8),
        resume=resume,
        db_dir=output,
    )


def convert(data: Path, output: Path, n_jobs: int = 1, rows: int | None = None) -> Pipeline[Any]:
    """Run on from what is there, as the same command given again does."""
    pipeline = pipeline_with(data, output, rows)
    run_pipeline(pipeline, n_jobs=n_jobs, progress=False)
    return pipeline


def damaged_copy(path: Path, kind: str) -> bytes:
    """Damage a file and return what it was."""
    whole = path.read_bytes()
    if kind == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "no LMDB file":
        path.write_bytes(b"x" * len(whole))
    else:
        value = raw_row(path, b"9")
        damaged = value[: len(value) // 2] if kind == "row" else b"\0" + value[1:]
        change_raw_row(path, b"9", damaged)
    return whole


@pytest.mark.parametrize(
    ("kind", "damaged", "jobs"),
    [
        ("truncated", [0], 1),
        ("truncated", [0, 2], 2),
        ("no LMDB file", [2], 1),
        ("row", [1], 1),
        ("head of row", [1], 2),
    ],
)
def test_a_repaired_file_is_all_that_runs_and_the_store_is_that_of_a_clean_run(
    tmp_path: Path, damaged: list[int], kind: str, jobs: int
) -> None:
    data = write_dataset(tmp_path / "in", files=3, rows=20)
    paths = [data / f"data{number:04}.aselmdb" for number in damaged]
    whole = {path: damaged_copy(path, kind) for path in paths}
    pipeline = convert(data, tmp_path, jobs)
    assert pipeline.failed_indices.keys() == set(damaged)
    for path, content in whole.items():
        path.write_bytes(content)
    before = {i: row.completed_at for i, row in enumerate(pipeline.metrics) if i not in damaged}
    pipeline = convert(data, tmp_path, jobs)
    assert pipeline.completed_indices == {0, 1, 2}
    after = {i: row.completed_at for i, row in enumerate(pipeline.metrics) if i not in damaged}
    assert after == before
    (tmp_path / "clean").mkdir()
    convert(data, tmp_path / "clean")
    # The damage in place changed the files' own counters, which the plan remembers.
    assert_same_content(tmp_path / "out.zarr", tmp_path / "clean/out.zarr")


def assert_same_content(one: Path, other: Path) -> None:
    ours, theirs = contents(one), contents(other)
    for arrays in (ours, theirs):
        arrays.pop("psnc/identity")
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values.dtype == theirs[name].dtype, name
        assert values.shape == theirs[name].shape, name
        assert (values == theirs[name]).all(), name


def test_a_bad_row_may_be_deleted_instead(tmp_path: Path) -> None:
    import ase.db

    data = write_dataset(tmp_path / "in", files=3, rows=20)
    damaged_copy(data / "data0001.aselmdb", "row")
    assert list(convert(data, tmp_path).failed_indices) == [1]
    with ase.db.connect(data / "data0001.aselmdb", type="aselmdb") as database:
        database.delete([9])
    assert convert(data, tmp_path).completed_indices == {0, 1, 2}
    (tmp_path / "clean").mkdir()
    convert(data, tmp_path / "clean")
    assert_same_store(tmp_path / "out.zarr", tmp_path / "clean/out.zarr")


def test_files_that_are_added_behind_the_others_are_all_that_runs(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=2, rows=15)
    first = convert(data, tmp_path)
    times = [row.completed_at for row in first.metrics]
    write_database(data / "data0002.aselmdb", molecules(11, seed=9), data={"charge": 1, "gap": 0.0})
    second = convert(data, tmp_path)
    assert second.completed_indices == {0, 1, 2}
    assert [row.completed_at for row in second.metrics][:2] == times
    (tmp_path / "clean").mkdir()
    convert(data, tmp_path / "clean")
    assert_same_store(tmp_path / "out.zarr", tmp_path / "clean/out.zarr", apart_from=IDENTITY)


def test_a_file_that_comes_in_between_is_refused(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=2, rows=15)
    convert(data, tmp_path)
    before = contents(tmp_path / "out.zarr")
    write_database(data / "data0000b.aselmdb", molecules(5))
    with pytest.raises(SourceError, match=r"index 1 is data0000b\.aselmdb now"):
        convert(data, tmp_path)
    # Nor does a run take it that has nothing on record.
    with pytest.raises(StageError, match=r"data0000b\.aselmdb is new"):
        run_pipeline(pipeline_with(data, tmp_path, resume=False), progress=False)
    after = contents(tmp_path / "out.zarr")
    assert all((before[name] == after[name]).all() for name in before)


def test_a_file_that_changed_after_it_was_written_is_refused(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=2, rows=15)
    convert(data, tmp_path)
    write_database(data / "more.aselmdb", molecules(5))
    write_database(data / "data0001.aselmdb", molecules(3))  # three rows more
    with pytest.raises(StageError, match=r"data0001\.aselmdb changed"):
        convert(data, tmp_path)


def test_a_file_that_was_made_anew_with_as_many_molecules_is_refused(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=3, rows=15)
    convert(data, tmp_path)
    path = data / "data0002.aselmdb"
    before = read_header(path)
    path.unlink()
    write_database(path, molecules(15, seed=2), data={"charge": 1, "gap": 0.5})
    assert read_header(path) == before
    with pytest.raises(StageError, match=r"data0002\.aselmdb changed"):
        convert(data, tmp_path)


def test_with_several_indices_a_file_a_repair_is_refused(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=3, rows=20)
    path = data / "data0001.aselmdb"
    whole = damaged_copy(path, "truncated")
    convert(data, tmp_path, rows=5)
    path.write_bytes(whole)
    # What was one unreadable index would now be four, and all numbers behind it would change.
    with pytest.raises(SourceError, match=r"index 5 is data0001\.aselmdb, rows 5 to 9 now"):
        convert(data, tmp_path, rows=5)
    with pytest.raises(StageError, match=r"data0001\.aselmdb changed"):
        run_pipeline(pipeline_with(data, tmp_path, rows=5, resume=False), progress=False)


def _convert_in_child(data: Path, output: Path) -> None:
    convert(data, output)


def _files_below(directory: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(directory))


def _which(store: Path) -> int:
    return (store / "psnc" / "zarr.json").stat().st_ino


def _kill_at(share: float, data: Path, output: Path, files_at_the_end: int) -> Path | None:
    """Kill a run that lays a store out anew, and return what it left behind, if anything.

    The draft then has that share of the files that it has at the end, or more; at 1 the two stores
    have changed places, or are about to.
    """
    earlier = set(output.glob(".out.zarr.*.draft"))
    before = _which(output / "out.zarr")
    child = multiprocessing.get_context("spawn").Process(
        target=_convert_in_child, args=(data, output)
    )
    child.start()
    drafts: set[Path] = set()
    while not drafts and child.is_alive():
        drafts = set(output.glob(".out.zarr.*.draft")) - earlier
    assert drafts, "the run ended without laying the store out anew"
    [draft] = drafts
    while (
        child.is_alive()
        and _files_below(draft) < share * files_at_the_end
        and _which(output / "out.zarr") == before
    ):
        pass
    child.kill()
    child.join()
    return draft if draft.exists() else None


@pytest.mark.skipif(sys.platform != "linux", reason="exchanges directories in one step on Linux")
def test_a_kill_while_it_is_laid_out_anew_loses_nothing(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=6, rows=40)
    path = data / "data0002.aselmdb"
    whole = damaged_copy(path, "truncated")
    output, kept = tmp_path / "out", tmp_path / "kept"
    convert(data, output)
    shutil.copytree(output, kept)
    path.write_bytes(whole)
    convert(data, tmp_path / "clean")
    # All but the damaged file's share of the chunks.
    files_at_the_end = _files_below(kept / "out.zarr")
    laid_out = _which(output / "out.zarr")
    hit = []
    for share in (0.01, 0.3, 0.5, 0.7, 0.9, 1):
        left = _kill_at(share, data, output, files_at_the_end)
        assert contents(output / "out.zarr")["meta/samples_mask"].sum() >= 200
        if _which(output / "out.zarr") == laid_out:
            assert left is not None
            hit.append(_files_below(left) / files_at_the_end)
            continue
        # The kill came with the exchange, or after: what it left is finished, and begun again.
        assert convert(data, output).completed_indices == set(range(6))
        assert_same_content(output / "out.zarr", tmp_path / "clean/out.zarr")
        shutil.rmtree(output)
        shutil.copytree(kept, output)
        laid_out = _which(output / "out.zarr")
    assert any(0.3 < share < 1 for share in hit), hit
    assert convert(data, output).completed_indices == set(range(6))
    assert_same_content(output / "out.zarr", tmp_path / "clean/out.zarr")


def pipeline_of(data: Path, output: Path, chunks: int) -> Pipeline[Any]:
    return Pipeline(
        source=ASELMDBSource(data),
        sink=AtomicDataZarrSink(
            output / "out.zarr", atoms_per_chunk=chunks, systems_per_chunk=chunks
        ),
        resume=True,
        db_dir=output,
    )


@pytest.mark.parametrize("chunks", [8, 10_000])
def test_whoever_was_at_work_goes_on_in_the_store_that_was_laid_out_anew(
    tmp_path: Path, chunks: int
) -> None:
    data = write_dataset(tmp_path / "in", files=6, rows=20)
    path = data / "data0002.aselmdb"
    whole = damaged_copy(path, "truncated")
    first = pipeline_of(data, tmp_path, chunks)
    _ = first[0]
    path.write_bytes(whole)
    second = pipeline_of(data, tmp_path, chunks)
    _ = second[2]
    for index in (1, 3, 4, 5):  # with the layout that it has known from the start
        _ = first[index]
    assert second.completed_indices == set(range(6))
    (tmp_path / "clean").mkdir()
    convert(data, tmp_path / "clean")
    assert_same_content(tmp_path / "out.zarr", tmp_path / "clean/out.zarr")


@pytest.mark.parametrize("what", ["repaired", "added"])
def test_an_index_that_is_half_written_goes_on_in_the_new_layout(tmp_path: Path, what: str) -> None:
    # So many that most of them are written before the layout changes.
    data = write_dataset(tmp_path / "in", files=4, rows=400)
    path = data / "data0001.aselmdb"
    whole = damaged_copy(path, "truncated")
    first = pipeline_of(data, tmp_path, 16)
    assert first.sink is not None
    first.sink.prepare(first)

    def while_others_change_the_layout() -> Iterator[AtomicData]:
        for number, structure in enumerate(first.items(2)):
            if number == 300:
                if what == "repaired":
                    path.write_bytes(whole)
                else:
                    write_database(data / "e.aselmdb", molecules(9), data={"charge": 1, "gap": 0})
                second = pipeline_of(data, tmp_path, 16)
                _ = second[3]
            yield structure

    first.sink(while_others_change_the_layout(), 2)
    path.write_bytes(whole)
    assert convert_with(data, tmp_path, 16).completed_indices >= {0, 1, 2, 3}
    convert_with(data, tmp_path / "clean", 16)
    assert_same_content(tmp_path / "out.zarr", tmp_path / "clean/out.zarr")


def convert_with(data: Path, output: Path, chunks: int) -> Pipeline[Any]:
    pipeline = pipeline_of(data, output, chunks)
    run_pipeline(pipeline, progress=False)
    return pipeline


def test_a_store_that_is_replaced_under_a_half_written_index_does_not_count_it_as_whole(
    tmp_path: Path,
) -> None:
    data = write_dataset(tmp_path / "in", files=2, rows=400)
    pipeline = pipeline_of(data, tmp_path, 16)
    sink = pipeline.sink
    assert sink is not None
    sink.prepare(pipeline)

    def while_the_store_is_made_anew() -> Iterator[AtomicData]:
        for number, structure in enumerate(pipeline.items(1)):
            if number == 300:
                shutil.rmtree(tmp_path / "out.zarr")
                AtomicDataZarrSink(
                    tmp_path / "out.zarr", atoms_per_chunk=16, systems_per_chunk=16
                ).prepare(pipeline)
            yield structure

    with pytest.raises(StageError, match="was replaced while it was written to; run index 1 again"):
        sink(while_the_store_is_made_anew(), 1)
    assert not contents(tmp_path / "out.zarr")["meta/samples_mask"].any()


def test_a_store_of_the_format_before_is_continued_and_laid_out_anew_when_it_grows(
    tmp_path: Path,
) -> None:
    data = write_dataset(tmp_path / "in", files=3, rows=20)
    first = pipeline_of(data, tmp_path, 16)
    run_pipeline(first, indices=[0, 2], progress=False)
    as_in_format_2(tmp_path / "out.zarr")
    assert convert_with(data, tmp_path, 16).completed_indices == {0, 1, 2}
    assert '"format": 2' in (tmp_path / "out.zarr/psnc/zarr.json").read_text()
    write_database(data / "e.aselmdb", molecules(9), data={"charge": 1, "gap": 0.0})
    assert convert_with(data, tmp_path, 16).completed_indices == {0, 1, 2, 3}
    convert_with(data, tmp_path / "clean", 16)
    assert_same_content(tmp_path / "out.zarr", tmp_path / "clean/out.zarr")
    assert '"format": 3' in (tmp_path / "out.zarr/psnc/zarr.json").read_text()


def as_in_format_2(store: Path) -> None:
    """Have a store say of itself what one of format 2 said."""
    path = store / "psnc" / "zarr.json"
    metadata = json.loads(path.read_text())
    attributes = metadata["attributes"]
    for key in ("indices", "parts", "follows"):
        del attributes[key]
    for field in attributes["fields"]:
        del field["presence_of"], field["may_be_missing"]
    attributes["format"] = 2
    path.write_text(json.dumps(metadata, indent=2))
    identity = json.loads(contents(store)["psnc/identity"].tobytes())
    for key in ("shard_rows", "codec", "missing"):
        del identity[key]
    shutil.rmtree(store / "psnc/identity")
    text = np.frombuffer(json.dumps(identity).encode(), dtype=np.uint8)
    zarr.open_group(store / "psnc", use_consolidated=False).create_array("identity", data=text)


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=2, rows=20)
    pipeline = pipeline_of(data, tmp_path, 10_000)
    _ = pipeline[0]
    chunk = tmp_path / "out.zarr/core/positions/c.0.0"
    chunk.write_bytes(b"no chunk")
    run_pipeline(pipeline, progress=False)
    failed = pipeline.failed_indices[1]
    assert failed.startswith(f"StageError: {chunk} cannot be decoded (")
    assert "\n" not in failed


def test_a_file_that_was_only_busy_gets_its_room_later(tmp_path: Path) -> None:
    import ase.db

    data = write_dataset(tmp_path / "in", files=3, rows=20)
    busy = ase.db.connect(data / "data0001.aselmdb", type="aselmdb", readonly=True)
    assert busy.count() == 20
    failed = convert(data, tmp_path).failed_indices
    assert list(failed) == [1]
    busy.close()
    assert convert(data, tmp_path).completed_indices == {0, 1, 2}
    (tmp_path / "clean").mkdir()
    convert(data, tmp_path / "clean")
    assert_same_content(tmp_path / "out.zarr", tmp_path / "clean/out.zarr")


def test_a_store_that_a_killed_process_had_put_aside_is_taken_back(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=3, rows=10)
    convert(data, tmp_path)
    before = contents(tmp_path / "out.zarr")
    (tmp_path / "out.zarr").rename(tmp_path / ".out.zarr.previous")
    assert convert(data, tmp_path).completed_indices == {0, 1, 2}
    after = contents(tmp_path / "out.zarr")
    assert all((before[name] == after[name]).all() for name in before)


def test_what_stands_in_the_way_is_named_not_what_may_change(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=3, rows=10)
    whole = damaged_copy(data / "data0000.aselmdb", "truncated")
    convert(data, tmp_path)
    (data / "data0000.aselmdb").write_bytes(whole)  # this alone would be fine
    write_database(data / "data0001b.aselmdb", molecules(5))
    with pytest.raises(SourceError, match=r"index 2 is data0001b\.aselmdb now"):
        convert(data, tmp_path)
    (data / "data0001b.aselmdb").unlink()
    write_database(data / "data0001.aselmdb", molecules(3))
    with pytest.raises(StageError, match=r"data0001\.aselmdb changed"):
        convert(data, tmp_path)


def test_a_store_is_checked_though_nothing_is_left_to_run(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=2, rows=10)
    convert(data, tmp_path)
    write_database(data / "data0001.aselmdb", molecules(3))
    with pytest.raises(StageError, match=r"data0001\.aselmdb changed"):
        convert(data, tmp_path)
    shutil.rmtree(tmp_path / "out.zarr")
    with pytest.raises(StageError, match="does not exist, but 2 of its indices"):
        convert(data, tmp_path)


def test_changed_indices_are_none_where_numbers_lose_their_meaning() -> None:
    then: dict[str, Any] = {
        "fields": None,
        "input": {"rows_per_index": None, "files": [["a", 1, 1]]},
    }
    same = {"rows_per_index": None, "files": [["a", 1, 1]]}
    assert changed_indices(then, {**then, "input": same}) == set()
    longer = {**same, "files": [["a", 2, 1], ["b", 1, 1]]}
    assert changed_indices(then, {**then, "input": longer}) == {0, 1}
    assert changed_indices(then, {**then, "fields": ["energy"]}) is None
    assert changed_indices(then, {**then, "input": {**same, "files": [["b", 1, 1]]}}) is None
    assert changed_indices(then, {**then, "input": {"indices": 3}}) is None
