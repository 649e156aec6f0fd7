"""How arrays are compressed: the codecs by name, as Zarr's metadata has them, and as functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from attrs import frozen
from numcodecs import blosc, gzip, zstd

__all__ = [
    "CODECS",
    "DEFAULT_CODEC",
    "Codec",
    "codec_metadata",
    "compressor_of",
    "decode_blosc",
    "level_of",
]

DEFAULT_CODEC = "blosc-lz4"
_BLOSC_HEADER_BYTES = 16
# Of each name its lowest, usual and highest level. All are part of every installation of zarr.
CODECS: dict[str, tuple[int, int, int]] = {
    "blosc-lz4": (0, 5, 9),
    "blosc-zstd": (0, 5, 9),
    "zstd": (-131_072, 3, 22),
    "gzip": (0, 6, 9),
    "none": (0, 0, 0),
}
_SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


def level_of(codec: str, level: int | None) -> int:
    """Return the level that is meant.

    Raises
    ------
    ValueError
        If there is no such codec or level.
    """
    if not isinstance(codec, str) or codec not in CODECS:
        raise ValueError(f"unknown codec {codec!r}; choose from {', '.join(CODECS)}")
    lowest, usual, highest = CODECS[codec]
    if level is None:
        return usual
    if not isinstance(level, int) or not lowest <= level <= highest:
        raise ValueError(f"codec {codec} has levels {lowest} to {highest}, and level is {level}")
    return level


def codec_metadata(codec: str, level: int, dtype: str) -> dict[str, Any] | None:
    """Return the codec as the metadata of an array of ``dtype`` has it; ``None`` for none."""
    size = np.dtype(dtype).itemsize
    if codec == "none":
        return None
    if codec == "zstd":
        return {"name": "zstd", "configuration": {"level": level, "checksum": False}}
    if codec == "gzip":
        return {"name": "gzip", "configuration": {"level": level}}
    compressor = codec.removeprefix("blosc-")
    # What each compresses best: lz4 finds runs of equal bits, zstd has an entropy coder for bytes.
    shuffle = "bitshuffle" if compressor == "lz4" else "shuffle"
    return {
        "name": "blosc",
        "configuration": {
            "typesize": size,
            "cname": compressor,
            "clevel": level,
            "shuffle": shuffle if size > 1 else "noshuffle",
            "blocksize": 0,
        },
    }


@frozen
class Codec:
    """A compressor.

    Attributes
    ----------
    encode, decode : callable
        From bytes to fewer bytes, and back.
    """

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


def compressor_of(metadata: Mapping[str, Any] | None) -> Codec:
    """Return the compressor that an entry of an array's metadata stands for.

    Raises
    ------
    ValueError
        If it is none of those that psnc writes.
    """
    if metadata is None:
        return Codec(bytes, bytes)
    name, options = metadata["name"], metadata.get("configuration", {})
    made: Any
    if name == "zstd":
        made = zstd.Zstd(options["level"], options["checksum"])
    elif name == "gzip":
        made = gzip.GZip(options["level"])
    elif name == "blosc":
        made = blosc.Blosc(
            cname=options["cname"],
            clevel=options["clevel"],
            shuffle=_SHUFFLES[options["shuffle"]],
            blocksize=options["blocksize"],
        )
    else:
        raise ValueError(f"codec {name} is none that psnc writes")
    return Codec(made.encode, decode_blosc if name == "blosc" else made.decode)


def decode_blosc(content: bytes) -> Any:
    """Decode what Blosc has encoded, whatever its options were.

    Raises
    ------
    ValueError
        If it is cut off: Blosc believes its header, and would decode what follows in memory.
    """
    stated = int.from_bytes(content[12:16], "little")
    if len(content) < _BLOSC_HEADER_BYTES or stated != len(content):
        raise ValueError(f"{len(content)} bytes of {stated} are there")
    return blosc.Blosc().decode(content)
