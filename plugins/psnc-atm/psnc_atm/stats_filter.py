"""AtomicStatsFilter: statistics of every field and component of the structures that pass."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from psnc.errors import ConfigurationError, StageError
from psnc.stages import Filter, Param
from psnc_atm.atomic_data import AtomicData
from psnc_atm.fields import FIELDS, Level
from psnc_atm.filter_input import place_of, require_known, structures_of
from psnc_atm.moments import FIGURES, Moments
from psnc_atm.optional_libraries import require_library

__all__ = ["AtomicStatsFilter"]

# A field, and where in the array of one atom or structure the component stands.
Component = tuple[str, tuple[int, ...]]

# Sums are taken over many atoms at once, and as few arrays as possible are kept until then.
_ATOMS_AT_ONCE = 32_768

_AXES = ("x", "y", "z")
_CELL_AXES = ("a", "b", "c")
_AXES_OF_FIELD: dict[str, tuple[Sequence[str], ...]] = {
    **dict.fromkeys(("positions", "forces", "momenta", "velocities", "dipole"), (_AXES,)),
    "cell": (_CELL_AXES, _AXES),
    "pbc": (_CELL_AXES,),
    "stress": (_AXES, _AXES),
}


class AtomicStatsFilter(Filter[AtomicData, AtomicData]):
    """Add up statistics of every field and component, and write them as a Parquet table.

    The table has a row for each component of each field: ``field``, ``component`` (``x``, ``xy``,
    for the cell ``ax``; empty for a number), ``count``, ``mean``, ``std``, ``var``, ``min``,
    ``max``, ``abs_mean``, ``abs_max``, ``skewness``, ``kurtosis``, ``nan_count``, ``inf_count``.
    Structures pass unchanged, and those that lack a field count nothing for it.

    Sums are exact, and each figure is the float64 next to its exact value. So the table is the
    same, bit for bit, however structures are divided into indices and in which order they come.
    Variance, skewness and kurtosis are those of the population (NumPy's ``ddof=0``, SciPy's
    ``bias=True``), the kurtosis that of Fisher (0 for a normal distribution). ``count`` and the
    figures are of finite values; NaN and infinities are counted apart. A figure that is not
    defined is null: all where no value is finite, skewness and kurtosis where all are equal.

    Parameters
    ----------
    output : str or Path
        The Parquet file that gathering writes.
    fields : sequence of str, optional
        The fields of `AtomicData` to look at; by default every one that a structure has.
    custom : mapping of str to {"atom", "system"}, optional
        Entries of ``AtomicData.info`` to look at besides: numbers or arrays, at level ``"atom"``
        with one row for each atom.

    Raises
    ------
    psnc.ConfigurationError
        If a field or level is unknown, or pyarrow is not installed.
    psnc.StageError
        If an entry of ``custom`` is no number or array of numbers.
    """

    name = "atomic-stats"
    description = "Exact statistics of every field and component, as a Parquet table"
    # Of what an index added up; the output has the name that it was given.
    artifact_suffix = ".json"

    def __init__(
        self,
        output: Annotated[str | Path, Param(description="The Parquet file with the statistics")],
        fields: Annotated[
            Sequence[str] | None,
            Param(description="Fields to look at; by default every one that is there"),
        ] = None,
        custom: Annotated[
            Mapping[str, Level] | None,
            Param(description="Entries of info to look at, each with its level, atom or system"),
        ] = None,
    ) -> None:
        require_library("pyarrow", "AtomicStatsFilter", extra="stats")
        countable = [name for name, kind in FIELDS.items() if kind.level in ("atom", "system")]
        require_known("field", fields or (), countable)
        for level in (custom or {}).values():
            require_known("level", (level,), ("atom", "system"))
        self.output = output
        self._levels: dict[str, str] = {
            name: FIELDS[name].level for name in countable if fields is None or name in fields
        }
        self._custom = dict(custom or {})
        both = sorted(self._custom.keys() & FIELDS.keys())
        if both:
            raise ConfigurationError(
                f"custom: {both[0]!r} is the name of a field of AtomicData, which would have the "
                "same name in the table: give the entry of info another one"
            )
        self._moments: dict[Component, Moments] = {}
        self._waiting: dict[tuple[str, tuple[int, ...], str], list[NDArray[Any]]] = {}
        self._atoms_waiting = 0

    def __call__(self, items: Iterator[AtomicData]) -> Iterable[AtomicData]:
        """Yield the structures unchanged."""
        for position, structure in structures_of(items, self):
            self._take(structure, position)
            yield structure

    def flush(self, path: Path) -> None:
        """Write the sums of this index, which are exact, as JSON."""
        self._add_waiting()
        kept = [
            {
                "field": field,
                "component": list(component),
                **self._moments[field, component].to_json(),
            }
            for field, component in sorted(self._moments)
        ]
        path.write_text(json.dumps({"format": 1, "sums": kept}), encoding="utf-8")

    def merge(self, shards: Sequence[Path], output: Path) -> None:
        """Write the table of all indices."""
        total: dict[Component, Moments] = {}
        for shard in shards:
            for kept in json.loads(shard.read_text(encoding="utf-8"))["sums"]:
                component = kept["field"], tuple(kept["component"])
                total.setdefault(component, Moments()).join(Moments.from_json(kept))
        _write_table(total, output)

    def _take(self, structure: AtomicData, position: int) -> None:
        for name, level in self._levels.items():
            value = getattr(structure, name)
            if value is not None:
                self._keep(name, level, np.asarray(value))
        for name, level in self._custom.items():
            value = structure.info.get(name)
            if value is not None:
                self._keep(name, level, _numbers(name, level, value, structure, position))
        self._atoms_waiting += len(structure) + 1
        if self._atoms_waiting >= _ATOMS_AT_ONCE:
            self._add_waiting()

    def _keep(self, name: str, level: str, array: NDArray[Any]) -> None:
        rows = array if level == "atom" else array[np.newaxis]
        # Integers and floats of one field stay apart, since large integers would be rounded.
        self._waiting.setdefault((name, rows.shape[1:], rows.dtype.kind), []).append(rows)

    def _add_waiting(self) -> None:
        for (name, shape, _), arrays in self._waiting.items():
            rows = np.concatenate(arrays)
            for component in product(*map(range, shape)):
                moments = self._moments.setdefault((name, component), Moments())
                moments.add(_column(rows, component))
        self._waiting = {}
        self._atoms_waiting = 0


def _column(rows: NDArray[Any], component: tuple[int, ...]) -> NDArray[Any]:
    for place in component:
        rows = rows[:, place]
    return rows


def _numbers(
    name: str, level: str, value: Any, structure: AtomicData, position: int
) -> NDArray[Any]:
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise StageError(
            f"{place_of(structure, position)}: {name!r} in info is a {type(value).__name__}, not a "
            "number or array of numbers"
        )
    if level == "atom" and array.shape[:1] != (len(structure),):
        raise StageError(
            f"{place_of(structure, position)}: {name!r} in info has shape {array.shape} for "
            f"{len(structure)} atoms; give one row for each atom, or say level 'system'"
        )
    return array


def _write_table(moments: Mapping[Component, Moments], output: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    order = {name: number for number, name in enumerate(FIELDS)}
    rows = sorted(moments, key=lambda row: (order.get(row[0], len(order)), row))
    figures = [moments[row].figures() for row in rows]
    counts = {
        name: pa.array([getattr(moments[row], name) for row in rows], pa.int64())
        for name in ("count", "nan_count", "inf_count")
    }
    table = pa.table(
        {
            "field": pa.array([field for field, _ in rows], pa.string()),
            "component": pa.array([_label(*row) for row in rows], pa.string()),
            "count": counts.pop("count"),
            **{name: pa.array([each[name] for each in figures], pa.float64()) for name in FIGURES},
            **counts,
        }
    )
    parquet.write_table(table, output)


def _label(field: str, component: tuple[int, ...]) -> str:
    axes = _AXES_OF_FIELD.get(field, ())
    if len(axes) == len(component) and all(
        place < len(names) for place, names in zip(component, axes, strict=True)
    ):
        return "".join(names[place] for place, names in zip(component, axes, strict=True))
    return ",".join(map(str, component))
