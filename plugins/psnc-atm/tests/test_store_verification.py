"""Comparing stores with what they were made from."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from attrs import evolve
from data import crystals, write_database, write_dataset
from numpy.typing import NDArray
from stores import arrays_by_hand, write_by_hand

from psnc import Filter, IndexRangeError, Pipeline, SourceError, StageError, run_pipeline
from psnc_atm import (
    ASELMDBSource,
    AtomicData,
    AtomicDataZarrSink,
    SelectSize,
    StoreReport,
    verify_store,
)


class Other(Filter[AtomicData, AtomicData]):
    """Changes the structures of an index, counted by their charge."""

    def __init__(self, charge: int, **fields: Any) -> None:
        self.charge, self.fields = charge, fields

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        for one in items:
            yield evolve(one, **self.fields) if one.charge == self.charge else one


def made(directory: Path, *filters: Filter[Any, Any], **options: Any) -> Pipeline[Any]:
    """A store of three indices of 20 molecules, and the pipeline that wrote it."""
    pipeline: Pipeline[Any] = Pipeline(
        source=ASELMDBSource(directory / "in"),
        filters=list(filters),
        sink=AtomicDataZarrSink(
            directory / "out.zarr", atoms_per_chunk=64, systems_per_chunk=16, **options
        ),
        store=str(directory / "run.db"),
    )
    run_pipeline(pipeline, progress=False)
    return pipeline


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verified")
    write_dataset(directory / "in", files=3, rows=20)
    made(directory)
    return directory


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    """Input and a store of it, to be damaged."""
    return shutil.copytree(original, tmp_path / "copy")


def changed(store: Path, name: str) -> zarr.Array[Any]:
    array = zarr.open_group(store, mode="r+", use_consolidated=False)[name]
    assert isinstance(array, zarr.Array)
    return array


def compare(directory: Path, **options: Any) -> StoreReport:
    return verify_store(ASELMDBSource(directory / "in"), directory / "out.zarr", **options)


def test_a_store_that_is_as_its_source_is(directory: Path) -> None:
    report = compare(directory)
    assert report
    assert report.ok
    assert (report.indices, report.structures, report.found) == (3, 60, 0)
    assert report.differences == report.not_written == report.rounded == ()
    assert str(report).endswith("out.zarr is as the source: 3 indices, 60 structures compared")


def test_some_indices_may_be_compared(directory: Path) -> None:
    changed(directory / "out.zarr", "core/energy")[25] = 1
    report = compare(directory, indices=[0, 2])
    assert report
    assert (report.indices, report.structures) == (2, 40)
    assert not compare(directory, indices=iter([1]))
    with pytest.raises(IndexRangeError, match="index 3 is out of range: there are 3"):
        compare(directory, indices=[3])


def test_filters_are_a_part_of_the_comparison(tmp_path: Path) -> None:
    write_dataset(tmp_path / "in", files=3, rows=20)
    pipeline = made(tmp_path, SelectSize(maximum=6))
    report = verify_store(pipeline)
    assert report
    assert 20 < report.structures < 60
    unfiltered = compare(tmp_path)
    assert not unfiltered
    assert unfiltered.missing == 60 - report.structures
    other = verify_store(
        Pipeline(source=pipeline.source, filters=[SelectSize(maximum=3)], sink=pipeline.sink)
    )
    assert other.extra > 0
    assert re.search(r"index 0 .*: has \d+ more structures in the store", str(other))


@pytest.mark.parametrize("name", ["positions", "forces", "energy", "atomic_numbers", "pbc"])
def test_one_altered_number_is_found(directory: Path, name: str) -> None:
    array = changed(directory / "out.zarr", f"core/{name}")
    ptr = changed(directory / "out.zarr", "meta/atoms_ptr")[:]
    per_atom = array.shape[0] == ptr[-1]
    row = 27
    place: Any = int(ptr[row]) if per_atom else row
    value = array[place]
    where = (place, *[0] * (array.ndim - 1))
    before = array[where]
    after = ~before if array.dtype == bool else np.nextafter(before, np.inf).astype(array.dtype)
    after = before + 1 if array.dtype == np.int64 else after
    array[where] = after
    assert not np.array_equal(array[place], value)
    report = compare(directory)
    assert not report
    assert report.found == 1
    (difference,) = report.differences
    assert (difference.index, difference.name) == (1, "data0001.aselmdb")
    assert (difference.structure, difference.field) == (7, name)
    assert difference.atom == (0 if per_atom else None)
    assert (difference.stored, difference.expected) == (after, before)
    of_atom = " of atom 0" if per_atom else ""
    assert str(difference) == (
        f"index 1 (data0001.aselmdb), structure 7: {name}{of_atom} is {after.item()!r} in the "
        f"store, {before.item()!r} in the source"
    )


def test_the_sign_of_zero_counts_and_nan_is_nan(tmp_path: Path) -> None:
    write_dataset(tmp_path / "in", files=3, rows=20)
    pipeline = made(tmp_path, Other(0, energy=np.nan), Other(1, energy=0.0))
    assert verify_store(pipeline)
    energy = changed(tmp_path / "out.zarr", "core/energy")
    energy[20:40] = np.frombuffer(b"\x01\0\0\0\0\0\xf8\xff", dtype="<f8")[0]
    assert np.isnan(energy[20:40]).all()
    assert verify_store(pipeline)
    energy[41] = -0.0
    report = verify_store(pipeline)
    assert report.found == 1
    assert "energy is -0.0 in the store, 0.0 in the source" in str(report)


def test_structures_that_changed_places_are_found(directory: Path) -> None:
    positions = changed(directory / "out.zarr", "core/positions")
    energy = changed(directory / "out.zarr", "core/energy")
    ptr = changed(directory / "out.zarr", "meta/atoms_ptr")[:]
    sizes = np.diff(ptr)[:20]
    one, other = next(
        (i, j) for i in range(20) for j in range(i + 1, 20) if sizes[i] == sizes[j] > 1
    )
    for array, places in (
        (positions, [slice(*ptr[i : i + 2]) for i in (one, other)]),
        (energy, [slice(i, i + 1) for i in (one, other)]),
    ):
        array[places[0]], array[places[1]] = array[places[1]], array[places[0]]
    report = compare(directory)
    assert [difference.structure for difference in report.differences] == [one, other]
    assert all("; energy too" in str(difference) for difference in report.differences)
    assert "numbers of it differ" in str(report)


def test_many_differences_are_counted_and_some_described(directory: Path) -> None:
    changed(directory / "out.zarr", "core/energy")[:] = 0
    report = compare(directory, at_most=2)
    assert (report.found, len(report.differences)) == (60, 2)
    assert "... and 58 more" in str(report)


def test_an_index_that_is_not_written_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path / "in", files=3, rows=20)
    sink = AtomicDataZarrSink(tmp_path / "out.zarr")
    pipeline = Pipeline(source=ASELMDBSource(tmp_path / "in"), sink=sink)
    run_pipeline(pipeline, indices=[0, 2], progress=False)
    report = verify_store(pipeline)
    assert not report
    assert report.not_written == (1,)
    assert report.found == 0
    assert "not written: index 1" in str(report)
    assert verify_store(pipeline, indices=[0, 2])


def test_structures_that_are_masked_are_missing(directory: Path) -> None:
    changed(directory / "out.zarr", "meta/samples_mask")[38:40] = False
    report = compare(directory)
    assert (report.missing, report.extra, report.found) == (2, 0, 2)
    assert "index 1 (data0001.aselmdb), structure 18: is not in the store" in str(report)
    assert "2 structures are missing, 0 should not be there" in str(report)


def test_pointers_that_are_wrong_show_as_other_numbers_of_atoms(directory: Path) -> None:
    ptr = changed(directory / "out.zarr", "meta/atoms_ptr")
    ptr[31] = ptr[31] + 1
    report = compare(directory)
    assert [difference.structure for difference in report.differences] == [10, 11]
    assert re.search(r"structure 10: has \d+ atoms in the store, \d+ in the source", str(report))


def test_a_damaged_chunk_fails_the_comparison_of_its_indices(directory: Path) -> None:
    path = directory / "out.zarr" / "core" / "forces" / "c.0.0"
    path.write_bytes(path.read_bytes()[:-20])
    report = compare(directory)
    assert not report
    assert {difference.index for difference in report.differences} == {0}
    assert f"cannot be compared: {path}: chunk 0 of core/forces" in str(report)
    assert report.structures >= 40


def test_a_chunk_that_is_gone_is_found(directory: Path) -> None:
    (directory / "out.zarr" / "core" / "energy" / "c.1.0").unlink()
    report = compare(directory)
    assert report.found == 16
    assert "energy is 0.0 in the store" in str(report)


def test_a_store_of_another_dataset_is_told_apart(directory: Path, tmp_path: Path) -> None:
    same_size = ASELMDBSource(write_dataset(tmp_path / "other", files=3, rows=21))
    report = verify_store(same_size, directory / "out.zarr")
    assert report.missing == 3
    (tmp_path / "other" / "data0002.aselmdb").unlink()
    with pytest.raises(StageError, match="it has 3 indices, the source has 2; give the source"):
        verify_store(ASELMDBSource(tmp_path / "other"), directory / "out.zarr")


def test_input_that_cannot_be_read_fails_its_own_index(directory: Path) -> None:
    path = directory / "in" / "data0001.aselmdb"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    report = compare(directory)
    (difference,) = report.differences
    assert difference.index == 1
    assert "cannot be compared: " in difference.problem
    assert report.structures == 40

    class Fails(Filter[AtomicData, AtomicData]):
        def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
            raise RuntimeError("no such thing")

    failing = Pipeline(source=ASELMDBSource(directory / "in"), filters=[Fails()])
    report = verify_store(failing, directory / "out.zarr", indices=[0])
    assert "index 0 (data0000.aselmdb): cannot be compared: RuntimeError: no such" in str(report)


def rewrite(store: Path, name: str, values: NDArray[Any], level: str = "") -> None:
    root = zarr.open_group(store, mode="r+", use_consolidated=False)
    root.create_array(name, data=values, chunks=(16, *values.shape[1:]), overwrite=True)
    if level:
        fields = dict(root.attrs["fields"])
        group, field = name.split("/")
        fields[group] = {**fields[group], field: level}
        root.attrs["fields"] = fields
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(root.store)


def test_lower_precision_is_compared_after_rounding(directory: Path) -> None:
    store = directory / "out.zarr"
    for name in ("core/positions", "core/forces"):
        rewrite(store, name, changed(store, name)[:].astype("float32"))
    report = compare(directory)
    assert report
    assert report.rounded == ("forces", "positions")
    assert "compared after rounding to the store's precision: forces, positions" in str(report)
    forces = changed(store, "core/forces")
    forces[3, 1] = np.nextafter(forces[3, 1], np.float32(9))
    assert compare(directory).found == 1


def test_fields_that_some_structures_lack(tmp_path: Path) -> None:
    write_dataset(tmp_path / "in", files=3, rows=20)
    made(tmp_path)
    store = tmp_path / "out.zarr"
    lacking = Pipeline(
        source=ASELMDBSource(tmp_path / "in"), filters=[Other(0, energy=None, forces=None)]
    )
    report = verify_store(lacking, store)
    assert report.found == 20
    assert "energy is in the store, and has nothing in the source; forces too" in str(report)
    has = np.ones(60, dtype=bool)
    has[20:40] = False
    for name in ("energy", "forces"):
        rewrite(store, f"custom/has_{name}", has, "system")
    assert verify_store(lacking, store)
    changed(store, "custom/has_forces")[39] = True
    report = verify_store(lacking, store)
    assert report.found == 1
    assert "structure 19: has_forces is True in the store, False in the source" in str(report)


def test_edges_are_compared_by_the_numbers_of_the_whole_store(tmp_path: Path) -> None:
    write_dataset(tmp_path / "in", files=1, rows=10)

    class Chain(Filter[AtomicData, AtomicData]):
        """Joins each atom to the next."""

        def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
            for one in items:
                first = np.arange(len(one) - 1)
                yield evolve(
                    one,
                    edge_index=np.stack([first, first + 1]),
                    unit_shifts=np.zeros((len(first), 3), int),
                    cutoff=2.5,
                )

    plain = made(tmp_path, fields=["energy", "forces", "charge"])
    store = tmp_path / "out.zarr"
    expected = Pipeline(source=plain.source, filters=[Chain()])
    structures = list(expected.items(0))
    ptr = changed(store, "meta/atoms_ptr")[:]
    edges = [one.edge_index.T + start for one, start in zip(structures, ptr, strict=False)]
    rewrite(store, "meta/edges_ptr", np.cumsum([0, *map(len, edges)]))
    rewrite(store, "core/neighbor_list", np.concatenate(edges), "edge")
    shifts = np.concatenate([one.unit_shifts for one in structures])
    rewrite(store, "core/neighbor_list_shifts", shifts, "edge")
    rewrite(store, "core/cutoff", np.full((10, 1), 2.5), "system")
    assert verify_store(expected, store)
    assert verify_store(expected, store).not_stored == ("initial_magmoms",)
    number = next(i for i, one in enumerate(edges) if len(one) > 1)
    first = sum(map(len, edges[:number]))
    changed(store, "core/neighbor_list_shifts")[first + 1, 2] = 1
    report = verify_store(expected, store)
    assert report.found == 1
    assert "neighbor_list_shifts of edge 1 is 1 in the store, 0 in the source" in str(report)
    assert verify_store(plain, store).found == sum(len(one) > 1 for one in structures)


def test_custom_fields_and_what_is_not_compared(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_database(tmp_path / "in" / "a.aselmdb", crystals(6), data={"gap": 0.5, "axis": [1, 2]})
    pipeline = made(tmp_path, custom={"gap": "system", "axis": "system"}, fields=["energy"])
    report = verify_store(pipeline)
    assert report
    assert {"forces", "stress", "tags"} <= set(report.not_stored)
    assert "in the source, but not in the store: " in str(report)
    changed(tmp_path / "out.zarr", "custom/axis")[2, 1] = 3
    assert "structure 2: axis is 3 in the store, 2 in the source" in str(verify_store(pipeline))
    rewrite(tmp_path / "out.zarr", "core/virial", np.ones((6, 3, 3)), "system")
    assert verify_store(pipeline).not_compared == ("virial",)


def test_what_cannot_be_compared_is_said(directory: Path, tmp_path: Path) -> None:
    source = ASELMDBSource(directory / "in")
    with pytest.raises(SourceError, match=r"nowhere\.zarr does not exist"):
        verify_store(source, tmp_path / "nowhere.zarr")
    write_by_hand(tmp_path / "other.zarr", arrays_by_hand())
    with pytest.raises(SourceError, match=r"other\.zarr was not laid out by psnc, so that nothing"):
        verify_store(source, tmp_path / "other.zarr")
    with pytest.raises(StageError, match="does not write a Zarr store by AtomicDataZarrSink"):
        verify_store(source)


def command(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (directory / "made.py").write_text(
        "from psnc import Pipeline\n"
        "from psnc_atm import ASELMDBSource, AtomicDataZarrSink\n"
        "pipeline = Pipeline(source=ASELMDBSource('in'), sink=AtomicDataZarrSink('out.zarr'))\n"
    )
    psnc = [sys.executable, "-c", "from psnc.cli import main; main()", "verify-store"]
    return subprocess.run(
        [*psnc, "made.py:pipeline", *arguments], capture_output=True, text=True, cwd=directory
    )


def test_the_command_says_what_differs_and_exits_with_1(directory: Path) -> None:
    right = command(directory)
    assert (right.returncode, right.stderr) == (0, "")
    assert right.stdout.endswith("is as the source: 3 indices, 60 structures compared\n")
    shutil.copytree(directory / "out.zarr", directory / "copy.zarr")
    changed(directory / "copy.zarr", "core/energy")[45] = 7
    wrong = command(directory, "--store", "copy.zarr")
    assert wrong.returncode == 1
    assert "index 2 (data0002.aselmdb), structure 5: energy is 7.0 in the store" in wrong.stdout
    some = command(directory, "--store", "copy.zarr", "--indices", "0-1")
    assert (some.returncode, "2 indices, 40 structures" in some.stdout) == (0, True)
    sample = command(directory, "--sample", "1")
    assert "1 index, 20 structures" in sample.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--indices", "1,x"], "'1,x' is no list of indices: write 0-99,200"),
        (["--indices", "0", "--sample", "1"], "give --indices or --sample, not both"),
        (["--indices", "7"], "psnc: index 7 is out of range: there are 3"),
        (["--store", "nowhere.zarr"], "nowhere.zarr does not exist; give the directory"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(
    directory: Path, arguments: list[str], message: str
) -> None:
    refused = command(directory, *arguments)
    assert refused.returncode == 2
    assert message in refused.stderr
