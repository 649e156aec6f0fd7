"""Indices as ranges, and as short text of those, such as ``0-99,200``, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

__all__ = ["ranges_in", "ranges_text", "runs_of"]

# Two numbers are shorter by themselves.
_SHORTEST_STRIDE = 3

_RANGE = re.compile(r"(\d+)(?:-(\d+)(?:/(\d+))?)?", re.ASCII)


def ranges_text(indices: Sequence[int]) -> str:
    """Return sorted, distinct indices as ranges that include their end.

    Examples
    --------
    >>> ranges_text([0, 1, 2, 3, 7])
    '0-3,7'
    >>> ranges_text(range(1, 100, 4))
    '1-97/4'
    """
    return ",".join(_texts(indices))


def ranges_in(text: str) -> list[range]:
    """Return the ranges that a text of :func:`ranges_text` names.

    Raises
    ------
    ValueError
        If it is no such text.

    Examples
    --------
    >>> ranges_in("0-3,7")
    [range(0, 4), range(7, 8)]
    """
    return [_range(part) for part in text.split(",")] if text else []


def runs_of(indices: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last of each run of indices without a gap."""
    first = last = None
    for index in indices:
        if last is None or index != last + 1:
            if first is not None and last is not None:
                yield first, last
            first = index
        last = index
    if first is not None and last is not None:
        yield first, last


def _texts(indices: Sequence[int]) -> Iterator[str]:
    place, count = 0, len(indices)
    while place < count:
        first = indices[place]
        length = _length_of_stride(indices, place)
        step = indices[place + 1] - first if length > 1 else 1
        if step > 1 and length < _SHORTEST_STRIDE:
            length = 1
        last = indices[place + length - 1]
        if length == 1:
            yield f"{first}"
        else:
            yield f"{first}-{last}" if step == 1 else f"{first}-{last}/{step}"
        place += length


def _length_of_stride(indices: Sequence[int], place: int) -> int:
    """Return how many indices from a place on are equally far from each other."""
    first, left = indices[place], len(indices) - place
    if indices[-1] - first == left - 1:
        return left
    end = place + 1
    while end < len(indices) and indices[end] - indices[end - 1] == indices[place + 1] - first:
        end += 1
    return end - place


def _range(text: str) -> range:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no range of indices")
    first, last, step = match[1], match[2] or match[1], match[3] or "1"
    return range(int(first), int(last) + 1, int(step))
