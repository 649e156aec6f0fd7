"""Which indices must stay together in one worker, as the source and the sink ask for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from psnc.errors import PartitionError
from psnc.stages import Sink, Source, stage_name

__all__ = ["partition"]


class _EachAlone(Collection[tuple[int, ...]]):
    """Groups of one index each, which take no memory until they are looked at."""

    def __init__(self, indices: Sequence[int]) -> None:
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return zip(self._indices)

    def __contains__(self, group: object) -> bool:
        return isinstance(group, tuple) and len(group) == 1 and group[0] in self._indices


def partition(
    source: Source[Any], sink: Sink[Any], indices: Sequence[int]
) -> Collection[tuple[int, ...]]:
    """Split indices into groups, each to be run in order by one worker.

    Indices that either stage wants together are together: the groups are the connected
    components of both stages' wishes, sorted by their first index.

    Raises
    ------
    PartitionError
        If a stage's groups do not cover each index exactly once.
    """
    wishes = [
        _checked(stage, groups, indices)
        for stage in (source, sink)
        if (groups := stage.partition_indices(indices)) is not None
    ]
    if not wishes:
        return _EachAlone(indices)
    if len(wishes) == 1:
        return sorted((group for group in wishes[0] if group), key=lambda group: group[0])
    return _connected(wishes, indices)


def _checked(
    stage: Source[Any] | Sink[Any], wish: Iterable[Iterable[int]], indices: Sequence[int]
) -> list[tuple[int, ...]]:
    where = f"{stage_name(stage)}.partition_indices()"
    try:
        groups = [tuple(group) for group in wish]
    except TypeError:
        raise PartitionError(f"{where} returned no groups: return a list of lists") from None
    grouped = [index for group in groups for index in group]
    if len(grouped) == len(indices) and set(grouped) == set(indices):
        return groups
    missing = sorted(set(indices) - set(grouped))
    if missing:
        raise PartitionError(f"{where} leaves out index {missing[0]}: group each index once")
    unknown = sorted(set(grouped) - set(indices))
    if unknown:
        raise PartitionError(f"{where} names index {unknown[0]}, which is not to be run")
    raise PartitionError(f"{where} names an index more than once: group each index once")


def _connected(
    wishes: Sequence[Sequence[tuple[int, ...]]], indices: Sequence[int]
) -> list[tuple[int, ...]]:
    leader = {index: index for index in indices}

    def find(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    for groups in wishes:
        for group in groups:
            for index in group[1:]:
                first, other = sorted((find(group[0]), find(index)))
                leader[other] = first
    components: dict[int, list[int]] = {}
    for index in sorted(indices):
        components.setdefault(find(index), []).append(index)
    return [tuple(component) for component in components.values()]
