"""Room for more indices behind those of a store, made in place.

Nothing that is there is copied or moved. What is written behind the end of an array is seen by
nobody, until the array's length says otherwise; then follows what readers begin with, the root's
metadata, and last what psnc's writers begin with, its own group's. Each of these files is replaced
in one step. So a reader finds the old lengths or the new ones, with rows that are masked; a kill
leaves a store in which the next run does the same again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psnc.errors import StageError
from psnc_atm.joined_edges import withdraw_edges
from psnc_atm.store_plan import plan_of
from psnc_atm.zarr_array import replace_file
from psnc_atm.zarr_region import write_region
from psnc_atm.zarr_store import OWN_GROUP, WRITTEN, Part, ZarrStore, own_attributes

__all__ = ["can_grow", "enlarge", "enlarged_parts"]


def can_grow(store: ZarrStore) -> bool:
    """Whether the store's chunks allow it: in format 2 they are no longer than the arrays."""
    return store.format > 2


def enlarged_parts(
    parts: Sequence[Part], number: int, identity: Mapping[str, Any], count: int
) -> list[Part]:
    """Return the parts once one of them, or a new one, has ``count`` indices more, at the end."""
    made = list(parts)
    if number == len(made):
        made.append(Part(identity, ()))
    first = sum(map(len, parts))
    runs = list(made[number].runs)
    if runs and sum(runs[-1]) == first:
        runs[-1] = (runs[-1][0], runs[-1][1] + count)
    elif count:
        runs.append((first, count))
    made[number] = Part(identity, tuple(runs))
    return made


def enlarge(
    store: ZarrStore,
    number: int,
    identity: Mapping[str, Any],
    counts: Sequence[NDArray[np.int64]],
    unplanned: Mapping[int, str],
) -> None:
    """Make room for new indices at the end, for a part that is there or for a new one.

    Parameters
    ----------
    store : ZarrStore
        The current layout, locked exclusively.
    number : int
        Of the part; the number of parts, for a new one.
    identity : mapping
        What the part is laid out for now.
    counts : list of array
        The number of atoms of each structure of each new index.
    unplanned : mapping of int to str
        Why some of the new indices, counted from 0, could not be read.
    """
    if store.edge_fields:
        # Their pointers end with the last structure; joined again, they have room for the new ones.
        withdraw_edges(store)
    parts = enlarged_parts(store.parts, number, identity, len(counts))
    texts_from = _write_and_resize(store, parts, number, counts)
    indices = len(store.rows_before) - 1
    attributes = own_attributes(
        store.fields,
        store.edge_fields,
        {**store.unplanned, **{indices + new: cause for new, cause in unplanned.items()}},
        indices + len(counts),
        parts,
        texts_from,
        (*store.follows, store.made),
    )
    own = _metadata(store.path / OWN_GROUP)
    own["attributes"] = attributes
    _publish(store, own, rows=int(store.rows_before[-1]) + sum(map(len, counts)))
    _replace(store, store.path / OWN_GROUP, own)


def _write_and_resize(
    store: ZarrStore,
    parts: Sequence[Part],
    number: int,
    counts: Sequence[NDArray[np.int64]],
) -> list[int]:
    """Enlarge the arrays, and return where the identity of each part is."""
    rows, atoms = int(store.rows_before[-1]), int(store.atoms_before[-1])
    new = plan_of((), counts, {})
    more_rows, more_atoms = int(new.rows_before[-1]), int(new.atoms_ptr[-1])
    indices = len(store.rows_before) - 1
    texts, texts_from = _texts(store, parts, number)
    added: list[tuple[str, int, NDArray[Any]]] = [
        ("meta/atoms_ptr", rows + 1, atoms + new.atoms_ptr[1:]),
        (f"{OWN_GROUP}/rows_before", indices + 1, rows + new.rows_before[1:]),
        (f"{OWN_GROUP}/atoms_before", indices + 1, atoms + new.atoms_before[1:]),
        (f"{OWN_GROUP}/identity", *texts),
    ]
    for name, start, values in added:
        _within(store, name, start, values)
    lengths = {name: start + len(values) for name, start, values in added}
    lengths["meta/edges_ptr"] = rows + more_rows + 1
    lengths |= {"meta/samples_mask": rows + more_rows, "meta/atoms_mask": atoms + more_atoms}
    lengths[WRITTEN] = indices + len(counts)
    for field in store.fields:
        lengths[field.path] = atoms + more_atoms if field.level == "atom" else rows + more_rows
    for name, length in lengths.items():
        metadata = _metadata(store.path / name)
        if metadata["shape"][0] != length:
            metadata["shape"][0] = length
            _replace(store, store.path / name, metadata)
    return texts_from


def _within(store: ZarrStore, name: str, start: int, values: NDArray[Any]) -> None:
    try:
        write_region(store.array(name).resized(start + len(values)), start, values)
    except OSError as error:
        raise _no_room(store, error) from error


def _texts(
    store: ZarrStore, parts: Sequence[Part], number: int
) -> tuple[tuple[int, NDArray[np.uint8]], list[int]]:
    """Return the part's identity and where it goes: behind all others, which stay valid."""
    own = _metadata(store.path / OWN_GROUP)["attributes"]["parts"]
    texts_from = [int(part["identity"][0]) for part in own]
    end = max(int(part["identity"][1]) for part in own)
    text = np.frombuffer(json.dumps(parts[number].identity).encode(), dtype=np.uint8)
    texts_from[number : number + 1] = [end]
    return (end, text), texts_from


def _publish(store: ZarrStore, own: Mapping[str, Any], *, rows: int) -> None:
    """Have readers see the new lengths, all at once."""
    root = _metadata(store.path)
    root["attributes"]["num_samples"] = rows
    consolidated = (root.get("consolidated_metadata") or {}).get("metadata", {})
    for name, metadata in consolidated.items():
        if name == OWN_GROUP:
            metadata["attributes"] = own["attributes"]
        elif metadata["node_type"] == "array":
            metadata["shape"] = _metadata(store.path / name)["shape"]
    _replace(store, store.path, root)


def _metadata(directory: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads((directory / "zarr.json").read_bytes())
    return metadata


def _replace(store: ZarrStore, directory: Path, metadata: Mapping[str, Any]) -> None:
    try:
        replace_file(directory / "zarr.json", json.dumps(metadata, indent=2).encode())
    except OSError as error:
        raise _no_room(store, error) from error


def _no_room(store: ZarrStore, error: OSError) -> StageError:
    return StageError(
        f"{store.path} cannot be enlarged ({error.strerror}); see to it and run again; "
        "what is written stays as it was"
    )
