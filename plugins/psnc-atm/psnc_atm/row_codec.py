"""From the bytes of one row of an ``.aselmdb`` file to AtomicData.

A row is zlib-compressed JSON, its arrays written ``{"__ndarray__": [shape, dtype, flat list]}``.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from psnc_atm.atomic_data import AtomicData
from psnc_atm.fields import FIELDS, RESULT_FIELDS
from psnc_atm.voigt import matrix_from_voigt

__all__ = [
    "EXTRA_FIELDS",
    "NOT_RESULTS",
    "atom_count",
    "decode_row",
    "joined_info",
    "plain",
    "plain_values",
    "structure_of_row",
    "take_charge_and_spin",
]

# The writer puts "numbers" first, so that a row's size can be learnt without inflating it all.
_HEAD = re.compile(rb'\s*\{\s*"numbers"\s*:\s*\{\s*"__ndarray__"\s*:\s*\[\s*\[\s*(\d+)\s*\]')
_HEAD_BYTES = 64

_ARRAYS_BY_ROW_KEY = {
    "masses": "atomic_masses",
    "momenta": "momenta",
    "tags": "tags",
    "initial_charges": "initial_charges",
    "initial_magmoms": "initial_magmoms",
}
_LARGE = 2.0**63
# What ase.db has no name for: ASELMDBSink writes it under its own.
EXTRA_FIELDS = ("velocities", "edge_index", "unit_shifts", "cutoff")
# What the database notes about the row rather than about the structure, and what is read apart.
NOT_RESULTS = frozenset(
    (
        *("numbers", "positions", "cell", "pbc", "constraints", "key_value_pairs", "data"),
        *("unique_id", "id", "ctime", "mtime", "user", "calculator", "calculator_parameters"),
        *_ARRAYS_BY_ROW_KEY,
    )
)


def decode_row(value: bytes | memoryview) -> AtomicData:
    """Decode one row.

    Raises
    ------
    zlib.error, ValueError, KeyError, TypeError
        If the bytes are no such row.
    """
    text = zlib.decompress(value)
    row = _load_json(text)
    if _may_be_large_integers(row.get("key_value_pairs")) or _may_be_large_integers(
        row.get("data")
    ):
        row = json.loads(text)
    return structure_of_row(row)


def structure_of_row(row: Mapping[str, Any]) -> AtomicData:
    """Make a structure of what the JSON of a row says.

    Raises
    ------
    ValueError, KeyError, TypeError
        If it is no such row.
    """
    fields: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for key, entry in row.items():
        if entry is None or key in NOT_RESULTS:
            if entry is not None and key in _ARRAYS_BY_ROW_KEY:
                name = _ARRAYS_BY_ROW_KEY[key]
                fields[name] = _array(entry, FIELDS[name].dtype)
        elif key in RESULT_FIELDS or key in EXTRA_FIELDS:
            fields[key] = _result(key, entry)
        else:
            results[key] = plain(entry)
    info = joined_info(plain_values(row.get("key_value_pairs")), plain_values(row.get("data")))
    take_charge_and_spin(info, fields)
    return AtomicData(
        atomic_numbers=_array(row["numbers"], "int64"),
        positions=_array(row["positions"], "float64").reshape(-1, 3),
        cell=_cell(row["cell"]),
        pbc=_array(row["pbc"], "bool"),
        constraints=tuple(plain(entry) for entry in row.get("constraints") or ()),
        results=results,
        info=info,
        **fields,
    )


def atom_count(value: bytes | memoryview) -> int:
    """Return the number of atoms of a row, inflating no more of it than that takes."""
    head = zlib.decompressobj().decompress(value, _HEAD_BYTES)
    match = _HEAD.match(head)
    if match is not None:
        return int(match[1])
    return len(_array(_load_json(zlib.decompress(value))["numbers"], "int64"))


def _load_json(text: bytes) -> dict[str, Any]:
    try:
        row = orjson.loads(text)
    except orjson.JSONDecodeError:
        row = json.loads(text)  # accepts NaN and Infinity, which ASE writes and JSON forbids
    if not isinstance(row, dict):
        raise ValueError(f"the row is a JSON {type(row).__name__}, not an object")
    return row


def _array(entry: Any, dtype: str) -> NDArray[Any]:
    if isinstance(entry, dict):
        shape, _, flat = entry["__ndarray__"]
        return np.array(flat, dtype=dtype).reshape(shape)
    return np.array(entry, dtype=dtype)


def _result(name: str, entry: Any) -> Any:
    if FIELDS[name].scalar:
        return float(entry) if _is_number(entry) else float(_array(entry, "float64").item())
    array = _array(entry, FIELDS[name].dtype)
    return matrix_from_voigt(array) if name == "stress" else array


def _may_be_large_integers(entry: Any) -> bool:
    """Tell whether orjson may have rounded an integer of more than 64 bits to a float."""
    if isinstance(entry, float):
        return abs(entry) >= _LARGE
    if isinstance(entry, dict):
        return "__ndarray__" not in entry and any(map(_may_be_large_integers, entry.values()))
    return isinstance(entry, list) and any(map(_may_be_large_integers, entry))


def _cell(entry: Any) -> NDArray[np.float64]:
    # JSON databases have ASE's object, which holds the array.
    held = entry["array"] if isinstance(entry, dict) and "array" in entry else entry
    return _array(held, "float64").reshape(3, 3)


def plain_values(entries: Mapping[str, Any] | None) -> dict[str, Any]:
    """Turn the values of a decoded JSON object into what ASE's own reader makes of them."""
    return {name: plain(entry) for name, entry in (entries or {}).items()}


def joined_info(pairs: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Join ``key_value_pairs`` and ``data``; of a name in both, the pair gets a longer one."""
    both = pairs.keys() & data.keys()
    return {
        f"key_value_pairs.{name}" if name in both else name: pairs[name] for name in pairs
    } | dict(data)


def take_charge_and_spin(info: dict[str, Any], fields: dict[str, Any]) -> None:
    """Move a numeric ``charge`` and ``spin`` from ``info`` to the fields."""
    for name in ("charge", "spin"):
        if _is_number(info.get(name)):
            fields[name] = float(info.pop(name))


def plain(entry: Any) -> Any:
    """Turn decoded JSON into what ASE's own reader makes of it."""
    if isinstance(entry, dict):
        if any(key.startswith("__") for key in entry):
            return _marked(entry)
        return {int(key) if key.isdecimal() else key: plain(item) for key, item in entry.items()}
    return [plain(item) for item in entry] if isinstance(entry, list) else entry


def _marked(entry: dict[str, Any]) -> Any:
    from ase.io.jsonio import object_hook

    return object_hook({key: _unmarked(item) for key, item in entry.items()})


def _unmarked(entry: Any) -> Any:
    if isinstance(entry, dict):
        inner = {key: _unmarked(item) for key, item in entry.items()}
        return _marked(inner) if any(key.startswith("__") for key in inner) else inner
    return [_unmarked(item) for item in entry] if isinstance(entry, list) else entry


def _is_number(entry: Any) -> bool:
    return isinstance(entry, int | float) and not isinstance(entry, bool)
