"""Whether files, and directories of files, say the same."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

__all__ = ["files_below", "same_bytes", "same_figures"]

_RELATIVE_ERROR = 1e-9


def files_below(directory: Path) -> dict[str, Path]:
    """Return every file in a directory and below, by its path from there."""
    return {
        str(path.relative_to(directory)): path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def same_bytes(one: Path, other: Path) -> bool:
    """Tell whether two files have the same content."""
    return one.read_bytes() == other.read_bytes()


def same_figures(one: Path, other: Path) -> bool:
    """Tell whether two files have the same content, or numbers that differ by rounding only.

    Numbers are looked for in JSON, and in NumPy's files where NumPy is in use.
    """
    if same_bytes(one, other):
        return True
    for read in (_read_json, _read_numpy):
        left, right = read(one), read(other)
        if left is not None and right is not None:
            return _close(left, right)
    return False


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def _read_numpy(path: Path) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    try:
        loaded = numpy.load(path)
    except (ValueError, OSError, EOFError):
        return None
    if isinstance(loaded, numpy.ndarray):
        return loaded.tolist()
    with loaded:
        return {name: loaded[name].tolist() for name in loaded.files}


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        both_nan = math.isnan(one) and math.isnan(other)
        return both_nan or math.isclose(one, other, rel_tol=_RELATIVE_ERROR, abs_tol=1e-12)
    return bool(one == other)
