"""Codecs, shards, dtypes and missing fields of a store."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from attrs import evolve, frozen
from data import contents
from structures import molecule

from psnc import Filter, Pipeline, Source, StageError, run_pipeline
from psnc_atm import ASELMDBSource, AtomicData, AtomicDataZarrSink, open_dataset, verify_store


class Given(Source[AtomicData]):
    """Indices of given structures."""

    def __init__(self, *indices: list[AtomicData]) -> None:
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Iterator[AtomicData]:
        return iter(self.indices[index])


class Rounded(Filter[AtomicData, AtomicData]):
    """Has arrays in single precision."""

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        for structure in items:
            yield evolve(
                structure,
                positions=structure.positions.astype(np.float32),
                forces=structure.forces.astype(np.float32),
                cell=structure.cell.astype(np.float32),
            )


def write(source: Source[Any], store: Path, *filters: Any, **options: Any) -> Pipeline[Any]:
    pipeline: Pipeline[Any] = Pipeline(
        source=source,
        filters=filters,
        sink=AtomicDataZarrSink(store, **options),
        db_file=store.with_suffix(".db"),
    )
    run_pipeline(pipeline, progress=False)
    return pipeline


def assert_readable_and_same(one: Path, other: Path) -> None:
    left, right = contents(one), contents(other)
    assert left.keys() == right.keys()
    for name in left:
        if name != "psnc/identity":
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)


@pytest.mark.parametrize("codec", ["blosc-lz4", "blosc-zstd", "zstd", "gzip", "none"])
@pytest.mark.parametrize("level", [None, 1])
def test_zarr_reads_every_codec_and_the_values_are_the_same(
    dataset: Path, tmp_path: Path, codec: str, level: int | None
) -> None:
    source = ASELMDBSource(dataset, rows_per_index=7)
    small = {"atoms_per_chunk": 100, "systems_per_chunk": 16}
    write(source, tmp_path / "default.zarr", **small)
    options = {"codec": codec, "level": None if codec == "none" else level}
    pipeline = write(source, tmp_path / "out.zarr", **options, **small)
    assert pipeline.failed_indices == {}
    assert_readable_and_same(tmp_path / "out.zarr", tmp_path / "default.zarr")
    array = zarr.open_group(tmp_path / "out.zarr", mode="r")["core/positions"]
    assert isinstance(array, zarr.Array)
    assert len(array.compressors) == (codec != "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "lzma"}, "unknown codec 'lzma'; choose from blosc-lz4, "),
        ({"codec": "gzip", "level": 12}, "codec gzip has levels 0 to 9, and level is 12"),
        ({"codec": "none", "level": 1}, "codec none has levels 0 to 0, and level is 1"),
        (
            {"atoms_per_shard": 20_000},
            "atoms_per_shard is 20000; give a multiple of atoms_per_chunk, 16384",
        ),
        ({"systems_per_shard": 0}, "systems_per_shard is 0; give a multiple of"),
        ({"missing": "zero"}, "missing is 'zero'; give refuse or nan"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(StageError) as refused:
        AtomicDataZarrSink("out.zarr", **options)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_a_store_with_another_codec_is_refused(dataset: Path, tmp_path: Path) -> None:
    write(ASELMDBSource(dataset), tmp_path / "out.zarr")
    with pytest.raises(StageError, match=r"codec was \['blosc-lz4', 5\] and is \['zstd', 3\]"):
        write(ASELMDBSource(dataset), tmp_path / "out.zarr", codec="zstd")


@pytest.mark.parametrize("codec", ["blosc-lz4", "blosc-zstd", "zstd", "gzip"])
def test_the_chunks_are_smaller_than_the_input(dataset: Path, tmp_path: Path, codec: str) -> None:
    write(ASELMDBSource(dataset), tmp_path / "out.zarr", codec=codec)
    chunks = (path for path in (tmp_path / "out.zarr").rglob("c.*") if path.is_file())
    size = sum(path.stat().st_size for path in chunks)
    assert 0 < size < sum(path.stat().st_size for path in dataset.glob("*.aselmdb"))


@pytest.mark.parametrize("codec", ["blosc-lz4", "none"])
def test_shards_make_few_files_of_many_chunks(dataset: Path, tmp_path: Path, codec: str) -> None:
    source = ASELMDBSource(dataset, rows_per_index=7)
    chunks = {"atoms_per_chunk": 50, "systems_per_chunk": 8}
    write(source, tmp_path / "chunks.zarr", **chunks)
    shards = {"atoms_per_shard": 400, "systems_per_shard": 64}
    write(source, tmp_path / "shards.zarr", codec=codec, **chunks, **shards)
    assert_readable_and_same(tmp_path / "shards.zarr", tmp_path / "chunks.zarr")
    array = zarr.open_group(tmp_path / "shards.zarr", mode="r")["core/forces"]
    assert isinstance(array, zarr.Array)
    assert (array.chunks, array.shards) == ((50, 3), (400, 3))
    np.testing.assert_array_equal(
        array[123:130], contents(tmp_path / "chunks.zarr")["core/forces"][123:130]
    )
    files = [
        len(list((tmp_path / name / "core/forces").iterdir()))
        for name in ("shards.zarr", "chunks.zarr")
    ]
    assert files[0] - 1 == -(-array.shape[0] // 400)
    assert files[1] > 4 * files[0]


def test_single_precision_stays_single_precision(dataset: Path, tmp_path: Path) -> None:
    source = ASELMDBSource(dataset)
    pipeline = write(source, tmp_path / "out.zarr", Rounded())
    assert pipeline.failed_indices == {}
    arrays = contents(tmp_path / "out.zarr")
    dtypes = {name: array.dtype.name for name, array in arrays.items() if name[:4] == "core"}
    assert dtypes == {
        **{f"core/{name}": "float32" for name in ("positions", "forces", "cell")},
        **{f"core/{name}": "float64" for name in ("energy", "charge")},
        **{"core/atomic_numbers": "int64", "core/pbc": "bool"},
    }
    expected = np.concatenate([s.positions for i in range(5) for s in source[i]])
    np.testing.assert_array_equal(arrays["core/positions"], expected.astype(np.float32))


@pytest.mark.parametrize(("first", "then"), [("float32", "float64"), ("float64", "float32")])
def test_another_precision_than_the_stores_is_refused(
    tmp_path: Path, first: str, then: str
) -> None:
    def with_dtype(dtype: str, seed: int) -> AtomicData:
        one = molecule([1, 8], seed)
        return evolve(one, positions=one.positions.astype(dtype))

    source = Given([with_dtype(first, 0)], [with_dtype(first, 1), with_dtype(then, 2)])
    failed = write(source, tmp_path / "out.zarr").failed_indices
    assert failed == {
        1: f"StageError: index 1, structure 1: positions is {then}; the store was laid out "
        f"for {first}"
    }


def mixed() -> Given:
    random = np.random.default_rng(0)
    made = []
    for number in range(30):
        fields: dict[str, Any] = {"info": {"gap": 0.5} if number % 5 else {}}
        if number % 2:
            fields["forces"] = random.normal(size=(3, 3))
        if number % 3:
            fields["stress"] = random.normal(size=(3, 3))
            fields["energy"] = float(number)
        if number == 17:
            fields["tags"] = np.array([1, 2, 3])
        made.append(molecule([1, 8, 1], number, **fields))
    return Given(made[:1], made[1:12], made[12:])


def test_missing_fields_are_nan_and_an_array_says_where(tmp_path: Path) -> None:
    source = mixed()
    fields = ["forces", "stress", "energy", "dipole", "tags"]
    pipeline = write(source, tmp_path / "out.zarr", fields=fields, missing="nan", atoms_per_chunk=7)
    assert pipeline.failed_indices == {}
    arrays = contents(tmp_path / "out.zarr")
    structures = [one for index in source.indices for one in index]
    assert arrays["meta/samples_mask"].all()
    for name in ("forces", "stress", "energy", "dipole"):
        has = np.array([[getattr(one, name) is not None] for one in structures])
        np.testing.assert_array_equal(arrays[f"custom/has_{name}"], has)
        for row, one in enumerate(structures):
            stored = arrays[f"core/{name}"]
            here = stored[3 * row : 3 * row + 3] if name == "forces" else stored[row]
            value = getattr(one, name)
            expected = (
                np.full(here.shape, np.nan) if value is None else np.reshape(value, here.shape)
            )
            np.testing.assert_array_equal(here, expected)
    assert arrays["core/tags"].sum() == 6
    assert "custom/has_tags" not in arrays
    declared = zarr.open_group(tmp_path / "out.zarr", mode="r").attrs["fields"]
    assert declared["custom"] == {
        f"has_{name}": "system" for name in ("energy", "forces", "stress", "dipole")
    }


def test_entries_of_info_may_be_missing_where_they_are_floats(tmp_path: Path) -> None:
    source = Given(
        [molecule([1], 0, info={"gap": 0.5, "count": 3})], [molecule([1], 1, info={"count": 1})]
    )
    write(source, tmp_path / "out.zarr", custom={"gap": "system"}, missing="nan")
    arrays = contents(tmp_path / "out.zarr")
    np.testing.assert_array_equal(arrays["custom/gap"], [[0.5], [np.nan]])
    np.testing.assert_array_equal(arrays["custom/has_gap"], [[True], [False]])
    source = Given(source.indices[0], [molecule([1], 1, info={"gap": 1.0})])
    custom = {"gap": "system", "count": "system"}
    failed = write(source, tmp_path / "ints.zarr", custom=custom, missing="nan").failed_indices
    assert failed[1].endswith("has no 'count' in its info; int64 has no NaN to put in its place")


def test_without_the_option_a_missing_field_fails_its_index(tmp_path: Path) -> None:
    one = molecule([1, 8], 0, energy=1.0)
    failed = write(Given([one], [molecule([8], 1)]), tmp_path / "out.zarr").failed_indices
    assert "index 1, structure 0: has no energy, unlike the first structure" in failed[1]
    with pytest.raises(StageError, match="'dipole' is to be stored, but the first structure has"):
        write(Given([one]), tmp_path / "other.zarr", fields=["dipole"])


def test_a_field_that_the_store_lacks_is_refused_as_before(tmp_path: Path) -> None:
    source = Given([molecule([1], 0)], [molecule([1], 1, dipole=np.ones(3))])
    failed = write(source, tmp_path / "out.zarr", missing="nan").failed_indices
    assert "index 1, structure 0: has dipole, unlike the first structure" in failed[1]


def test_two_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    source = Given([molecule([1], 0, energy=1.0, info={"has_energy": 1})])
    with pytest.raises(StageError, match="two custom fields would be named 'has_energy'"):
        write(source, tmp_path / "out.zarr", custom={"has_energy": "system"}, missing="nan")


def test_a_large_index_takes_little_memory(tmp_path: Path) -> None:
    class Large(Source[AtomicData]):
        """One index, made as it is read."""

        def __len__(self) -> int:
            return 1

        def atom_counts(self, index: int) -> Any:
            return np.full(4000, 50)

        def __getitem__(self, index: int) -> Iterator[AtomicData]:
            for seed in range(4000):
                yield molecule([6] * 50, seed)

    def peak(path: Path) -> int:
        sink = AtomicDataZarrSink(path, atoms_per_chunk=4096, systems_per_chunk=512)
        sink.prepare(Pipeline(source=Large(), sink=sink, track_metrics=False))
        tracemalloc.start()
        sink(Large()[0], 0)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    # The lesser of two, since Python's table of interned strings may be made anew at any moment,
    # but not twice in so short a time.
    least = min(peak(tmp_path / "out.zarr"), peak(tmp_path / "again.zarr"))
    positions = zarr.open_group(tmp_path / "out.zarr", mode="r")["core/positions"]
    assert isinstance(positions, zarr.Array)
    assert positions.nbytes == 4_800_000
    assert least < positions.nbytes / 2


def test_a_store_with_missing_fields_is_compared_with_its_source(tmp_path: Path) -> None:
    given = [molecule([1], energy=1.0), molecule([1, 8], 1), molecule([8], 2, energy=2.0)]
    pipeline = write(Given(given), tmp_path / "out.zarr", missing="nan")
    assert [one.energy for one in open_dataset(tmp_path / "out.zarr")] == [1.0, None, 2.0]
    report = verify_store(pipeline)
    assert report, str(report)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.int8(3), 300),
        (np.int32(1), 2**40),
        (np.int64(1), np.uint64(2**64 - 1)),
        (np.float32(1), 16_777_217),
    ],
)
def test_integers_that_do_not_fit_are_refused_rather_than_changed(
    tmp_path: Path, first: Any, second: Any
) -> None:
    given = [[molecule([1], info={"kind": first})], [molecule([1], info={"kind": second})]]
    pipeline = write(Given(*given), tmp_path / "out.zarr", custom={"kind": "system"})
    assert pipeline.completed_indices == {0}
    assert "numbers that" in pipeline.failed_indices[1]


@pytest.mark.parametrize("name", ["", "a/b", "..", "zarr.json", "__own"])
def test_custom_fields_that_cannot_name_an_array_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StageError, match="cannot be the name of an array"):
        AtomicDataZarrSink(tmp_path / "out.zarr", custom={name: "system"})


@pytest.mark.parametrize(
    "options",
    [
        {"atoms_per_chunk": 1.5},
        {"atoms_per_chunk": "8"},
        {"atoms_per_chunk": True},
        {"atoms_per_chunk": 2**40},
        {"atoms_per_shard": 16_384.0},
        {"level": 1.5},
        {"codec": ["zstd"]},
        {"fields": "energy"},
    ],
)
def test_options_of_another_type_are_refused_in_one_line(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(StageError) as caught:
        AtomicDataZarrSink(tmp_path / "out.zarr", **options)
    assert "\n" not in str(caught.value)


def test_a_custom_field_with_the_name_of_a_mask_is_none(tmp_path: Path) -> None:
    given = [molecule([1], energy=1.0, info={"has_energy": False})]
    write(Given(given), tmp_path / "out.zarr", custom={"has_energy": "system"})
    [found] = open_dataset(tmp_path / "out.zarr")
    assert (found.energy, found.info) == (1.0, {"has_energy": False})


def test_fields_that_are_named_are_stored_though_nothing_came_at_first(tmp_path: Path) -> None:
    write(Given([]), tmp_path / "out.zarr", fields=["energy", "forces"])
    stored = contents(tmp_path / "out.zarr")
    assert stored["core/energy"].shape == (0, 1)
    assert stored["core/forces"].shape == (0, 3)


@frozen(kw_only=True, eq=False, slots=True)
class Unchecked(AtomicData):
    """Does not look whether there is a row for each atom."""

    def __attrs_post_init__(self) -> None:
        pass


@pytest.mark.parametrize("others", [(2,), (2, 1)])
def test_rows_that_are_too_many_for_the_atoms_do_not_go_to_the_next_structure(
    tmp_path: Path, others: tuple[int, ...]
) -> None:
    # As many rows as atoms in all, in the second case.
    wrong = [
        Unchecked(atomic_numbers=np.ones(2, int), positions=np.full((rows, 3), 1.0))
        for rows in (3, *others[1:])
    ]
    right = molecule([1, 1], 2)
    pipeline = write(Given([*wrong], [right]), tmp_path / "out.zarr")
    assert pipeline.failed_indices == {
        0: "StageError: index 0, structure 0: positions has shape (3, 3); the store was laid out "
        "for (2, 3)"
    }
    [found] = open_dataset(tmp_path / "out.zarr")
    np.testing.assert_array_equal(found.positions, right.positions)


def test_custom_fields_of_which_no_structure_tells_anything_are_the_reason(tmp_path: Path) -> None:
    message = (
        r"not laid out, since custom fields \(site\) are laid out as the first structure has them"
    )
    pipeline = write(Given([]), tmp_path / "out.zarr", custom={"site": "atom"})
    assert re.search(message, pipeline.failed_indices[0])


def test_a_run_that_could_not_lay_out_leaves_the_store_of_another_alone(tmp_path: Path) -> None:
    class Unreadable(Given):
        broken = True

        def __getitem__(self, index: int) -> Iterator[AtomicData]:
            if self.broken:
                raise ValueError("not today")
            return super().__getitem__(index)

    store = tmp_path / "out.zarr"
    late = Unreadable([molecule([8], 3)])
    sink = AtomicDataZarrSink(store)
    sink.prepare(Pipeline(source=late, sink=sink, track_metrics=False))
    write(Given([molecule([1], 1)]), store)
    before = contents(store)
    late.broken = False
    with pytest.raises(StageError, match="not laid out"):
        sink(late[0], 0)
    after = contents(store)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


class Moved(Filter[AtomicData, AtomicData]):
    """Moves the atoms, in every direction."""

    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        return (evolve(one, positions=one.positions + self.by) for one in items)


def test_an_index_that_another_run_writes_meanwhile_is_not_mixed(tmp_path: Path) -> None:
    given = Given([molecule([1, 1], number) for number in range(200)])
    store = tmp_path / "out.zarr"
    sinks = [AtomicDataZarrSink(store, atoms_per_chunk=16, systems_per_chunk=8) for _ in range(2)]
    first, second = (
        Pipeline(source=given, filters=[Moved(by)], sink=sink, track_metrics=False)
        for by, sink in zip((100.0, 200.0), sinks, strict=True)
    )
    for pipeline, sink in zip((first, second), sinks, strict=True):
        sink.prepare(pipeline)

    def interrupted() -> Iterator[AtomicData]:
        for number, structure in enumerate(first.items(0)):
            if number == 150:
                sinks[1](iter(second.items(0)), 0)
            yield structure

    with pytest.raises(StageError, match="another run began to write index 0 meanwhile"):
        sinks[0](interrupted(), 0)
    sinks[0](iter(first.items(0)), 0)
    dataset = open_dataset(store)
    assert len(dataset) == 200
    assert all((one.positions < 150).all() for one in dataset)
    assert list((store / "psnc/written").glob("writing*")) == []


@pytest.mark.parametrize("shard", [None, 32])
def test_a_file_that_is_cut_off_is_not_written_to(tmp_path: Path, shard: int | None) -> None:
    given = Given([molecule([1] * 10, 0)], [molecule([1] * 10, 1)], [molecule([1] * 10, 2)])
    store = tmp_path / "out.zarr"
    options: dict[str, Any] = {"atoms_per_chunk": 16, "atoms_per_shard": shard}
    write(given, store, **options)
    chunk = store / "core/positions/c.0.0"
    whole = chunk.read_bytes()
    sink = AtomicDataZarrSink(store, **options)
    sink.prepare(Pipeline(source=given, sink=sink, track_metrics=False))
    for size in (0, 10, len(whole) - 3):
        chunk.write_bytes(whole[:size])
        with pytest.raises(StageError, match="cannot be decoded"):
            sink(given[1], 1)
        assert chunk.read_bytes() == whole[:size]
