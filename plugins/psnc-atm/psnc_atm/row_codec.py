"""From the bytes of one row of an ``.aselmdb`` file to AtomicData.

A row is zlib-compressed JSON, its arrays written ``{"__ndarray__": [shape, dtype, flat list]}``.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from psnc_atm.atomic_data import AtomicData
from psnc_atm.fields import FIELDS, RESULT_FIELDS
from psnc_atm.inflate import inflate
from psnc_atm.voigt import matrix_from_voigt

__all__ = [
    "BAD_ROW",
    "EXTRA_FIELDS",
    "NOT_RESULTS",
    "RowDecoder",
    "atom_count",
    "atom_counts_of_heads",
    "int_if_possible",
    "joined_info",
    "plain",
    "plain_values",
    "structure_of_row",
    "take_charge_and_spin",
]

# What decoding raises where the bytes are no row.
BAD_ROW = (
    *(zlib.error, ValueError, LookupError, TypeError, AttributeError, OverflowError),
    RecursionError,  # of JSON that is nested without end
)

# The writer puts "numbers" first, so that a row's size can be learnt without inflating it all.
_HEAD = re.compile(rb'\s*\{\s*"numbers"\s*:\s*\{\s*"__ndarray__"\s*:\s*\[\s*\[\s*(\d+)\s*\]')
# Code tables are the first 60 to 100 bytes of a compressed row.
_COMPRESSED_HEAD, _INFLATED_HEAD = 192, 48
# DEFLATE makes at most 1032 bytes of one, and each atom takes two, a digit and a comma.
_MOST_ATOMS = 516

# What ase.db has no name for: ASELMDBSink writes it under its own.
EXTRA_FIELDS = ("velocities", "edge_index", "unit_shifts", "cutoff")
_FIELD_OF_KEY = {"masses": "atomic_masses"} | {
    name: name
    for name in (
        *("momenta", "tags", "initial_charges", "initial_magmoms"),
        *(*RESULT_FIELDS, *EXTRA_FIELDS),
    )
}
_LARGE = 2.0**63
# What the database notes about the row rather than about the structure, and what is read apart.
_READ_APART = frozenset(
    (
        *("numbers", "positions", "cell", "pbc", "constraints", "key_value_pairs", "data"),
        *("unique_id", "id", "ctime", "mtime", "user", "calculator", "calculator_parameters"),
    )
)
# Under these names no result can be written.
NOT_RESULTS = _READ_APART | _FIELD_OF_KEY.keys()
# With spins that are not collinear they are vectors.
_MOMENTS = frozenset(("magmoms", "initial_magmoms"))
_FROM_INFO = ("charge", "spin")
_FLOAT64 = np.dtype("float64")
_NESTED = (dict, list)
_NUMBERS = (int, float)


def atom_count(value: bytes | memoryview) -> int:
    """Return the number of atoms of a row whose beginning does not tell it."""
    return len(_whole_numbers("numbers", _load_json(inflate(value))["numbers"]))


def atom_counts_of_heads(values: Iterable[bytes | memoryview]) -> list[int | None]:
    """Return the number of atoms of each row, or ``None`` where its beginning does not tell it.

    Most of the time goes into the code tables of the compressed rows, which any way to the first
    byte of a row has to read.
    """
    inflater, match = zlib.decompressobj, _HEAD.match
    counts: list[int | None] = []
    for value in values:
        try:
            found = match(inflater().decompress(value[:_COMPRESSED_HEAD], _INFLATED_HEAD))
        except zlib.error:
            found = None
        atoms = None if found is None else int(found[1])
        counts.append(None if atoms is None or atoms > _MOST_ATOMS * len(value) else atoms)
    return counts


class RowDecoder:
    """Decodes rows.

    Parameters
    ----------
    dtype : {"float64", "float32"}
        Of all arrays of floats.
    constraints, data : bool
        Whether the row's constraints and the entries of its ``data`` are kept. ``charge`` and
        ``spin`` are found in ``data`` in any case.
    """

    def __init__(
        self, dtype: str = "float64", *, constraints: bool = True, data: bool = True
    ) -> None:
        self._constraints, self._data = constraints, data
        self._float = np.dtype(dtype)
        self._narrow = self._float != _FLOAT64

    def __call__(self, value: bytes | memoryview) -> AtomicData:
        """Decode one row.

        Raises
        ------
        Exception
            One of `BAD_ROW`, if the bytes are no such row.
        """
        text = inflate(value)
        row = _load_json(text)
        if _may_be_large_integers((row.get("key_value_pairs"), row.get("data"))):
            row = json.loads(text)
        if not self._narrow:
            return self._structure(row)
        try:
            with np.errstate(over="raise"):
                return self._structure(row)
        except FloatingPointError as error:
            raise ValueError(f"a number has no room in {self._float}") from error

    def _structure(self, row: dict[str, Any]) -> AtomicData:
        fields: dict[str, Any] = {}
        results: dict[str, Any] = {}
        for key, entry in row.items():
            if entry is None or key in _READ_APART:
                continue
            name = _FIELD_OF_KEY.get(key)
            if name is None or (name == "magmom" and not _is_scalar(entry)):
                results[key] = self._plain(entry)
            else:
                fields[name] = self._field(name, entry)
        info = self._info(row)
        take_charge_and_spin(info, fields)
        constraints = row.get("constraints") or ()
        if constraints:
            _check_constraints(constraints)
        return AtomicData(
            atomic_numbers=_in_shape("numbers", _whole_numbers("numbers", row["numbers"]), ()),
            positions=self._vectors("positions", row["positions"]),
            cell=self._floats(_cell(row["cell"])).reshape(3, 3),
            pbc=_periodicity(row["pbc"]),
            constraints=tuple(map(self._plain, constraints)) if self._constraints else (),
            results=results,
            info=info,
            **fields,
        )

    def _field(self, name: str, entry: Any) -> Any:
        kind = FIELDS[name]
        if kind.scalar:
            return float(entry) if _is_number(entry) else float(_array(entry, _FLOAT64).item())
        if kind.dtype == "int64":
            whole = _whole_numbers(name, entry)
            return _in_shape(name, whole, kind.shape) if kind.level == "atom" else whole
        if kind.level == "atom" and kind.shape:
            return self._vectors(name, entry)
        array = self._floats(entry)
        if name == "stress":
            return matrix_from_voigt(array)
        if name == "dipole":
            return array.reshape(3)
        if name in _MOMENTS and array.ndim == 2:
            return _in_shape(name, array, (3,))
        return _in_shape(name, array, kind.shape)

    def _vectors(self, name: str, entry: Any) -> NDArray[Any]:
        array = _array(entry, self._float)
        if array.shape[1:] == (3,):
            return array
        return _in_shape(name, array, (3,)) if array.size else array.reshape(0, 3)

    def _floats(self, entry: Any) -> NDArray[Any]:
        return _array(entry, self._float)

    def _info(self, row: dict[str, Any]) -> dict[str, Any]:
        """Join ``key_value_pairs`` and ``data``; of a name in both, the pair gets a longer one."""
        pairs, data = row.get("key_value_pairs") or {}, row.get("data") or {}
        info = {
            f"key_value_pairs.{name}" if name in data else name: self._plain(entry)
            for name, entry in pairs.items()
        }
        kept = data if self._data else [name for name in _FROM_INFO if _is_number(data.get(name))]
        for name in kept:
            entry = data[name]
            # Most are numbers and texts, for which a call would be most of the time.
            info[name] = self._plain(entry) if entry.__class__ in _NESTED else entry
        return info

    def _plain(self, entry: Any) -> Any:
        """Turn decoded JSON into what ASE's own reader makes of it."""
        if isinstance(entry, dict):
            if "__ndarray__" in entry:
                return _marked_array(entry, self._float)
            if any(key.startswith("__") for key in entry):
                return _marked(entry)
            return {int_if_possible(key): self._plain(item) for key, item in entry.items()}
        return [self._plain(item) for item in entry] if isinstance(entry, list) else entry


def structure_of_row(row: dict[str, Any]) -> AtomicData:
    """Make a structure of what the JSON of a row says.

    Raises
    ------
    Exception
        One of `BAD_ROW`, if it is no such row.
    """
    return _DECODER._structure(row)


def plain(entry: Any) -> Any:
    """Turn decoded JSON into what ASE's own reader makes of it."""
    return _DECODER._plain(entry)


def plain_values(entries: Mapping[str, Any] | None) -> dict[str, Any]:
    """Turn the values of a decoded JSON object into what ASE's own reader makes of them."""
    return {name: plain(entry) for name, entry in (entries or {}).items()}


def joined_info(pairs: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Join ``key_value_pairs`` and ``data``; of a name in both, the pair gets a longer one."""
    both = pairs.keys() & data.keys()
    return {
        f"key_value_pairs.{name}" if name in both else name: pairs[name] for name in pairs
    } | dict(data)


def int_if_possible(key: str) -> int | str:
    """Return the key that a name in JSON was before it was written, as ASE's own reader has it."""
    try:
        return int(key)
    except ValueError:
        return key


def take_charge_and_spin(info: dict[str, Any], fields: dict[str, Any]) -> None:
    """Move a numeric ``charge`` and ``spin`` from ``info`` to the fields."""
    for name in _FROM_INFO:
        if _is_number(info.get(name)):
            fields[name] = float(info.pop(name))


_DECODER = RowDecoder()


def _cell(entry: Any) -> Any:
    # JSON databases have ASE's object, which holds the array.
    return entry["array"] if isinstance(entry, dict) and "array" in entry else entry


def _may_be_large_integers(entries: Iterable[Any]) -> bool:
    """Tell whether orjson may have rounded an integer of more than 64 bits to a float."""
    for entry in entries:
        kind = entry.__class__
        if kind is float:
            if abs(entry) >= _LARGE:
                return True
        elif kind is dict:
            if "__ndarray__" not in entry and _may_be_large_integers(entry.values()):
                return True
        elif kind is list and _may_be_large_integers(entry):
            return True
    return False


def _load_json(text: bytes) -> dict[str, Any]:
    try:
        row = orjson.loads(text)
    except orjson.JSONDecodeError:
        row = json.loads(text)  # accepts NaN and Infinity, which ASE writes and JSON forbids
    if not isinstance(row, dict):
        raise ValueError(f"the row is a JSON {type(row).__name__}, not an object")
    return row


def _array(entry: Any, dtype: Any = None) -> NDArray[Any]:
    if isinstance(entry, dict):
        shape, _, flat = entry["__ndarray__"]
        first = flat[0] if flat else 0
        array = np.array(flat, dtype).reshape(shape)
    else:
        first, array = _first_of(entry), np.array(entry, dtype)
    # NumPy takes digits for numbers. One look tells of most, since arrays are of one kind.
    if first.__class__ is str and dtype is not None:
        raise ValueError("a text stands where numbers are expected")
    return array


def _first_of(entry: Any) -> Any:
    while isinstance(entry, list) and entry:
        entry = entry[0]
    return entry


def _in_shape(name: str, array: NDArray[Any], of_an_atom: tuple[int, ...]) -> NDArray[Any]:
    if array.ndim != 1 + len(of_an_atom) or array.shape[1:] != of_an_atom:
        numbers = "three numbers" if of_an_atom else "one number"
        raise ValueError(f"{name} has shape {array.shape}, not {numbers} for each atom")
    return array


def _periodicity(entry: Any) -> NDArray[np.bool_]:
    array = _array(entry).reshape(3)
    if array.dtype == np.bool_:
        return array
    if array.dtype.kind != "i":
        raise ValueError("pbc has entries that are neither true nor false")
    return array.astype(np.bool_)


def _check_constraints(entries: Any) -> None:
    if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
        raise ValueError("constraints is no list of JSON objects")


def _is_scalar(entry: Any) -> bool:
    if isinstance(entry, dict):
        return _array(entry).size == 1
    return not isinstance(entry, list) or len(entry) == 1


def _whole_numbers(name: str, entry: Any) -> NDArray[np.int64]:
    array = _array(entry)
    if array.dtype.kind in "bi":
        return array.astype(np.int64, copy=False)
    if array.dtype.kind in "uf":
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int64)
        if (whole == array).all():
            return whole
    raise ValueError(f"{name} has entries that are no whole numbers")


def _marked_array(entry: dict[str, Any], float_dtype: np.dtype[Any]) -> NDArray[Any]:
    shape, name, flat = entry["__ndarray__"]
    dtype = np.dtype(name)
    if dtype.kind == "c":  # real and imaginary parts by turns
        array: NDArray[Any] = np.array(flat, f"f{dtype.itemsize // 2}").view(dtype)
        return array.reshape(shape)
    return np.array(flat, float_dtype if dtype == _FLOAT64 else dtype).reshape(shape)


def _marked(entry: dict[str, Any]) -> Any:
    # Imported where it is needed, since much of SciPy comes with it.
    from ase.io.jsonio import object_hook

    unmarked = {key: _unmarked(item) for key, item in entry.items()}
    try:
        return object_hook(unmarked)
    except Exception as error:  # whatever making an object of ASE's leads to
        mark = next(key for key in entry if key.startswith("__"))
        raise ValueError(f"{mark} makes no object ({type(error).__name__}: {error})") from error


def _unmarked(entry: Any) -> Any:
    if isinstance(entry, dict):
        if "__ndarray__" in entry:
            return _marked_array(entry, _FLOAT64)
        inner = {key: _unmarked(item) for key, item in entry.items()}
        return _marked(inner) if any(key.startswith("__") for key in inner) else inner
    return [_unmarked(item) for item in entry] if isinstance(entry, list) else entry


def _is_number(entry: Any) -> bool:
    kind = entry.__class__
    return kind is float or kind is int or (isinstance(entry, _NUMBERS) and kind is not bool)
