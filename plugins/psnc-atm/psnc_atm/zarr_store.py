"""The store on disk: laid out once, then opened by everybody who writes to it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from attrs import asdict, evolve, frozen
from numpy.typing import NDArray

from psnc.errors import StageError
from psnc_atm.edge_files import IndexName
from psnc_atm.region_lock import store_lock
from psnc_atm.store_plan import FieldSpec, StorePlan, room
from psnc_atm.zarr_array import LocalArray, open_array
from psnc_atm.zarr_codec import codec_metadata
from psnc_atm.zarr_region import clear_region, write_region

if TYPE_CHECKING:
    import zarr

__all__ = [
    "OWN_GROUP",
    "WRITTEN",
    "Encoding",
    "Part",
    "ZarrStore",
    "add_array",
    "create_store",
    "draft_path",
    "lay_out",
    "open_store",
    "own_attributes",
]

_FORMAT = 3
# In format 2 there was one part, and chunks were no longer than the arrays, so that these could
# not grow in place. Such a store is continued as it is.
_OLDEST_FORMAT = 2
_NOT_OURS = (KeyError, TypeError, ValueError, OSError)
# The group of what only psnc needs: readers of the layout do not look for it.
OWN_GROUP = "psnc"
# Of each index the mark of the pipeline that wrote it, 0 while it is not whole.
WRITTEN = f"{OWN_GROUP}/written"
_INDICES_PER_CHUNK = 4096
_IDENTITY_BYTES_PER_CHUNK = 65_536
# Files of one directory: with the usual "/" each would have one or two of its own.
_FLAT_NAMES = {"name": "default", "separator": "."}
Made = tuple[int, int]


@frozen
class Encoding:
    """How arrays are cut and compressed.

    Attributes
    ----------
    chunk_rows : mapping of {"atom", "system", "edge"} to int
        Rows that are compressed together.
    shard_rows : mapping of {"atom", "system", "edge"} to int or None
        Rows in one file, where that holds several chunks.
    codec : str
        One of `psnc_atm.zarr_codec.CODECS`.
    level : int
        How hard it tries.
    """

    chunk_rows: Mapping[str, int]
    shard_rows: Mapping[str, int | None]
    codec: str
    level: int


@frozen
class Part:
    """The indices of one source in the store.

    Attributes
    ----------
    identity : mapping
        What they were laid out for.
    runs : tuple of (int, int)
        The first index in the store, and the number, of each run of indices that follow one
        another.
    """

    identity: Mapping[str, Any]
    runs: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        """Return the number of indices."""
        return sum(count for _, count in self.runs)

    def indices(self) -> NDArray[np.int64]:
        """Return the index in the store of each index of the source."""
        runs = [np.arange(first, first + count) for first, count in self.runs]
        return np.concatenate(runs) if runs else np.empty(0, dtype=np.int64)

    def index_in_store(self, index: int) -> int:
        """Return the index in the store of one index of the source.

        Raises
        ------
        psnc.StageError
            If it has none.
        """
        for first, count in self.runs:
            if index < count:
                return first + index
            index -= count
        raise StageError(
            "the store has no room for an index that its source did not have when the run began; "
            "run again"
        )


@frozen(eq=False)
class ZarrStore:
    """A store that psnc laid out, open for writing.

    Attributes
    ----------
    path : Path
        Its directory.
    fields : tuple of FieldSpec
        The arrays of the groups ``core`` and ``custom``.
    edge_fields : tuple of str
        The fields of edges that it is to have.
    rows_before, atoms_before : (indices + 1,) int64
        Where the region of each index begins.
    unplanned : mapping of int to str
        The indices that it was laid out without, and why.
    parts : tuple of Part
        The sources that it has room for.
    format : int
        Version of what psnc keeps in it.
    made : tuple of int
        What tells this layout from another at the same path.
    follows : tuple of tuple of int
        The layouts that this one came from, with all that was written in them.
    """

    path: Path
    fields: tuple[FieldSpec, ...]
    edge_fields: tuple[str, ...]
    rows_before: NDArray[np.int64]
    atoms_before: NDArray[np.int64]
    unplanned: Mapping[int, str]
    parts: tuple[Part, ...]
    format: int
    made: Made
    follows: tuple[Made, ...]
    _arrays: Mapping[str, LocalArray]

    def array(self, name: str) -> LocalArray:
        """Return the array ``name``, for example ``"meta/samples_mask"``."""
        return self._arrays[name]

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return rows of the array ``name``."""
        return self._arrays[name].read(start, stop)

    def room(self, index: int) -> tuple[int, int]:
        """Return the number of rows and of atoms that an index has room for."""
        return room(self.rows_before, self.atoms_before, index)

    def name_of(self, index: int) -> IndexName:
        """Return what an index of the store is called, of whichever source it is."""
        for number, part in enumerate(self.parts, 1):
            own = np.flatnonzero(part.indices() == index)
            if len(own):
                return IndexName(int(own[0]), number if len(self.parts) > 1 else None)
        return IndexName(index)

    def current(self) -> ZarrStore:
        """Return this store, or the one that has taken its place."""
        if _made(self.path) == self.made:
            return self
        store = open_store(self.path)
        assert store is not None
        return store

    @contextmanager
    def lock(
        self, *, exclusive: bool = False, anchor: str = f"{OWN_GROUP}/zarr.json"
    ) -> Iterator[None]:
        """Keep others from laying the store out anew, or (exclusive) from writing to it.

        What is locked is a file of the store, ``anchor``; each has a lock of its own.
        """
        try:
            with store_lock(self.path / anchor, exclusive=exclusive):
                yield
        except FileNotFoundError as error:
            raise StageError(f"{self.path} has been deleted while it was written to") from error
        except PermissionError as error:
            raise StageError(
                f"{self.path} cannot be written ({error.strerror}); make it writable"
            ) from error

    def file_rows(self, name: str) -> int:
        """Return how many rows of an array are in one file."""
        return self._arrays[name].file_rows

    def write(self, name: str, start: int, values: NDArray[Any]) -> None:
        """Write rows of an array, whoever else writes beside them."""
        with self._said(name):
            write_region(self._arrays[name], start, values)

    def clear(self, name: str, start: int, stop: int) -> None:
        """Set rows of an array to zero."""
        with self._said(name):
            clear_region(self._arrays[name], start, stop)

    def mask_out(self, index: int) -> None:
        """From here on the index counts as not written, should it have been before."""
        if self.read(WRITTEN, index, index + 1).any():
            self.clear(WRITTEN, index, index + 1)
        row, row_end = (int(number) for number in self.rows_before[index : index + 2])
        if self.read("meta/samples_mask", row, row_end).any():
            self.clear("meta/samples_mask", row, row_end)

    @contextmanager
    def _said(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StageError(
                f"{self.path}: {name} cannot be written ({error.strerror}); "
                "see to it and run the index again"
            ) from error


def create_store(
    path: Path, plan: StorePlan, identity: Mapping[str, Any], encoding: Encoding
) -> None:
    """Lay out an empty store at ``path``, or leave the one that another process just laid out.

    It is made under another name and renamed, so that nobody ever sees half a layout.
    """
    draft = draft_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lay_out(draft, plan, [Part(identity, ((0, len(plan.rows_before) - 1),))], encoding)
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
        root = _metadata(path)
        attributes = _metadata(path / OWN_GROUP)["attributes"]
        version = int(attributes["format"])
        if root["node_type"] != "group":
            raise ValueError("no group")
    except _NOT_OURS as error:
        raise StageError(
            f"{path} exists and is no store that psnc laid out; choose another output_path"
        ) from error
    if version > _FORMAT:
        raise StageError(
            f"{path} has format {version}, written by {attributes.get('written_by')}; "
            "update psnc-atm or choose another output_path"
        )
    if version < _OLDEST_FORMAT:
        raise StageError(
            f"{path} has format {version}, written by {attributes.get('written_by')}, which does "
            "not say which indices are whole; choose another output_path, or delete the store to "
            "write it anew"
        )
    try:
        return _opened(path, made, attributes)
    except _NOT_OURS as error:
        raise StageError(
            f"{path} is incomplete or damaged ({error}); restore it, or choose another output_path"
        ) from error


def _opened(path: Path, made: Made, attributes: Mapping[str, Any]) -> ZarrStore:
    specs = [{**spec, "shape": tuple(spec["shape"])} for spec in attributes["fields"]]
    fields = tuple(FieldSpec(**spec) for spec in specs)
    names = [*_META_ARRAYS, *(field.path for field in fields), *_OWN_ARRAYS]
    arrays = {name: open_array(path / name) for name in names}
    before = [f"{OWN_GROUP}/{level}_before" for level in ("rows", "atoms")]
    # In a store that is being enlarged the arrays are already longer.
    indices = attributes.get("indices", arrays[WRITTEN].length)
    rows_before, atoms_before = (arrays[name].read(0, indices + 1) for name in before)
    return ZarrStore(
        path=path,
        fields=fields,
        edge_fields=tuple(attributes.get("edge_fields", ())),
        rows_before=rows_before,
        atoms_before=atoms_before,
        unplanned={int(index): cause for index, cause in attributes["unplanned"].items()},
        parts=_parts(attributes, arrays[f"{OWN_GROUP}/identity"], indices),
        format=int(attributes["format"]),
        made=made,
        follows=tuple((one, other) for one, other in attributes.get("follows", ())),
        arrays=arrays,
    )


def _parts(attributes: Mapping[str, Any], texts: LocalArray, indices: int) -> tuple[Part, ...]:
    if attributes["format"] == _OLDEST_FORMAT:
        return (Part(json.loads(texts.read(0, texts.length).tobytes()), ((0, indices),)),)
    return tuple(
        Part(
            identity=json.loads(texts.read(*part["identity"]).tobytes()),
            runs=tuple((first, count) for first, count in part["runs"]),
        )
        for part in attributes["parts"]
    )


def _metadata(directory: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads((directory / "zarr.json").read_bytes()))


def _made(path: Path) -> Made:
    # Written once, as the store is laid out, and replaced when it has been enlarged.
    status = os.stat(path / OWN_GROUP / "zarr.json")
    return status.st_ino, status.st_mtime_ns


_META_ARRAYS = ("meta/atoms_ptr", "meta/edges_ptr", "meta/samples_mask", "meta/atoms_mask")
_OWN_ARRAYS = (
    WRITTEN,
    *(f"{OWN_GROUP}/{name}" for name in ("rows_before", "atoms_before", "identity")),
)


def add_array(
    root: zarr.Group,
    name: str,
    length: int,
    shape: tuple[int, ...],
    dtype: str,
    encoding: Encoding,
    level: str,
    **options: Any,
) -> zarr.Array[Any]:
    """Make one array of a store, cut as those of its level; ``options`` are Zarr's."""
    chunk, shard = encoding.chunk_rows[level], encoding.shard_rows[level]
    # Files are made when they are written: until then a region reads as zero or False.
    # Chunks may be longer than the array, which may yet grow.
    return root.create_array(
        name,
        shape=(length, *shape),
        chunks=(chunk, *shape),
        shards=None if shard is None else (shard, *shape),
        dtype=dtype,
        compressors=codec_metadata(encoding.codec, encoding.level, dtype),
        **{"fill_value": 0, "chunk_key_encoding": _FLAT_NAMES, **options},
    )


def _of_masks(encoding: Encoding) -> Encoding:
    """Cut the mask of atoms into fewer files, as a row of it is a byte where others have eight."""
    if encoding.shard_rows["atom"] is not None:
        return encoding
    return evolve(encoding, chunk_rows={"atom": 8 * encoding.chunk_rows["atom"]})


def lay_out(
    draft: Path,
    plan: StorePlan,
    parts: Sequence[Part],
    encoding: Encoding,
    follows: Sequence[Made] = (),
) -> None:
    """Make an empty store at ``draft``."""
    # Imported here, since the workers that fill a store have no need of it.
    import zarr

    rows, atoms = len(plan.atoms_ptr) - 1, int(plan.atoms_ptr[-1])
    indices = len(plan.rows_before) - 1
    lengths = {"system": rows, "atom": atoms}
    levels: dict[str, dict[str, str]] = {"core": {}, "custom": {}}
    for field in plan.fields:
        levels[field.group][field.name] = field.level
    root = zarr.create_group(
        draft, zarr_format=3, attributes={"num_samples": rows, "fields": levels}
    )

    def add(name: str, length: int, shape: tuple[int, ...], dtype: str, level: str) -> None:
        add_array(root, name, length, shape, dtype, encoding, level)

    def add_own(name: str, length: int, dtype: str, chunk: int) -> None:
        own = Encoding({"own": chunk}, {"own": None}, encoding.codec, encoding.level)
        add_array(root, name, length, (), dtype, own, "own")

    add("meta/atoms_ptr", rows + 1, (), "int64", "system")
    add("meta/edges_ptr", rows + 1, (), "int64", "system")
    add("meta/samples_mask", rows, (), "bool", "system")
    add_array(root, "meta/atoms_mask", atoms, (), "bool", _of_masks(encoding), "atom")
    add("meta/edges_mask", 0, (), "bool", "edge")
    for group in levels:
        root.require_group(group)
    for field in plan.fields:
        add(field.path, lengths[field.level], field.shape, field.dtype, field.level)
    texts = [json.dumps(part.identity).encode() for part in parts]
    # Arrays rather than attributes: they may be long, and every reader reads the attributes.
    add_own(WRITTEN, indices, "uint64", _INDICES_PER_CHUNK)
    for name in ("rows_before", "atoms_before"):
        add_own(f"{OWN_GROUP}/{name}", indices + 1, "int64", _INDICES_PER_CHUNK)
    size = sum(map(len, texts))
    add_own(f"{OWN_GROUP}/identity", size, "uint8", _IDENTITY_BYTES_PER_CHUNK)
    for name, values in (
        ("meta/atoms_ptr", plan.atoms_ptr),
        (f"{OWN_GROUP}/rows_before", plan.rows_before),
        (f"{OWN_GROUP}/atoms_before", plan.atoms_before),
        (f"{OWN_GROUP}/identity", np.frombuffer(b"".join(texts), dtype=np.uint8)),
    ):
        write_region(open_array(draft / name), 0, values)
    ends = np.cumsum([0, *map(len, texts)]).tolist()
    own = cast("zarr.Group", root[OWN_GROUP])
    own.update_attributes(
        own_attributes(
            *(plan.fields, plan.edge_fields, plan.unplanned, indices, parts, ends[:-1], follows)
        )
    )
    with warnings.catch_warnings():
        # Zarr warns that version 3 of the format does not specify consolidated metadata yet;
        # readers that do not know it read each array's own.
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        zarr.consolidate_metadata(root.store)


def own_attributes(
    fields: Sequence[FieldSpec],
    edge_fields: Sequence[str],
    unplanned: Mapping[int, str],
    indices: int,
    parts: Sequence[Part],
    texts_from: Sequence[int],
    follows: Sequence[Made],
) -> dict[str, Any]:
    """Return what the attributes of psnc's own group say.

    ``texts_from`` is where the identity of each part begins in the array ``identity``.
    """
    from psnc_atm.version import VERSION

    return {
        "format": _FORMAT,
        "written_by": f"psnc-atm {VERSION}",
        "fields": [asdict(field) for field in fields],
        "edge_fields": list(edge_fields),
        "unplanned": {str(index): cause for index, cause in unplanned.items()},
        "indices": indices,
        "parts": [
            {
                "runs": [list(run) for run in part.runs],
                "identity": [start, start + len(json.dumps(part.identity).encode())],
            }
            for part, start in zip(parts, texts_from, strict=True)
        ],
        "follows": [list(made) for made in follows],
    }
