"""The rules of sources."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from typing import Any

from psnc.errors import PartitionError
from psnc.partition import partition
from psnc.stages import Sink, Source
from psnc.testing.stage_check import (
    call_arguments,
    check_hash_elsewhere,
    check_result_elsewhere,
    check_stage,
    constructed_again,
    fail,
    hash_of,
    pickled_copy,
    require_same,
    require_stage,
)

__all__ = ["check_source"]

_MOST_INDICES = 8


def check_source(source: Source[Any], *, indices: Sequence[int] | None = None) -> None:
    """Check that a source keeps the rules that resuming and parallel runs rely on.

    - It has a length, which stays the same.
    - Every index gives the same items: when asked twice, whatever was asked before, while another
      index is being read, in a copy that went through pickle, and in a source constructed anew,
      here and in another process. (What cannot be sent from there is not compared.)
    - It can be pickled, before and after it was read from.
    - Its hash is the same in every process, and reading does not change it.
    - ``params()`` lists what its constructor takes.
    - ``partition_indices`` puts each index into exactly one group.

    Parameters
    ----------
    source : Source
        The source, of little data: all of it is read several times.
    indices : sequence of int, optional
        Which indices to read; by default all of a few, or the first and the last.

    Raises
    ------
    AssertionError
        If it breaks a rule: one sentence that names both.

    Examples
    --------
    >>> check_source(Numbers(3))
    """
    __tracebackhide__ = True
    require_stage(source, Source)
    length = _length(source)
    chosen = _chosen(length) if indices is None else list(indices)
    check_stage(source)
    own_hash = hash_of(source)
    unread = pickled_copy(source)
    expected = {index: _items(source, index) for index in chosen}
    _check_items(source, unread, expected)
    _check_side_by_side(source, expected)
    _check_groups(source, range(length))
    if len(source) != length:
        fail(source, f"its length was {length} and is {len(source)} after it was read")
    if hash_of(source) != own_hash:
        fail(source, "reading it changes its hash: it changes an argument that it was given")
    check_hash_elsewhere(source)
    check_result_elsewhere(
        source,
        _read_anew,
        (type(source), *call_arguments(source), chosen),
        expected,
        "another process reads other items: sort what a directory or a set gives",
    )


def _read_anew(
    cls: type[Source[Any]], args: list[Any], kwargs: dict[str, Any], indices: list[int]
) -> dict[int, list[Any]]:
    source = cls(*args, **kwargs)
    return {index: list(source[index]) for index in indices}


def _length(source: Source[Any]) -> int:
    __tracebackhide__ = True
    try:
        length, again = len(source), len(source)
    except (TypeError, ValueError) as error:
        fail(source, f"its length is no number of indices ({error})")
    if length != again:
        fail(source, f"its length is first {length} and then {again}")
    if length == 0:
        fail(source, "it has no index to check: construct it with some data")
    return length


def _chosen(length: int) -> list[int]:
    if length <= _MOST_INDICES:
        return list(range(length))
    half = _MOST_INDICES // 2
    return [*range(half), *range(length - half, length)]


def _items(source: Source[Any], index: int) -> list[Any]:
    __tracebackhide__ = True
    items = source[index]
    if not isinstance(items, Iterable):
        fail(source, f"index {index} gives {type(items).__qualname__}: a source yields its items")
    return list(items)


def _check_items(source: Source[Any], unread: Source[Any], expected: dict[int, list[Any]]) -> None:
    __tracebackhide__ = True
    order, last_first = list(expected), list(reversed(expected))
    for asked, indices, sentence in (
        (source, order, "asked again, it gives other items"),
        (unread, order, "a copy that went through pickle gives other items"),
        (
            constructed_again(source),
            last_first,
            "its items depend on which indices were read before",
        ),
        (pickled_copy(source), order, "a copy made after it was read gives other items"),
        (pickled_copy(source, pickle), order, "a copy made after it was read gives other items"),
    ):
        _require_items(source, asked, expected, indices, sentence)


def _require_items(
    source: Source[Any],
    asked: Source[Any],
    expected: dict[int, list[Any]],
    order: Sequence[int],
    sentence: str,
) -> None:
    __tracebackhide__ = True
    for index in order:
        what = f"index {index}: items"
        require_same(source, expected[index], _items(asked, index), what, sentence)


def _check_side_by_side(source: Source[Any], expected: dict[int, list[Any]]) -> None:
    """Read two indices in turns, as two threads do."""
    __tracebackhide__ = True
    for pair in zip(expected, list(expected)[1:], strict=False):
        readers = {index: iter(source[index]) for index in pair}
        found: dict[int, list[Any]] = {index: [] for index in pair}
        while readers:
            for index, reader in list(readers.items()):
                try:
                    found[index].append(next(reader))
                except StopIteration:
                    del readers[index]
        for index in pair:
            require_same(
                source,
                expected[index],
                found[index],
                f"index {index}: items",
                "read in turns with another index, as threads do, it gives other items",
            )


def _check_groups(source: Source[Any], indices: range) -> None:
    __tracebackhide__ = True
    for some in (indices, indices[::2], indices[1:], indices[:1]):
        if len(some) == 0:
            continue
        try:
            groups = partition(source, _NoWishes(), list(some))
            again = partition(source, _NoWishes(), list(some))
        except PartitionError as error:
            fail(source, f"{error} (asked about {list(some)})")
        require_same(source, groups, again, "groups", "partition_indices() changes its answer")


class _NoWishes(Sink[Any]):
    """A sink that lets every index stand alone."""

    def __call__(self, items: Any, index: int) -> None: ...
