"""AtomicDataZarrSink: all structures of a dataset in one Zarr store."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from psnc.errors import ConfigurationError, StageError, TrackingDisabledError
from psnc.index_ranges import runs_of
from psnc.provenance import canonical_json
from psnc.stages import Param, Sink, stage_name
from psnc_atm.atomic_data import AtomicData
from psnc_atm.fields import EDGE_FIELDS, OPTIONAL, Level
from psnc_atm.joined_edges import hold_edges, join_edges
from psnc_atm.region_buffer import RegionBuffer
from psnc_atm.region_writer import RegionWriter
from psnc_atm.store_parts import Changes, changes, part_of, plan_with_others
from psnc_atm.store_plan import Missing, StorePlan, count_atoms, plan_of, plan_store
from psnc_atm.zarr_codec import CODECS, DEFAULT_CODEC, level_of
from psnc_atm.zarr_growth import can_grow, enlarge, enlarged_parts
from psnc_atm.zarr_relayout import lay_out_anew, take_back
from psnc_atm.zarr_store import WRITTEN, Encoding, ZarrStore, create_store, open_store

if TYPE_CHECKING:
    from psnc import Pipeline

__all__ = ["AtomicDataZarrSink"]

logger = logging.getLogger("psnc_atm")

# What an index is marked with when a pipeline wrote it that has no hash and so is never resumed.
_NOBODY = 1
_NAMED_RUNS = 20
_STORABLE = (*OPTIONAL, *EDGE_FIELDS)
# A file is in memory as a whole while it is written.
_MOST_ROWS = 2**31


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
        Edges are ``"edge_index"`` and ``"unit_shifts"``; they are in the store once it is gathered.
    custom : mapping of str to {"atom", "system"}, optional
        Entries of ``AtomicData.info`` to write to the group ``custom``, each an array or number
        of one shape for every structure (for every atom, at level ``"atom"``).
    codec : {"blosc-lz4", "blosc-zstd", "zstd", "gzip", "none"}
        How arrays are compressed.
    level : int, optional
        How hard the codec tries; by default its usual level.
    atoms_per_shard, systems_per_shard : int, optional
        Rows of a file, as multiples of those of a chunk, so that a large store is few files. By
        default a chunk is a file.
    missing : {"refuse", "nan"}
        What becomes of a structure that lacks a stored field: its index fails, or the field is
        NaN, and the array ``custom/has_NAME`` says which structures have it.
    append : bool
        Add the structures of this source behind those of others that are in the store.
    edges_per_chunk, edges_per_shard : int
        As those of atoms, for arrays of edges.

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
        codec: Annotated[
            str, Param(description=f"How arrays are compressed: {', '.join(CODECS)}")
        ] = DEFAULT_CODEC,
        level: Annotated[
            int | None, Param(description="How hard the codec tries; by default its usual level")
        ] = None,
        atoms_per_shard: Annotated[
            int | None, Param(description="Rows a file of atom-level arrays; by default one chunk")
        ] = None,
        systems_per_shard: Annotated[
            int | None, Param(description="Rows a file of system-level arrays; by default a chunk")
        ] = None,
        missing: Annotated[
            str, Param(description="Where a structure lacks a stored field: refuse it, or nan")
        ] = "refuse",
        append: Annotated[
            bool, Param(description="Add the source's structures behind those of other sources")
        ] = False,
        edges_per_chunk: Annotated[
            int, Param(description="Rows a chunk of edge-level arrays")
        ] = 65_536,
        edges_per_shard: Annotated[
            int | None, Param(description="Rows a file of edge-level arrays; by default one chunk")
        ] = None,
    ) -> None:
        chunks = {
            "atom": atoms_per_chunk,
            "system": systems_per_chunk,
            "edge": edges_per_chunk,
        }
        shards = {
            "atom": atoms_per_shard,
            "system": systems_per_shard,
            "edge": edges_per_shard,
        }
        _check_rows(chunks, shards)
        for field in fields or ():
            if field not in _STORABLE:
                raise StageError(f"unknown field {field!r}; choose from {', '.join(_STORABLE)}")
        if fields is not None and "unit_shifts" in fields and "edge_index" not in fields:
            raise StageError("fields has 'unit_shifts', which say nothing without 'edge_index'")
        if isinstance(fields, str) or isinstance(custom, str):
            raise StageError("fields is a list of names, and custom a mapping of names to levels")
        for field, of in (custom or {}).items():
            if not field or field.startswith((".", "__")) or "/" in field or field == "zarr.json":
                raise StageError(
                    f"custom field {field!r} cannot be the name of an array; rename it in a filter"
                )
            if of not in ("atom", "system"):
                raise StageError(f"custom field {field!r} has level {of!r}; give atom or system")
        if missing not in get_args(Missing):
            raise StageError(f"missing is {missing!r}; give refuse or nan")
        try:
            self._encoding = Encoding(chunks, shards, codec, level_of(codec, level))
        except ValueError as error:
            raise StageError(str(error)) from error
        self._path = Path(output_path).absolute()
        self._output = str(output_path)
        self._fields = None if fields is None else sorted(set(fields), key=_STORABLE.index)
        self._custom = dict(custom or {})
        self._missing = cast("Missing", missing)
        self._append = append
        self._store: ZarrStore | None = None
        self._part = 0
        self._laid_out = True
        self._mark = _NOBODY

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open store behind: each process opens its own."""
        return {**self.__dict__, "_store": None}

    def prepare(self, pipeline: Pipeline[AtomicData]) -> None:
        """Lay out the store, or check that the one there was laid out for this pipeline."""
        identity = self._identity(pipeline.source)
        take_back(self._path)
        store = open_store(self._path) or self._lay_out(pipeline, identity)
        if store is not None:
            store = self._adapt(pipeline, store, identity)
            self._part = part_of(store, identity, append=self._append)
        self._laid_out = store is not None
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
            marks = _marks_of(store.current(), self._part)
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
        plan = self._plan(pipeline)
        if plan is None:
            return None
        create_store(self._path, plan, identity, self._encoding)
        return open_store(self._path)

    def __call__(self, items: Iterator[AtomicData], index: int) -> list[str]:
        """Write the structures of one index and return the store's path."""
        store = (self._store or open_store(self._path)) if self._laid_out else None
        if store is None or self._part >= len(store.parts):
            self._consume(items)
            raise StageError(f"{self._path}: not laid out, since {self._why_not_laid_out()}")
        place = self._place(store, index)
        if place in store.unplanned:
            self._consume(items)
            raise StageError(
                f"{self._path} was laid out without index {index} ({store.unplanned[place]}); "
                "mend its file and run again"
            )
        self._write(store, items, index)
        return [self._output]

    def gather(self, indices: Sequence[int]) -> list[str]:
        """Join the edges of all indices that the store holds, if it is to have edges.

        These are what a reader of the store sees, and so what must have edges. If an index is
        written meanwhile, nothing is joined, and a warning says so.
        """
        take_back(self._path)
        store = open_store(self._path)
        if store is None or not store.edge_fields:
            return []
        return [self._output] if join_edges(store, self._encoding) else []

    def _write(self, store: ZarrStore, items: Iterator[AtomicData], index: int) -> None:
        room = store.room(self._place(store, index))
        buffer = RegionBuffer(
            index,
            store.fields,
            *room,
            edge_fields=store.edge_fields,
            refuse_others=self._fields is None,
            missing=self._missing,
        )
        writer = RegionWriter(buffer, store, self._part)
        try:
            for _ in buffer.fill(items):
                if writer.has_whole_files():
                    writer.write_whole_files()
        except Exception:
            with store.lock():
                current = store.current()
                current.mask_out(self._place(current, index))
            raise
        self._store = writer.finish(self._mark)

    def _place(self, store: ZarrStore, index: int) -> int:
        """Return the number that an index has in the store."""
        return store.parts[self._part].index_in_store(index)

    def _plan(self, pipeline: Pipeline[AtomicData]) -> StorePlan | None:
        return plan_store(pipeline, self._fields, self._custom, self._missing)

    @staticmethod
    def _plan_of_part(pipeline: Pipeline[AtomicData], store: ZarrStore) -> StorePlan:
        """Plan for an appended source, whose structures follow those that are there."""
        counts, unplanned = count_atoms(pipeline.source, range(len(pipeline.source)))
        return plan_of(store.fields, counts, unplanned, store.edge_fields)

    def _identity(self, source: Any) -> dict[str, Any]:
        if hasattr(source, "input_identity"):
            described = json.loads(json.dumps(source.input_identity()))
        elif self._append:
            raise StageError(
                f"append=True needs a source that tells its input from another's, and "
                f"{stage_name(source)} has no input_identity()"
            )
        else:
            described = {"indices": len(source)}
        return {
            "chunk_rows": _laid_out(self._encoding.chunk_rows),
            "shard_rows": _laid_out(self._encoding.shard_rows),
            "codec": [self._encoding.codec, self._encoding.level],
            "fields": self._fields,
            "custom": self._custom,
            "missing": self._missing,
            "input": described,
        }

    def _adapt(
        self, pipeline: Pipeline[AtomicData], store: ZarrStore, identity: dict[str, Any]
    ) -> ZarrStore:
        """Make room for input that was repaired or added since the store was laid out.

        One process at a time; whoever waited finds the store adapted.
        """
        needed = changes(store, identity, pipeline.source, append=self._append)
        if not needed:
            return store
        # Before anybody has to wait for it; not where all has to be planned anew.
        counted = count_atoms(pipeline.source, needed.new if not needed.old else ())
        with hold_edges(store), store.lock(exclusive=True):
            store = store.current()
            again = changes(store, identity, pipeline.source, append=self._append)
            if not again:
                return store
            if not again.old and again.new == needed.new and not needed.old and can_grow(store):
                enlarge(store, again.part, identity, *counted)
            else:
                self._lay_out_anew(pipeline, store, identity, again)
            adapted = open_store(self._path)
            assert adapted is not None
            return adapted

    def _lay_out_anew(
        self,
        pipeline: Pipeline[AtomicData],
        store: ZarrStore,
        identity: dict[str, Any],
        needed: Changes,
    ) -> None:
        plan = self._plan(pipeline) if needed.part == 0 else self._plan_of_part(pipeline, store)
        if plan is None:
            return
        parts = enlarged_parts(store.parts, needed.part, identity, len(needed.new))
        whole = plan_with_others(store, plan, parts, needed.part)
        changed = parts[needed.part].indices()[sorted(needed.old)].tolist()
        lay_out_anew(store, whole, parts, self._encoding, set(changed))

    def _why_not_laid_out(self) -> str:
        if not self._custom:
            return (
                "no structure reached the sink when the run began, and not all could be read; mend "
                "that, and run again"
            )
        return (
            f"custom fields ({', '.join(self._custom)}) are laid out as the first structure has "
            "them, and none reached the sink when the run began; mend what cannot be read, have "
            "filters keep some, or leave custom away, and run again"
        )

    @staticmethod
    def _consume(items: Iterator[AtomicData]) -> None:
        """Read on: the error that kept the index from being planned is the one to report."""
        for _ in items:
            pass


def _laid_out(rows: Mapping[str, int | None]) -> dict[str, int | None]:
    """Leave out the arrays of edges, which are made anew whenever they are joined."""
    return {level: number for level, number in rows.items() if level != "edge"}


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


def _marks_of(store: ZarrStore, part: int) -> NDArray[np.uint64]:
    """Return the marks of the indices of one source."""
    return _marks(store)[store.parts[part].indices()]


def _marks(store: ZarrStore) -> NDArray[np.uint64]:
    return store.read(WRITTEN, 0, len(store.rows_before) - 1)


def _check_rows(chunks: Mapping[str, int], shards: Mapping[str, int | None]) -> None:
    for level, rows in chunks.items():
        if not _is_whole_number(rows) or not 1 <= rows <= _MOST_ROWS:
            raise StageError(f"{level}s_per_chunk is {rows!r}; give a whole number from 1 on")
        shard = shards[level]
        if shard is not None and (not _is_whole_number(shard) or shard < 1 or shard % rows):
            raise StageError(
                f"{level}s_per_shard is {shard}; give a multiple of {level}s_per_chunk, {rows}"
            )


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
