"""AtomicDataZarrSink: all structures of a dataset in one Zarr store."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from psnc.errors import ConfigurationError, StageError, TrackingDisabledError
from psnc.index_ranges import runs_of
from psnc.provenance import canonical_json
from psnc.stages import Param, Sink
from psnc_atm.atomic_data import AtomicData
from psnc_atm.fields import OPTIONAL, Level
from psnc_atm.region_buffer import RegionBuffer
from psnc_atm.store_plan import atom_counts, plan_store
from psnc_atm.zarr_relayout import changed_indices, lay_out_anew, take_back
from psnc_atm.zarr_store import WRITTEN, ZarrStore, create_store, open_store

if TYPE_CHECKING:
    from psnc import Pipeline

__all__ = ["AtomicDataZarrSink"]

logger = logging.getLogger("psnc_atm")

# What an index is marked with when a pipeline wrote it that has no hash and so is never resumed.
_NOBODY = 1
_NAMED_RUNS = 20


class AtomicDataZarrSink(Sink[AtomicData]):
    """Write every index into its own region of one preallocated Zarr store.

    Before the first index runs, the source tells how many atoms each structure has, so that every
    index knows where its rows belong: workers need no order and no assembly, an index can be
    written again after a crash, and the store is the same whoever wrote what when.

    The layout is that of ``nvalchemi-toolkit``: groups ``meta`` (``atoms_ptr``, ``edges_ptr``,
    masks), ``core`` (atom-level arrays concatenated, system-level arrays stacked) and ``custom``.
    ``meta/samples_mask`` is True for exactly the structures that are completely written.

    The store itself says which indices it holds, and which pipeline wrote them. An index that is
    recorded as completed, and that another run has begun to write anew since, runs again.

    Parameters
    ----------
    output_path : str or Path
        The store's directory. It is created; one that psnc laid out for the same input is
        continued; anything else there is refused and left as it is.
    atoms_per_chunk, systems_per_chunk : int
        Rows a chunk of atom-level and system-level arrays.
    fields : sequence of str, optional
        The optional fields to write (``"energy"``, ``"forces"``, ...); others are left out. By
        default those that the first structure has, ``initial_charges`` and ``initial_magmoms``
        excepted, and a later structure that has others, or lacks one, fails its index.
    custom : mapping of str to {"atom", "system"}, optional
        Entries of ``AtomicData.info`` to write to the group ``custom``, each an array or number
        of one shape for every structure (for every atom, at level ``"atom"``).

    Raises
    ------
    psnc.StageError
        If ``output_path`` holds something else, or a store of input that has changed since it
        was written; if a structure does not fit the layout.
    """

    name = "atomic-zarr"
    description = "One consolidated Zarr store for all structures"
    shares_outputs = True

    def __init__(
        self,
        output_path: Annotated[str | Path, Param(description="Directory of the store")],
        atoms_per_chunk: Annotated[
            int, Param(description="Rows a chunk of atom-level arrays")
        ] = 16_384,
        systems_per_chunk: Annotated[
            int, Param(description="Rows a chunk of system-level arrays")
        ] = 8_192,
        fields: Annotated[
            Sequence[str] | None,
            Param(description="Optional fields to write; by default what the first structure has"),
        ] = None,
        custom: Annotated[
            Mapping[str, Level] | None,
            Param(description="Entries of info to write, each with its level, atom or system"),
        ] = None,
    ) -> None:
        for parameter, rows in (
            ("atoms_per_chunk", atoms_per_chunk),
            ("systems_per_chunk", systems_per_chunk),
        ):
            if rows < 1:
                raise StageError(f"{parameter} is {rows}; give 1 or more")
        for field in fields or ():
            if field not in OPTIONAL:
                raise StageError(f"unknown field {field!r}; choose from {', '.join(OPTIONAL)}")
        for field, level in (custom or {}).items():
            if level not in ("atom", "system"):
                raise StageError(f"custom field {field!r} has level {level!r}; give atom or system")
        self._path = Path(output_path).absolute()
        self._output = str(output_path)
        self._chunk_rows = {"atom": atoms_per_chunk, "system": systems_per_chunk}
        self._fields = None if fields is None else sorted(set(fields), key=OPTIONAL.index)
        self._custom = dict(custom or {})
        self._store: ZarrStore | None = None
        self._mark = _NOBODY

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open store behind: each process opens its own."""
        return {**self.__dict__, "_store": None}

    def prepare(self, pipeline: Pipeline[AtomicData]) -> None:
        """Lay out the store, or check that the one there was laid out for this pipeline."""
        identity = self._identity(pipeline.source)
        take_back(self._path)
        store = open_store(self._path) or self._lay_out(pipeline, identity)
        if store is not None and (
            store.identity != identity or _readable_again(pipeline, store.unplanned)
        ):
            store = self._adapt(pipeline, store, identity)
        self._store = store
        self._mark = _mark_of(pipeline)
        if store is not None:
            self._forget_what_is_lost(pipeline, store)

    def _forget_what_is_lost(self, pipeline: Pipeline[AtomicData], store: ZarrStore) -> None:
        """Have those indices run again that are recorded as completed and are not in the store."""
        lost = self._lost(pipeline, store)
        if lost:
            # Twice: another driver may have been told to run one again between the two looks.
            lost = sorted({*lost} & {*self._lost(pipeline, store)})
        if not lost:
            return
        logger.warning(
            "%s does not hold %s as recorded, since another run wrote there or began to: "
            "to be run again",
            self._path,
            _in_words(lost),
        )
        pipeline.require_store("AtomicDataZarrSink").reset_indices(lost)

    def _lost(self, pipeline: Pipeline[AtomicData], store: ZarrStore) -> list[int]:
        """Return what is recorded as completed, and is not in the store."""
        # First what is recorded, then what is there: an index is recorded after it is written.
        completed = _completed(pipeline)
        if not completed:
            return []
        with store.lock():
            marks = _marks(store.current())
        return [i for i in sorted(completed) if i < len(marks) and marks[i] != self._mark]

    def _lay_out(
        self, pipeline: Pipeline[AtomicData], identity: dict[str, Any]
    ) -> ZarrStore | None:
        """Make the store; ``None`` if nothing can be read, and each index fails with its cause."""
        completed = pipeline.completed_indices if pipeline.track_metrics else set()
        # Looked at again, since another process may have made it and completed an index by now.
        store = open_store(self._path)
        if store is not None:
            return store
        if completed:
            raise StageError(
                f"{self._path} does not exist, but {len(completed)} of its indices are recorded as "
                "completed; restore it, or run every index again (pipeline.reset(), psnc reset DB)"
            )
        plan = plan_store(pipeline, self._fields, self._custom)
        if plan is None:
            return None
        create_store(self._path, plan, identity, self._chunk_rows)
        return open_store(self._path)

    def __call__(self, items: Iterator[AtomicData], index: int) -> list[str]:
        """Write the structures of one index and return the store's path."""
        store = self._store or open_store(self._path)
        if store is None:
            self._consume(items)
            raise StageError(
                f"{self._path}: not laid out, since no structure could be read when the run "
                "began; run again"
            )
        if index in store.unplanned:
            self._consume(items)
            raise StageError(
                f"{self._path} was laid out without index {index} ({store.unplanned[index]}); "
                "mend its file and run again"
            )
        self._write(store, items, index)
        return [self._output]

    def _write(self, store: ZarrStore, items: Iterator[AtomicData], index: int) -> None:
        rows, atoms = store.room(index)
        buffer = RegionBuffer(index, store.fields, rows, atoms, refuse_others=self._fields is None)
        try:
            buffer.fill(items)
        except Exception:
            with store.lock():
                self._mask_out(store.current(), index)
            raise
        with store.lock():
            current = self._store = store.current()
            if current is not store and current.room(index) != (rows, atoms):
                raise StageError(
                    f"index {index} was changed in the source while it was read; run it again"
                )
            self._put(current, buffer, index)

    @staticmethod
    def _mask_out(store: ZarrStore, index: int) -> None:
        """From here on the index counts as not written, should it have been before."""
        if store.read(WRITTEN, index, index + 1).any():
            store.write(WRITTEN, index, np.zeros(1, dtype=np.uint64))
        row, row_end = (int(number) for number in store.rows_before[index : index + 2])
        if store.read("meta/samples_mask", row, row_end).any():
            store.write("meta/samples_mask", row, np.zeros(row_end - row, dtype=bool))

    def _put(self, store: ZarrStore, buffer: RegionBuffer, index: int) -> None:
        row, atom = int(store.rows_before[index]), int(store.atoms_before[index])
        self._mask_out(store, index)
        for field, values in buffer.arrays():
            start = atom if field.level == "atom" else row
            store.write(f"{field.group}/{field.name}", start, values)
        store.write("meta/atoms_mask", atom, np.arange(buffer.atoms) < buffer.kept_atoms)
        # The last entry is where the next index begins, which never changes.
        store.write("meta/atoms_ptr", row + 1, atom + buffer.atoms_ends()[:-1])
        store.write("meta/samples_mask", row, np.arange(buffer.rows) < buffer.kept_rows)
        # That no rows are there can also mean that a filter dropped them all.
        store.write(WRITTEN, index, np.array([self._mark], dtype=np.uint64))

    def _identity(self, source: Any) -> dict[str, Any]:
        if hasattr(source, "input_identity"):
            described = json.loads(json.dumps(source.input_identity()))
        else:
            described = {"indices": len(source)}
        return {
            "chunk_rows": self._chunk_rows,
            "fields": self._fields,
            "custom": self._custom,
            "input": described,
        }

    def _adapt(
        self, pipeline: Pipeline[AtomicData], store: ZarrStore, identity: dict[str, Any]
    ) -> ZarrStore:
        """Make room for input that was repaired or added since the store was laid out.

        One process at a time; whoever waited finds the store adapted.
        """
        with store.lock(exclusive=True):
            store = store.current()
            changed = changed_indices(store.identity, identity)
            written = set(np.flatnonzero(_marks(store)).tolist())
            same_indices = bool(changed) or len(pipeline.source) == len(store.rows_before) - 1
            if changed is None or not same_indices or changed & written:
                raise _other_input(store, identity, written)
            if store.identity["input"].get("natoms") != identity["input"].get("natoms"):
                # Numbers of atoms decide how much room an index has.
                changed |= {*range(len(pipeline.source))} - written
            changed |= _readable_again(pipeline, store.unplanned)
            plan = plan_store(pipeline, self._fields, self._custom) if changed else None
            if plan is None:
                return store
            lay_out_anew(store, plan, identity, self._chunk_rows, changed)
            adapted = open_store(self._path)
            assert adapted is not None
            return adapted

    @staticmethod
    def _consume(items: Iterator[AtomicData]) -> None:
        """Read on: the error that kept the index from being planned is the one to report."""
        for _ in items:
            pass


def _mark_of(pipeline: Pipeline[Any]) -> int:
    """Return what tells whether an index in the store is as this pipeline would write it.

    The store's identity says what it was laid out for; the rest is up to the filters, and to a
    source that does not describe its input.
    """
    try:
        stages = {"filters": pipeline.config["filters"]}
        if not hasattr(pipeline.source, "input_identity"):
            stages["source"] = pipeline.config["source"]
    except ConfigurationError:
        return _NOBODY
    digest = hashlib.sha256(canonical_json(stages).encode()).digest()
    return max(int.from_bytes(digest[:8], "little"), _NOBODY + 1)


def _marks(store: ZarrStore) -> NDArray[np.uint64]:
    return store.read(WRITTEN, 0, len(store.rows_before) - 1)


def _completed(pipeline: Pipeline[Any]) -> set[int]:
    if not pipeline.track_metrics:
        return set()
    try:
        return pipeline.completed_indices
    except TrackingDisabledError:
        return set()  # in a worker that the database is out of reach of: its driver has looked


def _in_words(indices: Sequence[int]) -> str:
    runs = [str(one) if one == last else f"{one}-{last}" for one, last in runs_of(indices)]
    if len(runs) > _NAMED_RUNS:
        runs[_NAMED_RUNS:] = [f"... ({len(indices)} in all)"]
    return f"{'index' if len(indices) == 1 else 'indices'} {', '.join(runs)}"


def _readable_again(pipeline: Pipeline[AtomicData], unplanned: Mapping[int, str]) -> set[int]:
    """Return the indices that had no room because of something that has passed."""
    readable = set()
    for index in unplanned:
        try:
            atom_counts(pipeline.source, index)
        except Exception:
            # The index fails again, with its present cause, when it runs.
            continue
        readable.add(index)
    return readable


def _other_input(
    store: ZarrStore, identity: Mapping[str, Any], written: Container[int]
) -> StageError:
    difference = _difference(store.identity, identity, written)
    return StageError(
        f"{store.path} was laid out for other input: {difference}; "
        "choose another output_path, or delete the store to write it anew"
    )


def _difference(then: Mapping[str, Any], now: Mapping[str, Any], written: Container[int]) -> str:
    """Say in a few words what stands in the way."""
    for key in ("chunk_rows", "fields", "custom"):
        if then[key] != now[key]:
            return f"{key} was {then[key]} and is {now[key]}"
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
