"""Filters that keep structures by their elements, size, energy or forces, and drop the others."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np

from psnc.errors import ConfigurationError, StageError
from psnc.stages import Filter, Param, stage_name
from psnc_atm.atomic_data import AtomicData
from psnc_atm.filter_input import place_of, require_known, structures_of
from psnc_atm.formula import number_of, symbol

__all__ = ["SelectElements", "SelectEnergy", "SelectForces", "SelectSize"]

logger = logging.getLogger("psnc_atm")

Missing = Literal["error", "drop", "keep"]
Element = str | int

_MISSING = Param(description="What becomes of structures without it: error, drop or keep")


class _Selection(Filter[AtomicData, AtomicData]):
    """Keeps structures for which there is no reason to drop them, and logs how many there were."""

    @abstractmethod
    def _reason_to_drop(self, structure: AtomicData, position: int) -> str | None:
        """Say why a structure is dropped, in the same words for all with the same reason."""

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        """Yield the structures that are selected."""
        reasons: Counter[str] = Counter()
        total = 0
        for position, structure in structures_of(items, self):
            total += 1
            reason = self._reason_to_drop(structure, position)
            if reason is None:
                yield structure
            else:
                reasons[reason] += 1
        if reasons:
            told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
            dropped = reasons.total()
            logger.info("%s dropped %d of %d: %s", stage_name(self), dropped, total, told)


class SelectElements(_Selection):
    """Keep structures by the elements in them.

    Parameters
    ----------
    allowed : sequence of str or int, optional
        Symbols or atomic numbers: drop structures that have an element besides these.
    required : sequence of str or int, optional
        Drop structures that lack one of these.
    excluded : sequence of str or int, optional
        Drop structures that have one of these.

    Raises
    ------
    psnc.ConfigurationError
        If none of the three is given, or an element is unknown.
    """

    name = "select-elements"
    description = "Keeps structures by the elements in them"

    def __init__(
        self,
        allowed: Annotated[
            Sequence[Element] | None, Param(description="Drop structures with any other element")
        ] = None,
        required: Annotated[
            Sequence[Element] | None, Param(description="Drop structures that lack one of these")
        ] = None,
        excluded: Annotated[
            Sequence[Element] | None, Param(description="Drop structures that have one of these")
        ] = None,
    ) -> None:
        if allowed is None and not required and not excluded:
            raise ConfigurationError(
                "SelectElements was given no elements: say allowed, required or excluded"
            )
        self._allowed = None if allowed is None else _numbers("allowed", allowed)
        self._required = _numbers("required", required or ())
        self._excluded = _numbers("excluded", excluded or ())

    def _reason_to_drop(self, structure: AtomicData, position: int) -> str | None:
        elements = set(structure.atomic_numbers.tolist())
        if not elements.isdisjoint(self._excluded):
            return f"with {_some(self._excluded)}"
        if not elements >= self._required:
            return f"without {_some(self._required)}"
        if self._allowed is not None and not elements <= self._allowed:
            return f"with others than {_some(self._allowed)}"
        return None


class SelectSize(_Selection):
    """Keep structures by their number of atoms.

    Parameters
    ----------
    minimum, maximum : int, optional
        The fewest and the most atoms of a structure that is kept.

    Raises
    ------
    psnc.ConfigurationError
        If neither is given, or no number lies between them.
    """

    name = "select-size"
    description = "Keeps structures by their number of atoms"

    def __init__(
        self,
        minimum: Annotated[int | None, Param(description="The fewest atoms")] = None,
        maximum: Annotated[int | None, Param(description="The most atoms")] = None,
    ) -> None:
        self._range = _Range(self, minimum, maximum)

    def _reason_to_drop(self, structure: AtomicData, position: int) -> str | None:
        return self._range.reason(len(structure), "atoms")


class SelectEnergy(_Selection):
    """Keep structures by their energy.

    An energy that is NaN is in no range.

    Parameters
    ----------
    minimum, maximum : float, optional
        The range, both ends included; eV, or eV an atom.
    per_atom : bool
        Whether the range is of the energy divided by the number of atoms. A structure without
        atoms has none.
    field : {"energy", "free_energy"}
        Which energy.
    missing : {"error", "drop", "keep"}
        What becomes of a structure without it: by default its index fails.

    Raises
    ------
    psnc.ConfigurationError
        If there is no range, or no number lies in it.
    psnc.StageError
        If a structure has no energy, and ``missing`` is ``"error"``.
    """

    name = "select-energy"
    description = "Keeps structures by their energy"

    def __init__(
        self,
        minimum: Annotated[float | None, Param(description="The lowest energy, eV")] = None,
        maximum: Annotated[float | None, Param(description="The highest energy, eV")] = None,
        per_atom: Annotated[
            bool, Param(description="Divide the energy by the number of atoms")
        ] = False,
        field: Annotated[str, Param(description="energy or free_energy")] = "energy",
        missing: Annotated[Missing, _MISSING] = "error",
    ) -> None:
        require_known("field", (field,), ("energy", "free_energy"))
        require_known("missing", (missing,), ("error", "drop", "keep"))
        self._range = _Range(self, minimum, maximum)
        self._per_atom, self._field, self._missing = per_atom, field, missing

    def _reason_to_drop(self, structure: AtomicData, position: int) -> str | None:
        energy = getattr(structure, self._field)
        if energy is None or (self._per_atom and len(structure) == 0):
            return _without(self._field, self._missing, structure, position)
        if self._per_atom:
            return self._range.reason(energy / len(structure), "eV an atom")
        return self._range.reason(energy, "eV")


class SelectForces(_Selection):
    """Keep structures by the largest force on an atom.

    A force that is NaN is in no range. In a structure without atoms the largest force is zero.

    Parameters
    ----------
    minimum, maximum : float, optional
        The range of the largest norm, both ends included; eV/Å.
    missing : {"error", "drop", "keep"}
        What becomes of a structure without forces: by default its index fails.

    Raises
    ------
    psnc.ConfigurationError
        If there is no range, or no number lies in it.
    psnc.StageError
        If a structure has no forces, and ``missing`` is ``"error"``.
    """

    name = "select-forces"
    description = "Keeps structures by the largest force on an atom"

    def __init__(
        self,
        minimum: Annotated[float | None, Param(description="The least largest norm, eV/Å")] = None,
        maximum: Annotated[float | None, Param(description="The most largest norm, eV/Å")] = None,
        missing: Annotated[Missing, _MISSING] = "error",
    ) -> None:
        require_known("missing", (missing,), ("error", "drop", "keep"))
        self._range = _Range(self, minimum, maximum)
        self._missing = missing

    def _reason_to_drop(self, structure: AtomicData, position: int) -> str | None:
        if structure.forces is None:
            return _without("forces", self._missing, structure, position)
        norms = np.linalg.norm(structure.forces.astype(np.float64, copy=False), axis=1)
        return self._range.reason(float(norms.max(initial=0.0)), "eV/Å")


class _Range:
    def __init__(self, stage: _Selection, minimum: float | None, maximum: float | None) -> None:
        if minimum is None and maximum is None:
            raise ConfigurationError(
                f"{stage_name(stage)} was given no range: say minimum, maximum or both"
            )
        self._minimum = -np.inf if minimum is None else minimum
        self._maximum = np.inf if maximum is None else maximum
        if not self._minimum <= self._maximum:
            raise ConfigurationError(
                f"{stage_name(stage)}: nothing lies between minimum={minimum} and maximum={maximum}"
            )

    def reason(self, value: float, unit: str) -> str | None:
        if self._minimum <= value <= self._maximum:
            return None
        if value < self._minimum:
            return f"below {self._minimum:g} {unit}"
        if value > self._maximum:
            return f"above {self._maximum:g} {unit}"
        return f"with a number of {unit} that is NaN"


def _without(field: str, missing: str, structure: AtomicData, position: int) -> str | None:
    if missing == "keep":
        return None
    if missing == "drop":
        return f"without {field}"
    raise StageError(
        f"{place_of(structure, position)} has no {field} to select it by: say missing='drop' or "
        "missing='keep' if that is as it should be"
    )


def _numbers(parameter: str, elements: Any) -> frozenset[int]:
    if isinstance(elements, str):
        raise ConfigurationError(f"{parameter} is {elements!r}; give a list, [{elements!r}]")
    return frozenset(number_of(element) for element in elements)


def _some(elements: frozenset[int]) -> str:
    names = [symbol(number) for number in sorted(elements)]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
