"""Drop structures that are there twice: in one index, or in a whole dataset.

Whether an index holds a structure that an earlier one holds cannot be known while both run side by
side. So a first pipeline writes the hashes of each index (`StructureHashSink`), and a second one
has a source that leaves out what came before (`UniqueStructures`). Of the same structures it keeps
the first, by index and by place in it, whoever ran which index when.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from attrs import asdict, frozen
from numpy.typing import NDArray

from psnc import atomic_write
from psnc.errors import SourceError
from psnc.stages import Filter, Param, Sink, Source
from psnc_atm.atomic_data import AtomicData
from psnc_atm.filter_input import place_of, structures_of
from psnc_atm.store_plan import atom_counts
from psnc_atm.structure_hash import HASH_BYTES, StructureHash

__all__ = ["DropDuplicates", "StructureHashSink", "UniqueStructures"]

logger = logging.getLogger("psnc_atm")

_DECIMALS = Param(description="Decimals to which positions and other numbers are compared")
_ANY_ORDER = Param(description="Whether the order of the atoms does not count")
_FIELDS = Param(description="Fields that have to be the same besides")


class DropDuplicates(Filter[AtomicData, AtomicData]):
    """Drop structures that came before in the same index.

    It sees one index at a time: for duplicates in different indices there is `UniqueStructures`.

    Parameters
    ----------
    decimals : int
        Decimals to which numbers are compared; see `StructureHash`.
    any_atom_order : bool
        Whether the same atoms in another order are the same structure.
    fields : sequence of str
        Fields that have to be the same besides.

    Raises
    ------
    psnc.ConfigurationError
        If a field is unknown, or ``decimals`` is not between 0 and 15.
    """

    name = "drop-duplicates"
    description = "Drops structures that came before in the same index"

    def __init__(
        self,
        decimals: Annotated[int, _DECIMALS] = 6,
        any_atom_order: Annotated[bool, _ANY_ORDER] = True,
        fields: Annotated[Sequence[str], _FIELDS] = ("charge", "spin"),
    ) -> None:
        self._hash = StructureHash(decimals, any_atom_order, fields)

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        """Yield each structure the first time that it comes."""
        seen: set[bytes] = set()
        total = 0
        for _, structure in structures_of(items, self):
            total += 1
            digest = self._hash(structure)
            if digest not in seen:
                seen.add(digest)
                yield structure
        if total > len(seen):
            logger.info("DropDuplicates dropped %d of %d", total - len(seen), total)


class StructureHashSink(Sink[AtomicData]):
    """Write the hashes of each index's structures to a file, for `UniqueStructures`.

    Put it right behind the source: no filter may drop structures before it.

    Parameters
    ----------
    output_dir : str or Path
        Where the files are to be.
    decimals, any_atom_order, fields
        As of `DropDuplicates`.

    Raises
    ------
    psnc.ConfigurationError
        If a field is unknown, or ``decimals`` is not between 0 and 15.
    """

    name = "structure-hashes"
    description = "Hashes of structures, to tell which are there twice"

    def __init__(
        self,
        output_dir: Annotated[str | Path, Param(description="Directory of the hashes")],
        decimals: Annotated[int, _DECIMALS] = 6,
        any_atom_order: Annotated[bool, _ANY_ORDER] = True,
        fields: Annotated[Sequence[str], _FIELDS] = ("charge", "spin"),
    ) -> None:
        self._directory = Path(output_dir)
        self._hash = StructureHash(decimals, any_atom_order, fields)

    def __call__(self, items: Iterator[AtomicData], index: int) -> Path:
        """Write the hashes of one index."""
        digests = b"".join(self._hash(structure) for _, structure in structures_of(items, self))
        path = _hash_file(self._directory, index)
        content = io.BytesIO()
        np.savez(
            content,
            hashes=np.frombuffer(digests, dtype=np.uint8).reshape(-1, HASH_BYTES),
            settings=np.array(json.dumps(asdict(self._hash))),
        )
        with atomic_write(path) as file:
            file.write(content.getvalue())
        return path


class UniqueStructures(Source[AtomicData]):
    """The structures of another source, without those that an earlier index, or place in one, has.

    Each structure is compared with its hash, so that hashes of other input are an error and never
    drop the wrong one.

    A store that is written from it has room for exactly what is kept. Indices may be added behind
    the others: those that are completed stay as they are, since of the same structures the first
    one is kept. Where something else has changed what is kept of a completed index, the run is not
    resumed.

    Parameters
    ----------
    source : Source
        Where the structures come from: the one whose hashes were written.
    hashes : str or Path
        The directory that `StructureHashSink` wrote.

    Raises
    ------
    psnc.SourceError
        If hashes of an index are missing, cannot be read, were made in another way than the others,
        or are of other structures.
    """

    name = "unique-structures"
    description = "Structures of another source, each of them once"

    def __init__(
        self,
        source: Annotated[Source[AtomicData], Param(description="Where the structures come from")],
        hashes: Annotated[
            str | Path, Param(description="Directory that the sink structure-hashes wrote")
        ],
    ) -> None:
        self._source = source
        self._directory = Path(hashes)

    def __len__(self) -> int:
        """Return the number of indices."""
        return len(self._source)

    def __getitem__(self, index: int) -> Iterator[AtomicData]:
        """Yield the structures of one index that no earlier place has."""
        hashes, kept = self._table.of_index(index)
        position = -1
        for position, structure in structures_of(iter(self._source[index]), self):
            if position >= len(hashes):
                break
            if self._table.hash(structure) != hashes[position].tobytes():
                raise self._other_input(index, place_of(structure, position))
            if kept[position]:
                yield structure
        if position + 1 != len(hashes):
            raise self._other_input(index, "the number of structures")
        if not kept.all():
            logger.info("UniqueStructures dropped %d of %d", np.sum(~kept), len(kept))

    def atom_counts(self, index: int) -> NDArray[np.int64]:
        """Return the number of atoms of each structure of one index that is kept.

        Where the other source has left out rows, it is that of all rows: which of them have
        become a structure is not known before they are decoded.
        """
        counts = atom_counts(self._source, index)
        _, kept = self._table.of_index(index)
        if len(counts) > len(kept) and getattr(self._source, "leaves_out_rows", False):
            return counts
        if len(counts) != len(kept):
            raise self._other_input(index, "the number of structures")
        return counts[kept]

    @property
    def index_measurements(self) -> Callable[[int], Mapping[str, int] | None]:
        """Return what the other source has to record, if it has."""
        inner: Callable[[int], Mapping[str, int] | None]
        inner = self._source.index_measurements  # type: ignore[attr-defined]
        return inner

    def identity(self) -> Any:
        """Return that of the other source; `index_name` says what is kept."""
        return self._source.identity()

    def index_name(self, index: int) -> str:
        """Return the name that the other source gives, and what is kept of the index."""
        inner = self._source.index_name(index)
        return f"{f'index {index}' if inner is None else inner} {self._table.kept_of(index)}"

    def partition_indices(self, indices: Sequence[int]) -> Sequence[Sequence[int]] | None:
        """Ask for what the other source asks for."""
        return self._source.partition_indices(indices)

    @property
    def input_identity(self) -> Callable[[], dict[str, Any]]:
        """Say what the indices are made from, if the other source does."""
        inner: Callable[[], dict[str, Any]] = self._source.input_identity  # type: ignore[attr-defined]
        return lambda: self._identity_with_kept(inner())

    def _identity_with_kept(self, inner: dict[str, Any]) -> dict[str, Any]:
        kept = [self._table.kept_of(index) for index in range(len(self))]
        files = inner.get("files", ())
        if len(files) == len(kept):
            # An index a file: what is said of each file stays when others are added.
            together = [[*file, of_it] for file, of_it in zip(files, kept, strict=True)]
            return {**inner, "files": together}
        return {**inner, "kept": hashlib.sha256("\n".join(kept).encode()).hexdigest()}

    @cached_property
    def _table(self) -> _Table:
        """What is kept of each index; made when first asked for, and sent along to workers."""
        return _read_table(self._directory, len(self._source))

    def _other_input(self, index: int, what: str) -> SourceError:
        return SourceError(
            f"{_hash_file(self._directory, index)}: {what} of index {index} is not what the hashes "
            "were made of: run the pipeline that writes them again"
        )


@frozen(eq=False)
class _Table:
    """Hashes of all structures, whether each is the first of its kind, and where indices begin."""

    hash: StructureHash
    hashes: NDArray[np.uint8]
    first: NDArray[np.bool_]
    starts: NDArray[np.int64]

    def of_index(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        rows = slice(self.starts[index], self.starts[index + 1])
        return self.hashes[rows], self.first[rows]

    def kept_of(self, index: int) -> str:
        """Say in a few words which structures of an index are kept."""
        _, kept = self.of_index(index)
        digest = hashlib.sha256(np.packbits(kept).tobytes()).hexdigest()[:8]
        return f"({kept.sum()} of {len(kept)}, {digest})"


def _read_table(directory: Path, indices: int) -> _Table:
    parts = []
    settings = None
    for index in range(indices):
        path = _hash_file(directory, index)
        hashes, own = _read_hashes(path)
        settings = settings or own
        if own != settings:
            raise SourceError(f"{path}: hashes of another kind ({own}) than before ({settings})")
        parts.append(hashes)
    hashes = np.concatenate(parts) if parts else np.empty((0, HASH_BYTES), np.uint8)
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
    made = StructureHash(**json.loads(settings)) if settings else StructureHash()
    return _Table(made, hashes, _first_of_each(hashes), starts)


def _first_of_each(hashes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    first = np.zeros(len(hashes), dtype=bool)
    if len(hashes):
        halves = np.ascontiguousarray(hashes).view("<u8")
        # The sort is stable: of equal hashes the first comes first.
        order = np.lexsort(halves.T)
        sorted_halves = halves[order]
        differs = (sorted_halves[1:] != sorted_halves[:-1]).any(axis=1)
        first[order[np.concatenate([[True], differs])]] = True
    return first


def _read_hashes(path: Path) -> tuple[NDArray[np.uint8], str]:
    try:
        with np.load(io.BytesIO(path.read_bytes())) as content:
            hashes: NDArray[np.uint8] = content["hashes"]
            return hashes, str(content["settings"])
    except FileNotFoundError:
        raise SourceError(
            f"{path} does not exist: run the pipeline that ends in StructureHashSink first"
        ) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path} holds no hashes ({error}): delete it, write it anew") from error


def _hash_file(directory: Path, index: int) -> Path:
    return directory / f"{index}.npz"
