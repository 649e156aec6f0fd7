"""Between AtomicData and ase.Atoms."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import dict2constraint

from psnc_atm.atomic_data import AtomicData, same_values
from psnc_atm.fields import FIELDS, RESULT_FIELDS
from psnc_atm.voigt import matrix_from_voigt, voigt_from_matrix

__all__ = ["from_ase", "to_ase"]

_OPTIONAL_ARRAYS = {
    "atomic_masses": "masses",
    "momenta": "momenta",
    "tags": "tags",
    "initial_charges": "initial_charges",
    "initial_magmoms": "initial_magmoms",
}
_ARRAYS_OF_STATE = ("numbers", "positions", "initial_charges", "initial_magmoms")
_KNOWN_ARRAYS = {"numbers", "positions", *_OPTIONAL_ARRAYS.values()}


def to_ase(structure: AtomicData) -> Atoms:
    """Return ``structure`` as ``ase.Atoms``; see :meth:`AtomicData.to_ase`."""
    atoms = Atoms(
        numbers=structure.atomic_numbers,
        positions=structure.positions,
        cell=structure.cell,
        pbc=structure.pbc,
        tags=structure.tags,
        masses=structure.atomic_masses,
        momenta=structure.momenta,
        charges=structure.initial_charges,
        magmoms=structure.initial_magmoms,
        constraint=[dict2constraint(dict(constraint)) for constraint in structure.constraints],
        info=_info(structure),
    )
    if structure.momenta is None and structure.velocities is not None:
        # Fixed atoms keep theirs, as they keep momenta.
        momenta = structure.velocities * atoms.get_masses()[:, np.newaxis]
        atoms.set_momenta(momenta, apply_constraint=False)
    results = {**structure.results, **_results(structure)}
    if results:
        known = {name: value for name, value in results.items() if name in all_properties}
        atoms.calc = SinglePointCalculator(atoms, **known)
        # It refuses what only one code calculates, though readers of that code give it.
        atoms.calc.results |= {name: results[name] for name in results.keys() - known.keys()}
    return atoms


def from_ase(atoms: Atoms) -> AtomicData:
    """Take over ``atoms``; see :meth:`AtomicData.from_ase`."""
    arrays = atoms.arrays
    known = _current_results(atoms)
    info = dict(atoms.info)
    fields: dict[str, Any] = {
        name: float(info.pop(name)) for name in ("charge", "spin") if _is_number(info.get(name))
    }
    for name in RESULT_FIELDS:
        value = known.get(name)
        if name == "magmom" and value is not None and np.size(value) != 1:
            continue  # of spins that are not collinear, a vector
        known.pop(name, None)
        if value is not None:
            fields[name] = _result(name, value)
    for name, array_name in _OPTIONAL_ARRAYS.items():
        if array_name in arrays:
            fields[name] = arrays[array_name].astype(FIELDS[name].dtype)
    for name, array in arrays.items():
        if name not in _KNOWN_ARRAYS:
            info[f"arrays.{name}" if name in info else name] = array.copy()
    return AtomicData(
        atomic_numbers=arrays["numbers"].astype(np.int64),
        positions=arrays["positions"].astype(np.float64),
        cell=np.array(atoms.cell, dtype=np.float64),
        pbc=np.array(atoms.pbc, dtype=bool),
        constraints=tuple(constraint.todict() for constraint in atoms.constraints),
        results={name: value for name, value in known.items() if value is not None},
        info=info,
        **fields,
    )


def _current_results(atoms: Atoms) -> dict[str, Any]:
    """Return what the calculator knows of the atoms as they are, and not as they were before."""
    calculator = atoms.calc
    if not hasattr(calculator, "check_state"):
        return {}
    # As ase.db does. get_property() would have a live calculator forget what it knows.
    if not _are_the_same(getattr(calculator, "atoms", None), atoms) and (
        calculator.check_state(atoms)
    ):
        return {}
    return dict(getattr(calculator, "results", None) or {})


def _are_the_same(before: Atoms | None, atoms: Atoms) -> bool:
    """Tell of most atoms that did not change what ASE takes ten times as long to tell."""
    return (
        before is not None
        and before.cell.array.tobytes() == atoms.cell.array.tobytes()
        and before.pbc.tobytes() == atoms.pbc.tobytes()
        and all(_bytes(before, name) == _bytes(atoms, name) for name in _ARRAYS_OF_STATE)
    )


def _bytes(atoms: Atoms, name: str) -> bytes | None:
    array = atoms.arrays.get(name)
    return None if array is None else array.tobytes()


def _results(structure: AtomicData) -> dict[str, Any]:
    results = {name: getattr(structure, name) for name in RESULT_FIELDS}
    if structure.stress is not None and same_values(structure.stress, structure.stress.T):
        results["stress"] = voigt_from_matrix(structure.stress)
    return {name: value for name, value in results.items() if value is not None}


def _result(name: str, value: Any) -> Any:
    if FIELDS[name].scalar:
        return float(np.asarray(value).item())
    array = np.array(value, dtype=FIELDS[name].dtype)
    return matrix_from_voigt(array) if name == "stress" else array


def _is_number(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.shape == () and value.dtype.kind in "iuf"
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _info(structure: AtomicData) -> dict[str, Any]:
    info = dict(structure.info)
    for name in ("charge", "spin"):
        value = getattr(structure, name)
        if value is not None:
            info[name] = value
    return info
