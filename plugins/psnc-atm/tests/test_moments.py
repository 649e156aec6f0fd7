"""Moments are exact, whatever the numbers are and however they are divided."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from psnc_atm.moments import FIGURES, Moments
from psnc_atm.power_sums import power_sums

RELATIVE = 1e-10
# What a float64 can hold, and where it no longer has all of its bits.
LARGEST, SMALLEST_NORMAL = Fraction(float(np.finfo(float).max)), Fraction(2) ** -1022


def moments_of(values: Any) -> Moments:
    moments = Moments()
    moments.add(np.asarray(values))
    return moments


def exact(values: list[Any]) -> dict[str, Fraction]:
    """The figures, or their squares where they are roots, from fractions."""
    numbers = [Fraction(value) for value in values]
    count = len(numbers)
    mean = sum(numbers) / count
    second, third, fourth = (
        sum((number - mean) ** power for number in numbers) / count for power in (2, 3, 4)
    )
    figures = {
        "mean": mean,
        "var": Fraction(second),
        "std squared": Fraction(second),
        "min": min(numbers),
        "max": max(numbers),
        "abs_mean": Fraction(sum(map(abs, numbers))) / count,
        "abs_max": max(map(abs, numbers)),
    }
    if second:
        figures["skewness squared"] = Fraction(third**2) / second**3
        figures["kurtosis"] = Fraction(fourth) / second**2 - 3
    return figures


def assert_close(found: float | None, expected: Fraction) -> None:
    assert found is not None
    if abs(expected) > LARGEST:
        assert math.isinf(found)
        assert (found > 0) == (expected > 0)
        return
    slack = max(abs(expected) * Fraction(RELATIVE), Fraction(2) ** -1074)
    assert abs(Fraction(found) - expected) <= slack, (found, float(expected))


def assert_agree(values: list[Any], figures: dict[str, float | None]) -> None:
    expected = exact(values)
    for name, value in expected.items():
        if name.endswith(" squared"):
            root = figures[name.removesuffix(" squared")]
            assert root is not None
            if value < Fraction(2) ** -2148:  # of which the root is smaller than any float64
                assert abs(root) <= 5e-324
            elif value > LARGEST**2:
                assert math.isinf(root)
            else:
                relative = abs(Fraction(root) ** 2 / value - 1) if value else Fraction(root)
                assert relative <= Fraction(RELATIVE) or abs(root) < float(SMALLEST_NORMAL), name
        else:
            assert_close(figures[name], value)


RANDOM = np.random.default_rng(7)
ADVERSARIAL: dict[str, NDArray[Any]] = {
    "an offset of 1e9 and a tiny variance": 1e9 + 1e-6 * RANDOM.normal(size=300),
    "an offset that the mean rounds to": 1e15 + RANDOM.integers(0, 2, 300) / 8,
    "magnitudes of 1e-300 to 1e300": RANDOM.normal(size=200)
    * 10.0 ** RANDOM.integers(-300, 300, 200),
    "all as small as can be": np.array([5e-324, -5e-324, 1e-323, 0.0]),
    "all as large as can be": np.array([1.7e308, -1.7e308, 1.6e308, 1.7976931348623157e308]),
    "large ones that cancel": np.array([1e300, 1.0, -1e300, 1e-300]),
    "one value": np.array([0.1]),
    "a constant": np.full(1000, 0.1),
    "a constant but for one": np.array([0.1] * 999 + [np.nextafter(0.1, 1)]),
    "zeros of both signs": np.array([0.0, -0.0]),
    "more than are summed at once": RANDOM.normal(size=20_001),
    "full significands": np.nextafter(np.full(9000, 2.0**60), 0),
    "half and single precision": RANDOM.normal(size=99).astype(np.float32),
    "halves": RANDOM.normal(size=99).astype(np.float16),
    "small integers": RANDOM.integers(-9, 9, 100),
    "large integers": np.array([2**63 - 1, -(2**63), 2**53 + 1, 0]),
    "large integers close together": np.array([2**63 - 1, 2**63 - 2, 2**63 - 5]),
    "integers without a sign": np.array([2**64 - 1, 0], dtype=np.uint64),
    "booleans": np.array([True, False, True]),
    "small steps": RANDOM.integers(0, 4, 50).astype(np.int8),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_figures_of_adversarial_numbers(name: str) -> None:
    values = ADVERSARIAL[name]
    moments = moments_of(values)
    assert moments.count == len(values)
    numbers = [int(value) if values.dtype.kind in "iub" else float(value) for value in values]
    assert_agree(numbers, moments.figures())


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_sums_are_exact(name: str) -> None:
    values = ADVERSARIAL[name]
    integral = values.dtype.kind in "iub"
    numbers = [Fraction(int(value) if integral else float(value)) for value in values]
    unit = Fraction(2) ** 1074
    expected = [sum(number**power for number in numbers) * unit**power for power in (1, 2, 3, 4)]
    assert list(power_sums(values)) == [*expected, sum(map(abs, numbers)) * unit]


def test_figures_of_tame_numbers_are_those_of_numpy_and_scipy() -> None:
    values = RANDOM.gamma(2.0, size=5000)
    figures = moments_of(values).figures()
    expected = {
        "mean": np.mean(values),
        "std": np.std(values),
        "var": np.var(values),
        "min": np.min(values),
        "max": np.max(values),
        "abs_mean": np.mean(np.abs(values)),
        "abs_max": np.max(np.abs(values)),
        "skewness": stats.skew(values),
        "kurtosis": stats.kurtosis(values),
    }
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=RELATIVE), name


def test_skewness_has_its_sign() -> None:
    for values in ([0.0, 0, 1], [0.0, 1, 1]):
        assert moments_of(values).figures()["skewness"] == pytest.approx(stats.skew(values))


def test_what_is_too_large_for_a_float_is_infinite_and_its_root_is_not() -> None:
    figures = moments_of([1e300, -1e300]).figures()
    assert figures["var"] == math.inf
    assert figures["std"] == 1e300


def test_nothing_is_defined_of_nothing() -> None:
    empty = moments_of(np.empty(0))
    assert empty.count == 0
    assert empty.figures() == dict.fromkeys(FIGURES)


@pytest.mark.parametrize("values", [[0.1], [0.1] * 7, [3]])
def test_skewness_and_kurtosis_of_equal_numbers_are_not_defined(values: list[float]) -> None:
    figures = moments_of(values).figures()
    assert figures["var"] == figures["std"] == 0.0
    assert figures["skewness"] is None
    assert figures["kurtosis"] is None


def test_what_is_not_finite_is_counted_apart() -> None:
    moments = moments_of([1.0, np.nan, np.inf, 3.0, -np.inf, np.nan])
    assert (moments.count, moments.nan_count, moments.inf_count) == (2, 2, 2)
    assert moments.figures() == moments_of([1.0, 3.0]).figures()


def test_nothing_but_what_is_not_finite() -> None:
    moments = moments_of([np.nan, np.inf])
    assert (moments.count, moments.nan_count, moments.inf_count) == (0, 1, 1)
    assert moments.figures() == dict.fromkeys(FIGURES)


NUMBERS = st.one_of(
    st.lists(st.floats(), max_size=40).map(np.array),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40).map(lambda v: np.array(v, np.int64)),
    st.lists(st.booleans(), max_size=40).map(lambda v: np.array(v, bool)),
)


@given(parts=st.lists(NUMBERS, max_size=6), order=st.randoms(use_true_random=False))
def test_neither_division_nor_order_changes_anything(parts: list[Any], order: Any) -> None:
    one_by_one = Moments()
    for part in parts:
        for value in part:
            one_by_one.add(np.array([value]))
    shuffled = list(parts)
    order.shuffle(shuffled)
    joined = Moments()
    for part in shuffled:
        joined.join(Moments.from_json(moments_of(part).to_json()))
    assert joined.to_json() == one_by_one.to_json()
    assert joined.figures() == one_by_one.figures()


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
def test_any_numbers_agree_with_fractions(values: list[float]) -> None:
    assert_agree(values, moments_of(np.array(values)).figures())
