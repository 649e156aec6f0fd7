from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
import pytest
import zarr
from attrs import evolve
from data import (
    assert_same_store,
    change_raw_row,
    contents,
    crystals,
    molecules,
    raw_row,
    write_database,
    write_dataset,
)

from psnc import Filter, Pipeline, Source, SourceError, StageError, run_pipeline
from psnc_atm import ASELMDBSource, AtomicData, AtomicDataZarrSink


class Keep(Filter[AtomicData, AtomicData]):
    """Keeps structures of at most so many atoms."""

    def __init__(self, at_most: int) -> None:
        self.at_most = at_most

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        return (structure for structure in items if len(structure) <= self.at_most)


class Change(Filter[AtomicData, Any]):
    """Changes the structures at one position of each index."""

    def __init__(self, position: int, how: str) -> None:
        self.position, self.how = position, how

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[Any]:
        for number, structure in enumerate(items):
            if number != self.position:
                yield structure
                continue
            half = len(structure) // 2
            shorter = AtomicData(
                atomic_numbers=structure.atomic_numbers[:half],
                positions=structure.positions[:half],
                energy=structure.energy,
                forces=structure.forces[:half],
                charge=structure.charge,
            )
            yield from {
                "no energy": [evolve(structure, energy=None)],
                "dipole": [evolve(structure, dipole=np.ones(3))],
                "twice": [structure, structure],
                "shorter": [shorter],
                "forces": [evolve(structure, forces=structure.forces[:, :1])],
                "atoms": [structure.to_ase()],
            }[self.how]


def run(pipeline: Pipeline[Any], n_jobs: int = 1) -> list[list[str]]:
    return run_pipeline(pipeline, n_jobs=n_jobs, progress=False)


def convert(source: Path, store: Path, *filters: Filter[Any, Any], **options: Any) -> Pipeline[Any]:
    rows = options.pop("rows_per_index", None)
    pipeline: Pipeline[Any] = Pipeline(
        source=ASELMDBSource(source, rows_per_index=rows),
        filters=list(filters),
        sink=AtomicDataZarrSink(store, **options),
    )
    run(pipeline)
    return pipeline


def test_the_store_has_the_layout_that_readers_expect(dataset: Path, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    pipeline = convert(dataset, store)
    assert pipeline.completed_indices == set(range(5))
    structures = [s for index in range(5) for s in pipeline.source[index]]
    atoms = [len(s) for s in structures]
    root = zarr.open_group(store, mode="r")
    assert root.attrs["num_samples"] == 200
    assert root.attrs["fields"] == {
        "core": {
            **{"atomic_numbers": "atom", "positions": "atom", "cell": "system", "pbc": "system"},
            **{"energy": "system", "forces": "atom", "charge": "system"},
        },
        "custom": {},
    }
    arrays = contents(store)
    expected = {
        "meta/atoms_ptr": np.cumsum([0, *atoms]),
        "meta/edges_ptr": np.zeros(201, dtype=np.int64),
        "meta/samples_mask": np.ones(200, dtype=bool),
        "meta/atoms_mask": np.ones(sum(atoms), dtype=bool),
        "meta/edges_mask": np.ones(0, dtype=bool),
        "core/atomic_numbers": np.concatenate([s.atomic_numbers for s in structures]),
        "core/positions": np.concatenate([s.positions for s in structures]),
        "core/forces": np.concatenate([s.forces for s in structures]),
        "core/cell": np.stack([s.cell for s in structures]),
        "core/pbc": np.stack([s.pbc for s in structures]),
        "core/energy": np.array([[s.energy] for s in structures]),
        "core/charge": np.array([[s.charge] for s in structures]),
    }
    assert {name for name in arrays if not name.startswith("psnc/")} == expected.keys()
    for name, values in expected.items():
        assert arrays[name].dtype == values.dtype, name
        np.testing.assert_array_equal(arrays[name], values, err_msg=name)


def test_metadata_is_consolidated(dataset: Path, tmp_path: Path) -> None:
    convert(dataset, tmp_path / "out.zarr")
    root = zarr.open_group(tmp_path / "out.zarr", mode="r", use_consolidated=True)
    assert root["core/positions"].shape == root["core/forces"].shape


def test_every_field_of_a_periodic_row_is_stored(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_database(tmp_path / "in" / "rows.aselmdb", crystals(4), data={"spin": 3})
    pipeline = convert(
        tmp_path / "in", tmp_path / "out.zarr", fields=None, atoms_per_chunk=10, systems_per_chunk=3
    )
    structures = list(pipeline.source[0])
    arrays = contents(tmp_path / "out.zarr")
    for name in ("stress", "dipole"):
        expected = np.stack([getattr(s, name) for s in structures])
        np.testing.assert_array_equal(arrays[f"core/{name}"], expected)
    for name in ("magmom", "free_energy", "spin"):
        expected = np.array([[getattr(s, name)] for s in structures])
        np.testing.assert_array_equal(arrays[f"core/{name}"], expected)
    for name in ("momenta", "atomic_masses", "tags", "charges", "magmoms"):
        expected = np.concatenate([getattr(s, name) for s in structures])
        np.testing.assert_array_equal(arrays[f"core/{name}"], expected)
    assert "core/initial_charges" not in arrays


def test_named_fields_are_stored_and_others_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_database(tmp_path / "in" / "a.aselmdb", molecules(10))
    write_database(tmp_path / "in" / "b.aselmdb", crystals(5))
    store = tmp_path / "out.zarr"
    convert(tmp_path / "in", store, fields=["energy", "tags", "initial_magmoms"])
    arrays = contents(store)
    assert {name for name in arrays if name.startswith("core/")} == {
        *("core/atomic_numbers", "core/positions", "core/cell", "core/pbc"),
        *("core/energy", "core/tags", "core/initial_magmoms"),
    }
    assert arrays["meta/samples_mask"].all()
    start = arrays["meta/atoms_ptr"][10]
    assert not arrays["core/tags"][:start].any()  # ASE: no tags means zeros
    assert arrays["core/tags"][start : start + 8].tolist() == list(range(8))


def test_entries_of_info_are_stored_on_request(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, gap in (("a", 0.5), ("b", 1.5)):
        write_database(
            tmp_path / "in" / f"{name}.aselmdb", molecules(3), data={"gap": gap, "grid": np.eye(2)}
        )
    store = tmp_path / "out.zarr"
    convert(tmp_path / "in", store, custom={"gap": "system", "grid": "system"})
    arrays = contents(store)
    assert arrays["custom/gap"].tolist() == [[0.5]] * 3 + [[1.5]] * 3
    assert arrays["custom/grid"].shape == (6, 2, 2)
    fields = zarr.open_group(store, mode="r").attrs["fields"]
    assert fields["custom"] == {"gap": "system", "grid": "system"}
    with pytest.raises(StageError, match="custom field 'gop' is not in the info"):
        convert(tmp_path / "in", tmp_path / "other.zarr", custom={"gop": "system"})
    assert not (tmp_path / "other.zarr").exists()


def test_dropped_structures_are_masked_and_the_rest_stays_in_place(
    dataset: Path, tmp_path: Path
) -> None:
    store = tmp_path / "out.zarr"
    pipeline = convert(
        dataset, store, Keep(5), atoms_per_chunk=50, systems_per_chunk=16, rows_per_index=20
    )
    assert pipeline.completed_indices == set(range(10))
    arrays = contents(store)
    pointer, mask = arrays["meta/atoms_ptr"], arrays["meta/samples_mask"]
    assert (np.diff(pointer) >= 0).all()
    kept = [s for index in range(10) for s in pipeline.items(index)]
    rows = np.flatnonzero(mask)
    assert 0 < len(rows) == len(kept) < 200
    for row, structure in zip(rows, kept, strict=True):
        place = slice(pointer[row], pointer[row + 1])
        np.testing.assert_array_equal(arrays["core/positions"][place], structure.positions)
        np.testing.assert_array_equal(arrays["core/forces"][place], structure.forces)
        assert arrays["core/energy"][row] == structure.energy
        assert arrays["meta/atoms_mask"][place].all()
    assert arrays["meta/atoms_mask"].sum() == sum(map(len, kept))
    assert pointer[-1] == sum(len(s) for i in range(10) for s in pipeline.source[i])
    for index in range(10):  # each index keeps its own rows, and begins with what it kept
        here = mask[20 * index : 20 * index + 20]
        assert (np.diff(here.astype(int)) <= 0).all()


def test_the_fields_come_from_the_first_index_that_can_be_filtered(
    dataset: Path, tmp_path: Path
) -> None:
    class FailsFirst(Keep):
        """Cannot do the structures of index 0, whose charge is -1."""

        def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
            for structure in items:
                if structure.charge == -1:
                    raise RuntimeError("cannot do that one")
                yield structure

    pipeline = convert(dataset, tmp_path / "out.zarr", FailsFirst(0))
    assert pipeline.failed_indices == {0: "RuntimeError: cannot do that one"}
    arrays = contents(tmp_path / "out.zarr")
    assert arrays["meta/samples_mask"].tolist() == [False] * 40 + [True] * 160
    assert "core/forces" in arrays


def test_custom_fields_at_atom_level_and_those_that_cannot_be_stored(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, atoms in enumerate(molecules(3)):
        write_database(
            tmp_path / "in" / f"{number}.aselmdb",
            [atoms],
            data={"spread": np.arange(len(atoms)) + number, "label": "x", "one": 1.5},
        )
    store = tmp_path / "out.zarr"
    convert(tmp_path / "in", store, custom={"spread": "atom"})
    arrays = contents(store)
    for row in range(3):
        start, stop = arrays["meta/atoms_ptr"][row : row + 2]
        assert arrays["custom/spread"][start:stop].tolist() == list(range(row, row + stop - start))
    with pytest.raises(StageError, match="'label' is a str, not a number"):
        convert(tmp_path / "in", tmp_path / "other.zarr", custom={"label": "system"})
    with pytest.raises(StageError, match="needs one row for each atom"):
        convert(tmp_path / "in", tmp_path / "other.zarr", custom={"one": "atom"})


def test_files_without_rows_are_completed_too(tmp_path: Path) -> None:
    source = write_dataset(tmp_path / "in", files=1, rows=4)
    for name in ("a", "z"):
        with ase.db.connect(source / f"{name}.aselmdb") as database:
            database.metadata = {"source": "none"}
    pipeline = convert(source, tmp_path / "out.zarr")
    assert pipeline.completed_indices == {0, 1, 2}
    assert contents(tmp_path / "out.zarr")["meta/samples_mask"].tolist() == [True] * 4
    (source / "data0000.aselmdb").unlink()
    assert convert(source, tmp_path / "empty.zarr").completed_indices == {0, 1}
    assert contents(tmp_path / "empty.zarr")["meta/atoms_ptr"].tolist() == [0]


def test_everything_dropped_leaves_an_empty_store(dataset: Path, tmp_path: Path) -> None:
    pipeline = convert(dataset, tmp_path / "out.zarr", Keep(0))
    assert pipeline.completed_indices == set(range(5))
    arrays = contents(tmp_path / "out.zarr")
    assert not arrays["meta/samples_mask"].any()
    assert arrays["meta/atoms_ptr"][-1] == len(arrays["core/positions"])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no energy", r"index 1, structure 7: has no energy, unlike the first structure"),
        ("dipole", r"index 1, structure 7: has dipole, unlike the first structure"),
        ("twice", r"index 1.*: more (structures|atoms) than the \d+ in the source"),
        ("shorter", r"index 1: \d+ atoms came of \d+ in the source"),
        ("forces", r"index 1, structure 7: forces has shape \(\d+, 1\); .* \(\d+, 3\)"),
        ("atoms", r"index 1, structure 7: the sink was given a Atoms, not AtomicData"),
    ],
)
def test_a_structure_that_does_not_fit_fails_its_index_alone(
    dataset: Path, tmp_path: Path, how: str, message: str
) -> None:
    class OnlyIndexOne(Change):
        """Leaves the other indices as they are: they have another charge."""

        def __call__(self, items: Iterator[AtomicData]) -> Iterable[Any]:
            first, *rest = items
            some = iter([first, *rest])
            return super().__call__(some) if first.charge == 0 else some

    pipeline = convert(dataset, tmp_path / "out.zarr", OnlyIndexOne(7, how))
    assert pipeline.completed_indices == {0, 2, 3, 4}
    assert re.search(message, pipeline.failed_indices[1])
    mask = contents(tmp_path / "out.zarr")["meta/samples_mask"]
    assert not mask[40:80].any()
    assert mask[:40].all()
    assert mask[80:].all()


def test_writing_an_index_again_changes_nothing(dataset: Path, tmp_path: Path) -> None:
    store, copy = tmp_path / "out.zarr", tmp_path / "copy.zarr"
    pipeline = convert(dataset, store, Keep(5), atoms_per_chunk=30, systems_per_chunk=7)
    shutil.copytree(store, copy)
    run(pipeline)
    sink = AtomicDataZarrSink(store, atoms_per_chunk=30, systems_per_chunk=7)
    sink.prepare(pipeline)
    for index in (3, 1):
        assert sink(iter(pipeline.items(index)), index) == [str(store)]
    assert_same_store(store, copy)


def test_an_index_that_fails_the_second_time_is_masked(dataset: Path, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    pipeline = convert(dataset, store)

    def broken() -> Iterator[AtomicData]:
        yield from list(pipeline.items(2))[:10]
        raise OSError("gone")

    sink = AtomicDataZarrSink(store)
    sink.prepare(pipeline)
    with pytest.raises(OSError, match="gone"):
        sink(broken(), 2)
    mask = contents(store)["meta/samples_mask"]
    assert mask.reshape(5, 40).all(axis=1).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("what", ["file", "directory", "group"])
def test_what_psnc_did_not_write_is_refused_and_left(
    dataset: Path, tmp_path: Path, what: str
) -> None:
    store = tmp_path / "out.zarr"
    if what == "file":
        store.write_text("mine")
    elif what == "directory":
        store.mkdir()
        (store / "mine.txt").write_text("mine")
    else:
        zarr.create_group(store).create_array("mine", data=np.arange(3))
    before = sorted(path.relative_to(store) for path in store.rglob("*"))
    with pytest.raises(StageError, match=r"out\.zarr exists and is no store that psnc laid out"):
        convert(dataset, store)
    assert sorted(path.relative_to(store) for path in store.rglob("*")) == before


def test_an_empty_directory_is_taken(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "out.zarr").mkdir()
    convert(dataset, tmp_path / "out.zarr")
    assert contents(tmp_path / "out.zarr")["meta/samples_mask"].all()


def test_a_store_for_other_input_is_refused_with_the_difference(tmp_path: Path) -> None:
    source = write_dataset(tmp_path / "in", files=2, rows=5)
    store = tmp_path / "out.zarr"
    convert(source, store)
    before = contents(store)
    for options, message in (
        ({"rows_per_index": 2}, "rows_per_index was None and is 2"),
        ({"atoms_per_chunk": 7}, "chunk_rows was .* and is .*7"),
        ({"fields": ["energy"]}, "fields was None and is .'energy'"),
    ):
        with pytest.raises(StageError, match=f"was laid out for other input: {message}"):
            convert(source, store, **options)
    write_database(source / "data0001.aselmdb", molecules(1))
    with pytest.raises(StageError, match=r"data0001\.aselmdb changed; choose another output_path"):
        convert(source, store)
    os.rename(source / "data0001.aselmdb", source / "data0002.aselmdb")
    with pytest.raises(StageError, match=r"data0001\.aselmdb is gone"):
        convert(source, store)
    assert before.keys() == contents(store).keys()


def test_input_that_was_copied_elsewhere_is_the_same_input(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "elsewhere")
    convert(dataset, tmp_path / "out.zarr")
    pipeline = convert(tmp_path / "elsewhere", tmp_path / "out.zarr")
    assert pipeline.completed_indices == set(range(5))


def test_a_newer_format_is_refused(dataset: Path, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    convert(dataset, store)
    for path in (store / "zarr.json", store / "psnc" / "zarr.json"):
        path.write_text(path.read_text().replace('"format": 3', '"format": 99'))
    with pytest.raises(StageError, match=r"has format 99, written by psnc-atm .*; update psnc-atm"):
        convert(dataset, store)


@pytest.mark.parametrize("damage", ["truncated", "row", "head of row"])
def test_a_damaged_file_fails_its_index_and_the_others_complete(
    tmp_path: Path, damage: str
) -> None:
    source = write_dataset(tmp_path / "in", files=3, rows=20)
    path = source / "data0001.aselmdb"
    value = raw_row(path, b"9")
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "row":
        change_raw_row(path, b"9", value[: len(value) // 2])
    else:
        change_raw_row(path, b"9", b"\0" + value[1:])
    store = tmp_path / "out.zarr"
    pipeline = convert(source, store)
    assert pipeline.completed_indices == {0, 2}
    assert "data0001.aselmdb" in pipeline.failed_indices[1]
    assert damage == "truncated" or "row 9:" in pipeline.failed_indices[1]
    arrays = contents(store)
    # What cannot be counted has no rows; a row that is damaged further on has its place.
    assert len(arrays["meta/samples_mask"]) == (60 if damage == "row" else 40)
    assert arrays["meta/samples_mask"].sum() == 40


def test_nothing_readable_leaves_no_store_and_says_why_for_each_index(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.aselmdb").write_bytes(b"x" * 9000)
    pipeline = convert(tmp_path / "in", tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()
    failed = pipeline.failed_indices
    assert {0, 1} == failed.keys()
    assert "a.aselmdb: not an LMDB file" in failed[0]
    assert "b.aselmdb: not an LMDB file" in failed[1]


def test_a_store_that_was_deleted_is_written_anew_where_that_is_verified(
    dataset: Path, tmp_path: Path
) -> None:
    store = tmp_path / "out.zarr"
    pipeline = Pipeline(
        source=ASELMDBSource(dataset), sink=AtomicDataZarrSink(store), db_file=tmp_path / "run.db"
    )
    run_pipeline(pipeline, verify="checksum", progress=False)
    before = file_contents(store)
    completed_at = [each.completed_at for each in pipeline.metrics.indices]
    run_pipeline(pipeline, verify="checksum", progress=False)
    assert [each.completed_at for each in pipeline.metrics.indices] == completed_at
    shutil.rmtree(store)
    run_pipeline(pipeline, verify="exists", progress=False)
    assert file_contents(store) == before


def file_contents(directory: Path) -> dict[Path, bytes]:
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_store_that_was_deleted_is_not_laid_out_under_a_checkpoint(
    dataset: Path, tmp_path: Path
) -> None:
    store = tmp_path / "out.zarr"

    def pipeline() -> Pipeline[Any]:
        return Pipeline(
            source=ASELMDBSource(dataset),
            sink=AtomicDataZarrSink(store),
            resume=True,
            db_dir=tmp_path / "db",
        )

    run_pipeline(pipeline(), indices=[0, 1], progress=False)
    shutil.rmtree(store)
    with pytest.raises(StageError, match="does not exist, but 2 of its indices are recorded"):
        run(pipeline())
    pipeline().reset()
    run(pipeline())
    assert contents(store)["meta/samples_mask"].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"atoms_per_chunk": 0}, "atoms_per_chunk is 0"),
        ({"systems_per_chunk": -1}, "systems_per_chunk is -1"),
        ({"fields": ["enrgy"]}, "unknown field 'enrgy'; choose from energy"),
        ({"custom": {"gap": "edge"}}, "custom field 'gap' has level 'edge'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(StageError, match=message):
        AtomicDataZarrSink("out.zarr", **options)


def test_a_prepared_sink_can_be_pickled(dataset: Path, tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    source = ASELMDBSource(dataset)
    sink = AtomicDataZarrSink(store)
    sink.prepare(Pipeline(source=source, sink=sink))
    pickled = pickle.dumps(sink)
    assert len(pickled) < 2000
    assert pickle.loads(pickled)(source[2], 2) == [str(store)]
    assert contents(store)["meta/samples_mask"][80:120].all()


def test_a_source_that_only_iterates_will_do(dataset: Path, tmp_path: Path) -> None:
    class Plain(Source[AtomicData]):
        def __init__(self, directory: Path) -> None:
            self.inner = ASELMDBSource(directory)

        def __len__(self) -> int:
            return len(self.inner)

        def __getitem__(self, index: int) -> Iterator[AtomicData]:
            return self.inner[index]

    convert(dataset, tmp_path / "one.zarr")
    run(Pipeline(source=Plain(dataset), sink=AtomicDataZarrSink(tmp_path / "two.zarr")))
    assert_same_store(
        tmp_path / "one.zarr",
        tmp_path / "two.zarr",
        apart_from=["psnc/identity", "psnc/written"],
    )


def test_the_source_error_names_the_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out.zarr")


def test_an_output_path_that_cannot_be_made_is_said_in_one_line(dataset: Path) -> None:
    with pytest.raises(StageError, match=r"^/proc/nowhere/out.zarr cannot be created") as refused:
        convert(dataset, Path("/proc/nowhere/out.zarr"))
    assert "\n" not in str(refused.value)
