"""One structure as a frame of an extended xyz file.

``ase.io`` writes eight decimals, and much of ``info`` in a way that it reads as something else.
Here what is written is read by ``ase.io`` as what it was: numbers have all their digits, and texts
that look like numbers, lists or truth values are JSON, which the format provides for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from ase.calculators.calculator import all_properties
from ase.data import chemical_symbols
from ase.io.extxyz import (
    key_val_str_to_dict,
    per_atom_properties,
    per_config_properties,
)
from numpy.typing import NDArray

from psnc_atm.atomic_data import AtomicData, same_values
from psnc_atm.fields import FIELDS
from psnc_atm.unwritable import Unwritable

__all__ = ["extxyz_frame"]

# The column that each field is, by the name under which ase.io reads it as that field.
_FIELD_COLUMNS = {
    "atomic_masses": "masses",
    "momenta": "momenta",
    "tags": "tags",
    "initial_charges": "initial_charges",
    "initial_magmoms": "initial_magmoms",
    "forces": "forces",
    "energies": "energies",
    "charges": "charge",
    "magmoms": "magmoms",
}
_FIELDS_WITHOUT_PLACE = ("velocities", "edge_index", "unit_shifts", "cutoff")
_NUMBERS = ("energy", "free_energy", "magmom")
# Names that ase.io takes for something else in the comment line, and as a column.
_NOT_INFO = frozenset(("Lattice", "Properties", "pbc", *per_config_properties))
_NOT_COLUMNS = frozenset(
    (
        *("species", "pos", "Z", "symbols", "positions", "numbers", "move_mask"),
        *(*all_properties, *per_atom_properties, *_FIELD_COLUMNS.values()),
    )
)
_KEY = re.compile(r"[^\W\d][\w.+-]*")
_KINDS = {"f": "R", "i": "I", "u": "I", "b": "L"}
_SMALLEST, _LARGEST = -(2**31), 2**31 - 1
_SMALLEST_PLAIN, _LARGEST_PLAIN = -(2**63), 2**63 - 1


def extxyz_frame(
    structure: AtomicData, columns: Sequence[str], decimals: int | None, unwritable: Unwritable
) -> str:
    """Return the lines of one frame.

    Raises
    ------
    psnc.StageError
        If the format cannot hold something of it, and that is not to be dropped.
    """
    for field in _FIELDS_WITHOUT_PLACE:
        if getattr(structure, field) is not None:
            unwritable.met(f"field {field!r}")
    beside = [*_columns(structure, columns, unwritable)]
    properties = "".join(f":{name}:{kind}:{width}" for name, kind, width, _ in beside)
    entries = [
        *_lattice(structure),
        f"Properties=species:S:1:pos:R:3{properties}",
        f'pbc="{_joined("T" if periodic else "F" for periodic in structure.pbc)}"',
        *_results(structure, unwritable),
        *_info(structure, columns, unwritable),
    ]
    symbols = [_symbol(number, unwritable) for number in structure.atomic_numbers.tolist()]
    parts = [symbols, _texts(structure.positions, decimals)]
    parts += [_texts(values, decimals) for *_, values in beside]
    lines = [" ".join(line) for line in zip(*parts, strict=True)]
    return "\n".join((str(len(structure)), " ".join(entries), *lines, ""))


def _symbol(number: int, unwritable: Unwritable) -> str:
    if not 0 <= number < len(chemical_symbols):
        # Without it there is no frame, so it is never left out.
        unwritable.refuse(f"atomic number {number}, which has no symbol,")
    return chemical_symbols[number]


_Column = tuple[str, str, int, NDArray[Any]]


def _columns(
    structure: AtomicData, columns: Sequence[str], unwritable: Unwritable
) -> Iterator[_Column]:
    for field, name in _FIELD_COLUMNS.items():
        values = getattr(structure, field)
        if values is not None:
            yield from _column(structure, f"field {field!r}", name, values, unwritable)
    for name, values in structure.results.items():
        if name in per_atom_properties and name not in FIELDS:
            yield from _column(structure, f"result {name!r}", name, values, unwritable)
    for name in columns:
        if name not in structure.info or name in _NOT_COLUMNS or not _is_key(name):
            unwritable.met(f"column {name!r}, which is not in info or has a name with a meaning,")
        else:
            values = structure.info[name]
            yield from _column(structure, f"column {name!r}", name, values, unwritable)
    if structure.constraints:
        fixed = _fixed_atoms(structure)
        if fixed is None:
            names = ", ".join(str(constraint.get("name")) for constraint in structure.constraints)
            unwritable.met(f"constraint {names}")
        else:
            yield "move_mask", "L", 1, ~fixed


def _column(
    structure: AtomicData, what: str, name: str, values: Any, unwritable: Unwritable
) -> Iterator[_Column]:
    """Yield a column, if it comes back in the shape that it has."""
    values = np.asarray(values)
    shape_is_kept = values.shape[:1] == (len(structure),) and (
        values.ndim == 1 or (values.ndim == 2 and values.shape[1] > 1)
    )
    is_held = values.dtype.kind in _KINDS and values.dtype != np.longdouble
    if values.dtype.kind in "iu" and values.size:
        # ase.io reads them as 32 bits.
        is_held = bool(values.min() >= _SMALLEST and values.max() <= _LARGEST)
    if not (shape_is_kept and is_held):
        unwritable.met(f"{what} ({values.dtype} of shape {values.shape})")
    else:
        width = 1 if values.ndim == 1 else values.shape[1]
        yield name, _KINDS[values.dtype.kind], width, values


def _fixed_atoms(structure: AtomicData) -> NDArray[np.bool_] | None:
    """Return which atoms are fixed, if that is all that the constraints say."""
    if len(structure.constraints) != 1:
        return None
    (constraint,) = structure.constraints
    indices = np.asarray(dict(constraint.get("kwargs", {})).get("indices", ()))
    if constraint.get("name") != "FixAtoms" or indices.ndim != 1:
        return None
    fixed = np.zeros(len(structure), dtype=bool)
    if len(indices):
        if indices.min() < 0 or indices.max() >= len(structure):
            return None
        fixed[indices] = True
    return fixed if np.array_equal(np.flatnonzero(fixed), indices) else None


def _lattice(structure: AtomicData) -> Iterator[str]:
    if structure.cell.any():
        yield f'Lattice="{_joined(map(repr, structure.cell.ravel().tolist()))}"'


def _results(structure: AtomicData, unwritable: Unwritable) -> Iterator[str]:
    for name in _NUMBERS:
        if (number := getattr(structure, name)) is not None:
            yield f"{name}={float(number)!r}"
    if structure.dipole is not None:
        yield from _vector("dipole", structure.dipole, unwritable)
    if structure.stress is not None:
        if same_values(structure.stress, structure.stress.T):
            yield f'stress="{_joined(map(repr, structure.stress.ravel().tolist()))}"'
        else:
            unwritable.met("field 'stress', which is not symmetric,")
    for name, value in structure.results.items():
        if name in per_atom_properties and name not in FIELDS:
            continue
        if name not in per_config_properties or name in FIELDS:
            unwritable.met(f"result {name!r}")
        elif np.ndim(value) == 0:
            yield f"{name}={float(value)!r}"
        else:
            yield from _vector(name, np.asarray(value), unwritable)
    for name in ("charge", "spin"):
        if (number := getattr(structure, name)) is not None:
            yield f"{name}={float(number)!r}"


def _vector(name: str, values: NDArray[Any], unwritable: Unwritable) -> Iterator[str]:
    if values.dtype.kind != "f" or values.ndim != 1 or len(values) < 2:
        unwritable.met(f"result {name!r} ({values.dtype} of shape {values.shape})")
    else:
        yield f'{name}="{_joined(map(repr, values.tolist()))}"'


def _info(structure: AtomicData, columns: Sequence[str], unwritable: Unwritable) -> Iterator[str]:
    for name, value in structure.info.items():
        if name in columns:
            continue
        is_free = isinstance(name, str) and _is_key(name) and name not in _NOT_INFO
        if name in ("charge", "spin") and getattr(structure, name) is not None:
            is_free = False
        text = _text_of(name, value) if is_free else None
        if text is None:
            unwritable.met(f"info {name!r} ({type(value).__name__})")
        else:
            yield f"{name}={text}"


def _is_key(name: str) -> bool:
    return _KEY.fullmatch(name) is not None


def _text_of(name: str, value: Any) -> str | None:
    """Return what is read as ``value``, or ``None`` if nothing is."""
    if name == "virial":
        return _text_of_virial(value)
    if isinstance(value, bool | np.bool_):
        return "T" if value else "F"
    if isinstance(value, int | np.integer) and _SMALLEST_PLAIN <= value <= _LARGEST_PLAIN:
        return str(int(value))
    if isinstance(value, float | np.float64 | np.float32 | np.float16):
        return repr(float(value))
    if isinstance(value, str):
        return _text_of_text(name, value)
    if _is_vector(value):
        return f'"{_joined(map(repr, value.tolist()))}"'
    return _checked(name, value, _quoted(f"_JSON {_json(value)}"))


def _is_vector(value: Any) -> bool:
    return (
        isinstance(value, np.ndarray)
        and value.dtype.kind == "f"
        and value.dtype != np.longdouble
        and value.ndim == 1
        and len(value) > 1
    )


def _text_of_virial(value: Any) -> str | None:
    """Return nine numbers, which is all that ``ase.io`` takes under this name."""
    if not isinstance(value, np.ndarray) or value.shape != (3, 3) or value.dtype.kind not in "fi":
        return None
    return f'"{_joined(map(repr, value.T.ravel().tolist()))}"'


@lru_cache(maxsize=4096)
def _text_of_text(name: str, value: str) -> str | None:
    if value.isascii() and value.isprintable():
        plain = value if re.fullmatch(r"[\w.:/+-]+", value) else _quoted(value)
        if _checked(name, value, plain) is not None:
            return plain
    return _checked(name, value, _quoted(f"_JSON {json.dumps(value)}"))


def _json(value: Any) -> str:
    try:
        return json.dumps(value.tolist() if isinstance(value, np.ndarray | np.generic) else value)
    except (TypeError, ValueError):
        return ""


def _checked(name: str, value: Any, text: str) -> str | None:
    """Return ``text`` if it is read as ``value``."""
    try:
        read = key_val_str_to_dict(f"{name}={text}")
    except (ValueError, TypeError, OverflowError):
        return None
    # A list of numbers is read as the array of them.
    expected = np.array(value) if isinstance(value, list | tuple) and _is_array(read) else value
    return text if read.keys() == {name} and same_values(read[name], expected) else None


def _is_array(read: Any) -> bool:
    return all(isinstance(value, np.ndarray) for value in read.values())


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _texts(values: NDArray[Any], decimals: int | None) -> list[str]:
    """Return a text for each atom."""
    if values.dtype.kind == "b":
        texts = np.where(values, "T", "F").tolist()
        return texts if values.ndim == 1 else [" ".join(row) for row in texts]
    if values.dtype.kind == "f" and decimals is not None:
        form = f"%.{decimals}f"
        if values.ndim > 1:
            form = " ".join([form] * values.shape[1])
            return [form % tuple(row) for row in values.tolist()]
        return [form % number for number in values.tolist()]
    if values.ndim == 1:
        return [repr(number) for number in values.tolist()]
    return [" ".join(map(repr, row)) for row in values.tolist()]


def _joined(texts: Any) -> str:
    return " ".join(texts)
