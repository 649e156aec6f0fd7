"""AtomicData: one structure, as NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import Factory, fields, frozen
from numpy.typing import NDArray

from psnc_atm.fields import ATOM_FIELDS

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["AtomicData", "same_values"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_PER_ATOM = tuple(name for name in ATOM_FIELDS if name != "atomic_numbers")
# Structures are made by the million, and most of these are None.
_per_atom = attrgetter(*_PER_ATOM)


@frozen(kw_only=True, eq=False, slots=True)
class AtomicData:
    """One structure: atoms, cell, and what is known of them, and edges between atoms.

    ``n`` is the number of atoms, ``m`` that of edges.

    Units are ASE's: Å, eV, elementary charges, atomic mass units; velocities in Å per ASE time
    unit (Å·sqrt(u/eV)), momenta in u times that. A field that is not known is ``None``, never
    zero. Arrays are not copied and are not to be changed in place.

    Arrays that are float64 below are float32 if a source was told to read them so.

    Attributes
    ----------
    atomic_numbers : (n,) int64
        Nuclear charges.
    positions : (n, 3) float64
        Cartesian positions, Å.
    cell : (3, 3) float64
        Lattice vectors as rows, Å; zeros for a molecule.
    pbc : (3,) bool
        Periodicity along each lattice vector.
    energy, free_energy : float, optional
        Potential energy (extrapolated to zero smearing), and the one consistent with the
        forces, eV.
    forces : (n, 3) float64, optional
        eV/Å.
    stress : (3, 3) float64, optional
        Cauchy stress, eV/Å³, positive under tension (ASE's sign). ASE's six Voigt components
        ``xx yy zz yz xz xy`` become a full symmetric matrix, which is what readers expect and
        needs no convention to be remembered.
    dipole : (3,) float64, optional
        e·Å.
    magmom : float, optional
        Total magnetic moment, µB.
    charge, spin : float, optional
        Total charge (e), and spin as the dataset gives it (usually the multiplicity).
    energies, charges, magmoms : (n,) float64, optional
        Computed for each atom: eV, e, µB.
    atomic_masses : (n,) float64, optional
        u; only when they differ from ASE's standard masses.
    momenta, velocities : (n, 3) float64, optional
        Rows of ASE databases hold momenta; velocities are there for those who set them.
    tags : (n,) int64, optional
        ASE's tags.
    initial_charges, initial_magmoms : (n,) float64, optional
        What the calculation started from.
    edge_index : (2, m) int64, optional
        The atoms that edges go from and to; see `NeighbourList`. Zarr stores have them as
        ``neighbor_list``, once all indices are gathered.
    unit_shifts : (m, 3) int64, optional
        The lattice vectors, as multiples, by which the atom that an edge goes to is shifted; in
        Zarr stores ``neighbor_list_shifts``.
    cutoff : float, optional
        Edges are between atoms that are closer than this, Å.
    constraints : tuple of mapping
        ASE constraints as dictionaries; not written to Zarr stores.
    results : mapping
        Any other calculator result by ASE's name; not written to Zarr stores.
    info : mapping
        What else the row says: the entries of its ``key_value_pairs`` and its ``data``.
    """

    atomic_numbers: Ints
    positions: Floats
    cell: Floats = Factory(lambda: np.zeros((3, 3)))
    pbc: NDArray[np.bool_] = Factory(lambda: np.zeros(3, dtype=bool))
    energy: float | None = None
    free_energy: float | None = None
    forces: Floats | None = None
    stress: Floats | None = None
    dipole: Floats | None = None
    magmom: float | None = None
    charge: float | None = None
    spin: float | None = None
    energies: Floats | None = None
    charges: Floats | None = None
    magmoms: Floats | None = None
    atomic_masses: Floats | None = None
    momenta: Floats | None = None
    velocities: Floats | None = None
    tags: Ints | None = None
    initial_charges: Floats | None = None
    initial_magmoms: Floats | None = None
    edge_index: Ints | None = None
    unit_shifts: Ints | None = None
    cutoff: float | None = None
    constraints: tuple[Mapping[str, Any], ...] = ()
    results: Mapping[str, Any] = Factory(dict)
    info: Mapping[str, Any] = Factory(dict)

    def __attrs_post_init__(self) -> None:
        count = len(self.atomic_numbers)
        for place, value in enumerate(_per_atom(self)):
            if value is not None and len(value) != count:
                raise ValueError(
                    f"{_PER_ATOM[place]} has {len(value)} rows for {count} atoms; give one row for "
                    "each atom"
                )
        if self.edge_index is not None or self.unit_shifts is not None:
            _check_edges(self.edge_index, self.unit_shifts)

    def __len__(self) -> int:
        """Return the number of atoms."""
        return len(self.atomic_numbers)

    @property
    def shifts(self) -> Floats | None:
        """The ``unit_shifts`` in Å, (m, 3) float64: edges are ``r[to] - r[from] + shifts`` long."""
        return None if self.unit_shifts is None else self.unit_shifts @ self.cell

    def __eq__(self, other: object) -> bool:
        """Compare element by element; NaN equals NaN, since both say "not known"."""
        if not isinstance(other, AtomicData):
            return NotImplemented
        return all(
            same_values(getattr(self, field.name), getattr(other, field.name))
            for field in fields(AtomicData)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Say what is there, not every number."""
        known = [field.name for field in fields(AtomicData) if _known(getattr(self, field.name))]
        return f"AtomicData({len(self)} atoms: {', '.join(known)})"

    def to_ase(self) -> Atoms:
        """Return it as ``ase.Atoms``, results in a ``SinglePointCalculator``.

        The stress is there as six components, or as a matrix where it is not symmetric.
        """
        from psnc_atm.ase_conversion import to_ase

        return to_ase(self)

    @classmethod
    def from_ase(cls, atoms: Atoms) -> AtomicData:
        """Take over an ``ase.Atoms`` and the results that its calculator holds already.

        Nothing is calculated. Results of what the atoms were before, at other positions or in
        another cell, are left out, as ``ase.db`` leaves them out. A total ``magmom`` that is no
        number, but a vector, is an entry of ``results``. Numbers ``charge`` and ``spin``
        of ``atoms.info`` become fields. Arrays that ASE has no name for, ``REF_forces`` say, become
        entries of ``info`` under their own name, or ``arrays.REF_forces`` if ``info`` has that.
        """
        from psnc_atm.ase_conversion import from_ase

        return from_ase(atoms)


def _check_edges(edge_index: Ints | None, unit_shifts: Ints | None) -> None:
    if edge_index is not None and (edge_index.ndim != 2 or len(edge_index) != 2):
        raise ValueError(f"edge_index has shape {edge_index.shape}; give (2, number of edges)")
    if unit_shifts is not None:
        count = "no" if edge_index is None else edge_index.shape[1]
        if unit_shifts.shape != (count, 3):
            raise ValueError(
                f"unit_shifts has shape {unit_shifts.shape} for {count} edges; "
                "give one row of three for each edge"
            )


def _known(value: object) -> bool:
    return value is not None and (not isinstance(value, Mapping | tuple) or len(value) > 0)


def same_values(one: Any, other: Any) -> bool:
    """Compare arrays element by element, and containers by what is in them; NaN equals NaN."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return _same_arrays(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_values(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_values, one, other))
    return bool(one == other) or bool(one != one and other != other)


def _same_arrays(one: Any, other: Any) -> bool:
    if not (isinstance(one, np.ndarray) and isinstance(other, np.ndarray)):
        return False
    if one.shape != other.shape:
        return False
    inexact = one.dtype.kind in "fc" and other.dtype.kind in "fc"
    return np.array_equal(one, other, equal_nan=inexact)
