"""AtomicInfoFilter: what a dataset is made of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from psnc.stages import Filter, Param
from psnc_atm.atomic_data import AtomicData
from psnc_atm.fields import FIELDS
from psnc_atm.filter_input import structures_of
from psnc_atm.formula import composition, hill_formula, symbol

__all__ = ["AtomicInfoFilter"]

Composition = tuple[tuple[int, int], ...]


class AtomicInfoFilter(Filter[AtomicData, AtomicData]):
    """Count what the structures that pass are made of, and write it as a JSON file.

    The file has

    - ``structures`` and ``atoms``: how many there are;
    - ``elements``: of each symbol the ``atoms``, and the ``structures`` that have some;
    - ``compositions``: structures by formula, in Hill's order;
    - ``atom_counts``: structures by their number of atoms;
    - ``periodicity``: structures by the lattice vectors that are periodic, ``abc`` for a crystal,
      ``none`` for a molecule;
    - ``fields`` and ``info``: structures by the fields, and by the entries of ``info``, that they
      have.

    Everything is a count, and so the same however structures are divided into indices. Structures
    pass unchanged.

    Parameters
    ----------
    output : str or Path
        The JSON file that gathering writes.
    """

    name = "atomic-info"
    description = "Compositions, elements and atom counts, as a JSON file"
    artifact_suffix = ".json"

    def __init__(
        self, output: Annotated[str | Path, Param(description="The JSON file with the counts")]
    ) -> None:
        self.output = output
        self._compositions: Counter[Composition] = Counter()
        self._periodicity: Counter[str] = Counter()
        # By the names together, of which there are few, and each alone in the end.
        self._fields: Counter[tuple[str, ...]] = Counter()
        self._info: Counter[tuple[str, ...]] = Counter()

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        """Yield the structures unchanged."""
        for _, structure in structures_of(items, self):
            self._compositions[composition(structure.atomic_numbers)] += 1
            self._periodicity[_periodicity(structure)] += 1
            known = tuple(name for name in FIELDS if getattr(structure, name) is not None)
            self._fields[known] += 1
            self._info[tuple(map(str, structure.info))] += 1
            yield structure

    def flush(self, path: Path) -> None:
        """Write the counts of this index."""
        path.write_text(json.dumps(self._counts()), encoding="utf-8")

    def merge(self, shards: Sequence[Path], output: Path) -> None:
        """Write the counts of all indices."""
        total = self._counts()
        for shard in shards:
            _add(total, json.loads(shard.read_text(encoding="utf-8")))
        _write(total, output)

    def _counts(self) -> dict[str, Any]:
        atom_counts: Counter[int] = Counter()
        atoms_of: Counter[int] = Counter()
        structures_with: Counter[int] = Counter()
        compositions: Counter[str] = Counter()
        for parts, structures in self._compositions.items():
            atom_counts[sum(count for _, count in parts)] += structures
            compositions[hill_formula(dict(parts))] += structures
            for number, count in parts:
                atoms_of[number] += count * structures
                structures_with[number] += structures
        return {
            "structures": self._compositions.total(),
            "atoms": atoms_of.total(),
            "elements": {
                symbol(number): {"atoms": atoms_of[number], "structures": structures_with[number]}
                for number in atoms_of
            },
            "compositions": dict(compositions),
            "atom_counts": {str(atoms): count for atoms, count in atom_counts.items()},
            "periodicity": dict(self._periodicity),
            "fields": _alone(self._fields),
            "info": _alone(self._info),
        }


def _alone(together: Counter[tuple[str, ...]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for names, structures in together.items():
        counts.update(dict.fromkeys(names, structures))
    return dict(counts)


def _periodicity(structure: AtomicData) -> str:
    periodic = structure.pbc.tolist()
    return "".join(axis for axis, is_so in zip("abc", periodic, strict=True) if is_so) or "none"


def _add(total: dict[str, Any], more: dict[str, Any]) -> None:
    """Add counts to those of the same names, tables of counts included."""
    for name, value in more.items():
        if isinstance(value, dict):
            _add(total.setdefault(name, {}), value)
        else:
            total[name] = total.get(name, 0) + value


def _write(counts: dict[str, Any], path: Path) -> None:
    ordered = {name: _ordered(value) for name, value in counts.items()}
    path.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _ordered(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _ordered(value[name]) for name in sorted(value, key=_number_or_text)}


def _number_or_text(name: str) -> tuple[int, str]:
    return (int(name) if name.isdecimal() else 0), name
