"""ConvertUnits: the numbers of fields, in other units."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from attrs import evolve, frozen

from psnc.errors import ConfigurationError, StageError
from psnc.stages import Filter, Param
from psnc_atm.atomic_data import AtomicData
from psnc_atm.filter_input import place_of, structures_of
from psnc_atm.units import CHARGE, ENERGY, LENGTH, MASS, NUMBER, TIME, Unit, parse_unit

__all__ = ["ConvertUnits"]

Pair = Sequence[str]

_ONE = Unit(1.0, NUMBER)
# Of each field the powers of energy and length, where it follows from these two.
_BY_ENERGY_AND_LENGTH = {
    **dict.fromkeys(("energy", "free_energy", "energies"), (1, 0)),
    "forces": (1, -1),
    "stress": (1, -3),
    **dict.fromkeys(("positions", "cell", "cutoff", "dipole"), (0, 1)),
    **dict.fromkeys(("results.virial", "results.virials"), (1, 0)),
    "results.stresses": (1, -3),
}
_PARTS = ("info", "results")


def _dimensions() -> dict[str, Any]:
    energy, length, mass, time, charge = (
        Unit(1.0, dimension) for dimension in (ENERGY, LENGTH, MASS, TIME, CHARGE)
    )
    known = {
        name: _ONE.times(energy, by_energy).times(length, by_length)
        for name, (by_energy, by_length) in _BY_ENERGY_AND_LENGTH.items()
    }
    known["dipole"] = charge.times(length)
    known.update(dict.fromkeys(("charge", "charges", "initial_charges"), charge))
    known["atomic_masses"] = mass
    known["velocities"] = length.times(time, -1)
    known["momenta"] = mass.times(length).times(time, -1)
    return {name: unit.dimension for name, unit in known.items()}


_DIMENSIONS = _dimensions()
_FIELDS = tuple(name for name in _DIMENSIONS if "." not in name)


class ConvertUnits(Filter[AtomicData, AtomicData]):
    """Convert numbers from one unit to another.

    Units are names of ``ase.units`` (``eV``, ``Hartree``, ``kcal``, ``mol``, ``Bohr``, ``Ang``,
    ``GPa``, ``Debye``, ``fs``, ...), ``e``, ``amu``, ``Å`` and numbers, joined with ``*``, ``/``
    and ``^``: ``"kcal/mol/Ang"``. Everything else in psnc-atm expects the units of `AtomicData`.

    Parameters
    ----------
    fields : mapping of str to (str, str), optional
        Of fields, the unit that they have and the one that they get; ``"info.NAME"`` and
        ``"results.NAME"`` for what is in those. No other field changes with them.
    energy, length : (str, str), optional
        The same for all that follows from energy and length: ``energy``, ``free_energy``,
        ``energies``, ``forces``, ``stress``, ``positions``, ``cell``, ``cutoff``, ``dipole`` (its
        length), and the results ``virial``, ``virials`` and ``stresses``. What ``fields`` names is
        converted as it says there.

    Raises
    ------
    psnc.ConfigurationError
        If there is nothing to convert, a field or unit is unknown, or units do not fit each other
        or the field.
    psnc.StageError
        If an entry of ``info`` or ``results`` is no number or array of numbers.

    Notes
    -----
    A field or entry that a structure lacks is passed over.
    """

    name = "convert-units"
    description = "Converts energies, lengths, forces and other fields to other units"

    def __init__(
        self,
        fields: Annotated[
            Mapping[str, Pair] | None,
            Param(description="Of fields, the unit that they have and the one that they get"),
        ] = None,
        energy: Annotated[
            Pair | None, Param(description="The same for all that follows from energy")
        ] = None,
        length: Annotated[
            Pair | None, Param(description="The same for all that follows from length")
        ] = None,
    ) -> None:
        if not fields and energy is None and length is None:
            raise ConfigurationError(
                "ConvertUnits was given nothing to convert: say fields, energy or length"
            )
        by_energy = 1.0 if energy is None else _factor("energy", energy, ENERGY)
        by_length = 1.0 if length is None else _factor("length", length, LENGTH)
        factors = {
            name: by_energy**energies * by_length**lengths
            for name, (energies, lengths) in _BY_ENERGY_AND_LENGTH.items()
        }
        for name, pair in (fields or {}).items():
            factors[name] = _factor(name, pair, _dimension_of(name))
        self._conversion = _Conversion.of(factors)

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        """Yield the structures in other units."""
        for position, structure in structures_of(items, self):
            yield self._conversion.applied(structure, position)


@frozen
class _Conversion:
    """Factors other than one: of fields, and of entries of ``info`` and ``results``."""

    fields: Mapping[str, float]
    entries: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, factors: Mapping[str, float]) -> _Conversion:
        fields: dict[str, float] = {}
        entries: dict[str, dict[str, float]] = {}
        for name, factor in factors.items():
            if factor == 1.0:
                continue
            part, dot, entry = name.partition(".")
            if dot:
                entries.setdefault(part, {})[entry] = factor
            else:
                fields[name] = factor
        return cls(fields, entries)

    def applied(self, structure: AtomicData, position: int) -> AtomicData:
        changes: dict[str, Any] = {}
        for name, factor in self.fields.items():
            value = getattr(structure, name)
            if value is not None:
                changes[name] = value * factor
        for part, factors in self.entries.items():
            kept = getattr(structure, part)
            converted = {
                name: _converted(kept[name], factor, f"{part}.{name}", structure, position)
                for name, factor in factors.items()
                if kept.get(name) is not None
            }
            if converted:
                changes[part] = {**kept, **converted}
        return evolve(structure, **changes)


def _converted(value: Any, factor: float, name: str, structure: AtomicData, position: int) -> Any:
    array = np.asarray(value)
    if array.dtype.kind not in "iuf":
        raise StageError(
            f"{place_of(structure, position)}: {name} is a {type(value).__name__}, not a number or "
            "array of numbers"
        )
    return float(value * factor) if array.ndim == 0 else array * factor


def _dimension_of(name: str) -> Any:
    """Return the dimension of a field, ``None`` where it is not known."""
    part, dot, entry = name.partition(".")
    if name in _DIMENSIONS or (dot and part in _PARTS and entry):
        return _DIMENSIONS.get(name)
    raise ConfigurationError(
        f"ConvertUnits: {name!r} has no unit; choose from {', '.join(_FIELDS)}, info.NAME, "
        "results.NAME"
    )


def _factor(name: str, pair: Any, dimension: Any) -> float:
    if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(one, str) for one in pair):
        raise ConfigurationError(
            f"ConvertUnits: {name} is {pair!r}; give two units, the present one and the new one"
        )
    before, after = map(parse_unit, pair)
    for text, unit in zip(pair, (before, after), strict=True):
        if dimension is not None and unit.dimension != dimension:
            raise ConfigurationError(f"ConvertUnits: {text!r} is no unit of {name}")
    if before.dimension != after.dimension:
        raise ConfigurationError(
            f"ConvertUnits: {name} cannot be converted from {pair[0]!r} to {pair[1]!r}"
        )
    return before.size / after.size
