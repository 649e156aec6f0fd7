"""When two structures count as the same: a hash of what they are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import field, frozen
from numpy.typing import NDArray

from psnc.errors import ConfigurationError
from psnc_atm.atomic_data import AtomicData
from psnc_atm.fields import ALWAYS, FIELDS
from psnc_atm.filter_input import require_known

__all__ = ["HASH_BYTES", "StructureHash"]

HASH_BYTES = 16

_COMPARABLE = tuple(
    name for name, kind in FIELDS.items() if name not in ALWAYS and kind.level != "edge"
)


def _names(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))


@frozen
class StructureHash:
    """Says which structures are the same: those for which it has the same 16 bytes.

    They are a digest of atomic numbers, positions, periodicity, the lattice vectors of the periodic
    directions, and ``fields``, with numbers rounded to ``decimals``. A structure that was moved,
    turned, or written with another cell is another one. So are, as with any rounding, two whose
    numbers differ by less than a unit of the last decimal and lie on either side of where it is
    rounded.

    Attributes
    ----------
    decimals : int
        Decimals of all numbers that count: 6 is a millionth of an Å.
    any_atom_order : bool
        Whether the same atoms in another order are the same structure.
    fields : tuple of str
        What has to be the same besides. By default charge and spin, without which an ion would be
        the same as its molecule.
    """

    decimals: int = 6
    any_atom_order: bool = True
    fields: tuple[str, ...] = field(default=("charge", "spin"), converter=_names)

    def __attrs_post_init__(self) -> None:
        require_known("field", self.fields, _COMPARABLE)
        if not 0 <= self.decimals <= 15:
            raise ConfigurationError(f"decimals is {self.decimals}; give a number from 0 to 15")

    def __call__(self, structure: AtomicData) -> bytes:
        """Return the hash of a structure, `HASH_BYTES` long."""
        numbers = structure.atomic_numbers.astype("<i8")
        positions = self._rounded(structure.positions)
        order: Any = slice(None)
        if self.any_atom_order:
            order = np.lexsort((*positions.T[::-1], numbers))
        digest = hashlib.blake2b(digest_size=HASH_BYTES)
        digest.update(b"%d" % len(structure))
        digest.update(numbers[order].tobytes())
        digest.update(positions[order].tobytes())
        digest.update(structure.pbc.tobytes())
        digest.update(self._rounded(structure.cell[structure.pbc]).tobytes())
        for name in self.fields:
            value = getattr(structure, name)
            digest.update(name.encode())
            if value is not None:
                rounded = self._rounded(value)
                by_atom = FIELDS[name].level == "atom"
                digest.update(b"=" + (rounded[order] if by_atom else rounded).tobytes())
        return digest.digest()

    def _rounded(self, value: Any) -> NDArray[np.float64]:
        # Minus zero becomes zero, and one NaN like another.
        rounded = np.round(np.asarray(value, dtype="<f8"), self.decimals) + 0.0
        return np.where(np.isnan(rounded), np.nan, rounded)
