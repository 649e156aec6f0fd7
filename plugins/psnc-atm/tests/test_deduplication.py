"""Structures that are there twice, in one index or in several."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve
from data import assert_same_store, contents, molecules, write_database
from hypothesis import given
from hypothesis import strategies as st
from structures import Structures, molecule

from psnc import Pipeline, Source, run_pipeline
from psnc.errors import ConfigurationError, SourceError
from psnc.testing import check_filter, check_sink, check_source
from psnc_atm import (
    ASELMDBSource,
    AtomicData,
    AtomicDataZarrSink,
    DropDuplicates,
    StructureHashSink,
    UniqueStructures,
)
from psnc_atm.structure_hash import StructureHash

Places = list[list[int]]


class Numbered(Source[AtomicData]):
    """Indices of structures, each told by a number: equal numbers, equal structures."""

    def __init__(self, indices: Sequence[Sequence[int]]) -> None:
        self.indices = [list(numbers) for numbers in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Iterator[AtomicData]:
        for place, number in enumerate(self.indices[index]):
            # Energies differ, so that it can be told which of the same structures is kept.
            yield molecule([1 + number % 90, 8], seed=number, energy=100.0 * index + place)


def hashed(source: Source[AtomicData], directory: Path, **options: Any) -> Path:
    made = Pipeline(
        source=source, sink=StructureHashSink(directory, **options), track_metrics=False
    )
    for index in range(len(source)):
        made[index]
    return directory


def kept(source: Source[AtomicData]) -> Places:
    """By the energies that `Numbered` gives, which structures are kept."""
    return [
        [int(one.energy) % 100 for one in source[index] if one.energy is not None]
        for index in range(len(source))
    ]


def first_places(indices: Sequence[Sequence[int]]) -> Places:
    seen: set[int] = set()
    places: Places = []
    for numbers in indices:
        places.append([])
        for place, number in enumerate(numbers):
            if number not in seen:
                places[-1].append(place)
            seen.add(number)
    return places


# --- what is the same -------------------------------------------------------------------------

CRYSTAL = molecule([11, 17, 8], cell=np.eye(3) * 4, pbc=np.array([True, True, False]), charge=1.0)
ORDER = [2, 0, 1]


@pytest.mark.parametrize(
    "other",
    [
        evolve(CRYSTAL, positions=CRYSTAL.positions.copy()),
        evolve(CRYSTAL, energy=1.0, info={"name": "another calculation"}),
        evolve(CRYSTAL, positions=np.round(CRYSTAL.positions, 6)),
        evolve(
            CRYSTAL,
            atomic_numbers=CRYSTAL.atomic_numbers[ORDER],
            positions=CRYSTAL.positions[ORDER],
        ),
        evolve(CRYSTAL, cell=np.diag([4.0, 4.0, 99.0])),
    ],
)
def test_the_same_structures(other: AtomicData) -> None:
    assert StructureHash()(other) == StructureHash()(CRYSTAL)


@pytest.mark.parametrize(
    "other",
    [
        evolve(CRYSTAL, positions=CRYSTAL.positions + 2e-6),
        evolve(CRYSTAL, atomic_numbers=np.array([11, 17, 16])),
        evolve(CRYSTAL, atomic_numbers=CRYSTAL.atomic_numbers[ORDER]),
        evolve(CRYSTAL, cell=np.diag([4.0, 4.1, 4.0])),
        evolve(CRYSTAL, pbc=np.array([True, True, True])),
        evolve(CRYSTAL, charge=0.0),
        evolve(CRYSTAL, charge=None),
        evolve(CRYSTAL, spin=1.0),
    ],
)
def test_other_structures(other: AtomicData) -> None:
    assert StructureHash()(other) != StructureHash()(CRYSTAL)


def test_what_counts_can_be_chosen() -> None:
    moved = evolve(CRYSTAL, positions=CRYSTAL.positions + 1e-4)
    coarse = StructureHash(decimals=1)
    assert coarse(evolve(moved, positions=np.round(moved.positions, 1))) == coarse(
        evolve(CRYSTAL, positions=np.round(moved.positions, 1))
    )
    reordered = evolve(
        CRYSTAL, atomic_numbers=CRYSTAL.atomic_numbers[ORDER], positions=CRYSTAL.positions[ORDER]
    )
    in_order = StructureHash(any_atom_order=False)
    assert in_order(reordered) != in_order(CRYSTAL)
    assert in_order(evolve(CRYSTAL)) == in_order(CRYSTAL)
    neutral = evolve(CRYSTAL, charge=0.0)
    assert StructureHash(fields=())(neutral) == StructureHash(fields=())(CRYSTAL)
    by_forces = StructureHash(fields=("forces",))
    forces = np.arange(9.0).reshape(3, 3)
    assert by_forces(evolve(CRYSTAL, forces=forces)) == by_forces(
        evolve(reordered, forces=forces[ORDER])
    )
    assert by_forces(evolve(CRYSTAL, forces=forces)) != by_forces(CRYSTAL)


def test_zeros_of_both_signs_are_the_same() -> None:
    structures = [molecule([1], positions=np.array([[0.0, x, 0.0]])) for x in (0.0, -0.0, -1e-9)]
    assert len(set(map(StructureHash(), structures))) == 1


# --- in one index -----------------------------------------------------------------------------


def test_the_filter_keeps_the_rules() -> None:
    check_filter(DropDuplicates(), Numbered([[1, 2, 1], [], [2, 2]]), lazy=True)


def test_the_first_in_an_index_is_kept() -> None:
    source = Numbered([[5, 5, 2, 5, 2, 3], [5]])
    found = [
        [int(one.energy) % 100 for one in DropDuplicates()(source[index]) if one.energy is not None]
        for index in range(2)
    ]
    assert found == [[0, 2, 5], [0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": ["chrage"]}, "unknown field 'chrage'; choose from energy"),
        ({"decimals": -1}, "decimals is -1; give a number from 0 to 15"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DropDuplicates(**options)
    with pytest.raises(ConfigurationError, match=message):
        StructureHashSink("hashes", **options)


# --- in several indices -----------------------------------------------------------------------


def test_the_sink_and_the_source_keep_the_rules(tmp_path: Path) -> None:
    source = Numbered([[1, 2, 1], [3, 2], [], [4, 1]])
    check_sink(lambda directory: StructureHashSink(directory / "hashes"), source)
    check_source(UniqueStructures(source, hashed(source, tmp_path / "hashes")))


@given(indices=st.lists(st.lists(st.integers(0, 6), max_size=6), max_size=6))
def test_the_first_of_all_is_kept(
    tmp_path_factory: pytest.TempPathFactory, indices: list[list[int]]
) -> None:
    source = Numbered(indices)
    directory = hashed(source, tmp_path_factory.mktemp("hashes"))
    unique = UniqueStructures(source, directory)
    assert kept(unique) == first_places(indices)
    for index, places in enumerate(first_places(indices)):
        assert unique.atom_counts(index).tolist() == [2] * len(places)


def test_hashes_that_are_missing(tmp_path: Path) -> None:
    source = Numbered([[1], [2]])
    hashed(source, tmp_path)
    (tmp_path / "1.npz").unlink()
    with pytest.raises(SourceError, match=r"1\.npz does not exist: run the pipeline that ends in"):
        list(UniqueStructures(source, tmp_path)[0])


@pytest.mark.parametrize("content", [b"", b"no zip file", b"PK\x03\x04"])
def test_hashes_that_are_damaged(tmp_path: Path, content: bytes) -> None:
    source = Numbered([[1], [2]])
    hashed(source, tmp_path)
    (tmp_path / "1.npz").write_bytes(content)
    with pytest.raises(SourceError, match=r"1\.npz holds no hashes"):
        list(UniqueStructures(source, tmp_path)[0])


def test_hashes_of_other_structures(tmp_path: Path) -> None:
    hashed(Numbered([[1, 2, 3], [4]]), tmp_path)
    for other, message in (
        ([[1, 5, 3], [4]], r"0\.npz: structure 1 \(\w+\) of index 0 is not what the hashes"),
        ([[1, 2], [4]], r"0\.npz: the number of structures of index 0 is not what"),
        ([[1, 2, 3, 4], [4]], r"0\.npz: the number of structures of index 0 is not what"),
    ):
        unique = UniqueStructures(Numbered(other), tmp_path)
        with pytest.raises(SourceError, match=message):
            list(unique[0])


def test_hashes_of_two_kinds(tmp_path: Path) -> None:
    source = Numbered([[1], [2]])
    hashed(source, tmp_path / "fine")
    hashed(source, tmp_path / "coarse", decimals=1)
    os.replace(tmp_path / "coarse" / "1.npz", tmp_path / "fine" / "1.npz")
    with pytest.raises(SourceError, match=r"1\.npz: hashes of another kind"):
        list(UniqueStructures(source, tmp_path / "fine")[0])


def test_a_run_is_not_resumed_where_something_else_is_kept(tmp_path: Path) -> None:
    def run(indices: list[list[int]]) -> Places:
        source = Numbered([[0]])
        source.indices = indices  # as files that come and go
        made = Pipeline(
            source=UniqueStructures(source, hashed(source, tmp_path / "hashes")),
            sink=StructureHashSink(tmp_path / "again"),
            resume=True,
            db_dir=tmp_path / "db",
        )
        run_pipeline(made, progress=False)
        return kept(made.source)

    assert run([[1, 2], [2, 3]]) == [[0, 1], [1]]
    # More behind them changes nothing of what is completed.
    assert run([[1, 2], [2, 3], [3, 4]]) == [[0, 1], [1], [1]]
    with pytest.raises(SourceError, match=r"index 1 is index 1 \(2 of 2, .*was index 1 \(1 of 2,"):
        run([[1, 9], [2, 3], [3, 4]])


# --- into a store -----------------------------------------------------------------------------


@pytest.fixture
def with_duplicates(tmp_path: Path) -> Path:
    """Three files, in which each molecule of the second is in another one too."""
    directory = tmp_path / "molecules"
    directory.mkdir()
    first, second = list(molecules(20, seed=1)), list(molecules(20, seed=2))
    write_database(directory / "a.aselmdb", [*first, *first[:5]])
    write_database(directory / "b.aselmdb", [*second[10:], *first[10:]])
    write_database(directory / "c.aselmdb", second)
    return directory


def unique(dataset: Path, directory: Path, **options: Any) -> Pipeline[Any]:
    return Pipeline(
        source=UniqueStructures(ASELMDBSource(dataset, rows_per_index=4), directory / "hashes"),
        sink=AtomicDataZarrSink(directory / "unique.zarr"),
        **options,
    )


def test_a_store_has_room_for_what_is_kept_and_no_more(
    with_duplicates: Path, tmp_path: Path
) -> None:
    hashed(ASELMDBSource(with_duplicates, rows_per_index=4), tmp_path / "hashes")
    run_pipeline(unique(with_duplicates, tmp_path), progress=False)
    arrays = contents(tmp_path / "unique.zarr")
    assert arrays["meta/samples_mask"].tolist() == [True] * 40
    assert arrays["meta/atoms_mask"].all()


def test_killed_and_resumed_the_same_are_kept(with_duplicates: Path, tmp_path: Path) -> None:
    source = ASELMDBSource(with_duplicates, rows_per_index=4)
    hashed(source, tmp_path / "clean" / "hashes")
    run_pipeline(unique(with_duplicates, tmp_path / "clean"), progress=False)
    script = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
from psnc import Pipeline, run_pipeline
from psnc_atm import ASELMDBSource, StructureHashSink
from test_deduplication import unique
dataset, directory = Path({str(with_duplicates)!r}), Path({str(tmp_path / "killed")!r})
first = Pipeline(source=ASELMDBSource(dataset, rows_per_index=4),
                 sink=StructureHashSink(directory / "hashes"), resume=True,
                 db_dir=directory / "db")
run_pipeline(first, n_jobs=2, progress=False)
run_pipeline(unique(dataset, directory, resume=True, db_dir=directory / "db"), n_jobs=2,
             progress=False)
"""
    (tmp_path / "script.py").write_text(script)
    directory = tmp_path / "killed"
    for begun in ("hashes/*.npz", "unique.zarr"):
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py")], start_new_session=True
        )
        while not list(directory.glob(begun)) and process.poll() is None:
            time.sleep(0.001)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, str(tmp_path / "script.py")], check=True)
    assert_same_store(directory / "unique.zarr", tmp_path / "clean" / "unique.zarr")


def test_a_file_added_behind_the_others_joins_the_store(
    with_duplicates: Path, tmp_path: Path
) -> None:
    def run() -> dict[str, Any]:
        source = ASELMDBSource(with_duplicates)
        hashed(source, tmp_path / "hashes")
        made = Pipeline(
            source=UniqueStructures(source, tmp_path / "hashes"),
            sink=AtomicDataZarrSink(tmp_path / "grown.zarr"),
            resume=True,
            db_dir=tmp_path / "db",
        )
        run_pipeline(made, progress=False)
        return contents(tmp_path / "grown.zarr")

    assert run()["meta/samples_mask"].sum() == 40
    write_database(with_duplicates / "d.aselmdb", [*molecules(3, seed=1), *molecules(2, seed=9)])
    assert run()["meta/samples_mask"].tolist() == [True] * 42


def test_structures_of_any_source(tmp_path: Path) -> None:
    source = Structures([5, 5])
    unique = UniqueStructures(source, hashed(source, tmp_path))
    assert [len(list(unique[index])) for index in range(2)] == [
        len(set(map(StructureHash(), source[0]))),
        len(set(map(StructureHash(), [*source[0], *source[1]])))
        - len(set(map(StructureHash(), source[0]))),
    ]
