"""A store that a later run began to write anew, and the earlier run that is resumed after it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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

from psnc import Filter, Pipeline, Source, StageError, run_pipeline
from psnc_atm import ASELMDBSource, AtomicData, AtomicDataZarrSink, zarr_sink


class Flaky(Filter[AtomicData, AtomicData]):
    """Cannot do structures of one charge while a file is there."""

    def __init__(self, broken: Path, charge: int) -> None:
        self.broken, self.charge = broken, charge

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        for structure in items:
            if structure.charge == self.charge and self.broken.exists():
                raise OSError("not at the moment")
            yield structure


class Keep(Filter[AtomicData, AtomicData]):
    """Keeps structures of at most so many atoms."""

    def __init__(self, at_most: int) -> None:
        self.at_most = at_most

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        return (structure for structure in items if len(structure) <= self.at_most)


def pipeline_of(
    data: Path, output: Path, *filters: Filter[Any, Any], **options: Any
) -> Pipeline[Any]:
    return Pipeline(
        source=ASELMDBSource(data),
        filters=filters,
        sink=AtomicDataZarrSink(output / "out.zarr", atoms_per_chunk=64, systems_per_chunk=8),
        **{"resume": True, "db_dir": output, **options},
    )


def run(pipeline: Pipeline[Any], n_jobs: int = 1) -> list[list[str]]:
    return run_pipeline(pipeline, n_jobs=n_jobs, progress=False)


def times(pipeline: Pipeline[Any]) -> list[str]:
    return [row.completed_at for row in pipeline.metrics]


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_failed_fresh_run_took_away_is_all_that_a_resumed_run_writes_again(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, jobs: int
) -> None:
    flaky = Flaky(tmp_path / "broken", charge=1)
    first = pipeline_of(dataset, tmp_path, flaky)
    run(first)
    before, first_times = contents(tmp_path / "out.zarr"), times(first)
    (tmp_path / "broken").touch()
    fresh = pipeline_of(dataset, tmp_path, flaky, resume=False)
    run(fresh, jobs)
    assert fresh.failed_indices == {2: "OSError: not at the moment"}
    assert not contents(tmp_path / "out.zarr")["meta/samples_mask"].all()
    # It is lost as long as the trouble lasts, and that is what is said.
    still_broken = pipeline_of(dataset, tmp_path, flaky)
    assert run(still_broken, jobs)[2] == []
    assert still_broken.completed_indices == {0, 1, 3, 4}
    assert "out.zarr" in caplog.text
    assert "index 2 " in caplog.text
    (tmp_path / "broken").unlink()
    caplog.clear()
    resumed = pipeline_of(dataset, tmp_path, flaky)
    assert run(resumed, jobs) == [[str(tmp_path / "out.zarr")]] * 5
    after = contents(tmp_path / "out.zarr")
    assert all((before[name] == after[name]).all() for name in before)
    resumed_times = times(resumed)
    assert resumed_times.pop(2) > first_times.pop(2)
    assert resumed_times == first_times
    assert caplog.text == ""


def test_an_index_in_a_loop_of_ones_own_is_written_again_too(dataset: Path, tmp_path: Path) -> None:
    flaky = Flaky(tmp_path / "broken", charge=1)
    run(pipeline_of(dataset, tmp_path, flaky))
    (tmp_path / "broken").touch()
    run(pipeline_of(dataset, tmp_path, flaky, resume=False))
    (tmp_path / "broken").unlink()
    resumed = pipeline_of(dataset, tmp_path, flaky)
    assert [resumed[index] for index in range(5)] == [[str(tmp_path / "out.zarr")]] * 5
    assert contents(tmp_path / "out.zarr")["meta/samples_mask"].all()


def test_an_index_of_which_nothing_was_kept_is_not_taken_for_lost(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = pipeline_of(dataset, tmp_path, Keep(0))
    run(first)
    again = pipeline_of(dataset, tmp_path, Keep(0))
    run(again)
    assert times(again) == times(first)
    # Nor after it was written over by a run that did the same.
    run(pipeline_of(dataset, tmp_path, Keep(0), resume=False))
    run(again)
    assert times(again) == times(first)
    assert caplog.text == ""


def test_what_was_written_over_with_other_filters_is_written_again(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(pipeline_of(dataset, tmp_path, Keep(5)))
    before = contents(tmp_path / "out.zarr")
    run_pipeline(pipeline_of(dataset, tmp_path, Keep(3)), indices=[0, 1, 3], progress=False)
    run(pipeline_of(dataset, tmp_path, Keep(5)))
    after = contents(tmp_path / "out.zarr")
    for name in ("meta/samples_mask", "meta/atoms_mask", "meta/atoms_ptr", "psnc/written"):
        assert (before[name] == after[name]).all(), name
    assert "indices 0-1, 3 " in caplog.text


class Same(Source[AtomicData]):
    """Says nothing of its input but how much there is."""

    def __init__(self, energy: float) -> None:
        self.energy = energy

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Iterator[AtomicData]:
        for atoms in molecules(3):
            atoms.calc.results["energy"] = self.energy
            yield AtomicData.from_ase(atoms)


def test_what_was_written_over_from_another_source_is_written_again(tmp_path: Path) -> None:
    sink = AtomicDataZarrSink(tmp_path / "out.zarr")
    for energy in (1.0, 2.0, 1.0):
        run(Pipeline(source=Same(energy), sink=sink, resume=True, db_dir=tmp_path))
        assert (contents(tmp_path / "out.zarr")["core/energy"] == energy).all()


def test_untracked_runs_need_no_hash_and_leave_nothing_to_be_taken_for_done(
    dataset: Path, tmp_path: Path
) -> None:
    first = pipeline_of(dataset, tmp_path)
    run(first)
    before, first_times = contents(tmp_path / "out.zarr"), times(first)
    untracked = pipeline_of(
        dataset, tmp_path, Flaky(tmp_path / "broken", charge=lambda: 0), track_metrics=False
    )
    run_pipeline(untracked, indices=[1], progress=False)
    run(first)
    assert [one != other for one, other in zip(times(first), first_times, strict=True)] == [
        index == 1 for index in range(5)
    ]
    after = contents(tmp_path / "out.zarr")
    assert all((before[name] == after[name]).all() for name in before)


def test_a_file_mended_under_a_store_laid_out_without_it_is_written(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=3, rows=10)
    run(pipeline_of(data, tmp_path))
    whole = contents(tmp_path / "out.zarr")
    (tmp_path / "out.zarr").rename(tmp_path / "gone.zarr")
    path = data / "data0001.aselmdb"
    content = path.read_bytes()
    os.truncate(path, len(content) // 2)
    fresh = pipeline_of(data, tmp_path, resume=False)
    run(fresh)
    assert fresh.completed_indices == {0, 2}
    path.write_bytes(content)
    run(pipeline_of(data, tmp_path))
    assert_same_store(tmp_path / "out.zarr", tmp_path / "gone.zarr")
    assert whole["meta/samples_mask"].all()


def test_a_written_index_whose_file_changes_is_refused_though_nothing_of_it_was_kept(
    tmp_path: Path,
) -> None:
    data = write_dataset(tmp_path / "in", files=2, rows=10)
    run(pipeline_of(data, tmp_path, Keep(0)))
    write_database(data / "data0001.aselmdb", molecules(3))
    with pytest.raises(StageError, match=r"data0001\.aselmdb changed"):
        run(pipeline_of(data, tmp_path, Keep(0)))


def test_what_is_written_is_still_known_after_the_store_was_laid_out_anew(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "in", files=3, rows=20)
    path = data / "data0001.aselmdb"
    value = raw_row(path, b"9")
    change_raw_row(path, b"9", b"\0" + value[1:])
    run(pipeline_of(data, tmp_path))
    change_raw_row(path, b"9", value)
    run(pipeline_of(data, tmp_path))
    marks = contents(tmp_path / "out.zarr")["psnc/written"]
    assert marks.all()
    assert len(set(marks.tolist())) == 1


def test_a_store_of_the_first_format_is_refused_in_one_line(dataset: Path, tmp_path: Path) -> None:
    run(pipeline_of(dataset, tmp_path))
    for path in (tmp_path / "out.zarr/zarr.json", tmp_path / "out.zarr/psnc/zarr.json"):
        path.write_text(path.read_text().replace('"format": 3', '"format": 1'))
    with pytest.raises(StageError, match=r"out\.zarr has format 1.*choose another") as refused:
        run(pipeline_of(dataset, tmp_path))
    assert "\n" not in str(refused.value)


def _has_hole(store: Path) -> bool:
    mask = zarr.open_group(store, mode="r")["meta/samples_mask"]
    assert isinstance(mask, zarr.Array)
    return not bool(mask[:].all())  # type: ignore[union-attr]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_fresh_run_that_is_killed_costs_an_earlier_one_nothing(
    dataset: Path, tmp_path: Path, jobs: int
) -> None:
    store = tmp_path / "out.zarr"
    run(pipeline_of(dataset, tmp_path))
    before = contents(store)
    script = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
from test_written_over import pipeline_of, run
if __name__ == "__main__":
    while True:
        run(pipeline_of(Path({str(dataset)!r}), Path({str(tmp_path)!r}), resume=False), {jobs})
"""
    (tmp_path / "script.py").write_text(script)
    holes = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py")], start_new_session=True
        )
        while process.poll() is None and not _has_hole(store):
            time.sleep(0.001)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        holes += _has_hole(store)
        resumed = pipeline_of(dataset, tmp_path)
        assert run(resumed, jobs) == [[str(store)]] * 5
        after = contents(store)
        assert all((before[name] == after[name]).all() for name in before)
    assert holes


def test_the_warning_comes_from_the_plugins_own_logger(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(pipeline_of(dataset, tmp_path, Keep(5)))
    run(pipeline_of(dataset, tmp_path, Keep(3)))
    run(pipeline_of(dataset, tmp_path, Keep(5)))
    [entry] = caplog.records
    assert (entry.name, entry.levelno) == ("psnc_atm", logging.WARNING)
    assert "indices 0-4 " in entry.message


def test_what_another_driver_runs_again_meanwhile_is_not_taken_for_lost(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (pipeline_of(dataset, tmp_path) for _ in range(2))
    run(first)
    look_at_marks = zarr_sink._marks

    def look_as_it_runs_again(store: Any) -> Any:
        monkeypatch.undo()
        first.reset_index(0)
        store.mask_out(0)
        seen = look_at_marks(store)
        assert first[0]
        return seen

    monkeypatch.setattr(zarr_sink, "_marks", look_as_it_runs_again)
    run_pipeline(second, indices=[1], progress=False)
    assert len(first.completed_indices) == len(first.source)
