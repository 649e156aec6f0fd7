"""One array of a Zarr store in a local directory: whole chunks in, whole chunks out.

Readers use zarr. A writer of regions knows which chunks it replaces, and needs neither an event
loop nor threads for it: two workers on two cores have none to spare.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from psnc.errors import StageError
from psnc_atm.zarr_codec import Codec, compressor_of

__all__ = ["LocalArray", "open_array", "replace_file"]

_NO_CHUNK = 2**64 - 1  # what a shard's index says of a chunk that is not there


@frozen(eq=False)
class LocalArray:
    """An array that is cut along its first axis alone, and filled with zeros where nothing is.

    Attributes
    ----------
    directory : Path
        Where its ``zarr.json`` is.
    length : int
        Rows.
    shape : tuple of int
        Shape of a row.
    dtype : numpy.dtype
        Of the values.
    chunk_rows : int
        Rows that are compressed together.
    file_rows : int
        Rows in one file: those of a chunk, or of a shard.
    """

    directory: Path
    length: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_rows: int
    file_rows: int
    _codec: Codec
    _sharded: bool
    _separator: str

    def resized(self, length: int) -> LocalArray:
        """Return the array as it is with another number of rows."""
        return evolve(self, length=length)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the rows from ``start`` to ``stop``."""
        values = np.zeros((max(stop - start, 0), *self.shape), self.dtype)
        for number in range(start // self.file_rows, -(-stop // self.file_rows)):
            rows = self.read_file(number)
            if rows is not None:
                first = number * self.file_rows
                one, end = max(start, first), min(stop, first + self.file_rows)
                values[one - start : end - start] = rows[one - first : end - first]
        return values

    def read_file(self, number: int) -> NDArray[Any] | None:
        """Return all rows of one file; ``None`` if they are zero."""
        path = self._path(number)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            if self._sharded:
                return self._of_shard(content)
            return self._decoded(content, self.file_rows)
        except Exception as error:  # each codec has its own
            raise StageError(
                f"{path} cannot be decoded ({error}); restore it, or delete the store to write "
                "it anew"
            ) from error

    def write_file(self, number: int, values: NDArray[Any]) -> None:
        """Replace one file, in one step, by ``values`` and zeros behind them."""
        path = self._path(number)
        if not _any(values):
            path.unlink(missing_ok=True)
            return
        if len(values) < self.file_rows:
            whole = np.zeros((self.file_rows, *self.shape), self.dtype)
            whole[: len(values)] = values
            values = whole
        content = self._shard(values) if self._sharded else self._codec.encode(values)
        replace_file(path, content)

    def _path(self, number: int) -> Path:
        return self.directory / self._separator.join(["c", str(number), *("0" for _ in self.shape)])

    def _decoded(self, content: bytes, rows: int) -> NDArray[Any]:
        values = np.frombuffer(self._codec.decode(content), self.dtype)
        return values.reshape(rows, *self.shape)

    def _shard(self, values: NDArray[Any]) -> bytes:
        places, pieces, position = [], [], 0
        for start in range(0, self.file_rows, self.chunk_rows):
            chunk = values[start : start + self.chunk_rows]
            if not _any(chunk):
                places.append((_NO_CHUNK, _NO_CHUNK))
                continue
            pieces.append(bytes(self._codec.encode(chunk)))
            places.append((position, len(pieces[-1])))
            position += len(pieces[-1])
        index = np.array(places, dtype="<u8").tobytes()
        checksum = google_crc32c.value(index).to_bytes(4, "little")
        return b"".join([*pieces, index, checksum])

    def _of_shard(self, content: bytes) -> NDArray[Any]:
        count = self.file_rows // self.chunk_rows
        if len(content) < 16 * count + 4:
            raise ValueError(f"it has {len(content)} bytes, and ends too early")
        index, checksum = content[-16 * count - 4 : -4], content[-4:]
        if google_crc32c.value(index) != int.from_bytes(checksum, "little"):
            raise ValueError("the checksum of its index is wrong")
        values = np.zeros((self.file_rows, *self.shape), self.dtype)
        for chunk, (offset, size) in enumerate(np.frombuffer(index, "<u8").reshape(-1, 2).tolist()):
            if offset != _NO_CHUNK:
                start = chunk * self.chunk_rows
                values[start : start + self.chunk_rows] = self._decoded(
                    content[offset : offset + size], self.chunk_rows
                )
        return values


def _any(values: NDArray[Any]) -> bool:
    """Whether any byte is set: a negative zero is not nothing."""
    return bool(values.size and values.reshape(-1).view(np.uint8).any())


def open_array(directory: Path) -> LocalArray:
    """Open the array in ``directory``.

    Raises
    ------
    OSError, KeyError, ValueError
        If there is none, or none that psnc laid out.
    """
    metadata = json.loads((directory / "zarr.json").read_bytes())
    length, *shape = metadata["shape"]
    file_rows, *_ = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    codecs, chunk_rows, sharded = metadata["codecs"], file_rows, False
    if codecs[0]["name"] == "sharding_indexed":
        sharded, inner = True, codecs[0]["configuration"]
        codecs, chunk_rows = inner["codecs"], inner["chunk_shape"][0]
    return LocalArray(
        directory=directory,
        length=length,
        shape=tuple(shape),
        dtype=np.dtype(metadata["data_type"]).newbyteorder("<"),
        chunk_rows=chunk_rows,
        file_rows=file_rows,
        codec=_codec(codecs),
        sharded=sharded,
        separator=metadata["chunk_key_encoding"]["configuration"]["separator"],
    )


def _codec(codecs: list[Mapping[str, Any]]) -> Codec:
    to_bytes, *compressors = codecs
    if to_bytes["name"] != "bytes" or len(compressors) > 1:
        raise ValueError(f"codecs {[codec['name'] for codec in codecs]} are none that psnc writes")
    return compressor_of(compressors[0] if compressors else None)


def replace_file(path: Path, content: Any) -> None:
    """Write a file such that everybody sees what was there before, or all of ``content``."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        try:
            _write(draft, content)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(draft, content)
        os.replace(draft, path)
    except BaseException:
        with suppress(FileNotFoundError):
            draft.unlink()
        raise


def _write(path: Path, content: Any) -> None:
    with open(path, "wb", buffering=0) as file:
        view = memoryview(content).cast("B")
        while len(view):
            view = view[file.write(view) :]
