"""Exact sums of the first four powers of numbers, in tens of nanoseconds a number.

A float64 is an integer of 53 bits times a power of two. So sums of its powers are integers times a
power of two as well, and Python's integers hold them without rounding. What is left is to get there
without a Python operation for each number:

- Numbers whose exponents differ by less than eight share a window: shifted to the same power of two
  they are integers below 2**60, three limbs of twenty bits each.
- Their squares are six such limbs.
- A product of two limbs is below 2**40, and the sum of 8192 such products below 2**53, where
  float64 is exact in whatever order it adds. So one matrix product of the limbs with themselves
  has all of the sums: limbs by ones, limbs by limbs of the square, and those among themselves.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["UNIT_BITS", "power_sums"]

# Every float64 is a whole number of 2**-1074, the smallest subnormal one.
UNIT_BITS = 1074

_FRACTION_BITS = 52
_FRACTION = (1 << _FRACTION_BITS) - 1
_ALL_BUT_SIGN = (1 << 63) - 1

_LIMB_BITS = 20
_LIMB = (1 << _LIMB_BITS) - 1
_WINDOW_BITS = 3
_WINDOWS = 256
_MOST_AT_ONCE = 1 << (53 - 2 * _LIMB_BITS)

# Rows of the matrix of limbs. Limbs of the number have its sign.
_ONE, _SIGN, _LIMBS, _SQUARE = 0, 1, slice(2, 5), slice(5, 11)
_ROWS = 11
# Fewer different integers than this are counted instead.
_MOST_COUNTED = 4096


def power_sums(values: NDArray[Any]) -> tuple[int, int, int, int, int]:
    """Return the sums of the values, their squares, cubes, fourth powers and absolute values.

    Parameters
    ----------
    values : ndarray
        Finite real numbers, integers or booleans, in one dimension.

    Returns
    -------
    tuple of int
        The sum of power ``k`` in units of ``2**(-1074 * k)``, for ``k`` from 1 to 4, and that of
        the absolute values in units of ``2**-1074``. They are exact.
    """
    if values.dtype.kind in "iub":
        return _sums_of_integers(values)
    totals = [0, 0, 0, 0, 0]
    numbers = np.ascontiguousarray(values, dtype=np.float64)
    for start in range(0, len(numbers), _MOST_AT_ONCE):
        _add_floats(totals, numbers[start : start + _MOST_AT_ONCE])
    return tuple(totals)  # type: ignore[return-value]


def _sums_of_integers(values: NDArray[Any]) -> tuple[int, int, int, int, int]:
    sums = [0, 0, 0, 0, 0]
    for value, count in _counted(values):
        for power in range(1, 5):
            sums[power - 1] += count * value**power
        sums[4] += count * abs(value)
    powers = (1, 2, 3, 4, 1)
    return tuple(  # type: ignore[return-value]
        total << (UNIT_BITS * power) for total, power in zip(sums, powers, strict=True)
    )


def _counted(values: NDArray[Any]) -> list[tuple[int, int]]:
    """Return each value with how often it occurs."""
    if len(values) == 0:
        return []
    lowest, highest = int(values.min()), int(values.max())
    if highest - lowest < _MOST_COUNTED and max(-lowest, highest) < 2**62:
        counts = np.bincount(values.astype(np.int64) - lowest)
        found = np.flatnonzero(counts)
        return list(zip((found + lowest).tolist(), counts[found].tolist(), strict=True))
    different, numbers = np.unique(values, return_counts=True)
    return list(zip(different.tolist(), numbers.tolist(), strict=True))


def _add_floats(totals: list[int], numbers: NDArray[np.float64]) -> None:
    integers, windows = _integers_in_windows(numbers)
    counts = np.bincount(windows, minlength=_WINDOWS)
    used = np.flatnonzero(counts).tolist()
    if len(used) > 1:
        order = np.argsort(windows, kind="stable")
        integers, numbers = integers[order], numbers[order]
    limbs = _limbs(integers, np.copysign(1.0, numbers))
    start = 0
    for window in used:
        stop = start + int(counts[window])
        part = limbs[:, start:stop]
        _add_window(totals, part @ part.T, window << _WINDOW_BITS)
        start = stop


def _integers_in_windows(
    numbers: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return absolute values as integers below 2**60, and the windows that they are shifted to."""
    bits = numbers.view(np.int64) & _ALL_BUT_SIGN
    # Counted from 2**-1074. Subnormal numbers have the exponent of the smallest normal ones, and
    # are told from them by the bit of the significand that is not written down.
    position = bits >> _FRACTION_BITS
    normal = np.minimum(position, 1)
    position -= normal
    bits &= _FRACTION
    bits |= normal << _FRACTION_BITS
    bits <<= position & ((1 << _WINDOW_BITS) - 1)
    position >>= _WINDOW_BITS
    return bits, position.astype(np.uint8)


def _limbs(integers: NDArray[np.int64], sign: NDArray[np.float64]) -> NDArray[np.float64]:
    rows, (low, middle, high, carry, product) = _workspace(len(integers))
    rows[_ONE] = 1
    rows[_SIGN] = sign
    np.bitwise_and(integers, _LIMB, out=low)
    np.right_shift(integers, _LIMB_BITS, out=middle)
    middle &= _LIMB
    np.right_shift(integers, 2 * _LIMB_BITS, out=high)
    for row, limb in zip(rows[_LIMBS], (low, middle, high), strict=True):
        np.multiply(limb, sign, out=row)
    square = rows[_SQUARE]
    carry[:] = 0
    for row, pairs in zip(
        square,
        (
            ((low, low, 1),),
            ((low, middle, 2),),
            ((low, high, 2), (middle, middle, 1)),
            ((middle, high, 2),),
            ((high, high, 1),),
            (),
        ),
        strict=True,
    ):
        for one, other, times in pairs:
            np.multiply(one, other, out=product)
            for _ in range(times):
                carry += product
        np.bitwise_and(carry, _LIMB, out=product)
        row[:] = product
        carry >>= _LIMB_BITS
    return rows


class _Workspace(threading.local):
    """Memory of each thread for one chunk.

    To get it anew for each chunk, and from the system, takes longer than to calculate in it.
    """

    def __init__(self) -> None:
        self.rows = np.empty((_ROWS, _MOST_AT_ONCE))
        self.integers = np.empty((5, _MOST_AT_ONCE), dtype=np.int64)


_OWN = _Workspace()


def _workspace(count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    return _OWN.rows[:, :count], _OWN.integers[:, :count]


def _add_window(totals: list[int], products: NDArray[np.float64], shift: int) -> None:
    square = products[_SQUARE]
    for number, (block, power) in enumerate(
        (
            (products[_ONE, _LIMBS][np.newaxis], 1),
            (products[_ONE, _SQUARE][np.newaxis], 2),
            (products[_LIMBS, _SQUARE], 3),
            (square[:, _SQUARE], 4),
            (products[_SIGN, _LIMBS][np.newaxis], 1),
        )
    ):
        totals[number] += _joined(block) << (shift * power)


def _joined(block: NDArray[np.float64]) -> int:
    """Put sums of products of limbs together to one integer."""
    return sum(
        int(entry) << (_LIMB_BITS * (row + column))
        for row, entries in enumerate(block.tolist())
        for column, entry in enumerate(entries)
    )
