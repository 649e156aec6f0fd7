"""What the filters ask of their items and arguments, and what they say if it is not so."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from psnc.errors import ConfigurationError, StageError
from psnc.stages import Stage, stage_name
from psnc_atm.atomic_data import AtomicData

__all__ = ["place_of", "require_known", "structures_of"]


def structures_of(items: Iterator[Any], stage: Stage) -> Iterator[tuple[int, AtomicData]]:
    """Yield structures with their positions among those that reach a stage.

    Raises
    ------
    psnc.StageError
        If an item is no `AtomicData`.
    """
    for position, item in enumerate(items):
        if not isinstance(item, AtomicData):
            raise StageError(
                f"structure {position}: {stage_name(stage)} was given a {type(item).__name__}, not "
                "AtomicData; convert it in a filter before (AtomicData.from_ase)"
            )
        yield position, item


def place_of(structure: AtomicData, position: int) -> str:
    """Name a structure, for the beginning of a message."""
    from psnc_atm.formula import formula_of

    return f"structure {position} ({formula_of(structure.atomic_numbers)})"


def require_known(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse names that are not among the known ones.

    Raises
    ------
    psnc.ConfigurationError
        With the first that is unknown, and all that are known.
    """
    for name in names:
        if name not in known:
            raise ConfigurationError(f"unknown {kind} {name!r}; choose from {', '.join(known)}")
