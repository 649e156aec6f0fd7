"""Where every structure of a dataset will be in the store, known before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from psnc import map_on_workers
from psnc.errors import StageError
from psnc_atm.atomic_data import AtomicData
from psnc_atm.fields import ALWAYS, EDGE_FIELDS, FIELDS, OPTIONAL, Level

if TYPE_CHECKING:
    from psnc import Pipeline

__all__ = [
    "FieldSpec",
    "Missing",
    "StorePlan",
    "atom_counts",
    "count_atoms",
    "plan_of",
    "plan_store",
    "require_structure",
]

Missing = Literal["refuse", "nan"]

_STORABLE_KINDS = "biufc"
# Many more than there are workers, so that none waits long for the last.
_PARTS_TO_COUNT = 512


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
    presence_of : str, optional
        The array, with its group, that this one says of which structures have it; of the others
        it is NaN.
    may_be_missing : bool
        Whether there is such an array for this one.
    """

    group: str
    name: str
    level: Level
    dtype: str
    shape: tuple[int, ...]
    presence_of: str | None = None
    may_be_missing: bool = False

    @property
    def path(self) -> str:
        """Where the array is in the store."""
        return f"{self.group}/{self.name}"

    def value_of(self, structure: AtomicData) -> Any:
        """Return what a structure has for the array; ``None`` for nothing."""
        if self.presence_of is not None:
            group, name = self.presence_of.split("/", 1)
            return _value(structure, group, name) is not None
        return _value(structure, self.group, self.name)


def _value(structure: AtomicData, group: str, name: str) -> Any:
    return getattr(structure, name) if group == "core" else structure.info.get(name)


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
    pipeline: Pipeline[Any],
    names: Sequence[str] | None,
    custom: Mapping[str, Level],
    missing: Missing = "refuse",
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
    missing : {"refuse", "nan"}
        Whether structures may lack fields that are stored.

    Returns
    -------
    StorePlan or None
        ``None`` when no structure reaches the sink because of errors: there is nothing to learn
        the fields from yet.
    """
    counts, unplanned = count_atoms(pipeline.source, range(len(pipeline.source)))
    first, failed = _first_structure(pipeline, unplanned)
    if first is None and (failed or custom):
        # Nothing says what the arrays of the custom fields are to be like.
        return None
    fields = _fields(first, names, custom, missing)
    return plan_of(fields, counts, unplanned, _edge_fields(first, names))


def plan_of(
    fields: tuple[FieldSpec, ...],
    counts: Sequence[NDArray[np.int64]],
    unplanned: Mapping[int, str],
    edge_fields: tuple[str, ...] = (),
) -> StorePlan:
    """Return the layout for indices whose structures have so many atoms each."""
    atoms_ptr = _running_total(np.concatenate(counts) if counts else [])
    rows_before = _running_total([len(of_index) for of_index in counts])
    return StorePlan(
        fields=fields,
        rows_before=rows_before,
        atoms_before=atoms_ptr[rows_before],
        atoms_ptr=atoms_ptr,
        unplanned=unplanned,
        edge_fields=edge_fields,
    )


def count_atoms(
    source: Any, indices: Sequence[int]
) -> tuple[list[NDArray[np.int64]], dict[int, str]]:
    """Return the numbers of atoms of each index, and why some could not be read.

    What could not be read is counted from 0 on, in the order of ``indices``, and has no structures.
    All workers of the run that gets ready count.
    """
    at_a_time = -(-len(indices) // _PARTS_TO_COUNT) or 1
    parts = [indices[start : start + at_a_time] for start in range(0, len(indices), at_a_time)]
    counts: list[NDArray[np.int64]] = []
    unplanned: dict[int, str] = {}
    for counted, why_not in map_on_workers(partial(_count_some, source), parts):
        unplanned |= {len(counts) + position: cause for position, cause in why_not.items()}
        counts += counted
    return counts, unplanned


def _count_some(
    source: Any, indices: Sequence[int]
) -> tuple[list[NDArray[np.int64]], dict[int, str]]:
    counts: list[NDArray[np.int64]] = []
    unplanned: dict[int, str] = {}
    for position, index in enumerate(indices):
        try:
            counts.append(atom_counts(source, index))
        except Exception as error:  # whatever it is, it must cost this index alone
            unplanned[position] = f"{type(error).__name__}: {error}"
            counts.append(np.empty(0, dtype=np.int64))
    return counts, unplanned


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
    first: AtomicData | None,
    names: Sequence[str] | None,
    custom: Mapping[str, Level],
    missing: Missing,
) -> tuple[FieldSpec, ...]:
    if first is None:
        nothing = AtomicData(atomic_numbers=np.empty(0, np.int64), positions=np.empty((0, 3)))
        known = [name for name in names or () if name not in EDGE_FIELDS]
        # Their shapes are known though there is no structure.
        core = [_core_field(name, nothing, "nan") for name in (*ALWAYS, *known)]
        if missing == "refuse":
            return tuple(evolve(field, may_be_missing=False) for field in core)
        return (*core, *_presence_fields(core))
    if names is None:
        present = (name for name in OPTIONAL if getattr(first, name) is not None)
        names = [name for name in present if not FIELDS[name].calculation_input]
    names = [name for name in names if name not in EDGE_FIELDS]
    core = [_core_field(name, first, missing) for name in (*ALWAYS, *names)]
    own = [_custom_field(name, level, first, missing) for name, level in custom.items()]
    return (*core, *own, *_presence_fields((*core, *own)))


def _edge_fields(first: AtomicData | None, names: Sequence[str] | None) -> tuple[str, ...]:
    if first is None:
        return ()
    present = [name for name in EDGE_FIELDS if getattr(first, name) is not None]
    for name in EDGE_FIELDS:
        if name in (names or ()) and name not in present:
            raise StageError(
                f"field {name!r} is to be stored, but the first structure has none; "
                "have a filter find the edges (NeighbourList)"
            )
    return tuple(name for name in present if names is None or name in names)


def _core_field(name: str, first: AtomicData, missing: Missing) -> FieldSpec:
    kind = FIELDS[name]
    value = getattr(first, name)
    optional = missing == "nan" and name not in ALWAYS and not kind.zero_if_missing
    if value is None and not kind.zero_if_missing and not optional:
        raise StageError(
            f"field {name!r} is to be stored, but the first structure has none; "
            "take missing='nan' where not all have it"
        )
    if kind.scalar:
        return FieldSpec("core", name, kind.level, kind.dtype, (1,), may_be_missing=optional)
    if value is None:
        shape = kind.shape
    else:
        shape = np.shape(value)[1:] if kind.level == "atom" else np.shape(value)
    dtype = _float_dtype(first.positions if value is None else value, kind.dtype)
    return FieldSpec("core", name, kind.level, dtype, shape, may_be_missing=optional)


def _float_dtype(value: Any, dtype: str) -> str:
    """Return the dtype of a field of floats as the structures have it: the store rounds nothing."""
    found = np.asarray(value).dtype
    return found.name if dtype == "float64" and found.kind == "f" else dtype


def _custom_field(name: str, level: Level, first: AtomicData, missing: Missing) -> FieldSpec:
    if name not in first.info:
        raise StageError(
            f"custom field {name!r} is not in the info of the first structure, "
            f"which has {', '.join(map(repr, first.info)) or 'none'}"
        )
    value = np.asarray(first.info[name])
    if value.dtype.kind not in _STORABLE_KINDS:
        kind = type(first.info[name]).__name__
        raise StageError(f"custom field {name!r} is a {kind}, not a number or array of numbers")
    optional = missing == "nan" and value.dtype.kind == "f"
    if level == "system":
        shape = value.shape or (1,)
        return FieldSpec("custom", name, level, value.dtype.name, shape, may_be_missing=optional)
    if value.shape[:1] != (len(first),):
        raise StageError(
            f"custom field {name!r} has shape {value.shape} for {len(first)} atoms; "
            "an atom-level field needs one row for each atom"
        )
    shape = value.shape[1:]
    return FieldSpec("custom", name, level, value.dtype.name, shape, may_be_missing=optional)


def _presence_fields(fields: Sequence[FieldSpec]) -> list[FieldSpec]:
    """Return, for each array that a structure may lack, the one that says which have it."""
    names = {field.name for field in fields if field.group == "custom"}
    made: list[FieldSpec] = []
    for field in fields:
        if not field.may_be_missing:
            continue
        name = f"has_{field.name}"
        if name in names:
            raise StageError(
                f"two custom fields would be named {name!r}, one of which says where "
                f"{field.name} is missing; rename the other in a filter"
            )
        names.add(name)
        made.append(FieldSpec("custom", name, "system", "bool", (1,), presence_of=field.path))
    return made
