"""Lay a store out anew, and keep what is written: for input that was repaired.

An index that could not be read when the store was laid out has no room in it. Once its file is
mended, every region after it moves. The store is then made again beside the old one, the written
regions are copied, and the two change places.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from psnc.errors import StageError
from psnc.index_ranges import runs_of
from psnc_atm.edge_files import carry_edge_files
from psnc_atm.index_claim import carry_claims
from psnc_atm.store_plan import StorePlan
from psnc_atm.zarr_store import (
    WRITTEN,
    Encoding,
    Part,
    ZarrStore,
    draft_path,
    lay_out,
    open_store,
)

__all__ = ["changed_indices", "input_without_counts", "lay_out_anew", "take_back"]

# Whole files at a time, few enough to stay small in memory.
_COPIED_ROWS = 262_144


def changed_indices(then: Mapping[str, Any], now: Mapping[str, Any]) -> set[int] | None:
    """Return the indices whose input is another than it was, new ones among them.

    Parameters
    ----------
    then, now : mapping
        What the store was laid out for, and what it is wanted for.

    Returns
    -------
    set of int or None
        ``None`` where the indices no longer mean what they meant.
    """
    old, new = input_without_counts(then), input_without_counts(now)
    others = [key for key in then if key != "input"]
    same_stage = all(then[key] == now[key] for key in others)
    if same_stage and old == new:
        return set()
    old_files, new_files = old.pop("files", None), new.pop("files", None)
    same_otherwise = same_stage and old == new
    # With several indices a file, one file's content decides the numbers of all that follow.
    if not same_otherwise or not old_files or not new_files or new.get("rows_per_index"):
        return None
    if [file[0] for file in old_files] != [file[0] for file in new_files[: len(old_files)]]:
        return None
    changed = {
        i for i, (one, other) in enumerate(zip(old_files, new_files, strict=False)) if one != other
    }
    return changed | set(range(len(old_files), len(new_files)))


def input_without_counts(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out where numbers of atoms come from: those of what is written were right."""
    return {key: value for key, value in identity["input"].items() if key != "natoms"}


def lay_out_anew(
    store: ZarrStore,
    plan: StorePlan,
    parts: Sequence[Part],
    encoding: Encoding,
    changed: set[int],
) -> None:
    """Replace ``store`` by one that follows ``plan``, with everything that is written.

    Whenever the process is killed, either the old or the new store is at the path, whole; or, on
    systems that cannot exchange two directories, it is where :func:`take_back` finds it.

    Raises
    ------
    psnc.StageError
        If the new layout has other fields, or other room for an index that did not change.
    """
    if (plan.fields, plan.edge_fields) != (store.fields, store.edge_fields):
        raise StageError(
            f"{store.path} has other fields than the first structure now; choose another "
            "output_path, or name the fields (fields=...)"
        )
    indices = range(len(store.rows_before) - 1)
    kept = [i for i in indices if store.room(i) == plan.room(i)]
    for index in indices:
        if index not in changed and store.room(index) != plan.room(index):
            raise StageError(
                f"{store.path}: {store.name_of(index)} has other structures than it was laid out "
                "for, though its file looks the same; choose another output_path"
            )
    draft = draft_path(store.path)
    try:
        lay_out(draft, plan, parts, encoding, (*store.follows, store.made))
        laid_out = open_store(draft)
        assert laid_out is not None
        for first, last in runs_of(kept):
            _copy_indices(store, laid_out, first, last)
        for index in changed.intersection(kept):
            _forget(laid_out, index)
        carry_claims(store.path, draft)
        if store.edge_fields:
            carry_edge_files(store.path, draft, [index for index in kept if index not in changed])
        _exchange(draft, store.path)
    except OSError as error:
        raise StageError(
            f"{store.path} cannot be laid out anew ({error.strerror}); that takes room for a "
            "second copy; the store is as it was"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _copy_indices(old: ZarrStore, new: ZarrStore, first: int, last: int) -> None:
    rows = _span(old.rows_before, new.rows_before, first, last)
    atoms = _span(old.atoms_before, new.atoms_before, first, last)
    _copy(old, new, "meta/atoms_mask", *atoms)
    for field in old.fields:
        _copy(old, new, field.path, *(atoms if field.level == "atom" else rows))
    # Where the last structure ends is where the next index begins, which the new layout says.
    start, stop, target = rows
    ends = old.read("meta/atoms_ptr", start, stop)
    new.write("meta/atoms_ptr", target, ends + np.int64(atoms[2] - atoms[0]))
    _copy(old, new, "meta/samples_mask", *rows)
    _copy(old, new, WRITTEN, first, last + 1, first)


def _forget(store: ZarrStore, index: int) -> None:
    """Somebody may be writing the index: its rows were copied for that, and are not whole."""
    row, row_end = (int(number) for number in store.rows_before[index : index + 2])
    store.clear(WRITTEN, index, index + 1)
    store.clear("meta/samples_mask", row, row_end)


def _span(old: Any, new: Any, first: int, last: int) -> tuple[int, int, int]:
    return int(old[first]), int(old[last + 1]), int(new[first])


def _copy(old: ZarrStore, new: ZarrStore, name: str, start: int, stop: int, target: int) -> None:
    step = max(1, _COPIED_ROWS // old.file_rows(name)) * old.file_rows(name)
    for position in range(start, stop, step):
        values = old.read(name, position, min(position + step, stop))
        new.write(name, target + position - start, values)


def _exchange(first: Path, second: Path) -> None:
    """Let two directories change places, in one step where the system can do it."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    current_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2 is not None:
        names = os.fsencode(first), os.fsencode(second)
        if renameat2(current_directory, names[0], current_directory, names[1], exchange) == 0:
            return
    previous = _previous_path(second)
    os.rename(second, previous)
    os.rename(first, second)
    os.rename(previous, first)


def take_back(path: Path) -> None:
    """Return the store to ``path`` that a killed process had just taken away from it."""
    if not path.exists():
        with suppress(FileNotFoundError):  # the usual case: there is none
            os.rename(_previous_path(path), path)


def _previous_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")
