"""Stores in the hands of nvalchemi-toolkit and of PyTorch, which are too large to install always.

By hand, in an environment of its own (1.8 GB with PyTorch for CPUs):

    pip install torch tensordict plum-dispatch pydantic periodictable jaxtyping loguru warp-lang
    pip install --no-deps nvalchemi-toolkit==0.2.0 nvalchemi-toolkit-ops
    pip install -e ../.. -e '.[test]'
    pytest -m nvalchemi tests/test_nvalchemi.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data import crystals, molecules, write_database
from stores import arrays_by_hand, write_by_hand

from psnc import Pipeline, gather_pipeline, run_pipeline
from psnc_atm import (
    ASELMDBSource,
    AtomicData,
    AtomicDataset,
    AtomicDataZarrSink,
    NeighbourList,
    SelectSize,
    open_dataset,
)

pytestmark = [
    pytest.mark.nvalchemi,
    # What libraries warn of as they are imported is theirs.
    pytest.mark.filterwarnings("default"),
]


def write_store(directory: Path, kind: str) -> Path:
    """Three indices, of which a filter drops some."""
    (directory / "in").mkdir()
    for number in range(3):
        structures = molecules(40, number) if kind == "molecules" else crystals(12, number)
        write_database(
            directory / "in" / f"{number}.aselmdb",
            structures,
            data={"charge": number - 1, "spin": 1, "gap": 0.25 * number, "kind": number},
        )
    pipeline = Pipeline(
        source=ASELMDBSource(directory / "in"),
        filters=[SelectSize(maximum=6 if kind == "molecules" else 8)],
        sink=AtomicDataZarrSink(
            directory / "out.zarr",
            atoms_per_chunk=50,
            systems_per_chunk=7,
            custom={"gap": "system", "kind": "system"},
        ),
        track_metrics=False,
    )
    run_pipeline(pipeline, progress=False)
    return directory / "out.zarr"


def assert_read_alike(theirs: Any, dataset: AtomicDataset) -> None:
    """Compare a reader of nvalchemi's with a dataset, structure by structure and field by field."""
    from nvalchemi.data.atomic_data import AtomicData as TheirData

    assert len(theirs) == len(dataset) > 10
    for number in range(len(dataset)):
        read, _ = theirs[number]
        ours = dataset[[number]].arrays()
        assert read.keys() == ours.keys() - {"atoms_ptr", "edges_ptr"}
        for name, tensor in read.items():
            np.testing.assert_array_equal(tensor.numpy(), ours[name], err_msg=name)
        # It checks dtypes and shapes.
        TheirData.model_validate(dict(read))


@pytest.mark.parametrize("kind", ["molecules", "crystals"])
def test_their_reader_and_model_accept_what_the_sink_writes(tmp_path: Path, kind: str) -> None:
    from nvalchemi.data.atomic_data import AtomicData as TheirData
    from nvalchemi.data.batch import Batch
    from nvalchemi.data.datapipes.backends.zarr import AtomicDataZarrReader

    store = write_store(tmp_path, kind)
    theirs, dataset = AtomicDataZarrReader(store), open_dataset(store)
    assert_read_alike(theirs, dataset)
    chosen = [5, 3, 11, 0]
    batch = Batch.from_data_list([TheirData.model_validate(theirs[i][0]) for i in chosen])
    arrays = dataset[chosen].arrays()
    for name in ("positions", "atomic_numbers", "forces", "energy", "cell", "pbc", "spin"):
        np.testing.assert_array_equal(getattr(batch, name).numpy(), arrays[name])


def test_their_reader_and_model_accept_edges_shards_and_appended_structures(tmp_path: Path) -> None:
    from nvalchemi.data.datapipes.backends.zarr import AtomicDataZarrReader

    store = tmp_path / "out.zarr"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for number in range(2):
            write_database(tmp_path / name / f"{number}.aselmdb", crystals(9, len(name) + number))
        pipeline = Pipeline(
            source=ASELMDBSource(tmp_path / name, dtype="float32"),
            filters=[NeighbourList(3.0)],
            sink=AtomicDataZarrSink(
                store,
                atoms_per_chunk=16,
                systems_per_chunk=4,
                edges_per_chunk=32,
                atoms_per_shard=64,
                edges_per_shard=128,
                fields=["energy", "forces", "stress", "charge", "edge_index", "unit_shifts"],
                missing="nan",
                append=True,
            ),
            db_dir=tmp_path / f"db-{name}",
        )
        run_pipeline(pipeline, progress=False)
        gather_pipeline(pipeline)
    theirs, dataset = AtomicDataZarrReader(store), open_dataset(store)
    assert len(dataset) == 36
    assert {"neighbor_list", "neighbor_list_shifts", "has_charge"} <= dataset.fields.keys()
    with pytest.warns(UserWarning, match="cast"):  # of energies, to the dtype of positions
        assert_read_alike(theirs, dataset)
    for number in (0, 17, 18, 35):
        edges = theirs[number][0]["neighbor_list"].numpy().T
        np.testing.assert_array_equal(edges, dataset[number].edge_index)


def test_their_reader_accepts_edges(tmp_path: Path) -> None:
    from nvalchemi.data.atomic_data import AtomicData as TheirData
    from nvalchemi.data.datapipes.backends.zarr import AtomicDataZarrReader

    arrays = arrays_by_hand()
    del arrays["custom/energy"]  # they have one name for both
    write_by_hand(tmp_path / "out.zarr", arrays)
    theirs = AtomicDataZarrReader(tmp_path / "out.zarr")
    dataset = open_dataset(tmp_path / "out.zarr")
    for number in range(len(dataset)):
        read, _ = theirs[number]
        np.testing.assert_array_equal(read["neighbor_list"].numpy().T, dataset[number].edge_index)
        np.testing.assert_array_equal(
            read["neighbor_list_shifts"].numpy(), dataset[number].unit_shifts
        )
        np.testing.assert_array_equal(read["site"].numpy(), dataset[number].info["site"])
        TheirData.model_validate(dict(read))


def test_what_their_writer_writes_can_be_read(tmp_path: Path) -> None:
    import torch
    from nvalchemi.data.atomic_data import AtomicData as TheirData
    from nvalchemi.data.datapipes.backends.zarr import AtomicDataZarrReader, AtomicDataZarrWriter

    made = []
    for number in range(20):
        atoms, edges = 2 + number % 5, 3 * number % 7
        made.append(
            TheirData(
                positions=torch.randn(atoms, 3),
                atomic_numbers=torch.randint(1, 30, (atoms,)),
                energy=torch.tensor([[float(number)]]),
                forces=torch.randn(atoms, 3),
                cell=torch.eye(3).unsqueeze(0),
                pbc=torch.tensor([[True, False, True]]),
                neighbor_list=torch.randint(0, atoms, (edges, 2)),
                neighbor_list_shifts=torch.randint(-1, 2, (edges, 3)),
            )
        )
    writer = AtomicDataZarrWriter(tmp_path / "out.zarr")
    writer.write(made)
    writer.delete([3, 15])
    dataset = open_dataset(tmp_path / "out.zarr")
    assert_read_alike(AtomicDataZarrReader(tmp_path / "out.zarr"), dataset)
    kept = [one for number, one in enumerate(made) if number not in (3, 15)]
    for structure, one in zip(dataset, kept, strict=True):
        np.testing.assert_array_equal(structure.positions, one.positions.numpy())
        np.testing.assert_array_equal(structure.edge_index.T, one.neighbor_list.numpy())
        assert structure.energy == float(one.energy)


@pytest.mark.parametrize("method", [None, "fork", "spawn"])
def test_a_dataloader_shuffles_a_dataset(tmp_path: Path, method: str | None) -> None:
    from torch.utils.data import DataLoader

    dataset = open_dataset(write_store(tmp_path, "molecules"))
    expected = list(dataset)
    loader: Any = DataLoader(
        dataset,
        batch_size=8,
        shuffle=True,
        num_workers=0 if method is None else 2,
        multiprocessing_context=method,
        collate_fn=list,
    )
    seen: list[AtomicData] = [one for batch in loader for one in batch]
    assert len(seen) == len(expected)

    def order(one: AtomicData) -> tuple[float, ...]:
        return tuple(one.positions.ravel())

    assert sorted(seen, key=order) == sorted(expected, key=order)
