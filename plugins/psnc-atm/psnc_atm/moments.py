"""Moments: count, mean, variance and so on of numbers, whatever order they come in.

What is kept are exact sums (see `psnc_atm.power_sums`). Adding integers is associative, so that a
result depends on the numbers alone, and not on how they were divided or in which order the parts
were added. Only the figures in the end are rounded, once each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from psnc_atm.power_sums import UNIT_BITS, power_sums

__all__ = ["FIGURES", "Moments"]

FIGURES = (
    *("mean", "std", "var", "min", "max"),
    *("abs_mean", "abs_max", "skewness", "kurtosis"),
)

_COUNTS = ("count", "nan_count", "inf_count")
_SUMS = ("first", "second", "third", "fourth", "absolute")
_BOUNDS = ("lowest", "highest")


class Moments:
    """What is known of a set of numbers; add to it, join it with others, and ask.

    ``count`` is the number of finite values, and figures are of those. NaN and infinities are only
    counted, in ``nan_count`` and ``inf_count``.

    Examples
    --------
    >>> import numpy as np
    >>> moments = Moments()
    >>> moments.add(np.array([1e9, 1e9 + 1, 1e9 + 2]))
    >>> moments.figures()["var"]
    0.6666666666666666
    """

    __slots__ = (*_COUNTS, *_SUMS, *_BOUNDS)

    count: int
    nan_count: int
    inf_count: int
    # In units of 2**-1074 and its powers.
    first: int
    second: int
    third: int
    fourth: int
    absolute: int
    lowest: int | None
    highest: int | None

    def __init__(self) -> None:
        for name in (*_COUNTS, *_SUMS):
            setattr(self, name, 0)
        self.lowest = self.highest = None

    def add(self, values: NDArray[Any]) -> None:
        """Take numbers in: floats of up to 64 bits, integers or booleans, in one dimension."""
        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            if not finite.all():
                nans = int(np.isnan(values).sum())
                self.nan_count += nans
                self.inf_count += int(len(values) - finite.sum()) - nans
                values = values[finite]
        if len(values) == 0:
            return
        self.count += len(values)
        for name, total in zip(_SUMS, power_sums(values), strict=True):
            setattr(self, name, getattr(self, name) + total)
        self._widen(_in_units(values.min()), _in_units(values.max()))

    def join(self, other: Moments) -> None:
        """Take in all the numbers of another one."""
        for name in (*_COUNTS, *_SUMS):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.lowest is not None and other.highest is not None:
            self._widen(other.lowest, other.highest)

    def _widen(self, lowest: int, highest: int) -> None:
        self.lowest = lowest if self.lowest is None else min(self.lowest, lowest)
        self.highest = highest if self.highest is None else max(self.highest, highest)

    def figures(self) -> dict[str, float | None]:
        """Return each of `FIGURES`, the float64 next to its exact value.

        ``var`` and ``std`` are those of the population, as NumPy's are (``ddof=0``). ``skewness``
        and ``kurtosis`` are SciPy's: biased, and the kurtosis that of Fisher, which is 0 for a
        normal distribution. What is not defined is ``None``: everything where no number is finite,
        skewness and kurtosis where all are the same. What is too large for a float64 is infinite.
        """
        if self.lowest is None or self.highest is None:
            return dict.fromkeys(FIGURES)
        count, squares = self.count, self._second_central()
        skewness = kurtosis = None
        if squares:
            cubes, fourths = self._third_central(), self._fourth_central()
            skewness = math.copysign(_root(cubes**2, squares**3), _sign(cubes))
            kurtosis = _ratio(fourths - 3 * squares**2, squares**2)
        unit = 1 << UNIT_BITS
        largest = max(abs(self.lowest), abs(self.highest))
        return {
            "mean": _ratio(self.first, count * unit),
            "std": _root(squares, (count * unit) ** 2),
            "var": _ratio(squares, (count * unit) ** 2),
            "min": _ratio(self.lowest, unit),
            "max": _ratio(self.highest, unit),
            "abs_mean": _ratio(self.absolute, count * unit),
            "abs_max": _ratio(largest, unit),
            "skewness": skewness,
            "kurtosis": kurtosis,
        }

    # Sums of powers of the differences from the mean, times a power of the count that makes them
    # integers.

    def _second_central(self) -> int:
        return self.count * self.second - self.first**2

    def _third_central(self) -> int:
        n, first = self.count, self.first
        return n**2 * self.third - 3 * n * first * self.second + 2 * first**3

    def _fourth_central(self) -> int:
        n, first = self.count, self.first
        return (
            n**3 * self.fourth
            - 4 * n**2 * first * self.third
            + 6 * n * first**2 * self.second
            - 3 * first**4
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything that is kept, as JSON can hold it; equal sets give equal values."""
        kept: dict[str, Any] = {name: getattr(self, name) for name in _COUNTS}
        for name in (*_SUMS, *_BOUNDS):
            value = getattr(self, name)
            kept[name] = None if value is None else _text(value)
        return kept

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Self:
        """Return what `to_json` was called on."""
        made = cls()
        for name in _COUNTS:
            setattr(made, name, int(kept[name]))
        for name in (*_SUMS, *_BOUNDS):
            setattr(made, name, None if kept[name] is None else _integer(kept[name]))
        return made


def _in_units(value: Any) -> int:
    """Return a finite number as a multiple of 2**-1074."""
    numerator, denominator = value.item().as_integer_ratio()
    return int(numerator << UNIT_BITS) // int(denominator)


def _ratio(numerator: int, denominator: int) -> float:
    try:
        # Python rounds this division once, however long the integers are.
        return numerator / denominator
    except OverflowError:
        return math.copysign(math.inf, _sign(numerator))


def _sign(value: int) -> int:
    return -1 if value < 0 else 1


def _root(numerator: int, denominator: int) -> float:
    """Return the square root of a fraction, rounded once."""
    if numerator == 0:
        return 0.0
    # Enough bits for 64 of the root. What is cut off of it decides which way half a bit is rounded.
    shift = max(0, 128 + denominator.bit_length() - numerator.bit_length())
    shift += shift % 2
    scaled, rest = divmod(numerator << shift, denominator)
    root = math.isqrt(scaled)
    inexact = rest != 0 or root * root != scaled
    return _ratio(2 * root + inexact, 1 << (shift // 2 + 1))


def _text(value: int) -> str:
    """Write an integer as an odd one in hexadecimal, and the zero bits behind it."""
    zeros = (value & -value).bit_length() - 1 if value else 0
    return f"{value >> zeros:x}p{zeros}"


def _integer(text: str) -> int:
    digits, _, zeros = text.partition("p")
    return int(digits, 16) << int(zeros)
