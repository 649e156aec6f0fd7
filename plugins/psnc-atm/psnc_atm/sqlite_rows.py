"""From the columns of one row of an ``ase.db`` SQLite database to AtomicData."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from psnc_atm.atomic_data import AtomicData
from psnc_atm.row_codec import joined_info, plain, plain_values, take_charge_and_spin
from psnc_atm.voigt import matrix_from_voigt

__all__ = ["COLUMNS", "structure_of_columns"]

# ase.db writes arrays as they lie in the memory of a little-endian machine.
_FLOATS, _INTS = "<f8", "<i4"
_PERIODIC = (1, 2, 4)

COLUMNS = (
    *("numbers", "positions", "cell", "pbc", "constraints", "key_value_pairs", "data"),
    *("masses", "momenta", "tags", "initial_charges", "initial_magmoms"),
    *("energy", "free_energy", "forces", "stress", "dipole", "magmom", "magmoms", "charges"),
)


def structure_of_columns(values: Sequence[Any]) -> AtomicData:
    """Make a structure of the values of ``COLUMNS``.

    Raises
    ------
    ValueError, KeyError, TypeError
        If they are not what ``ase.db`` writes.
    """
    row = dict(zip(COLUMNS, values, strict=True))
    numbers = _ints(row["numbers"])
    fields: dict[str, Any] = {}
    for column, (field, decode) in _DECODED.items():
        if row[column] is not None:
            fields[field] = decode(row[column])
    for field in ("initial_magmoms", "magmoms"):
        if field in fields and len(numbers) and len(fields[field]) == 3 * len(numbers):
            fields[field] = fields[field].reshape(len(numbers), -1)
    info = joined_info(plain_values(_json(row["key_value_pairs"])), _data(row["data"]))
    take_charge_and_spin(info, fields)
    periodic = row["pbc"] or 0
    return AtomicData(
        atomic_numbers=numbers,
        positions=_vectors(row["positions"]),
        cell=np.zeros((3, 3)) if row["cell"] is None else _vectors(row["cell"]).reshape(3, 3),
        pbc=np.array([bool(periodic & axis) for axis in _PERIODIC]),
        constraints=tuple(plain(entry) for entry in _json(row["constraints"]) or ()),
        info=info,
        **fields,
    )


def _floats(blob: bytes) -> Any:
    return np.frombuffer(blob, _FLOATS).astype(np.float64)


def _ints(blob: bytes) -> Any:
    return np.frombuffer(blob, _INTS).astype(np.int64)


def _vectors(blob: bytes) -> Any:
    return _floats(blob).reshape(-1, 3)


def _stress(blob: bytes) -> Any:
    return matrix_from_voigt(_floats(blob))


_DECODED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "masses": ("atomic_masses", _floats),
    "momenta": ("momenta", _vectors),
    "tags": ("tags", _ints),
    "initial_charges": ("initial_charges", _floats),
    "initial_magmoms": ("initial_magmoms", _floats),
    "energy": ("energy", float),
    "free_energy": ("free_energy", float),
    "forces": ("forces", _vectors),
    "stress": ("stress", _stress),
    "dipole": ("dipole", _floats),
    "magmom": ("magmom", float),
    "magmoms": ("magmoms", _floats),
    "charges": ("charges", _floats),
}


def _json(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _data(value: Any) -> dict[str, Any]:
    """Decode the data, which are bytes with arrays as they are, or JSON."""
    if isinstance(value, bytes):
        from ase.db.core import bytes_to_object

        value = bytes_to_object(value)
        return dict(value or {})
    return plain_values(_json(value))
