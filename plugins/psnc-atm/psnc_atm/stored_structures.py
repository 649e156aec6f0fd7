"""What is in a store at one moment: which structures, which fields, and where they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from attrs import frozen
from numpy.typing import NDArray

from psnc.errors import SourceError
from psnc_atm.atomic_data import AtomicData
from psnc_atm.fields import ALWAYS, FIELDS, Level
from psnc_atm.stored_array import ChunkCache, Pieces, StoredArray, pieces_by_chunk, stored_array

__all__ = ["StoredField", "StoredStructures", "read_structures"]

# Edges of a store are under the names of its layout, and their atoms are numbered through.
_EDGES = {"neighbor_list": "edge_index", "neighbor_list_shifts": "unit_shifts"}
_PRESENCE = "has_"
# A block of an iteration: so many atoms and structures that chunks are seldom taken up twice, so
# few that they are little memory.
_BLOCK_ATOMS = 16_384
_BLOCK_STRUCTURES = 512
_NO_JSON = (json.JSONDecodeError, UnicodeDecodeError)
_REQUIRED = ("meta/samples_mask", "meta/atoms_ptr", "core/atomic_numbers", "core/positions")


@frozen(eq=False)
class StoredField:
    """One field of the structures of a store.

    Attributes
    ----------
    name : str
        Its name in the store.
    key : str
        Its name in a dictionary of arrays: that in the store, ``"custom/NAME"`` for a custom
        field with the name of another field.
    attribute : str, optional
        The attribute of ``AtomicData`` that it becomes; ``None`` for an entry of ``info``.
    level : {"atom", "edge", "system"}
        What its first axis counts.
    array : StoredArray
        Its values.
    tells_of : str, optional
        The field of which it says, structure by structure, whether there is a value.
    """

    name: str
    key: str
    attribute: str | None
    level: Level
    array: StoredArray
    tells_of: str | None = None


@frozen(eq=False)
class StoredStructures:
    """The structures of a store, to be read by their rows.

    Attributes
    ----------
    where : str
        The store, for people.
    rows : (structures,) int64
        The rows of what is completely written.
    atoms_ptr, edges_ptr : (rows + 1,) int64
        Where each row's atoms and edges begin.
    fields : tuple of StoredField
        What is read of each structure.
    attrs : mapping
        The root attributes of the store.
    """

    where: str
    rows: NDArray[np.int64]
    atoms_ptr: NDArray[np.int64]
    edges_ptr: NDArray[np.int64]
    fields: tuple[StoredField, ...]
    attrs: Mapping[str, Any]

    def counts(self, level: Level, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many atoms, edges or systems each row has."""
        starts, stops = self._ranges(level, rows)
        return stops - starts

    def blocks(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Cut rows into blocks that are worth reading at once and are little memory."""
        ends = np.cumsum(self.counts("atom", rows))
        start = 0
        while start < len(rows):
            before = int(ends[start - 1]) if start else 0
            full = int(np.searchsorted(ends, before + _BLOCK_ATOMS, side="right"))
            stop = max(start + 1, min(full, start + _BLOCK_STRUCTURES))
            yield rows[start:stop]
            start = stop

    def columns(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return each field of several rows, one row's values behind the other's, by key.

        Each chunk is read once. Numbers of atoms in edges are as they are in the store.
        """
        plans: dict[tuple[str, int], tuple[Pieces, int]] = {}
        columns = {}
        for field in self.fields:
            plan = (field.level, field.array.chunk_rows)
            if plan not in plans:
                starts, stops = self._ranges(field.level, rows)
                total = int((stops - starts).sum())
                plans[plan] = pieces_by_chunk(starts, stops, field.array.chunk_rows), total
            columns[field.key] = field.array.take(*plans[plan])
            if field.attribute == "edge_index":
                self._check_edges(columns[field.key], rows)
        return columns

    def arrays(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return ``columns`` with pointers of their own, to which the atoms of edges refer."""
        columns = self.columns(rows)
        atoms_ptr = _running_total(self.counts("atom", rows))
        arrays = {"atoms_ptr": atoms_ptr}
        if any(field.level == "edge" for field in self.fields):
            edges = self.counts("edge", rows)
            arrays["edges_ptr"] = _running_total(edges)
            if "neighbor_list" in columns:
                moved = np.repeat(atoms_ptr[:-1] - self.atoms_ptr[rows], edges)
                columns["neighbor_list"] += moved[:, None]
        return {**arrays, **columns}

    def structure(self, row: int) -> AtomicData:
        """Return the structure of one row."""
        ranges = {level: self._range(level, row) for level in self._levels}
        values = {field.key: field.array.rows(*ranges[field.level]) for field in self.fields}
        for field in self.fields:
            if field.attribute == "edge_index":
                self._check_edges(values[field.key], np.array([row]))
        return self._assembled(values, row)

    def structures(self, rows: NDArray[np.int64]) -> list[AtomicData]:
        """Return the structures of several rows, in their order."""
        columns = self.columns(rows)
        ends = {level: _running_total(self.counts(level, rows)).tolist() for level in self._levels}
        made = []
        for at, row in enumerate(rows.tolist()):
            places = {level: slice(*ends[level][at : at + 2]) for level in ends}
            # Copies: what is kept of one structure must not keep those that were read with it.
            values = {
                field.key: columns[field.key][places[field.level]].copy() for field in self.fields
            }
            made.append(self._assembled(values, row))
        return made

    def _check_edges(self, edges: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """Refuse edges to other structures' atoms: negative numbers would be taken for others."""
        counts = self.counts("edge", rows)
        starts, stops = (np.repeat(ptr, counts)[:, None] for ptr in self._ranges("atom", rows))
        outside = ((edges < starts) | (edges >= stops)).any(axis=1)
        if outside.any():
            row = int(np.repeat(rows, counts)[outside][0])
            raise SourceError(
                f"{self.where}: core/neighbor_list of row {row} names atoms of other rows; write "
                "the store anew, or read it without neighbor_list (fields=...)"
            )

    @property
    def _levels(self) -> set[Level]:
        return {field.level for field in self.fields}

    def _ranges(
        self, level: Level, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if level == "system":
            return rows, rows + 1
        ptr = self.atoms_ptr if level == "atom" else self.edges_ptr
        return ptr[rows], ptr[rows + 1]

    def _range(self, level: Level, row: int) -> tuple[int, int]:
        if level == "system":
            return row, row + 1
        ptr = self.atoms_ptr if level == "atom" else self.edges_ptr
        return int(ptr[row]), int(ptr[row + 1])

    def _assembled(self, stored: Mapping[str, NDArray[Any]], row: int) -> AtomicData:
        """Make a structure of its own rows of each field."""
        values: dict[str, Any] = {}
        info: dict[str, Any] = {}
        absent = set()
        for field in self.fields:
            value: Any = stored[field.key]
            if field.tells_of is not None:
                if not value.all():
                    absent.add(field.tells_of)
                continue
            if field.attribute == "edge_index":
                value = np.ascontiguousarray((value - self.atoms_ptr[row]).T)
            elif field.level == "system":
                value = _of_system(field, value[0])
            if field.attribute is None:
                info[field.key] = value
            else:
                values[field.attribute] = value
        for name in absent:
            values.pop(_EDGES.get(name, name), None)
            info.pop(name, None)
        return AtomicData(**values, info=info)


def _of_system(field: StoredField, value: Any) -> Any:
    kind = None if field.attribute is None else FIELDS[field.attribute]
    if kind is not None and kind.scalar:
        return float(value.item())
    return value.item() if kind is None and value.shape in ((), (1,)) else value


def _running_total(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(numbers)]).astype(np.int64, copy=False)


# --- opening ----------------------------------------------------------------------------------


@frozen
class _Layout:
    """What tells the files of a store from those of another one at the same path."""

    # psnc writes this file once, as it lays a store out, and not when it enlarges one.
    file: str
    directory: str
    found: tuple[int, int]

    @classmethod
    def at(cls, path: Path) -> _Layout:
        of_psnc = (path / "psnc").exists()
        places = str(path / ("core" if of_psnc else "psnc") / "zarr.json"), str(path)
        return cls(*places, cls._look(*places))

    def __call__(self) -> None:
        try:
            same = self._look(self.file, self.directory) == self.found
        except OSError:
            same = False
        if not same:
            raise SourceError(
                f"{self.directory} is another store than the one that was opened, since it was "
                "laid out anew or deleted; refresh() the dataset, or open it again"
            )

    @staticmethod
    def _look(file: str, directory: str) -> tuple[int, int]:
        try:
            status = os.stat(file)
        except FileNotFoundError:
            return os.stat(directory).st_ino, 0
        return status.st_ino, status.st_mtime_ns


def _anywhere() -> None:
    """Of a store that is not in local files nothing tells whether it is another one by now."""


def read_structures(
    store: Any, cache: ChunkCache, fields: Sequence[str] | None = None
) -> StoredStructures:
    """Open a store, and read which structures it has.

    Parameters
    ----------
    store : path, URL or zarr.abc.store.Store
        The store.
    cache : ChunkCache
        Where its chunks are to be kept.
    fields : sequence of str, optional
        The fields to read, by their names in the store, besides atoms and cell; by default all.

    Raises
    ------
    psnc.SourceError
        If there is no store, or one of another layout, or without one of ``fields``.
    """
    path = _local_path(store)
    where = str(path or store)
    if path is not None and not path.exists():
        raise SourceError(f"{path} does not exist; give the directory of a Zarr store")
    try:
        # Taken before anything is read: what is read then is of this layout, or is refused.
        unchanged = _anywhere if path is None else _Layout.at(path)
        # The arrays' own metadata: what is consolidated may be older than they are. Not so in what
        # psnc writes, where all arrays change in the moment in which that changes.
        root = zarr.open_group(path or store, mode="r", use_consolidated=False)
        if "psnc" in root:
            root = zarr.open_group(path or store, mode="r")
    except _NO_JSON as error:
        raise _damaged(where, error) from error
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        cause = "" if path is not None or not str(error) else f" ({str(error).splitlines()[0]})"
        raise SourceError(f"{where} is no Zarr store{cause}; give the directory of one") from error
    except ImportError as error:
        raise SourceError(
            f"{where} cannot be opened ({error}); install what zarr needs for this kind of URL"
        ) from error
    try:
        return _structures(root, cache, fields, where, path, unchanged)
    except _NO_JSON as error:
        raise _damaged(where, error) from error


def _damaged(where: str, error: ValueError) -> SourceError:
    return SourceError(
        f"{where} is damaged: metadata of the store or of an array are no JSON ({error}); "
        "restore it, or write it anew"
    )


def _structures(
    root: zarr.Group,
    cache: ChunkCache,
    fields: Sequence[str] | None,
    where: str,
    path: Path | None,
    unchanged: Callable[[], None],
) -> StoredStructures:
    for name in _REQUIRED:
        if name not in root:
            raise SourceError(
                f"{where} has no {name}, so it is no store of atomic data, or an incomplete one; "
                "give a store with the groups meta and core"
            )
    once = ChunkCache(0)

    def opened(name: str) -> StoredArray:
        array = cast("zarr.Array[Any]", root[name])
        kept = once if name.startswith("meta/") else cache
        return stored_array(name, array, kept, where=where, directory=path, unchanged=unchanged)

    # What a mask says is written was written before it was read.
    mask = _whole(opened("meta/samples_mask"))
    atoms_ptr = _whole(opened("meta/atoms_ptr")).astype(np.int64, copy=False)
    has_edges = "meta/edges_ptr" in root
    edges_ptr = _whole(opened("meta/edges_ptr")) if has_edges else np.zeros(1, dtype=np.int64)
    # Of a store that is being appended to, arrays may be longer than those that were read first.
    rows = np.flatnonzero(mask[: len(atoms_ptr) - 1]).astype(np.int64, copy=False)
    structures = StoredStructures(
        where=where,
        rows=rows,
        atoms_ptr=atoms_ptr,
        edges_ptr=edges_ptr.astype(np.int64, copy=False),
        fields=_fields(root, opened, (len(mask), int(atoms_ptr[-1])), fields, where),
        attrs=dict(root.attrs),
    )
    _check_lengths(structures)
    if isinstance(unchanged, _Layout):
        unchanged()
    return structures


def _local_path(store: Any) -> Path | None:
    if isinstance(store, zarr.storage.LocalStore):
        return Path(store.root)
    if isinstance(store, os.PathLike):
        return Path(store).absolute()
    return Path(store).absolute() if isinstance(store, str) and "://" not in store else None


def _whole(array: StoredArray) -> NDArray[Any]:
    rows = array.shape[0]
    every = pieces_by_chunk(np.array([0]), np.array([rows]), array.chunk_rows)
    return array.take(every, rows)


def _fields(
    root: zarr.Group,
    opened: Any,
    lengths: tuple[int, int],
    wanted: Sequence[str] | None,
    where: str,
) -> tuple[StoredField, ...]:
    levels = cast("Mapping[str, Mapping[str, Level]]", root.attrs.get("fields", {}))
    masks = _masks_of_psnc(root)
    found: list[StoredField] = []
    for group in ("core", "custom"):
        if group not in root:
            continue
        for name in sorted(cast("zarr.Group", root[group]).array_keys()):
            array = opened(f"{group}/{name}")
            taken = {field.key for field in found}
            level = levels.get(group, {}).get(name) or _level(group, name, array, lengths)
            found.append(
                StoredField(
                    name=name,
                    key=f"{group}/{name}" if name in taken else name,
                    attribute=_attribute(name) if group == "core" else None,
                    level=level,
                    array=array,
                    tells_of=masks[f"{group}/{name}"]
                    if f"{group}/{name}" in masks
                    else _told_of(group, name, array, taken),
                )
            )
    found.sort(key=_position)
    return tuple(_wanted(found, wanted, where))


def _attribute(name: str) -> str | None:
    return _EDGES.get(name, name if name in FIELDS else None)


def _level(group: str, name: str, array: StoredArray, lengths: tuple[int, int]) -> Level:
    """Return the level of a field that the store says nothing of."""
    attribute = _attribute(name)
    if group == "core" and attribute is not None:
        return FIELDS[attribute].level
    samples, atoms = lengths
    if array.shape[0] == samples:
        return "system"
    return "atom" if array.shape[0] == atoms else "edge"


def _masks_of_psnc(root: zarr.Group) -> dict[str, str | None]:
    """Return, of each array that psnc made, of which field it says where that is missing."""
    if "psnc" not in root:
        return {}
    specs = cast("Sequence[Mapping[str, Any]]", root["psnc"].attrs.get("fields", ()))
    return {
        f"{spec['group']}/{spec['name']}": (spec.get("presence_of") or "").partition("/")[2] or None
        for spec in specs
    }


def _told_of(group: str, name: str, array: StoredArray, others: Iterable[str]) -> str | None:
    told = name.removeprefix(_PRESENCE)
    is_mask = group == "custom" and array.dtype == np.bool_ and name != told
    return told if is_mask and (told in others or _of_edges(told, others)) else None


def _of_edges(name: str, others: Iterable[str]) -> bool:
    return any(attribute == name for stored, attribute in _EDGES.items() if stored in others)


def _position(field: StoredField) -> tuple[int, str]:
    """Order fields as AtomicData has them, then those of others by name."""
    known = list(FIELDS)
    place = len(known) if field.attribute is None else known.index(field.attribute)
    return place, field.key


def _wanted(
    found: Sequence[StoredField], names: Sequence[str] | None, where: str
) -> Iterable[StoredField]:
    if names is None:
        return found
    keys = [field.key for field in found]
    for name in names:
        if name not in keys:
            raise SourceError(f"{where} has no field {name!r}; it has {', '.join(keys)}")
    chosen = {*ALWAYS, *names}
    return [field for field in found if field.key in chosen or field.tells_of in chosen]


def _check_lengths(structures: StoredStructures) -> None:
    """Say that an array is too short rather than return too few rows of it."""
    if not len(structures.rows):
        return
    if len(structures.edges_ptr) <= structures.rows[-1] and "edge" in structures._levels:
        raise _too_short(structures, "meta/edges_ptr", len(structures.edges_ptr) - 1)
    for field in structures.fields:
        _, stops = structures._ranges(field.level, structures.rows)
        if stops.max() > field.array.shape[0]:
            raise _too_short(structures, field.array.name, field.array.shape[0])


def _too_short(structures: StoredStructures, name: str, rows: int) -> SourceError:
    return SourceError(
        f"{structures.where} is incomplete or damaged: {name} has only {rows} rows; restore it, "
        "or write it anew"
    )
