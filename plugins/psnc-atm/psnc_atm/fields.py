"""The fields that a structure can have: per atom, per edge or per system, and with which dtype.

Names and levels are those that the Zarr readers of the field know, so that a store needs no
translation table.
"""

from __future__ import annotations

from typing import Literal

from attrs import frozen

__all__ = [
    "ALWAYS",
    "ATOM_FIELDS",
    "EDGE_FIELDS",
    "FIELDS",
    "OPTIONAL",
    "RESULT_FIELDS",
    "FieldType",
    "Level",
]

Level = Literal["atom", "system", "edge"]


@frozen
class FieldType:
    """What is known of a field before any structure is seen.

    Attributes
    ----------
    level : {"atom", "system", "edge"}
        Whether a structure has one value for each atom, one in all, or one for each edge.
    dtype : str
        NumPy dtype in memory and in the store.
    scalar : bool
        The attribute is a Python number; stores hold it as shape ``(1,)``, one row a structure.
    zero_if_missing : bool
        ASE defines what a structure without it has: zero.
    calculation_input : bool
        It says how a calculation was started, not what came of it, and is stored on request.
    shape : tuple of int
        Shape of the values for one atom, edge or system, where that is not a number.
    """

    level: Level
    dtype: str = "float64"
    scalar: bool = False
    zero_if_missing: bool = False
    calculation_input: bool = False
    shape: tuple[int, ...] = ()


FIELDS: dict[str, FieldType] = {
    # int64 is what ASE, NumPy indexing and embedding layers use: no conversion on the way in or
    # out, and compression removes the seven bytes that are always zero.
    "atomic_numbers": FieldType("atom", "int64"),
    "positions": FieldType("atom", shape=(3,)),
    "cell": FieldType("system", shape=(3, 3)),
    "pbc": FieldType("system", "bool", shape=(3,)),
    "energy": FieldType("system", scalar=True),
    "free_energy": FieldType("system", scalar=True),
    "forces": FieldType("atom", shape=(3,)),
    "stress": FieldType("system", shape=(3, 3)),
    "dipole": FieldType("system", shape=(3,)),
    "magmom": FieldType("system", scalar=True),
    "charge": FieldType("system", scalar=True),
    "spin": FieldType("system", scalar=True),
    "energies": FieldType("atom"),
    "charges": FieldType("atom"),
    "magmoms": FieldType("atom"),
    "atomic_masses": FieldType("atom"),
    "momenta": FieldType("atom", shape=(3,)),
    "velocities": FieldType("atom", shape=(3,)),
    "tags": FieldType("atom", "int64", zero_if_missing=True),
    "initial_charges": FieldType("atom", zero_if_missing=True, calculation_input=True),
    "initial_magmoms": FieldType("atom", zero_if_missing=True, calculation_input=True),
    "edge_index": FieldType("edge", "int64"),
    "unit_shifts": FieldType("edge", "int64", shape=(3,)),
    "cutoff": FieldType("system", scalar=True),
}

ALWAYS = ("atomic_numbers", "positions", "cell", "pbc")
EDGE_FIELDS = tuple(name for name, field in FIELDS.items() if field.level == "edge")
# What a store can have of atoms and systems.
OPTIONAL = tuple(name for name in FIELDS if name not in (*ALWAYS, *EDGE_FIELDS))
ATOM_FIELDS = tuple(name for name, field in FIELDS.items() if field.level == "atom")
# What ASE's calculators call a result, under the same name.
RESULT_FIELDS = (
    *("energy", "free_energy", "forces", "stress", "dipole", "magmom"),
    *("energies", "charges", "magmoms"),
)
