"""Stores made by hand, to the description of the layout alone, and a reader that follows it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import TransposeCodec

Arrays = Mapping[str, NDArray[Any]]

LEVELS = {
    "core": {
        **{"atomic_numbers": "atom", "positions": "atom", "forces": "atom", "virial": "system"},
        **{"cell": "system", "pbc": "system", "energy": "system", "cutoff": "system"},
        **{"neighbor_list": "edge", "neighbor_list_shifts": "edge", "dipole": "system"},
    },
    "custom": {
        **{"gap": "system", "site": "atom", "has_energy": "system", "has_dipole": "system"},
        **{"kind": "system", "spectrum": "system", "energy": "system", "bond_order": "edge"},
    },
}


def arrays_by_hand(structures: int = 40, *, floats: str = "float64") -> dict[str, NDArray[Any]]:
    """Return arrays of everything that a store can have; every fifth structure is masked."""
    random = np.random.default_rng(5)
    atoms = random.integers(1, 9, structures)
    edges = random.integers(0, 12, structures)
    edges[3] = 0
    atoms_ptr, edges_ptr = np.cumsum([0, *atoms]), np.cumsum([0, *edges])
    total, total_edges = int(atoms_ptr[-1]), int(edges_ptr[-1])
    which = np.repeat(np.arange(structures), edges)
    neighbours = random.integers(0, atoms[which][:, None], (total_edges, 2))
    has_energy, has_dipole = random.random(structures) < 0.7, random.random(structures) < 0.7
    mask = np.arange(structures) % 5 != 4

    def numbers(*shape: int) -> NDArray[Any]:
        return random.normal(size=shape).astype(floats)

    return {
        "meta/atoms_ptr": atoms_ptr,
        "meta/edges_ptr": edges_ptr,
        "meta/samples_mask": mask,
        "meta/atoms_mask": np.repeat(mask, atoms),
        "meta/edges_mask": np.repeat(mask, edges),
        "core/atomic_numbers": random.integers(1, 100, total),
        "core/positions": numbers(total, 3),
        "core/forces": numbers(total, 3),
        "core/cell": numbers(structures, 3, 3),
        "core/pbc": random.random((structures, 3)) < 0.5,
        "core/energy": np.where(has_energy[:, None], numbers(structures, 1), np.nan),
        "core/dipole": np.where(has_dipole[:, None], numbers(structures, 3), np.nan),
        "core/virial": numbers(structures, 3, 3),
        "core/cutoff": np.full((structures, 1), 5, dtype=floats),
        "core/neighbor_list": neighbours + atoms_ptr[which][:, None],
        "core/neighbor_list_shifts": random.integers(-1, 2, (total_edges, 3)),
        "custom/gap": numbers(structures, 1),
        "custom/kind": random.integers(0, 9, (structures, 1)),
        "custom/spectrum": numbers(structures, 4),
        "custom/site": numbers(total, 2),
        "custom/bond_order": numbers(total_edges),
        "custom/energy": numbers(structures, 1),
        "custom/has_energy": has_energy,
        "custom/has_dipole": has_dipole[:, None],
    }


def write_by_hand(store: Any, arrays: Arrays, *, rows: int = 7, **how: Any) -> None:
    """Write arrays to a store in chunks of so many rows; ``how`` is zarr's."""
    root = zarr.create_group(
        store,
        zarr_format=how.pop("zarr_format", 3),
        attributes={"num_samples": len(arrays["meta/samples_mask"]), "fields": LEVELS},
    )
    shards, transposed = how.pop("shards", None), how.pop("transposed", False)
    for name, values in arrays.items():
        if transposed:
            how["filters"] = [TransposeCodec(order=tuple(reversed(range(values.ndim))))]
        if shards is not None:
            how["shards"] = (shards * rows, *values.shape[1:])
        made = root.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(rows, *values.shape[1:]),
            fill_value=0,
            **how,
        )
        made[...] = values


def consolidate(store: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(store)


def read_by_hand(arrays: Arrays) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield each structure as the layout is described: pointers, masks, and rows between them."""
    for row in np.flatnonzero(arrays["meta/samples_mask"]):
        structure = {}
        for name, values in arrays.items():
            group, field = name.split("/")
            if group not in ("core", "custom"):
                continue
            level = LEVELS[group][field]
            if level == "system":
                structure[name] = values[row]
                continue
            ptr = arrays[f"meta/{level}s_ptr"]
            structure[name] = values[ptr[row] : ptr[row + 1]]
            if field == "neighbor_list":
                structure[name] = structure[name] - arrays["meta/atoms_ptr"][row]
        yield structure
