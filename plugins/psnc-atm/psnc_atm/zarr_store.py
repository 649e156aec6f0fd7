"""The store on disk: laid out once, then opened by everybody who writes to it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from attrs import asdict, frozen
from numpy.typing import NDArray

from psnc.errors import StageError
from psnc_atm.region_lock import store_lock
from psnc_atm.store_plan import FieldSpec, StorePlan, room
from psnc_atm.zarr_region import write_region

__all__ = [
    "WRITTEN",
    "ZarrStore",
    "add_array",
    "create_store",
    "draft_path",
    "lay_out",
    "open_store",
]

_FORMAT = 2
_NOT_OURS = (KeyError, TypeError, ValueError, OSError)
# The group of what only psnc needs: readers of the layout do not look for it.
_OWN_GROUP = "psnc"
# Of each index the mark of the pipeline that wrote it, 0 while it is not whole.
WRITTEN = f"{_OWN_GROUP}/written"
_MARKS_PER_CHUNK = 4096


@frozen(eq=False)
class ZarrStore:
    """A store that psnc laid out, open for writing.

    Attributes
    ----------
    path : Path
        Its directory.
    fields : tuple of FieldSpec
        The arrays of the groups ``core`` and ``custom``.
    rows_before, atoms_before : (indices + 1,) int64
        Where the region of each index begins.
    edge_fields : tuple of str
        The fields of edges that it is to have.
    unplanned : mapping of int to str
        The indices that it was laid out without, and why.
    identity : mapping
        What it was laid out for.
    made : tuple of int
        What tells its files from those of another layout at the same path.
    """

    path: Path
    fields: tuple[FieldSpec, ...]
    edge_fields: tuple[str, ...]
    rows_before: NDArray[np.int64]
    atoms_before: NDArray[np.int64]
    unplanned: Mapping[int, str]
    identity: Mapping[str, Any]
    made: tuple[int, int]
    _arrays: Mapping[str, zarr.Array[Any]]

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return rows of the array ``name``, for example ``"meta/samples_mask"``."""
        return np.asarray(self._arrays[name][start:stop])

    def room(self, index: int) -> tuple[int, int]:
        """Return the number of rows and of atoms that an index has room for."""
        return room(self.rows_before, self.atoms_before, index)

    def current(self) -> ZarrStore:
        """Return this store, or the one that has taken its place."""
        if _made(self.path) == self.made:
            return self
        store = open_store(self.path)
        assert store is not None
        return store

    @contextmanager
    def lock(self, *, exclusive: bool = False) -> Iterator[None]:
        """Keep others from laying the store out anew, or (exclusive) from writing to it."""
        try:
            with store_lock(self.path / _OWN_GROUP / "zarr.json", exclusive=exclusive):
                yield
        except FileNotFoundError as error:
            raise StageError(f"{self.path} has been deleted while it was written to") from error

    def chunk_rows(self, name: str) -> int:
        """Return how many rows of an array are stored together."""
        array = self._arrays[name]
        return int((array.shards or array.chunks)[0])

    def write(self, name: str, start: int, values: NDArray[Any]) -> None:
        """Write rows of an array, whoever else writes beside them."""
        try:
            write_region(self.path, self._arrays[name], start, values)
        except OSError as error:
            raise StageError(
                f"{self.path}: {name} cannot be written ({error.strerror}); "
                "see to it and run the index again"
            ) from error


def create_store(
    path: Path, plan: StorePlan, identity: Mapping[str, Any], chunk_rows: Mapping[str, int]
) -> None:
    """Lay out an empty store at ``path``, or leave the one that another process just laid out.

    It is made under another name and renamed, so that nobody ever sees half a layout.
    """
    draft = draft_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lay_out(draft, plan, identity, chunk_rows)
        os.rename(draft, path)
    except OSError as error:
        if open_store(path) is None:
            raise StageError(
                f"{path} cannot be created ({error.strerror}); choose another output_path"
            ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def draft_path(path: Path) -> Path:
    """Return a name of its own beside ``path``, to make something under before it is renamed."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.draft")


def open_store(path: Path) -> ZarrStore | None:
    """Open the store at ``path``; ``None`` if there is nothing.

    Raises
    ------
    psnc.StageError
        If something is there that psnc did not lay out.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    try:
        made = _made(path)
        root = zarr.open_group(path, mode="r+", zarr_format=3)
        own = cast("zarr.Group", root[_OWN_GROUP])
        attributes = dict(own.attrs)
        version = int(cast(int, attributes["format"]))
    except _NOT_OURS as error:
        raise StageError(
            f"{path} exists and is no store that psnc laid out; choose another output_path"
        ) from error
    if version > _FORMAT:
        raise StageError(
            f"{path} has format {version}, written by {attributes.get('written_by')}; "
            "update psnc-atm or choose another output_path"
        )
    if version < _FORMAT:
        raise StageError(
            f"{path} has format {version}, written by {attributes.get('written_by')}, which does "
            "not say which indices are whole; choose another output_path, or delete the store to "
            "write it anew"
        )
    try:
        return _opened(path, made, root, own)
    except _NOT_OURS as error:
        raise StageError(
            f"{path} is incomplete or damaged ({error}); restore it, or choose another output_path"
        ) from error


def _opened(path: Path, made: tuple[int, int], root: zarr.Group, own: zarr.Group) -> ZarrStore:
    specs = cast("list[dict[str, Any]]", own.attrs["fields"])
    unplanned = cast("dict[str, str]", own.attrs["unplanned"])
    arrays = {
        name: cast("zarr.Array[Any]", root[name])
        for name in ("meta/atoms_ptr", "meta/samples_mask", "meta/atoms_mask", WRITTEN)
    }
    fields = tuple(FieldSpec(**{**spec, "shape": tuple(spec["shape"])}) for spec in specs)
    for field in fields:
        name = f"{field.group}/{field.name}"
        arrays[name] = cast("zarr.Array[Any]", root[name])
    return ZarrStore(
        path=path,
        fields=fields,
        edge_fields=tuple(cast("list[str]", own.attrs.get("edge_fields", ()))),
        rows_before=_whole(own, "rows_before"),
        atoms_before=_whole(own, "atoms_before"),
        unplanned={int(index): cause for index, cause in unplanned.items()},
        identity=json.loads(_whole(own, "identity").tobytes()),
        made=made,
        arrays=arrays,
    )


def _made(path: Path) -> tuple[int, int]:
    # Written once, as the store is laid out.
    status = os.stat(path / _OWN_GROUP / "zarr.json")
    return status.st_ino, status.st_mtime_ns


def _whole(group: zarr.Group, name: str) -> NDArray[Any]:
    return np.asarray(cast("zarr.Array[Any]", group[name])[:])


def add_array(
    root: zarr.Group,
    name: str,
    length: int,
    shape: tuple[int, ...],
    dtype: str,
    chunk: int,
    **options: Any,
) -> zarr.Array[Any]:
    """Make one array of a store; ``options`` are Zarr's."""
    # Chunks are made when they are written: until then a region reads as zero or False.
    return root.create_array(
        name,
        shape=(length, *shape),
        chunks=(max(1, min(chunk, length)), *shape),
        dtype=dtype,
        **{"fill_value": 0, **options},
    )


def lay_out(
    draft: Path, plan: StorePlan, identity: Mapping[str, Any], chunk_rows: Mapping[str, int]
) -> None:
    """Make an empty store at ``draft``."""
    rows, atoms = len(plan.atoms_ptr) - 1, int(plan.atoms_ptr[-1])
    lengths = {"system": rows, "atom": atoms}
    levels: dict[str, dict[str, str]] = {"core": {}, "custom": {}}
    for field in plan.fields:
        levels[field.group][field.name] = field.level
    root = zarr.create_group(
        draft, zarr_format=3, attributes={"num_samples": rows, "fields": levels}
    )

    def add(name: str, length: int, shape: tuple[int, ...], dtype: str, chunk: int) -> Any:
        return add_array(root, name, length, shape, dtype, chunk)

    systems = chunk_rows["system"]
    add("meta/atoms_ptr", rows + 1, (), "int64", systems)[:] = plan.atoms_ptr
    add("meta/edges_ptr", rows + 1, (), "int64", systems)
    add("meta/samples_mask", rows, (), "bool", systems)
    add("meta/atoms_mask", atoms, (), "bool", chunk_rows["atom"])
    add("meta/edges_mask", 0, (), "bool", 1)
    for group in levels:
        root.require_group(group)
    for field in plan.fields:
        name = f"{field.group}/{field.name}"
        add(name, lengths[field.level], field.shape, field.dtype, chunk_rows[field.level])
    _write_own_group(root, plan, identity)
    with warnings.catch_warnings():
        # Zarr warns that version 3 of the format does not specify consolidated metadata yet;
        # readers that do not know it read each array's own.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(root.store)


def _write_own_group(root: zarr.Group, plan: StorePlan, identity: Mapping[str, Any]) -> None:
    from psnc_atm.version import VERSION

    own = root.create_group(
        _OWN_GROUP,
        attributes={
            "format": _FORMAT,
            "written_by": f"psnc-atm {VERSION}",
            "fields": [asdict(field) for field in plan.fields],
            "unplanned": {str(index): cause for index, cause in plan.unplanned.items()},
            **({"edge_fields": list(plan.edge_fields)} if plan.edge_fields else {}),
        },
    )
    indices = len(plan.rows_before) - 1
    root.create_array(
        WRITTEN,
        shape=(indices,),
        chunks=(max(1, min(_MARKS_PER_CHUNK, indices)),),
        dtype="uint64",
        fill_value=0,
    )
    own.create_array("rows_before", data=plan.rows_before)
    own.create_array("atoms_before", data=plan.atoms_before)
    # An array rather than an attribute: it may be long, and every reader reads the attributes.
    text = json.dumps(identity).encode()
    own.create_array("identity", data=np.frombuffer(text, dtype=np.uint8))
