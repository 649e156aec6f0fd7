"""Where every structure of a dataset will be in the store, known before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from psnc.errors import StageError
from psnc_atm.atomic_data import AtomicData
from psnc_atm.fields import ALWAYS, EDGE_FIELDS, FIELDS, OPTIONAL, Level

if TYPE_CHECKING:
    from psnc import Pipeline

__all__ = ["FieldSpec", "StorePlan", "plan_store", "require_structure"]

_STORABLE_KINDS = "biufc"


@frozen
class FieldSpec:
    """One array of the store.

    Attributes
    ----------
    group : {"core", "custom"}
        Custom fields come from ``AtomicData.info``.
    name : str
        Name of the array and of the field.
    level : {"atom", "system"}
        Whether the first axis counts atoms or structures.
    dtype : str
        NumPy dtype.
    shape : tuple of int
        Shape for one atom or one structure; ``(1,)`` for the number that a structure has.
    """

    group: str
    name: str
    level: Level
    dtype: str
    shape: tuple[int, ...]


@frozen(eq=False)
class StorePlan:
    """The layout of a store.

    Attributes
    ----------
    fields : tuple of FieldSpec
        The arrays of the groups ``core`` and ``custom``.
    rows_before, atoms_before : (indices + 1,) int64
        Where each index's rows and atoms begin; the last entry is the total.
    atoms_ptr : (rows + 1,) int64
        Where each structure's atoms begin if nothing is dropped.
    unplanned : mapping of int to str
        The indices that could not be read, and why; they have no rows.
    edge_fields : tuple of str
        The fields of edges to store; their arrays are made when all edges are known.
    """

    fields: tuple[FieldSpec, ...]
    rows_before: NDArray[np.int64]
    atoms_before: NDArray[np.int64]
    atoms_ptr: NDArray[np.int64]
    unplanned: Mapping[int, str]
    edge_fields: tuple[str, ...] = ()

    def room(self, index: int) -> tuple[int, int]:
        """Return the number of rows and of atoms that an index has room for."""
        return room(self.rows_before, self.atoms_before, index)


def room(
    rows_before: NDArray[np.int64], atoms_before: NDArray[np.int64], index: int
) -> tuple[int, int]:
    """Return the number of rows and of atoms between an index and the next."""
    rows = rows_before[index + 1] - rows_before[index]
    return int(rows), int(atoms_before[index + 1] - atoms_before[index])


def plan_store(
    pipeline: Pipeline[Any], names: Sequence[str] | None, custom: Mapping[str, Level]
) -> StorePlan | None:
    """Plan the store for everything that ``pipeline`` will write.

    The number of atoms of every structure comes from the source, the fields from the first
    structure that reaches the sink. An index that cannot be read is left out.

    Parameters
    ----------
    pipeline : Pipeline
        What is going to run.
    names : sequence of str, optional
        The optional fields to store; by default those that the first structure has, without what
        was only a calculation's input.
    custom : mapping of str to {"atom", "system"}
        The entries of ``AtomicData.info`` to store.

    Returns
    -------
    StorePlan or None
        ``None`` when no structure reaches the sink because of errors: there is nothing to learn
        the fields from yet.
    """
    counts: list[NDArray[np.int64]] = []
    unplanned: dict[int, str] = {}
    for index in range(len(pipeline.source)):
        try:
            counts.append(atom_counts(pipeline.source, index))
        except Exception as error:  # whatever it is, it must cost this index alone
            unplanned[index] = f"{type(error).__name__}: {error}"
            counts.append(np.empty(0, dtype=np.int64))
    first, failed = _first_structure(pipeline, unplanned)
    if first is None and failed:
        return None
    atoms_ptr = _running_total(np.concatenate(counts) if counts else [])
    rows_before = _running_total([len(of_index) for of_index in counts])
    return StorePlan(
        fields=_fields(first, names, custom),
        rows_before=rows_before,
        atoms_before=atoms_ptr[rows_before],
        atoms_ptr=atoms_ptr,
        unplanned=unplanned,
        edge_fields=_edge_fields(first, names),
    )


def atom_counts(source: Any, index: int) -> NDArray[np.int64]:
    """Return the number of atoms of each structure of an index, by reading it if need be."""
    if hasattr(source, "atom_counts"):
        return np.asarray(source.atom_counts(index), dtype=np.int64)
    return np.array([len(item) for item in source[index]], dtype=np.int64)


def _first_structure(
    pipeline: Pipeline[Any], unplanned: Mapping[int, str]
) -> tuple[AtomicData | None, bool]:
    """Return the first structure that reaches the sink, and whether any index failed."""
    failed = bool(unplanned)
    for index in range(len(pipeline.source)):
        if index in unplanned:
            continue
        try:
            for structure in pipeline.items(index):
                return require_structure(structure, f"index {index}, structure 0"), failed
        except StageError:
            raise
        except Exception:
            # The index fails again, with this cause, when it runs; here it only has no fields.
            failed = True
    return None, failed


def require_structure(item: Any, place: str) -> AtomicData:
    """Return ``item`` if it is a structure, and say so if it is not."""
    if not isinstance(item, AtomicData):
        raise StageError(
            f"{place}: the sink was given a {type(item).__name__}, not AtomicData; "
            "convert it in a filter (AtomicData.from_ase)"
        )
    return item


def _running_total(numbers: Any) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(numbers, dtype=np.int64)])


def _fields(
    first: AtomicData | None, names: Sequence[str] | None, custom: Mapping[str, Level]
) -> tuple[FieldSpec, ...]:
    if first is None:
        nothing = AtomicData(atomic_numbers=np.empty(0, np.int64), positions=np.empty((0, 3)))
        return tuple(_core_field(name, nothing) for name in ALWAYS)
    if names is None:
        present = (name for name in OPTIONAL if getattr(first, name) is not None)
        names = [name for name in present if not FIELDS[name].calculation_input]
    names = [name for name in names if name not in EDGE_FIELDS]
    core = [_core_field(name, first) for name in (*ALWAYS, *names)]
    return (*core, *(_custom_field(name, level, first) for name, level in custom.items()))


def _edge_fields(first: AtomicData | None, names: Sequence[str] | None) -> tuple[str, ...]:
    if first is None:
        return ()
    present = [name for name in EDGE_FIELDS if getattr(first, name) is not None]
    for name in EDGE_FIELDS:
        if name in (names or ()) and name not in present:
            raise _nothing_to_store(name)
    return tuple(name for name in present if names is None or name in names)


def _nothing_to_store(name: str) -> StageError:
    return StageError(f"field {name!r} is to be stored, but the first structure has none")


def _core_field(name: str, first: AtomicData) -> FieldSpec:
    kind = FIELDS[name]
    value = getattr(first, name)
    if value is None and not kind.zero_if_missing:
        raise _nothing_to_store(name)
    if kind.scalar:
        return FieldSpec("core", name, kind.level, kind.dtype, (1,))
    shape = np.shape(value)[1:] if kind.level == "atom" else np.shape(value)
    return FieldSpec("core", name, kind.level, kind.dtype, shape)


def _custom_field(name: str, level: Level, first: AtomicData) -> FieldSpec:
    if name not in first.info:
        raise StageError(
            f"custom field {name!r} is not in the info of the first structure, "
            f"which has {', '.join(map(repr, first.info)) or 'none'}"
        )
    value = np.asarray(first.info[name])
    if value.dtype.kind not in _STORABLE_KINDS:
        kind = type(first.info[name]).__name__
        raise StageError(f"custom field {name!r} is a {kind}, not a number or array of numbers")
    if level == "system":
        return FieldSpec("custom", name, level, value.dtype.name, value.shape or (1,))
    if value.shape[:1] != (len(first),):
        raise StageError(
            f"custom field {name!r} has shape {value.shape} for {len(first)} atoms; "
            "an atom-level field needs one row for each atom"
        )
    return FieldSpec("custom", name, level, value.dtype.name, value.shape[1:])
