"""What the tests of faults have in common."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from lives import Nursery, nursery
from trials import FACTOR, SEED, Many, Tried


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Tried:
    """Count what was tried, for the line at the end of the tests' output."""

    def count(what: str, number: int) -> None:
        request.node.user_properties.append((f"faults: {what}", number))

    return count


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Return random numbers that are others in each run, and can be had again."""
    print(f"to try the same again: PSNC_TEST_FAULTS_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture
def many() -> Many:
    """Multiply a number of trials by the environment's factor."""
    return lambda number: max(round(number * FACTOR), 1)


@pytest.fixture(scope="module")
def lives() -> Iterator[Nursery]:
    """Where lives are forked from."""
    with nursery() as opened:
        yield opened
