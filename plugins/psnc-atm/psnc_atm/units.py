"""Units as text, such as ``eV/Ang^3``: their size in the units of ASE, and their dimension."""

from __future__ import annotations

import ast

from attrs import frozen

from psnc.errors import ConfigurationError

__all__ = ["CHARGE", "ENERGY", "LENGTH", "MASS", "NUMBER", "TIME", "Unit", "parse_unit"]

# Powers of length, mass, time and charge.
Dimension = tuple[int, int, int, int]

NUMBER: Dimension = (0, 0, 0, 0)
LENGTH: Dimension = (1, 0, 0, 0)
MASS: Dimension = (0, 1, 0, 0)
TIME: Dimension = (0, 0, 1, 0)
CHARGE: Dimension = (0, 0, 0, 1)
ENERGY: Dimension = (2, 1, -2, 0)

# Names of ase.units, by dimension.
_NAMES: dict[Dimension, tuple[str, ...]] = {
    ENERGY: ("eV", "Hartree", "Ha", "Rydberg", "Ry", "kcal", "kJ", "J", "invcm"),
    LENGTH: ("Ang", "Angstrom", "Bohr", "nm", "m"),
    TIME: ("fs", "second", "s", "AUT"),
    MASS: ("kg",),
    CHARGE: ("C",),
    (1, 0, 0, 1): ("Debye",),
    (-1, 1, -2, 0): ("GPa", "bar", "Pascal"),
    NUMBER: ("mol",),
}
# What is 1 in ASE, and has no name there.
_ASE_UNITS = {"Å": LENGTH, "e": CHARGE, "amu": MASS}
_DIMENSIONS = {
    **{name: dimension for dimension, names in _NAMES.items() for name in names},
    **_ASE_UNITS,
}


@frozen
class Unit:
    """A unit.

    Attributes
    ----------
    size : float
        In the units of ASE.
    dimension : tuple of int
        Powers of length, mass, time and charge.
    """

    size: float
    dimension: Dimension

    def times(self, other: Unit, power: int = 1) -> Unit:
        """Return the product with a power of another."""
        size = self.size * other.size**power
        pairs = zip(self.dimension, other.dimension, strict=True)
        length, mass, time, charge = (one + power * two for one, two in pairs)
        return Unit(size, (length, mass, time, charge))


def parse_unit(text: str) -> Unit:
    """Return the unit that a text means.

    Parameters
    ----------
    text : str
        Names of `ase.units`, ``e``, ``amu``, ``Å`` and numbers, with ``*``, ``/``, ``^`` or ``**``
        for powers, and brackets.

    Raises
    ------
    psnc.ConfigurationError
        If it is none.
    """
    try:
        tree = ast.parse(text.strip().replace("^", "**"), mode="eval")
        unit = _unit_of(tree.body, text)
    except (SyntaxError, ValueError, OverflowError, ZeroDivisionError, RecursionError):
        raise _no_unit(text) from None
    if not 0 < unit.size < float("inf"):
        raise _no_unit(text)
    return unit


def _unit_of(node: ast.expr, text: str) -> Unit:
    if isinstance(node, ast.Name):
        return _named(node.id, text)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Unit(float(node.value), NUMBER)
    if isinstance(node, ast.BinOp):
        left = _unit_of(node.left, text)
        if isinstance(node.op, ast.Pow):
            return Unit(1.0, NUMBER).times(left, _power(node.right, text))
        if isinstance(node.op, ast.Mult | ast.Div):
            power = 1 if isinstance(node.op, ast.Mult) else -1
            return left.times(_unit_of(node.right, text), power)
    raise _no_unit(text)


def _power(node: ast.expr, text: str) -> int:
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    number = node.operand if isinstance(node, ast.UnaryOp) else node
    if isinstance(node, ast.UnaryOp) and not negative:
        raise _no_unit(text)
    if not (isinstance(number, ast.Constant) and type(number.value) is int):
        raise _no_unit(text)
    return -number.value if negative else number.value


def _named(name: str, text: str) -> Unit:
    if name in _ASE_UNITS:
        return Unit(1.0, _ASE_UNITS[name])
    if name not in _DIMENSIONS:
        raise ConfigurationError(
            f"unknown unit {name!r} in {text!r}; choose from {', '.join(_DIMENSIONS)}"
        )
    from ase import units

    return Unit(float(getattr(units, name)), _DIMENSIONS[name])


def _no_unit(text: str) -> ConfigurationError:
    return ConfigurationError(
        f"{text!r} is no unit: write names, *, /, and whole powers, such as 'eV/Ang^3'"
    )
