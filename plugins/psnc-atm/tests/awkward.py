"""Structures with whatever can be awkward about one, each by a name that says what it is."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixBondLengths, FixCartesian, FixedPlane
from data import molecules

from psnc_atm import AtomicData

WATER = np.array([8, 1, 1])
# All that is difficult about a float64: no short decimals, signs of zero, the ends of the range.
FLOATS = np.array(
    [
        *(0.1 + 0.2, 1 / 3, -0.0, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308),
        *(1e-17, float(2**53 - 1), -123456789.123456789),
    ]
)


def water(**fields: Any) -> AtomicData:
    """Return three atoms, whose positions are the awkward numbers."""
    return AtomicData(atomic_numbers=WATER, positions=FLOATS.reshape(3, 3), **fields)


def in_a_cell(cell: Any, pbc: Any = (True, True, True), **fields: Any) -> AtomicData:
    return water(cell=np.array(cell, dtype=float), pbc=np.array(pbc), **fields)


def constrained(*constraints: Any) -> AtomicData:
    atoms = Atoms("OH2", positions=np.eye(3), constraint=constraints)
    return AtomicData.from_ase(atoms)


SYMMETRIC = np.array([[0.1, 1 / 3, -0.2], [1 / 3, 1e-300, 7.0], [-0.2, 7.0, -1e300]])

# What every format of the field holds.
PLAIN: dict[str, AtomicData] = {
    "no atoms": AtomicData(atomic_numbers=np.zeros(0, np.int64), positions=np.zeros((0, 3))),
    "one atom": AtomicData(atomic_numbers=np.array([1]), positions=np.array([[0.1, 0.2, 0.3]])),
    "an atom of no element": AtomicData(
        atomic_numbers=np.array([0, 118]), positions=np.zeros((2, 3))
    ),
    "awkward numbers": water(forces=FLOATS[::-1].reshape(3, 3).copy()),
    "a huge cell": in_a_cell(np.eye(3) * 1e12),
    "a left-handed cell": in_a_cell([[0, 3.1, 0], [2.7, 0, 0], [0, 0.1, 5]]),
    "periodic in one direction": in_a_cell(np.eye(3) * 9.1, (False, True, False)),
    "periodic without a cell": in_a_cell(np.zeros((3, 3))),
    "a cell and not periodic": in_a_cell(np.eye(3), (False, False, False)),
    "energies that differ in the last bit": water(energy=-76.4, free_energy=np.nextafter(-76.4, 0)),
    "infinite results": water(energy=float("inf"), forces=np.full((3, 3), -np.inf)),
    "results that are no numbers": water(energy=float("nan"), forces=np.full((3, 3), np.nan)),
    "stress": in_a_cell(np.eye(3), stress=SYMMETRIC),
    "a stress that is infinite": in_a_cell(np.eye(3), stress=np.full((3, 3), np.inf)),
    "other masses": water(atomic_masses=np.array([17.999, 2.014, 3.016])),
    "tags and charges": water(
        tags=np.array([1, -2, 2**31 - 1]), initial_charges=np.array([-0.8, 0.4, 0.4])
    ),
    "magnetic moments": water(
        magmom=1.5, magmoms=FLOATS[:3].copy(), initial_magmoms=FLOATS[3:6].copy()
    ),
    "magnetic vectors": water(
        magmoms=FLOATS.reshape(3, 3), initial_magmoms=FLOATS[::-1].reshape(3, 3).copy()
    ),
    "all results": in_a_cell(
        np.eye(3),
        energy=1.5,
        free_energy=1.25,
        forces=np.ones((3, 3)),
        stress=np.eye(3),
        dipole=np.array([0.1, 0.2, 0.3]),
        magmom=0.0,
        energies=np.array([0.5, 0.25, 0.75]),
        charges=np.array([-1.0, 0.5, 0.5]),
        magmoms=np.zeros(3),
        charge=-1.0,
        spin=2.0,
    ),
    "moving": water(momenta=FLOATS.reshape(3, 3)),
    "a rarer result": water(results={"stresses": np.arange(18.0).reshape(3, 6) / 7}),
    "fixed atoms": constrained(FixAtoms([0, 2])),
    "all fixed": constrained(FixAtoms([0, 1, 2])),
    "truth values and numbers": water(
        info={"yes": True, "no": False, "int": -3, "float": 0.1 + 0.2, "minus_zero": -0.0}
    ),
    "large integers": water(
        info={"odd": 2**53 + 1, "last": 2**63 - 1, "unsigned": 2**64 - 1, "far": 10**30}
    ),
    "numbers that are none": water(info={"nan": float("nan"), "infinite": -float("inf")}),
    "texts": water(
        info={
            "label": "water",
            "spaces": "a b  c",
            "empty": "",
            "digits": "007",
            "truth": "T",
            "truths": "T F",
            "infinite": "inf",
            "json": "_JSON 1",
            "quotes": "she said \"yes\" and 'no'",
            "signs": "a=b {c} [d] \\ / \\n",
            "lines": "one\ntwo\r\nthree\ttab",
            "unicode": "Ångström 水 \N{WATER WAVE}",
            "separators": "a\u2028b\x85c",
        }
    ),
    "arrays in info": water(
        info={
            "vector": FLOATS,
            "one": np.array([1.5]),
            "none": np.zeros(0),
            "matrix": FLOATS.reshape(3, 3),
            "cube": np.arange(24).reshape(2, 3, 4),
            "truths": np.array([True, False]),
            "whole": np.array([1, 2**53 + 1]),
            "nan": np.array([np.nan, np.inf, -0.0]),
        }
    ),
    "nested info": water(
        info={"tree": {"a": {"b": [1, 2.5, "x", None, True]}, "c": []}, "nothing": None}
    ),
    "names": water(info={"REF_energy": -1.5, "_x": 1, "a.b-c+d": 2, "H": "an element", "id2": 3}),
    "a charge that is a text": water(info={"charge": "neutral"}),
    "numbers of numpy": water(
        info={"i": np.int32(7), "f": np.float64(1 / 3), "g": np.float32(0.1), "b": np.True_}
    ),
}

# What rows of databases hold besides.
RICH: dict[str, AtomicData] = {
    "a stress that is not symmetric": in_a_cell(np.eye(3), stress=np.arange(9.0).reshape(3, 3)),
    "velocities": water(velocities=FLOATS.reshape(3, 3)),
    "edges": in_a_cell(
        np.eye(3) * 4,
        edge_index=np.array([[0, 1], [1, 2]]),
        unit_shifts=np.array([[0, 0, 1], [-1, 0, 0]]),
        cutoff=5.5,
    ),
    "no edges": water(
        edge_index=np.zeros((2, 0), np.int64), unit_shifts=np.zeros((0, 3), np.int64), cutoff=1.0
    ),
    "large tags": water(tags=np.array([2**40, -(2**62), 0])),
    "constraints of several kinds": constrained(
        FixAtoms([1]), FixCartesian(0, mask=(True, False, True)), FixedPlane(2, (0, 0, 1))
    ),
    "bond lengths": constrained(FixBondLengths([[0, 1], [0, 2]])),
    "fixed atoms out of order": constrained(FixAtoms([2, 0])),
    "complex numbers": water(info={"wave": np.array([1 + 2j, -0.5j]), "one": 1 + 2j}),
    "integers as keys": water(info={"shells": {1: [2.5], 2: "d"}}),
    "negative integers as keys": water(info={"shells": {-1: [2.5], -(10**20): "d"}}),
    "large integers as keys": water(info={"shells": {10**30: 1, 2**63: 2}}),
    "a time": water(info={"when": {"begun": datetime(2024, 1, 2, 3, 4, 5, 678)}}),
    "atoms inside": water(info={"start": Atoms("OH2", positions=np.eye(3) / 3)}),
    "arrays inside": water(info={"deep": {"grid": FLOATS.reshape(3, 3), "list": [FLOATS]}}),
    "names with spaces": water(info={"my label": 1, "a=b": "c", "水": 2, "key_value_pairs.x": 3}),
    "names of results": water(info={"energy": 1.5, "forces": "none", "natoms": 7}),
}

# What JSON holds, and rows of databases do not.
NO_ROWS: dict[str, AtomicData] = {
    "digits as keys": water(info={"shells": {"1": 2}}),
    "integers in other words as keys": water(info={"shells": {" 3": 1}}),
    "a sign and digits as keys": water(info={"shells": {"-1": 1}}),
    "half a character": water(info={"text": "\ud800"}),
    "a mark as a name": water(info={"__complex__": 1}),
    "marks": water(info={"mark": {"__ndarray__": 1}}),
}

# What would come back as something else, and so is refused.
OTHER: dict[str, AtomicData] = {
    "an object": water(info={"thing": object()}),
    "a time of a full second": water(info={"when": datetime(2024, 1, 2)}),
    "atoms with results": water(info={"start": next(molecules(1))}),
    "a set": water(info={"set": {1, 2}}),
    "texts in an array": water(info={"names": np.array(["a", "b"])}),
    "a name that is no text": water(info={7: 8}),
    "half a character in a name": water(info={"\ud800": 1}),
    "two charges": water(charge=1.0, info={"charge": "neutral"}),
    "a result with the name of a field": water(results={"positions": 1.0}),
}
