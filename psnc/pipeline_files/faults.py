"""What is wrong with a file, gathered so that all of it is said at once."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Iterable
from typing import Any

__all__ = ["Faults", "did_you_mean", "item_place", "one_line", "shown"]

_SHOWN_LENGTH = 60


class Faults:
    """Errors in the order in which they were found, each with its place.

    Attributes
    ----------
    cause : BaseException, optional
        The first exception that made one of them, for a traceback.

    Examples
    --------
    >>> faults = Faults()
    >>> faults.add("source.params.count", "missing")
    >>> print(faults.report("numbers.toml"))
    numbers.toml: 1 error
      source.params.count: missing
    """

    def __init__(self) -> None:
        self._found: list[tuple[str, str]] = []
        self.cause: BaseException | None = None

    def __len__(self) -> int:
        return len(self._found)

    @property
    def places(self) -> list[str]:
        """Where the errors are."""
        return [place for place, _ in self._found]

    def add(self, place: str, message: str, cause: BaseException | None = None) -> None:
        """Note an error; a place of ``""`` is the file itself."""
        self._found.append((place, one_line(message)))
        self.cause = self.cause or cause

    def extend(self, others: Faults) -> None:
        """Note another's errors."""
        self._found.extend(others._found)
        self.cause = self.cause or others.cause

    def report(self, heading: str | os.PathLike[str]) -> str:
        """Say how many errors there are, and then each on a line of its own."""
        count = len(self._found)
        lines = [f"{place}: {message}" if place else message for place, message in self._found]
        first = f"{os.fspath(heading)}: {count} {'error' if count == 1 else 'errors'}"
        return "\n  ".join([first, *lines])


def item_place(place: str, key: Any) -> str:
    """Return the place of one item of a list or table."""
    if isinstance(key, str) and re.fullmatch(r"[\w$-]+", key):
        return f"{place}.{key}" if place else key
    return f"{place}[{key!r}]"


def did_you_mean(given: Any, known: Iterable[str], otherwise: str) -> str:
    """Suggest the closest of the known names, or else what ``otherwise`` says."""
    close = difflib.get_close_matches(str(given), list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise


def shown(value: Any) -> str:
    """Return a value's type and its beginning, for a message."""
    if value is None:
        return "None"
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _SHOWN_LENGTH
    return f"{type(value).__name__} {short.repr(value)}"


def one_line(text: Any) -> str:
    """Join the lines of a text."""
    return " ".join(str(text).split())
