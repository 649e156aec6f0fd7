"""Reading stores back."""

from __future__ import annotations

import multiprocessing
import pickle
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from attrs import evolve
from data import crystals, molecules, write_database, write_dataset
from numpy.typing import NDArray
from stores import arrays_by_hand, consolidate, read_by_hand, write_by_hand
from zarr.buffer.cpu import Buffer
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.storage import LocalStore, MemoryStore, ZipStore

from psnc import IndexRangeError, Pipeline, SourceError, run_pipeline
from psnc_atm import (
    ASELMDBSource,
    AtomicData,
    AtomicDataset,
    AtomicDataZarrSink,
    SelectSize,
    open_dataset,
)


def as_stored(structure: AtomicData) -> AtomicData:
    """Leave out what a store has not."""
    return evolve(structure, info={}, constraints=(), initial_charges=None, initial_magmoms=None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[AtomicData]]:
    """A store of three indices with dropped structures, and what is in it; only to be read."""
    directory = tmp_path_factory.mktemp("store")
    pipeline = Pipeline(
        source=ASELMDBSource(write_dataset(directory / "in", files=3, rows=30)),
        filters=[SelectSize(maximum=6)],
        sink=AtomicDataZarrSink(directory / "out.zarr", atoms_per_chunk=50, systems_per_chunk=7),
        track_metrics=False,
    )
    run_pipeline(pipeline, progress=False)
    structures = [as_stored(one) for index in range(3) for one in pipeline.items(index)]
    assert 30 < len(structures) < 90
    return directory / "out.zarr", structures


def assert_is(structure: AtomicData, expected: dict[str, NDArray[Any]]) -> None:
    """Compare a structure with what ``read_by_hand`` gives."""
    for name in ("atomic_numbers", "positions", "forces", "cell", "pbc"):
        np.testing.assert_array_equal(getattr(structure, name), expected[f"core/{name}"])
        assert getattr(structure, name).dtype == expected[f"core/{name}"].dtype
    np.testing.assert_array_equal(structure.edge_index, expected["core/neighbor_list"].T)
    np.testing.assert_array_equal(structure.unit_shifts, expected["core/neighbor_list_shifts"])
    assert structure.cutoff == 5.0
    has_energy, has_dipole = (expected[f"custom/has_{name}"].all() for name in ("energy", "dipole"))
    assert structure.energy == (expected["core/energy"][0] if has_energy else None)
    if has_dipole:
        np.testing.assert_array_equal(structure.dipole, expected["core/dipole"])
    else:
        assert structure.dipole is None
    others = {"virial", "gap", "kind", "spectrum", "site", "bond_order", "custom/energy"}
    assert structure.info.keys() == others
    np.testing.assert_array_equal(structure.info["virial"], expected["core/virial"])
    for name in ("spectrum", "site", "bond_order"):
        np.testing.assert_array_equal(structure.info[name], expected[f"custom/{name}"])
    for name in ("gap", "kind"):
        assert structure.info[name] == expected[f"custom/{name}"][0]
    assert type(structure.info["kind"]) is int


def test_a_store_gives_back_what_was_written(made: tuple[Path, list[AtomicData]]) -> None:
    store, expected = made
    dataset = open_dataset(store)
    assert isinstance(dataset, AtomicDataset)
    assert len(dataset) == len(expected)
    assert [dataset[i] for i in range(len(dataset))] == expected
    assert list(dataset) == expected
    assert dataset.batch(range(len(dataset))) == expected
    assert dataset.atom_counts.tolist() == [len(one) for one in expected]
    assert dataset.fields["forces"] == "atom"
    assert dataset.attrs["num_samples"] == 90
    assert dataset[0].to_ase().get_potential_energy() == expected[0].energy
    assert str(store) in repr(dataset)


def test_structures_are_asked_for_as_in_a_sequence(made: tuple[Path, list[AtomicData]]) -> None:
    store, expected = made
    dataset = open_dataset(store)
    assert dataset[-1] == expected[-1]
    assert dataset[np.int32(3)] == expected[3]
    assert list(dataset[2:20:3]) == expected[2:20:3]
    assert list(dataset[::-1]) == expected[::-1]
    assert dataset[10:20][3] == dataset[10:20][-7] == expected[13]
    assert list(dataset[5:][:3][[2, 0]]) == [expected[7], expected[5]]
    order = np.random.default_rng(0).permutation(len(expected))
    assert dataset.batch(order) == list(dataset[order]) == [expected[i] for i in order]
    assert dataset.batch([4, -1, 4]) == [expected[4], expected[-1], expected[4]]
    small = dataset.atom_counts < 4
    assert list(dataset[small]) == [one for one in expected if len(one) < 4]
    assert len(dataset[[]]) == len(dataset[5:5]) == len(dataset.batch([])) == 0
    assert list(dataset[5:5]) == []


def test_each_structure_has_arrays_of_its_own(made: tuple[Path, list[AtomicData]]) -> None:
    store, expected = made
    dataset = open_dataset(store)
    for taken in (dataset[0], dataset.batch([0, 1])[0], next(iter(dataset))):
        assert taken.positions.base is None
        taken.positions[:] = 0
    assert dataset[0] == expected[0]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (10**6, r"index 1000000 is out of range: .*out\.zarr has \d+ structures"),
        (-(10**6), r"index -1000000 is out of range"),
        ([0, 10**6], r"index 1000000 is out of range"),
        ([True, False], r"a mask of 2 does not fit: .* has \d+ structures"),
    ],
)
def test_what_is_not_there_is_out_of_range(
    made: tuple[Path, list[AtomicData]], which: Any, message: str
) -> None:
    dataset = open_dataset(made[0])
    with pytest.raises(IndexRangeError, match=message):
        dataset[which]
    if isinstance(which, list):
        with pytest.raises(IndexError, match=message):
            dataset.batch(which)


@pytest.mark.parametrize("which", ["a", 1.5, [1.5], [[1]], None, True])
def test_other_things_are_no_index(made: tuple[Path, list[AtomicData]], which: Any) -> None:
    with pytest.raises(TypeError, match="structures are indexed by integers, slices and"):
        open_dataset(made[0])[which]


STORAGE: dict[str, dict[str, Any]] = {
    "as zarr has it": {},
    "uncompressed": {"compressors": None},
    "gzip": {"compressors": GzipCodec(level=1)},
    "LZ4": {"compressors": BloscCodec(cname="lz4", shuffle="bitshuffle")},
    "two": {"compressors": [ZstdCodec(level=3), Crc32cCodec()]},
    "big endian": {"serializer": BytesCodec(endian="big")},
    "shards": {"shards": 3},
    "uncompressed shards": {"shards": 3, "compressors": None},
    "transposed": {"transposed": True},
    "format 2": {"zarr_format": 2},
}


@pytest.mark.parametrize("cache_bytes", [0, 500, 2**30])
@pytest.mark.parametrize("how", STORAGE)
def test_all_kinds_of_fields_are_read_however_they_are_stored(
    tmp_path: Path, how: str, cache_bytes: int
) -> None:
    arrays = arrays_by_hand()
    write_by_hand(tmp_path / "out.zarr", arrays, **STORAGE[how])
    dataset = open_dataset(tmp_path / "out.zarr", cache_bytes=cache_bytes)
    expected = list(read_by_hand(arrays))
    assert len(dataset) == len(expected) == 32
    for read in (list(dataset), [dataset[i] for i in range(32)]):
        for one, other in zip(read, expected, strict=True):
            assert_is(one, other)
    order = np.random.default_rng(1).permutation(32)
    for structure, number in zip(dataset.batch(order), order, strict=True):
        assert_is(structure, expected[number])


def test_float32_stays_float32(tmp_path: Path) -> None:
    arrays = arrays_by_hand(floats="float32")
    write_by_hand(tmp_path / "out.zarr", arrays)
    dataset = open_dataset(tmp_path / "out.zarr")
    assert dataset[0].positions.dtype == dataset[0].cell.dtype == np.float32
    for structure, expected in zip(dataset, read_by_hand(arrays), strict=True):
        assert_is(structure, expected)


def test_arrays_are_those_of_the_store_with_pointers_of_their_own(tmp_path: Path) -> None:
    stored = arrays_by_hand()
    write_by_hand(tmp_path / "out.zarr", stored)
    dataset = open_dataset(tmp_path / "out.zarr")
    chosen = [7, 2, 31, 2]
    arrays = dataset[chosen].arrays()
    expected = [list(read_by_hand(stored))[i] for i in chosen]
    assert arrays["energy"].shape == (4, 1)
    assert arrays["cell"].shape == (4, 3, 3)
    atoms_ptr, edges_ptr = arrays["atoms_ptr"], arrays["edges_ptr"]
    assert atoms_ptr[-1] == len(arrays["positions"])
    for number, one in enumerate(expected):
        atoms = slice(*atoms_ptr[number : number + 2])
        edges = slice(*edges_ptr[number : number + 2])
        np.testing.assert_array_equal(arrays["positions"][atoms], one["core/positions"])
        np.testing.assert_array_equal(arrays["site"][atoms], one["custom/site"])
        np.testing.assert_array_equal(arrays["energy"][number], one["core/energy"])
        np.testing.assert_array_equal(arrays["custom/energy"][number], one["custom/energy"])
        np.testing.assert_array_equal(arrays["has_dipole"][number], one["custom/has_dipole"])
        local = arrays["neighbor_list"][edges] - atoms_ptr[number]
        np.testing.assert_array_equal(local, one["core/neighbor_list"])
    everything = dataset.arrays()
    assert len(everything["energy"]) == 32
    assert everything.keys() == {*dataset.fields, "atoms_ptr", "edges_ptr"}
    nothing = dataset[:0].arrays()
    assert nothing["atoms_ptr"].tolist() == [0]
    assert nothing["positions"].shape == (0, 3)


def test_only_the_fields_that_are_asked_for_are_read(tmp_path: Path) -> None:
    store = tmp_path / "out.zarr"
    write_by_hand(store, arrays_by_hand())
    shutil.rmtree(store / "core" / "forces" / "c")
    (store / "custom" / "site" / "c" / "0" / "0").write_bytes(b"damaged")
    dataset = open_dataset(store, fields=["energy", "kind"])
    assert list(dataset.fields) == [
        *("atomic_numbers", "positions", "cell", "pbc", "energy", "has_energy", "kind")
    ]
    first = dataset[0]
    assert first.forces is None
    assert first.info.keys() == {"kind"}
    assert list(open_dataset(store, fields=[]).fields) == [
        *("atomic_numbers", "positions", "cell", "pbc")
    ]
    with pytest.raises(SourceError, match=r"out\.zarr has no field 'enrgy'; it has atomic_numbers"):
        open_dataset(store, fields=["enrgy"])


def test_levels_that_a_store_does_not_state_are_told_by_its_arrays(tmp_path: Path) -> None:
    arrays = arrays_by_hand()
    write_by_hand(tmp_path / "out.zarr", arrays)
    del zarr.open_group(tmp_path / "out.zarr", mode="r+").attrs["fields"]
    dataset = open_dataset(tmp_path / "out.zarr")
    for structure, expected in zip(dataset, read_by_hand(arrays), strict=True):
        assert_is(structure, expected)


def test_consolidated_metadata_that_is_out_of_date_is_not_believed(tmp_path: Path) -> None:
    store, arrays = tmp_path / "out.zarr", arrays_by_hand()
    write_by_hand(store, arrays)
    consolidate(store)
    root = zarr.open_group(store, mode="r+", use_consolidated=False)
    for name, values in arrays.items():
        again = values
        if name.endswith("_ptr"):
            again = values[1:] + values[-1]
        elif name == "core/neighbor_list":
            again = values + arrays["meta/atoms_ptr"][-1]
        root[name].append(again)
    dataset = open_dataset(store)
    assert len(dataset) == 64
    np.testing.assert_array_equal(dataset[32].positions, dataset[0].positions)


@pytest.mark.parametrize("where", ["memory", "zip", "local"])
def test_store_objects_are_read_too(tmp_path: Path, where: str) -> None:
    arrays = arrays_by_hand()
    make: dict[str, Callable[[], Any]] = {
        "memory": MemoryStore,
        "zip": lambda: ZipStore(tmp_path / "out.zip", mode="w"),
        "local": lambda: LocalStore(tmp_path / "out.zarr"),
    }
    store = make[where]()
    write_by_hand(store, arrays)
    if where == "zip":
        store.close()
        store = ZipStore(tmp_path / "out.zip", mode="r")
    dataset = open_dataset(store)
    for structure, expected in zip(dataset, read_by_hand(arrays), strict=True):
        assert_is(structure, expected)
    assert_is(dataset[5], list(read_by_hand(arrays))[5])


def test_a_url_that_cannot_be_opened_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(SourceError, match=r"^s3://bucket/out\.zarr cannot be opened \(.*fsspec"):
        open_dataset("s3://bucket/out.zarr")


# --- while it is written ----------------------------------------------------------------------


def test_a_growing_store_shows_whole_structures_and_more_after_a_refresh(tmp_path: Path) -> None:
    source = write_dataset(tmp_path / "in", files=3, rows=20)

    def run(indices: list[int]) -> Pipeline[Any]:
        pipeline = Pipeline(
            source=ASELMDBSource(source),
            sink=AtomicDataZarrSink(
                tmp_path / "out.zarr", atoms_per_chunk=64, systems_per_chunk=16
            ),
            store=str(tmp_path / "run.db"),
            resume=True,
        )
        run_pipeline(pipeline, indices=indices, progress=False)
        return pipeline

    run([2])
    dataset = open_dataset(tmp_path / "out.zarr")
    some = dataset[5:]
    assert len(dataset) == 20
    last = list(dataset)
    pipeline = run([0])
    assert len(dataset) == 20
    assert list(dataset) == last
    dataset.refresh()
    first = [as_stored(one) for one in pipeline.items(0)]
    assert list(dataset) == [*first, *last]
    assert dataset.rows.tolist() == [*range(20), *range(40, 60)]
    assert list(some) == last[5:]
    with pytest.raises(SourceError, match="a selection stays as it is; refresh the dataset"):
        some.refresh()


def test_a_store_that_was_laid_out_anew_is_not_read_with_old_pointers(tmp_path: Path) -> None:
    source = write_dataset(tmp_path / "in", files=2, rows=20)

    def run() -> None:
        sink = AtomicDataZarrSink(tmp_path / "out.zarr", atoms_per_chunk=64)
        run_pipeline(Pipeline(source=ASELMDBSource(source), sink=sink), progress=False)

    added = source / "data0009.aselmdb"
    write_database(added, molecules(7), data={"charge": 1})
    whole = added.read_bytes()
    added.write_bytes(whole[:5000])
    run()
    dataset = open_dataset(tmp_path / "out.zarr", cache_bytes=0)
    before = list(dataset)
    added.write_bytes(whole)  # mended, it has room of its own
    run()
    with pytest.raises(SourceError, match=r"is another store than .* refresh\(\) the dataset"):
        dataset[0]
    dataset.refresh()
    assert list(dataset)[:40] == before
    assert len(dataset) == 47
    shutil.rmtree(tmp_path / "out.zarr")
    with pytest.raises(SourceError, match="laid out anew or deleted"):
        dataset[0]
    with pytest.raises(SourceError, match="does not exist"):
        dataset.refresh()


# --- processes and threads --------------------------------------------------------------------


def read_all(dataset: AtomicDataset) -> list[AtomicData]:
    return [dataset[i] for i in range(len(dataset))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(made: tuple[Path, list[AtomicData]], method: str) -> None:
    store, expected = made
    dataset = open_dataset(store)
    read_all(dataset)
    context: Any = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        assert pool.map(read_all, [dataset, dataset[3:9]]) == [expected, expected[3:9]]


@pytest.mark.parametrize("how", ["LZ4", "transposed"])
def test_a_fork_reads_on_whatever_decodes(tmp_path: Path, how: str) -> None:
    write_by_hand(tmp_path / "out.zarr", arrays_by_hand(100), **STORAGE[how])
    dataset = open_dataset(tmp_path / "out.zarr", cache_bytes=0)
    expected = read_all(dataset)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(read_all, [dataset, dataset[3:9]]) == [expected, expected[3:9]]


def test_a_pickled_dataset_leaves_what_is_in_memory_behind(
    made: tuple[Path, list[AtomicData]],
) -> None:
    store, expected = made
    dataset = open_dataset(store)
    before = len(pickle.dumps(dataset))
    read_all(dataset)
    assert len(pickle.dumps(dataset)) == before < 20_000
    assert read_all(pickle.loads(pickle.dumps(dataset[2:]))) == expected[2:]


def test_threads_share_a_dataset(made: tuple[Path, list[AtomicData]]) -> None:
    store, expected = made
    dataset = open_dataset(store, cache_bytes=4000)
    found: list[bool] = []

    def read() -> None:
        found.append(all(read_all(dataset) == expected for _ in range(3)))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


# --- what is wrong ----------------------------------------------------------------------------


def test_what_is_no_store_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere\.zarr does not exist; give the directory"):
        open_dataset(tmp_path / "nowhere.zarr")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no store")
    for name in ("empty", "file"):
        with pytest.raises(SourceError, match=f"{name} is no Zarr store; give the directory"):
            open_dataset(str(tmp_path / name))
    with pytest.raises(SourceError, match="is no Zarr store"):
        open_dataset(MemoryStore())
    with pytest.raises(SourceError, match="cache_bytes is -1; give 0 or more"):
        open_dataset(tmp_path, cache_bytes=-1)


@pytest.mark.parametrize(
    "name", ["meta", "meta/samples_mask", "meta/atoms_ptr", "core", "core/positions"]
)
def test_an_incomplete_store_is_refused(tmp_path: Path, name: str) -> None:
    write_by_hand(tmp_path / "out.zarr", arrays_by_hand())
    shutil.rmtree(tmp_path / "out.zarr" / name)
    with pytest.raises(SourceError, match=rf"out\.zarr has no {name}.*; give a store with"):
        open_dataset(tmp_path / "out.zarr")


@pytest.mark.parametrize("name", ["core/forces", "core/energy", "meta/edges_ptr", "custom/site"])
def test_an_array_that_is_too_short_is_refused(tmp_path: Path, name: str) -> None:
    arrays = arrays_by_hand()
    write_by_hand(tmp_path / "out.zarr", {**arrays, name: arrays[name][:20]})
    with pytest.raises(SourceError, match=rf"is incomplete or damaged: {name} has only \d+ rows"):
        open_dataset(tmp_path / "out.zarr")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, garble, empty])
@pytest.mark.parametrize("name", ["", "core", "core/energy", "meta/samples_mask", "custom/site"])
def test_damaged_metadata_are_told_from_what_is_no_store(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    write_by_hand(tmp_path / "out.zarr", arrays_by_hand())
    damage(tmp_path / "out.zarr" / name / "zarr.json")
    message = (
        r"out\.zarr is damaged: metadata of .* are no JSON \(.+\); restore it, or write it anew"
    )
    with pytest.raises(SourceError, match=message):
        open_dataset(tmp_path / "out.zarr")


@pytest.mark.parametrize("damage", [truncate, garble, empty])
@pytest.mark.parametrize("how", ["as zarr has it", "uncompressed", "gzip", "LZ4", "two", "shards"])
def test_a_damaged_chunk_is_named_and_others_can_be_read(
    tmp_path: Path, how: str, damage: Callable[[Path], None]
) -> None:
    arrays = arrays_by_hand()
    write_by_hand(tmp_path / "out.zarr", arrays, **STORAGE[how])
    path = tmp_path / "out.zarr" / "core" / "positions" / "c" / "1" / "0"
    if damage is garble and how == "uncompressed":
        damage = truncate  # other numbers are no damage that anything could see
    damage(path)
    dataset = open_dataset(tmp_path / "out.zarr")
    expected = list(read_by_hand(arrays))
    rows = 21 if how == "shards" else 7
    first = np.flatnonzero(arrays["meta/atoms_ptr"][dataset.rows + 1] > rows)[0]
    message = (
        rf"^{re.escape(str(path))}: chunk \d+ of core/positions cannot be read \(.+\); restore"
    )
    for read in (lambda: dataset[first], lambda: dataset.batch([first]), lambda: list(dataset)):
        with pytest.raises(SourceError, match=message) as refused:
            read()
        assert "\n" not in str(refused.value)
    assert_is(dataset[0], expected[0])
    assert_is(dataset[-1], expected[-1])


def test_a_damaged_chunk_elsewhere_is_named_too() -> None:
    files: dict[str, Buffer] = {}
    write_by_hand(MemoryStore(files), arrays_by_hand())
    files["core/forces/c/0/0"] = Buffer.from_bytes(b"damaged")
    dataset = open_dataset(MemoryStore(files))
    with pytest.raises(SourceError, match=r"memory.*: chunk 0 of core/forces cannot be read"):
        dataset[0]


def test_edges_to_atoms_of_other_structures_are_refused(tmp_path: Path) -> None:
    arrays = arrays_by_hand()
    row = int(np.flatnonzero(np.diff(arrays["meta/edges_ptr"])[5:])[0]) + 5
    first = arrays["meta/edges_ptr"][row]
    arrays["core/neighbor_list"][first] -= arrays["meta/atoms_ptr"][row] + 1
    arrays["meta/samples_mask"][row] = True
    write_by_hand(tmp_path / "out.zarr", arrays)
    dataset = open_dataset(tmp_path / "out.zarr")
    (number,) = np.flatnonzero(dataset.rows == row)
    for read in (lambda: dataset[number], lambda: dataset.arrays(), lambda: list(dataset)):
        with pytest.raises(SourceError, match=rf"neighbor_list of row {row} names atoms of other"):
            read()
    assert len(list(open_dataset(tmp_path / "out.zarr", fields=["energy"]))) == len(dataset)


def test_crystals_come_back_with_everything(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_database(tmp_path / "in" / "a.aselmdb", crystals(6), data={"spin": 1, "gap": 0.5})
    sink = AtomicDataZarrSink(
        tmp_path / "out.zarr", atoms_per_chunk=10, systems_per_chunk=4, custom={"gap": "system"}
    )
    pipeline = Pipeline(source=ASELMDBSource(tmp_path / "in"), sink=sink, track_metrics=False)
    run_pipeline(pipeline, progress=False)
    expected = [evolve(as_stored(one), info={"gap": 0.5}) for one in pipeline.items(0)]
    assert list(open_dataset(tmp_path / "out.zarr")) == expected


PAGES = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["README.md", "docs/reading.md"])
def test_the_examples_of_the_pages_run(
    made: tuple[Path, list[AtomicData]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    page: str,
) -> None:
    shutil.copytree(made[0].parent / "in", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    pages = [
        (PAGES / one).read_text(encoding="utf-8") for one in dict.fromkeys(["README.md", page])
    ]
    blocks = [block for text in pages for block in re.findall(r"```python\n(.*?)```", text, re.S)]
    run = [block for block in blocks if "torch" not in block and "run_pipeline(" not in block]
    assert len(run) >= len(pages)
    pipeline = blocks[0].replace("n_jobs=4", "progress=False")
    for block in [pipeline, *run]:
        exec(block, namespace)
    assert len(namespace["dataset"]) == 90
