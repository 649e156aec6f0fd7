"""What each codec makes of the arrays of a dataset: how small, and how fast.

python benchmarks/zarr_codecs.py DATASET [--files 2] [--rows 16384]

DATASET is a directory of ``.aselmdb`` files. Each array is cut into chunks of so many rows.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psnc_atm import ASELMDBSource
from psnc_atm.zarr_codec import codec_metadata, compressor_of

CHOICES = [
    *(("blosc-lz4", level) for level in (1, 5, 9)),
    *(("blosc-zstd", level) for level in (1, 3, 5)),
    *(("zstd", level) for level in (1, 3, 9)),
    *(("gzip", level) for level in (1, 6)),
    ("none", 0),
]


def arrays_of(directory: str, files: int) -> dict[str, NDArray[Any]]:
    source = ASELMDBSource(directory)
    some = [one for index in range(min(files, len(source))) for one in source[index]]
    return {
        "positions": np.concatenate([one.positions for one in some]),
        "forces": np.concatenate([one.forces for one in some if one.forces is not None]),
        "atomic_numbers": np.concatenate([one.atomic_numbers for one in some]),
        "atoms_ptr": np.cumsum([0, *map(len, some)]),
        "atoms_mask": np.ones(sum(map(len, some)), dtype=bool),
    }


def measured(values: NDArray[Any], rows: int, codec: str, level: int) -> tuple[float, float, float]:
    """Return the share of the size, and megabytes a second there and back."""
    made = compressor_of(codec_metadata(codec, level, values.dtype.name))
    chunks = [values[start : start + rows] for start in range(0, len(values), rows)]
    there, back = [], []
    for _ in range(3):
        started = time.process_time()
        encoded = [made.encode(chunk) for chunk in chunks]
        there.append(time.process_time() - started)
        started = time.process_time()
        for chunk in encoded:
            made.decode(chunk)
        back.append(time.process_time() - started)
    size = sum(memoryview(chunk).nbytes for chunk in encoded)
    speeds = (values.nbytes / max(min(times), 1e-9) / 1e6 for times in (there, back))
    return size / values.nbytes, *speeds  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare codecs on the arrays of a dataset.")
    parser.add_argument("dataset")
    parser.add_argument("--files", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16_384)
    options = parser.parse_args()
    for name, values in arrays_of(options.dataset, options.files).items():
        print(f"{name}: {values.dtype}, {values.nbytes} bytes")
        for codec, level in CHOICES:
            share, there, back = measured(values, options.rows, codec, level)
            print(f"  {codec:10} {level} {share:6.3f} {there:7.0f} MB/s {back:7.0f} MB/s back")


if __name__ == "__main__":
    main()
