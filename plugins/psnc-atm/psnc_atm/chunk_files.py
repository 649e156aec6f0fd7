"""The chunks of a Zarr array in local files, decoded in the thread that asks for them.

Reading a few rows through zarr-python costs hundreds of microseconds before anything is read: a
task of its event loop, and a thread for each codec. Here a chunk is one `open`, one `read` and the
codecs, called one after the other. What it knows are the codecs that stores of this layout are
written with; any other array is left to zarr-python.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

__all__ = ["ChunkError", "ChunkFiles", "files_of_array"]

Decode = Callable[[bytes], bytes]

_NUMBERS = frozenset(
    (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
)
_CHECKSUM_BYTES = 4
_ABSENT = 2**64 - 1


class ChunkError(Exception):
    """A chunk that cannot be read or decoded.

    Attributes
    ----------
    file : str
        The file that it is in.
    cause : str
        What is wrong with it.
    """

    def __init__(self, file: str, cause: str) -> None:
        super().__init__(file, cause)
        self.file, self.cause = file, cause


class _UnknownError(Exception):
    """The array is stored in a way that this module does not know."""


@frozen
class _Codecs:
    """From the bytes of a file, or of a part of one, to numbers."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    names: tuple[str, ...]

    def decode(self, data: bytes) -> NDArray[Any]:
        for name in reversed(self.names):
            data = _DECODERS[name](data)
        return np.frombuffer(data, dtype=self.dtype).reshape(self.shape)


@frozen
class _Shards:
    """Where the chunks are in a file that holds several, and after them (or before) an index."""

    chunks: int
    index: _Codecs
    index_bytes: int
    index_first: bool


@frozen
class ChunkFiles:
    """The chunks of one array.

    Attributes
    ----------
    chunk_rows : int
        Rows that are decoded together.
    """

    chunk_rows: int
    _before: str
    _after: str
    _codecs: _Codecs
    _shards: _Shards | None

    def read(self, number: int) -> NDArray[Any] | None:
        """Return a chunk; ``None`` if it was never written.

        Raises
        ------
        ChunkError
            If its file cannot be read or decoded.
        """
        per_file = 1 if self._shards is None else self._shards.chunks
        # Plain strings: making a Path takes as long as opening it.
        path = f"{self._before}{number // per_file}{self._after}"
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ChunkError(path, str(error.strerror)) from error
        try:
            size = os.fstat(descriptor).st_size
            start, length = 0, size
            if self._shards is not None:
                place = self._place(descriptor, size, number % per_file)
                if place is None:
                    return None
                start, length = place
            return self._codecs.decode(_bytes(descriptor, start, length, size))
        except OSError as error:
            raise ChunkError(path, str(error.strerror)) from error
        except Exception as error:  # the codecs' libraries have no common class of error
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ChunkError(path, cause) from error
        finally:
            os.close(descriptor)

    def _place(self, descriptor: int, size: int, number: int) -> tuple[int, int] | None:
        assert self._shards is not None
        index_bytes = self._shards.index_bytes
        start = 0 if self._shards.index_first else size - index_bytes
        index = self._shards.index.decode(_bytes(descriptor, start, index_bytes, size))
        offset, length = index[number].tolist()
        return None if offset == _ABSENT else (offset, length)


def files_of_array(directory: Path) -> ChunkFiles | None:
    """Return the chunks of the array in ``directory``; ``None`` if they are for zarr-python."""
    try:
        return _described(directory, json.loads((directory / "zarr.json").read_bytes()))
    except (_UnknownError, KeyError, TypeError, ValueError, OSError):
        return None


def _described(directory: Path, array: Mapping[str, Any]) -> ChunkFiles:
    grid, encoding = array["chunk_grid"], array["chunk_key_encoding"]
    _require(grid["name"] == "regular" and encoding["name"] == "default")
    _require(array["data_type"] in _NUMBERS and not array.get("storage_transformers"))
    shape, dtype = tuple(array["shape"]), np.dtype(array["data_type"])
    stored = tuple(grid["configuration"]["chunk_shape"])
    _require(len(shape) > 0 and stored[1:] == shape[1:])
    codecs, shards, chunk = array["codecs"], None, stored
    if codecs[0]["name"] == "sharding_indexed":
        _require(len(codecs) == 1)
        sharding = codecs[0]["configuration"]
        codecs, chunk = sharding["codecs"], tuple(sharding["chunk_shape"])
        _require(chunk[1:] == shape[1:])
        shards = _shards(sharding, stored[0] // chunk[0])
    separator = encoding.get("configuration", {}).get("separator", "/")
    return ChunkFiles(
        chunk_rows=chunk[0],
        before=f"{directory}/c{separator}",
        after=f"{separator}0" * (len(shape) - 1),
        codecs=_codecs(codecs, dtype, chunk),
        shards=shards,
    )


def _shards(sharding: Mapping[str, Any], chunks: int) -> _Shards:
    codecs = sharding["index_codecs"]
    names = [codec["name"] for codec in codecs]
    _require(names in (["bytes"], ["bytes", "crc32c"]))
    index_bytes = 16 * chunks + _CHECKSUM_BYTES * (len(names) - 1)
    index = _codecs(codecs, np.dtype(np.uint64), (chunks, 2))
    return _Shards(chunks, index, index_bytes, sharding.get("index_location", "end") == "start")


def _codecs(
    codecs: Sequence[Mapping[str, Any]], dtype: np.dtype[Any], shape: tuple[int, ...]
) -> _Codecs:
    first, *others = codecs
    _require(first["name"] == "bytes" and all(codec["name"] in _DECODERS for codec in others))
    endian = first.get("configuration", {}).get("endian", "little")
    _require(endian in ("little", "big"))
    ordered = dtype.newbyteorder("<" if endian == "little" else ">")
    return _Codecs(ordered, shape, tuple(codec["name"] for codec in others))


def _require(known: bool) -> None:
    if not known:
        raise _UnknownError


def _bytes(descriptor: int, start: int, length: int, size: int) -> bytes:
    if not 0 <= start <= start + length <= size:
        raise ValueError(f"it has {size} bytes, and ends too early")
    data = os.pread(descriptor, length, start)
    if len(data) != length:
        raise ValueError(f"{len(data)} bytes of {length} are there")
    return data


def _zstd(data: bytes) -> bytes:
    from numcodecs.zstd import Zstd

    return _bytes_of(Zstd().decode(data))


def _gzip(data: bytes) -> bytes:
    from numcodecs.gzip import GZip

    return _bytes_of(GZip().decode(data))


def _blosc(data: bytes) -> bytes:
    from psnc_atm.zarr_codec import decode_blosc

    return _bytes_of(decode_blosc(data))


def _crc32c(data: bytes) -> bytes:
    from google_crc32c import value

    content, stated = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if value(content) != int.from_bytes(stated, "little"):
        raise ValueError("its checksum is of other bytes")
    return content


def _bytes_of(decoded: Any) -> bytes:
    """Return what a codec returned, without a copy if it is bytes."""
    return decoded if isinstance(decoded, bytes) else bytes(decoded)


_DECODERS: Mapping[str, Decode] = {
    "zstd": _zstd,
    "gzip": _gzip,
    "blosc": _blosc,
    "crc32c": _crc32c,
}
