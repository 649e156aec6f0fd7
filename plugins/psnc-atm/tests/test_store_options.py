"""Codecs, shards, dtypes and missing fields of a store."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from attrs import evolve
from data import contents
from structures import molecule

from psnc import Filter, Pipeline, Source, StageError, run_pipeline
from psnc_atm import ASELMDBSource, AtomicData, AtomicDataZarrSink


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

    sink = AtomicDataZarrSink(tmp_path / "out.zarr", atoms_per_chunk=4096, systems_per_chunk=512)
    pipeline = Pipeline(source=Large(), sink=sink, track_metrics=False)
    sink.prepare(pipeline)
    tracemalloc.start()
    sink(Large()[0], 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    positions = zarr.open_group(tmp_path / "out.zarr", mode="r")["core/positions"]
    assert isinstance(positions, zarr.Array)
    assert positions.nbytes == 4_800_000
    assert peak < positions.nbytes / 2
