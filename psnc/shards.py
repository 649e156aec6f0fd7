"""Parts of a run that several drivers share: each is a share of what was asked for."""

from __future__ import annotations

import re
from collections.abc import Collection

from attrs import frozen

from psnc.errors import PipelineError

__all__ = ["Shard"]


@frozen
class Shard:
    """One of so many parts, counted from 1.

    Attributes
    ----------
    part, parts : int
        Which one, and of how many.
    """

    part: int
    parts: int

    @classmethod
    def of(cls, value: object) -> Shard:
        """Return the shard that ``"3/16"`` or ``(3, 16)`` names.

        Raises
        ------
        PipelineError
            If there is no such part.
        """
        numbers: object = value
        if isinstance(value, str):
            match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", value, re.ASCII)
            numbers = tuple(map(int, match.groups())) if match else None
        if not isinstance(numbers, (tuple, list)) or [type(each) for each in numbers] != [int] * 2:
            raise PipelineError(
                f"shard={value!r}: give a part and the number of parts, such as '3/16'"
            )
        part, parts = numbers
        if parts < 1:
            raise PipelineError(f"shard={value!r}: divide it into 1 part at least")
        if not 1 <= part <= parts:
            raise PipelineError(f"shard={value!r}: parts are counted from 1 to {parts}")
        return cls(part, parts)

    def indices(self, groups: Collection[tuple[int, ...]]) -> frozenset[int]:
        """Return the indices of this part: neighbouring groups, none of them divided.

        The parts are as equal as the groups allow. All parts together are all indices, and no two
        have one in common.

        Examples
        --------
        >>> sorted(Shard(2, 3).indices([(0,), (1,), (2,), (3,), (4,), (5,)]))
        [2, 3]
        """
        total = sum(map(len, groups))
        chosen: list[int] = []
        begin = 0
        for group in groups:
            # A group belongs to the part that its middle lies in.
            middle = 2 * begin + len(group)
            if middle * self.parts // (2 * total) == self.part - 1:
                chosen.extend(group)
            begin += len(group)
        return frozenset(chosen)
