"""From AtomicData to the bytes of one row of an ``.aselmdb`` file.

Rows are what ``ase-db-backends`` writes, key by key, but for what would differ from run to run.
"""

from __future__ import annotations

import hashlib
import math
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from psnc_atm.atomic_data import AtomicData
from psnc_atm.fields import FIELDS, RESULT_FIELDS
from psnc_atm.row_codec import EXTRA_FIELDS, NOT_RESULTS, int_if_possible
from psnc_atm.unwritable import Unwritable
from psnc_atm.voigt import voigt_from_matrix

__all__ = ["encode_row", "encode_value"]

_ARRAYS = {
    "initial_magmoms": "initial_magmoms",
    "initial_charges": "initial_charges",
    "masses": "atomic_masses",
    "tags": "tags",
    "momenta": "momenta",
}
# Years since 2000, which is how ase.db counts: a row that is written twice is the same twice.
_TIME = 0.0
_NO_ID = "0" * 32
_ARRAY_KINDS = "biufc"
_SMALLEST, _LARGEST = -(2**63), 2**64 - 1


def encode_row(structure: AtomicData, place: str, unwritable: Unwritable) -> bytes:
    """Encode one structure; ``place`` tells it from others that are equal.

    Raises
    ------
    psnc.StageError
        If a row cannot hold something of it, and that is not to be dropped.
    """
    row: dict[str, Any] = {
        "numbers": structure.atomic_numbers,
        "positions": structure.positions,
        "unique_id": _NO_ID,
        "pbc": structure.pbc,
        "cell": structure.cell,
    }
    for key, field in _ARRAYS.items():
        if (value := getattr(structure, field)) is not None:
            row[key] = value
    results = {**dict(_results(structure)), **dict(_rarer_results(structure, unwritable))}
    if results:
        row |= {"calculator": "unknown", "calculator_parameters": {}, **results}
    for field in EXTRA_FIELDS:
        if (value := getattr(structure, field)) is not None:
            row[field] = value
    row |= {"ctime": _TIME, "user": None, "mtime": _TIME}
    pairs, data = _pairs_and_data(structure, unwritable)
    if pairs:
        row["key_value_pairs"] = pairs
    row["data"] = data
    if structure.constraints:
        row["constraints"] = list(_constraints(structure, unwritable))
    text = _json(row)
    identity = hashlib.sha256(place.encode() + b"\0" + text).hexdigest()[: len(_NO_ID)]
    # Only numbers come before it.
    return zlib.compress(text.replace(f'"{_NO_ID}"'.encode(), f'"{identity}"'.encode(), 1))


def encode_value(value: Any) -> bytes:
    """Encode what a key of the file has as its value."""
    return zlib.compress(_json(value))


def _json(value: Any) -> bytes:
    """Write JSON in which arrays and complex numbers are marked as ASE marks them."""
    if _is_beyond_orjson(value):
        from ase.io.jsonio import encode

        return str(encode(value)).encode()
    return orjson.dumps(value, default=_marked, option=orjson.OPT_NON_STR_KEYS)


def _marked(value: Any) -> Any:
    if isinstance(value, np.ndarray) and not np.iscomplexobj(value):
        return {"__ndarray__": [value.shape, value.dtype.name, value.ravel().tolist()]}
    from ase.io.jsonio import default

    return default(value)


def _is_beyond_orjson(value: Any) -> bool:
    """Tell whether there is what orjson writes in another way than ASE, or not at all.

    NaN and Infinity, which become null; integers of more than 64 bits; complex numbers, times, and
    objects of ASE.
    """
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "fc" and not np.isfinite(value).all()
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, int):
        return not _SMALLEST <= value <= _LARGEST
    if isinstance(value, Mapping):
        return any(map(_is_beyond_orjson, value)) or any(map(_is_beyond_orjson, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_is_beyond_orjson, value))
    return isinstance(value, complex | np.inexact | datetime) or hasattr(value, "todict")


def _results(structure: AtomicData) -> Iterator[tuple[str, Any]]:
    for field in RESULT_FIELDS:
        value = getattr(structure, field)
        if value is None:
            continue
        if field == "stress" and _is_symmetric(value):
            value = voigt_from_matrix(value)
        yield field, float(value) if FIELDS[field].scalar else value


def _is_symmetric(stress: NDArray[np.float64]) -> bool:
    if not np.isfinite(stress).all() or np.abs(stress).max(initial=0) > _HALF_OF_ALL:
        return False
    return bool(np.array_equal(stress, stress.T))


# The sum of two larger numbers is infinite.
_HALF_OF_ALL = np.finfo(np.float64).max / 2


def _rarer_results(structure: AtomicData, unwritable: Unwritable) -> Iterator[tuple[str, Any]]:
    for name, value in structure.results.items():
        taken = name in NOT_RESULTS or name in FIELDS
        if taken or value is None or not _comes_back(value):
            unwritable.met(f"result {name!r} ({type(value).__name__})")
        else:
            yield name, value


def _constraints(structure: AtomicData, unwritable: Unwritable) -> Iterator[Mapping[str, Any]]:
    for constraint in structure.constraints:
        if _comes_back(constraint):
            yield constraint
        else:
            unwritable.met(f"constraint {constraint.get('name')!r}")


def _pairs_and_data(
    structure: AtomicData, unwritable: Unwritable
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make ``key_value_pairs`` of what ``ase.db`` takes as such, and data of the rest."""
    pairs: dict[str, Any] = {}
    data: dict[str, Any] = {}
    for name, value in structure.info.items():
        is_field = name in ("charge", "spin") and (
            getattr(structure, name) is not None or _is_number(value)
        )
        if is_field or not _is_name(name) or not _comes_back(value):
            unwritable.met(f"info {name!r} ({type(value).__name__})")
        elif _is_pair_value(value) and _is_pair_name(name):
            pairs[name] = value.item() if isinstance(value, np.generic) else value
        else:
            data[name] = value
    for name in ("charge", "spin"):
        if (number := getattr(structure, name)) is not None:
            data[name] = float(number)
    return pairs, data


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _is_pair_value(value: Any) -> bool:
    if isinstance(value, str):
        return _is_plain_text(value)
    return isinstance(value, bool | np.bool_ | int | float | np.integer | np.floating)


@lru_cache(maxsize=4096)
def _is_plain_text(value: str) -> bool:
    """Tell whether ``ase.db`` takes a text, and not for a number in quotes."""
    return _ase_takes("text", value)


@lru_cache(maxsize=4096)
def _is_pair_name(name: str) -> bool:
    return _ase_takes(name, 0)


def _ase_takes(name: str, value: Any) -> bool:
    from ase.db.core import check

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            check({name: value})
    except (ValueError, UserWarning):
        return False
    return True


def _comes_back(value: Any) -> bool:
    """Tell whether a value is, once it is written and read, what it was.

    NumPy's numbers come back as Python's, tuples as lists.
    """
    if value is None or isinstance(value, bool | int | float | str | complex):
        return _is_unicode(value) if isinstance(value, str) else True
    if isinstance(value, np.generic):
        return isinstance(value, np.bool_ | np.integer | np.float64 | np.float32 | np.float16)
    if isinstance(value, np.ndarray):
        return value.dtype.kind in _ARRAY_KINDS and value.dtype != np.longdouble
    if isinstance(value, list | tuple):
        return _all_come_back(value)
    if isinstance(value, dict):
        return all(map(_is_key, value)) and _all_come_back(value.values())
    if isinstance(value, datetime):
        return value.tzinfo is None and value.microsecond != 0
    # Of atoms the calculator would not come back.
    return hasattr(value, "ase_objtype") and getattr(value, "calc", None) is None


def _all_come_back(values: Iterable[Any]) -> bool:
    return all(map(_comes_back, values))


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and _is_unicode(name) and not name.startswith("__")


def _is_key(key: Any) -> bool:
    # What is an integer for Python comes back as one, and two underscores mark what is no mapping.
    if isinstance(key, str):
        return (
            _is_unicode(key) and isinstance(int_if_possible(key), str) and not key.startswith("__")
        )
    return isinstance(key, int) and not isinstance(key, bool)


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
