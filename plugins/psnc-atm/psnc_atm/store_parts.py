"""Which part of a store a pipeline writes, and what has to change in the layout for it."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import frozen

from psnc.errors import StageError
from psnc_atm.store_plan import StorePlan, atom_counts, plan_of
from psnc_atm.zarr_codec import CODECS, DEFAULT_CODEC
from psnc_atm.zarr_relayout import changed_indices, input_without_counts
from psnc_atm.zarr_store import WRITTEN, Part, ZarrStore

__all__ = ["Changes", "changes", "part_of", "part_of_source", "plan_with_others"]

Identity = Mapping[str, Any]
# What a store of an earlier format was laid out with.
_ALWAYS_SO_BEFORE = {
    "shard_rows": {"atom": None, "system": None},
    "codec": [DEFAULT_CODEC, CODECS[DEFAULT_CODEC][1]],
    "missing": "refuse",
}


@frozen
class Changes:
    """What a layout lacks.

    Attributes
    ----------
    part : int
        Number of the part; the number of parts, for a new one.
    new : list of int
        Indices of the source that come behind those that have room.
    old : set of int
        Indices that need other room than they have.
    """

    part: int
    new: list[int]
    old: set[int]


def part_of(store: ZarrStore, identity: Identity, *, append: bool) -> int:
    """Return the number of the part that a pipeline writes; the number of parts, for a new one."""
    for number, part in enumerate(store.parts):
        if _complete(part.identity) == identity:
            return number
    if not append:
        return 0
    for number, part in enumerate(store.parts):
        if _goes_on(part.identity, identity):
            return number
    return len(store.parts)


def part_of_source(store: ZarrStore, source: Any) -> Part:
    """Return what a store has of a source, whatever the sink's options were.

    Raises
    ------
    psnc.StageError
        If it has the structures of several sources, and none of them is this one.
    """
    if len(store.parts) == 1:
        return store.parts[0]
    if hasattr(source, "input_identity"):
        described = {"input": json.loads(json.dumps(source.input_identity()))}
        for part in store.parts:
            if input_without_counts(part.identity) == input_without_counts(described):
                return part
    raise StageError(
        f"{store.path} has the structures of {len(store.parts)} sources, and none of them is this "
        "one as it is now; give one that it was made from"
    )


def changes(store: ZarrStore, identity: Identity, source: Any, *, append: bool) -> Changes | None:
    """Return what has to change before a pipeline can write; ``None`` for nothing.

    Raises
    ------
    psnc.StageError
        If the store is for other input, or has part of it already.
    """
    number = part_of(store, identity, append=append)
    if number == len(store.parts):
        _refuse_what_is_there(store, identity)
        return Changes(number, list(range(len(source))), set())
    part = store.parts[number]
    then, indices = _complete(part.identity), part.indices()
    marks = store.read(WRITTEN, 0, len(store.rows_before) - 1)[indices]
    written = set(np.flatnonzero(marks).tolist())
    new: list[int] = []
    old: set[int] = set()
    if then != identity and _only_added(then, identity):
        new = list(range(len(part), len(source)))
    elif then != identity:
        changed = changed_indices(then, identity)
        if changed is None and append and not written and _may_be_replaced(then, identity):
            # What was appended by mistake, and nothing was written of.
            changed = set(range(len(source))) if len(source) >= len(part) else None
        same_indices = bool(changed) or len(source) == len(part)
        if changed is None or not same_indices or changed & written:
            raise _other_input(store, then, identity, written)
        if then["input"].get("natoms") != identity["input"].get("natoms"):
            # Numbers of atoms decide how much room an index has.
            changed |= {*range(len(source))} - written
        new = sorted(index for index in changed if index >= len(part))
        old = {index for index in changed if index < len(part)}
    unplanned = [i for i, place in enumerate(indices.tolist()) if place in store.unplanned]
    old |= _readable_again(source, unplanned)
    return Changes(number, new, old) if new or old or then != identity else None


def plan_with_others(
    store: ZarrStore, plan: StorePlan, parts: Sequence[Part], number: int
) -> StorePlan:
    """Return a plan of the whole store, from that of one part and what there is of the others."""
    indices = parts[number].indices().tolist()
    mine = {place: index for index, place in enumerate(indices)}
    counts = []
    for place in range(sum(map(len, parts))):
        if place in mine:
            first, last = plan.rows_before[mine[place] : mine[place] + 2]
            counts.append(np.diff(plan.atoms_ptr[first : last + 1]))
        else:
            first, last = (int(row) for row in store.rows_before[place : place + 2])
            counts.append(np.diff(store.read("meta/atoms_ptr", first, last + 1)))
    unplanned = {place: why for place, why in store.unplanned.items() if place not in mine}
    unplanned |= {indices[index]: why for index, why in plan.unplanned.items()}
    whole = store if number else plan
    return plan_of(whole.fields, counts, unplanned, whole.edge_fields)


def _complete(identity: Identity) -> dict[str, Any]:
    return {**_ALWAYS_SO_BEFORE, **identity}


def _files(identity: Identity) -> list[list[Any]]:
    files: list[list[Any]] = identity["input"].get("files") or []
    return files


def _may_be_replaced(then: Identity, now: Identity) -> bool:
    return _goes_on(then, now) and _difference_of_options(then, now) is None


def _only_added(then: Identity, now: Identity) -> bool:
    """Whether the same files are there with others behind them, and all else is the same."""
    old, new = _files(then), _files(now)
    others = [
        {**identity, "input": {**identity["input"], "files": None}} for identity in (then, now)
    ]
    return bool(old) and others[0] == others[1] and old == new[: len(old)]


def _goes_on(then: Identity, now: Identity) -> bool:
    """Whether it is the same source, though files were added or mended."""
    old, new = _files(then), _files(now)
    same_names = [file[0] for file in old] == [file[0] for file in new[: len(old)]]
    return same_names and any(one == other for one, other in zip(old, new, strict=False))


def _refuse_what_is_there(store: ZarrStore, identity: Identity) -> None:
    first = _complete(store.parts[0].identity)
    difference = _difference_of_options(first, identity)
    if difference:
        raise _refusal(store, difference)
    there = [file for part in store.parts for file in _files(part.identity)]
    for file in _files(identity):
        if file in there:
            raise _refusal(store, f"{file[0]} is in it already, beside other files")


def _readable_again(source: Any, unplanned: Sequence[int]) -> set[int]:
    """Return the indices that had no room because of something that has passed."""
    readable = set()
    for index in unplanned:
        try:
            atom_counts(source, index)
        except Exception:
            # The index fails again, with its present cause, when it runs.
            continue
        readable.add(index)
    return readable


def _other_input(
    store: ZarrStore, then: Identity, now: Identity, written: Container[int]
) -> StageError:
    return _refusal(store, _difference(then, now, written))


def _refusal(store: ZarrStore, difference: str) -> StageError:
    return StageError(
        f"{store.path} was laid out for other input: {difference}; "
        "choose another output_path, or delete the store to write it anew"
    )


def _difference_of_options(then: Identity, now: Identity) -> str | None:
    for key in then:
        if key != "input" and then[key] != now[key]:
            return f"{key} was {then[key]} and is {now[key]}"
    return None


def _difference(then: Identity, now: Identity, written: Container[int]) -> str:
    """Say in a few words what stands in the way."""
    options = _difference_of_options(then, now)
    if options:
        return options
    old, new = then["input"], now["input"]
    old_files = {name: state for name, *state in old.get("files", ())}
    new_files = {name: state for name, *state in new.get("files", ())}
    if list(old_files) != list(new_files)[: len(old_files)]:
        gone = [f"{name} is gone" for name in old_files if name not in new_files]
        added = [f"{name} is new" for name in new_files if name not in old_files]
        return (gone + added)[0]
    others = {*old, *new} - {"files", "natoms"}
    rest = sorted(key for key in others if old.get(key) != new.get(key))
    if rest:
        return ", ".join(f"{key} was {old.get(key)} and is {new.get(key)}" for key in rest)
    changed = [name for name, state in old_files.items() if new_files[name] != state]
    positions = {name: position for position, name in enumerate(old_files)}
    changed.sort(key=lambda name: positions[name] not in written)
    return f"{changed[0]} changed" if changed else "files were added"
