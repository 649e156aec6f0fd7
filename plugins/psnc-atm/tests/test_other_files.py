"""Files that come or go between two runs, for a sink that knows nothing of files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import pytest
from data import molecules, write_database

from psnc import Pipeline, Sink, Source, SourceError, run_pipeline
from psnc_atm import ASEDatabaseSource, ASELMDBSource, ASESource, AtomicData, ExtxyzSink


class Energies(Sink[AtomicData]):
    """Writes the energies of each index to a file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, items: Iterator[AtomicData], index: int) -> Path:
        self.directory.mkdir(exist_ok=True)
        path = self.directory / f"{index}.txt"
        path.write_text(" ".join(str(structure.energy) for structure in items))
        return path


def add(data: Path, *names: str) -> None:
    data.mkdir(exist_ok=True)
    for name in names:
        write_database(data / f"{name}.aselmdb", molecules(4, seed=ord(name)))


def run(data: Path, output: Path, jobs: int = 1, rows: int | None = None) -> Pipeline[Any]:
    pipeline = Pipeline(
        source=ASELMDBSource(data, rows),
        sink=Energies(output / "energies"),
        resume=True,
        db_dir=output,
    )
    run_pipeline(pipeline, n_jobs=jobs, progress=False)
    return pipeline


def written(output: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (output / "energies").iterdir()}


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("rows", [None, 2])
def test_a_file_in_front_of_those_that_are_done_is_refused(
    tmp_path: Path, jobs: int, rows: int | None
) -> None:
    add(tmp_path / "in", "b", "c")
    first = run(tmp_path / "in", tmp_path, jobs, rows)
    before, done = written(tmp_path), first.completed_indices
    add(tmp_path / "in", "a")
    with pytest.raises(SourceError, match=r"index 0 is a\.aselmdb.* was b\.aselmdb") as refused:
        run(tmp_path / "in", tmp_path, jobs, rows)
    assert "\n" not in str(refused.value)
    assert written(tmp_path) == before
    (tmp_path / "in/a.aselmdb").unlink()
    assert run(tmp_path / "in", tmp_path, jobs, rows).completed_indices == done


def test_a_file_that_went_is_refused_unless_none_comes_in_its_place(tmp_path: Path) -> None:
    add(tmp_path / "in", "b", "c")
    run(tmp_path / "in", tmp_path)
    (tmp_path / "in/c.aselmdb").unlink()
    run(tmp_path / "in", tmp_path)
    add(tmp_path / "in", "d")
    with pytest.raises(SourceError, match=r"index 1 is d\.aselmdb .* was c\.aselmdb"):
        run(tmp_path / "in", tmp_path)
    (tmp_path / "in/b.aselmdb").unlink()
    with pytest.raises(SourceError, match=r"index 0 is d\.aselmdb .* was b\.aselmdb"):
        run(tmp_path / "in", tmp_path)


def test_an_index_asked_for_by_itself_is_refused_and_stays_on_record(tmp_path: Path) -> None:
    add(tmp_path / "in", "b", "c")
    run(tmp_path / "in", tmp_path)
    add(tmp_path / "in", "a")
    pipeline = Pipeline(
        source=ASELMDBSource(tmp_path / "in"),
        sink=Energies(tmp_path / "energies"),
        resume=True,
        db_dir=tmp_path,
    )
    for index in (0, 2):
        with pytest.raises(SourceError, match=r"index 0 is a\.aselmdb"):
            _ = pipeline[index]
    assert pipeline.completed_indices == {0, 1}
    pipeline.reset()
    assert run(tmp_path / "in", tmp_path).completed_indices == {0, 1, 2}


@pytest.mark.parametrize("rows", [None, 2])
def test_files_behind_the_others_are_all_that_runs(tmp_path: Path, rows: int | None) -> None:
    add(tmp_path / "in", "b", "c")
    first = run(tmp_path / "in", tmp_path, rows=rows)
    times = [row.completed_at for row in first.metrics]
    add(tmp_path / "in", "d")
    second = run(tmp_path / "in", tmp_path, rows=rows)
    assert second.remaining_indices() == []
    assert len(second) == len(first) * 3 // 2
    assert [row.completed_at for row in second.metrics][: len(times)] == times


def test_files_may_come_before_one_that_is_not_done(tmp_path: Path) -> None:
    add(tmp_path / "in", "a")
    (tmp_path / "in/c.aselmdb").write_bytes(b"no database")
    assert run(tmp_path / "in", tmp_path).completed_indices == {0}
    (tmp_path / "in/c.aselmdb").unlink()
    add(tmp_path / "in", "b", "c")
    assert run(tmp_path / "in", tmp_path).completed_indices == {0, 1, 2}
    (tmp_path / "clean").mkdir()
    run(tmp_path / "in", tmp_path / "clean")
    assert written(tmp_path) == written(tmp_path / "clean")


def grown(path: Path, first: int, last: int) -> None:
    """Write some of the molecules behind those that a file has."""
    some = list(molecules(last))[first:]
    if path.suffix == ".extxyz":
        ase.io.write(path, some, append=True)
    else:
        with ase.db.connect(path) as database:
            for atoms in some:
                database.write(atoms)


SOURCES = {
    "a.aselmdb": (lambda path: ASELMDBSource(path, rows_per_index=2), "rows"),
    "a.db": (lambda path: ASEDatabaseSource(path, rows_per_index=2), "rows"),
    "a.extxyz": (lambda path: ASESource(path, frames_per_index=2), "frames"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_short_last_index_that_has_grown_is_refused(tmp_path: Path, name: str) -> None:
    make, unit = SOURCES[name]
    path = tmp_path / name

    def convert(output: Path) -> None:
        source: Source[AtomicData] = make(path)
        pipeline = Pipeline(source=source, sink=ExtxyzSink(output), resume=True, db_dir=output)
        run_pipeline(pipeline, progress=False)

    def energies(output: Path) -> list[float | None]:
        return [
            structure.energy for each in ASESource(output, pattern="*.extxyz") for structure in each
        ]

    grown(path, 0, 3)
    convert(tmp_path / "out")
    grown(path, 3, 6)
    with pytest.raises(SourceError) as refused:
        convert(tmp_path / "out")
    assert f"index 1 is {name}, {unit} 2 to 3 now, and was {name}, {unit} 2 to 2 when" in str(
        refused.value
    )
    convert(tmp_path / "anew")
    assert energies(tmp_path / "anew") == [atoms.get_potential_energy() for atoms in molecules(6)]


@pytest.mark.parametrize("name", SOURCES)
def test_a_full_last_index_leaves_room_for_more(tmp_path: Path, name: str) -> None:
    make, _ = SOURCES[name]
    grown(tmp_path / name, 0, 4)
    names = [make(tmp_path / name).index_name(index) for index in range(2)]
    grown(tmp_path / name, 4, 5)
    source = make(tmp_path / name)
    assert [source.index_name(index) for index in range(3)][:2] == names
