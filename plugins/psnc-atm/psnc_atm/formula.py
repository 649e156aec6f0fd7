"""Chemical symbols and formulas of atomic numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psnc.errors import ConfigurationError

__all__ = ["composition", "formula_of", "hill_formula", "number_of", "symbol"]


@cache
def symbol(number: int) -> str:
    """Return an element's symbol: ``X`` for 0, as in ASE, and ``Z200`` for what has none."""
    from ase.data import chemical_symbols

    known: bool = 0 <= number < len(chemical_symbols)
    return str(chemical_symbols[number]) if known else f"Z{number}"


def number_of(element: Any) -> int:
    """Return the atomic number of an element given by its symbol or number.

    Raises
    ------
    psnc.ConfigurationError
        If there is no such element.
    """
    from ase.data import atomic_numbers, chemical_symbols

    if isinstance(element, str) and element in atomic_numbers:
        return int(atomic_numbers[element])
    whole = isinstance(element, int) and not isinstance(element, bool)
    if whole and 0 <= element < len(chemical_symbols):
        return int(element)
    raise ConfigurationError(
        f"unknown element {element!r}; give a symbol such as 'Cl', or an atomic number"
    )


def composition(numbers: NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Return each atomic number with how often it occurs, in order."""
    # For as many atoms as structures have, several times as fast as numpy.unique.
    return tuple(sorted(Counter(numbers.tolist()).items()))


def hill_formula(counts: Mapping[int, int]) -> str:
    """Return a formula in Hill's order: C, H and then by letter; without C all by letter."""
    by_symbol = {symbol(number): count for number, count in counts.items()}
    first = [name for name in ("C", "H") if name in by_symbol] if "C" in by_symbol else []
    others = sorted(by_symbol.keys() - set(first))
    return "".join(
        name + (str(by_symbol[name]) if by_symbol[name] > 1 else "") for name in (*first, *others)
    )


def formula_of(numbers: NDArray[np.int64]) -> str:
    """Return the formula of atoms in Hill's order, ``no atoms`` if there are none."""
    return hill_formula(dict(composition(numbers))) or "no atoms"
