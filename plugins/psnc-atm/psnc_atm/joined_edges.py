"""The edges of all indices, joined to the arrays that readers know, and taken back.

Readers find arrays by name, and there are four that must change at once. What makes it one step is
the consolidated metadata, which readers take from the store's own ``zarr.json``: it says of each
array its length, and how the files of its chunks are named. New chunks are written beside those in
use, under the other of two kinds of names (``c/0/0`` and ``c.0.0``), and replacing that one file
has readers see all new arrays, or all old ones.

Whoever reads the arrays' own metadata instead finds no ``neighbor_list`` in between: it is removed
first, and comes last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from psnc.atomic import atomic_write
from psnc.errors import OutputError, StageError
from psnc_atm.edge_files import EdgeFileHead, edge_file_path, open_edge_file, read_head
from psnc_atm.zarr_store import WRITTEN, Encoding, ZarrStore, add_array

if TYPE_CHECKING:
    import zarr

__all__ = ["hold_edges", "join_edges", "withdraw_edges"]

logger = logging.getLogger("psnc_atm")

_POINTER, _MASK = "meta/edges_ptr", "meta/edges_mask"
_LIST, _SHIFTS = "core/neighbor_list", "core/neighbor_list_shifts"
_EDGE_ARRAYS = (_LIST, _SHIFTS)
# The first is what a store is laid out with.
_SEPARATORS = (".", "/")
# Under these names there are never any chunks.
_NO_CHUNKS = {"name": "v2", "configuration": {"separator": "."}}

Document = dict[str, Any]
Heads = dict[int, EdgeFileHead]


class _WrittenMeanwhileError(Exception):
    """An index is not what it was when joining began."""


@contextmanager
def hold_edges(store: ZarrStore) -> Iterator[None]:
    """Keep others from joining edges, and from laying the store out anew; regions are written."""
    with store.lock(exclusive=True, anchor="core/zarr.json"):
        yield


def join_edges(store: ZarrStore, encoding: Encoding) -> bool:
    """Make the arrays of edges of all indices that are written; ``False`` if one was meanwhile.

    What a reader sees is replaced in one step. What was there is left until edges are joined again,
    for those who have it open. Where nothing has changed since, nothing is written.

    Raises
    ------
    psnc.StageError
        If the edges of an index cannot be read, or an array cannot be written.
    """
    with hold_edges(store):
        store = store.current()
        try:
            if not _in_line(store.path, _read(store.path / "zarr.json")):
                with store.lock(exclusive=True):
                    # What a killed process began.
                    _bring_in_line(store.path, _read(store.path / "zarr.json"))
            heads = _heads(store)
            # After the files: whoever writes one withdraws what is joined first.
            state = _State.of(_read(store.path / "zarr.json"))
            described = _described(heads, encoding)
            _remove_chunks(store.path, _SEPARATORS[(state.generation + 1) % 2])
            if state.joined == described:
                return True
            new = _State(state.generation + 1, described)
            arrays = _new_arrays(store, heads, new, encoding)
            _write_arrays(store, heads, arrays)
            with store.lock(exclusive=True):
                _publish(store, heads, arrays)
        except _WrittenMeanwhileError as error:
            logger.warning(
                "%s: edges are not joined, since %s was written meanwhile: gather again when "
                "nobody writes there",
                *(store.path, error),
            )
            return False
        except OutputError:
            raise
        except OSError as error:
            raise StageError(
                f"{store.path}: edges cannot be joined ({error.strerror}); see to it and gather "
                "again (psnc gather)"
            ) from error
    return True


def withdraw_edges(store: ZarrStore) -> None:
    """Have a reader see no edges, since those of an index are about to change.

    Whoever calls it keeps the store from being laid out anew. Several may call it at once.
    """
    root = _read(store.path / "zarr.json")
    state = _State.of(root)
    if not state.joined:
        return
    metadata = root["consolidated_metadata"]["metadata"]
    metadata[_POINTER]["chunk_key_encoding"] = _NO_CHUNKS
    metadata[_POINTER]["attributes"] = {"generation": state.generation}
    metadata[_MASK]["shape"] = [0]
    for name in _EDGE_ARRAYS:
        metadata.pop(name, None)
        root["attributes"]["fields"]["core"].pop(_own_name(name), None)
    _bring_in_line(store.path, root)
    _replace(store.path / "zarr.json", root)


@frozen
class _State:
    """What ``edges_ptr`` says of the edges in its attributes.

    Attributes
    ----------
    generation : int
        How many times edges were joined; it decides how files of chunks are named.
    joined : str
        Of what; empty when there are no edges to see.
    """

    generation: int = 0
    joined: str = ""

    @classmethod
    def of(cls, root: Mapping[str, Any]) -> _State:
        attributes = root["consolidated_metadata"]["metadata"][_POINTER]["attributes"]
        return cls(attributes.get("generation", 0), attributes.get("joined", ""))


# --- what is joined ---------------------------------------------------------------------------


def _heads(store: ZarrStore) -> Heads:
    """Return what the files of the written indices say of themselves."""
    marks = store.read(WRITTEN, 0, len(store.rows_before) - 1)
    heads = {}
    for index in np.flatnonzero(marks).tolist():
        heads[index] = read_head(store.path, index, store.name_of)
        if heads[index].mark != int(marks[index]):
            name = store.name_of(index)
            raise StageError(
                f"{edge_file_path(store.path, index)} is not of the run that wrote {name}: "
                f"{name.advice}"
            )
    return heads


def _described(heads: Heads, encoding: Encoding) -> str:
    """Return what tells whether the joined arrays are still those of the files."""
    digest = hashlib.sha256(repr(encoding).encode())
    for index, head in heads.items():
        digest.update(index.to_bytes(8, "little") + head.digest)
    return digest.hexdigest()


def _new_arrays(
    store: ZarrStore, heads: Heads, state: _State, encoding: Encoding
) -> dict[str, zarr.Array[Any]]:
    """Return the new arrays: their chunks go to the store, their metadata are nowhere yet."""
    import zarr
    from zarr.storage import LocalStore, MemoryStore, StorePath

    edges = sum(head.edges for head in heads.values())
    rows = int(store.rows_before[-1])
    root = zarr.create_group(MemoryStore(), zarr_format=3)
    local = LocalStore(store.path)
    naming = {"name": "default", "separator": _SEPARATORS[state.generation % 2]}

    def new(
        name: str, length: int, shape: tuple[int, ...], dtype: str, level: str, fill: int
    ) -> zarr.Array[Any]:
        made = add_array(
            *(root, name, length, shape, dtype, encoding, level),
            fill_value=fill,
            chunk_key_encoding=naming,
            attributes={"generation": state.generation, "joined": state.joined}
            if name == _POINTER
            else {},
        )
        return zarr.Array(zarr.AsyncArray(made.metadata, StorePath(local, name)))

    arrays = {
        _POINTER: new(_POINTER, rows + 1, (), "int64", "system", 0),
        # No chunk is written: all edges are there.
        _MASK: new(_MASK, edges, (), "bool", "edge", True),
        # A reader who goes on with chunks that were removed should not take atom 0 for its own.
        _LIST: new(_LIST, edges, (2,), "int64", "edge", -1),
    }
    if "unit_shifts" in store.edge_fields:
        arrays[_SHIFTS] = new(_SHIFTS, edges, (3,), "int64", "edge", 0)
    return arrays


def _write_arrays(store: ZarrStore, heads: Heads, arrays: Mapping[str, zarr.Array[Any]]) -> None:
    """Write the chunks, index by index, a piece of an index at a time."""
    columns = {name: _Column(arrays[name]) for name in arrays if name != _MASK}
    columns[_POINTER].append(np.zeros(1, dtype=np.int64))
    edges = 0
    for index in range(len(store.rows_before) - 1):
        ends = np.full(store.room(index)[0], edges, dtype=np.int64)
        if index in heads:
            sizes = _write_index(store, index, heads[index], columns)
            ends[: len(sizes)] += np.cumsum(sizes)
            ends[len(sizes) :] += heads[index].edges
            edges += heads[index].edges
        columns[_POINTER].append(ends)
    for column in columns.values():
        column.end()


def _write_index(
    store: ZarrStore, index: int, head: EdgeFileHead, columns: Mapping[str, _Column]
) -> NDArray[np.int64]:
    """Write the edges of an index, and return how many each structure has."""
    with open_edge_file(store.path, index, store.name_of) as file:
        if file.head != head:
            raise _WrittenMeanwhileError(str(store.name_of(index)))
        first_atoms = int(store.atoms_before[index]) + np.cumsum(file.atoms) - file.atoms
        ends = np.cumsum(file.edges)
        position = 0
        for piece in file.columns(5 if _SHIFTS in columns else 2):
            # Of each edge the structure, by the number of its last edge.
            numbers = np.arange(position, position + piece.shape[1])
            offsets = first_atoms[np.searchsorted(ends, numbers, side="right")]
            columns[_LIST].append((piece[:2] + offsets).T)
            if _SHIFTS in columns:
                columns[_SHIFTS].append(piece[2:].T)
            position += piece.shape[1]
    return file.edges


class _Column:
    """Rows of an array, written in whole chunks as they come."""

    def __init__(self, array: zarr.Array[Any]) -> None:
        self._array = array
        self._step = int((array.shards or array.chunks)[0])
        self._written = self._count = 0
        self._waiting: list[NDArray[Any]] = []

    def append(self, rows: NDArray[Any]) -> None:
        self._waiting.append(rows)
        self._count += len(rows)
        if self._count >= self._step:
            self._write(self._count // self._step * self._step)

    def end(self) -> None:
        if self._count:
            self._write(self._count)

    def _write(self, count: int) -> None:
        rows = np.concatenate(self._waiting)
        try:
            self._array[self._written : self._written + count] = rows[:count]
        except OSError as error:
            raise StageError(
                f"{self._array.store_path}: edges cannot be joined ({error.strerror}); see to it "
                "and gather again (psnc gather)"
            ) from error
        self._written += count
        self._waiting, self._count = [rows[count:]], len(rows) - count


# --- what readers see -------------------------------------------------------------------------


def _publish(store: ZarrStore, heads: Heads, arrays: Mapping[str, zarr.Array[Any]]) -> None:
    """Have readers see the new arrays, while nobody writes and if nobody has."""
    now = _heads(store)
    changed = [i for i in sorted({*now, *heads}) if now.get(i) != heads.get(i)]
    if changed:
        raise _WrittenMeanwhileError(str(store.name_of(changed[0])))
    # A process that was killed may have made rows visible, and not said that they are whole.
    marks = store.read(WRITTEN, 0, len(store.rows_before) - 1)
    for index in np.flatnonzero(marks == 0).tolist():
        store.mask_out(index)
    root = _read(store.path / "zarr.json")
    metadata = root["consolidated_metadata"]["metadata"]
    for name, array in arrays.items():
        metadata[name] = json.loads(json.dumps(array.metadata.to_dict()))
        if name in _EDGE_ARRAYS:
            root["attributes"]["fields"]["core"][_own_name(name)] = "edge"
    # Zarr reads it so only: groups first, and what is in one group side by side.
    in_order = sorted(metadata.items(), key=lambda item: (item[0].count("/"), item[0]))
    root["consolidated_metadata"]["metadata"] = dict(in_order)
    _replace(store.path / "zarr.json", root)
    _bring_in_line(store.path, root)


def _in_line(store: Path, root: Mapping[str, Any]) -> bool:
    """Tell whether the arrays' own metadata say what the store's say."""
    return all(_own(store, name) == document for name, document in _of_arrays(root).items())


def _bring_in_line(store: Path, root: Mapping[str, Any]) -> None:
    """Have the arrays' own metadata say what the store's say, so that they fit at every moment."""
    if _in_line(store, root):
        return
    wanted = _of_arrays(root)
    for name in _EDGE_ARRAYS:
        (store / name / "zarr.json").unlink(missing_ok=True)
    for name in (_MASK, _POINTER, _SHIFTS, _LIST):
        document = wanted[name]
        if document is not None:
            _replace(store / name / "zarr.json", document)


def _of_arrays(root: Mapping[str, Any]) -> dict[str, Document | None]:
    metadata = root["consolidated_metadata"]["metadata"]
    return {name: metadata.get(name) for name in (_POINTER, _MASK, *_EDGE_ARRAYS)}


def _own(store: Path, name: str) -> Document | None:
    try:
        return _read(store / name / "zarr.json")
    except FileNotFoundError:
        return None


def _remove_chunks(store: Path, separator: str) -> None:
    """Remove the chunks that were in use before those in use now, or that are half written."""
    for name in (_POINTER, *_EDGE_ARRAYS):
        if separator == "/":
            shutil.rmtree(store / name / "c", ignore_errors=True)
        else:
            for path in (store / name).glob("c.*"):
                path.unlink(missing_ok=True)


def _read(path: Path) -> Document:
    document: Document = json.loads(path.read_bytes())
    return document


def _replace(path: Path, document: Mapping[str, Any]) -> None:
    with atomic_write(path, "w") as file:
        json.dump(document, file, indent=2)


def _own_name(name: str) -> str:
    return name.rpartition("/")[2]
