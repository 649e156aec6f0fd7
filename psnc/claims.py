"""What a driver claims: the indices of a run that it is at work on, for others to leave alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import attrs
from attrs import frozen

from psnc.index_ranges import ranges_in
from psnc.processes import Life, ProcessIdentity

__all__ = ["ALL", "Claim", "claims_in", "claims_text", "shown_indices"]

ALL = "all"

# Of a claim's indices, in a message.
_SHOWN = 60


@frozen
class Claim:
    """The indices that one driver has claimed of a run.

    Attributes
    ----------
    invocation_id : str
        The call of ``run_pipeline``; shared by its workers.
    hostname : str
        The driver's machine.
    pid : int
        The driver's process.
    machine : str
        What tells the boot and the container of that machine from others; empty if not known.
    process_started_at : str
        When the process began, in the words of its machine.
    started_at : str
        When the run began: ISO-8601 time in UTC, by the driver's clock.
    beat : int
        Counted up by the driver every now and then, as a sign of life.
    indices : str
        The indices as ranges, such as ``0-99,200``; ``all`` for all that there are.
    """

    invocation_id: str
    hostname: str
    pid: int
    machine: str
    process_started_at: str
    started_at: str
    beat: int
    indices: str

    def life(self) -> Life:
        """Tell whether the driver lives, if its process is one of this machine."""
        identity = (self.hostname, self.pid, self.machine, self.process_started_at)
        return ProcessIdentity(*identity).life()

    def overlaps(self, other: Claim) -> bool:
        """Tell whether two claims have an index in common."""
        if ALL in (self.indices, other.indices):
            return bool(self.indices and other.indices)
        own = ranges_in(self.indices)
        if not own:
            return False
        first, last = min(each[0] for each in own), max(each[-1] for each in own)
        # Of two parts of a run, as they mostly are, nothing is left to be written out.
        others = [_within(each, first, last) for each in ranges_in(other.indices)]
        if not any(others):
            return False
        return not set(chain.from_iterable(own)).isdisjoint(chain.from_iterable(others))

    @property
    def driver(self) -> str:
        """The driver and what it is at, for a message."""
        since = self.started_at[:19].replace("T", " ")
        what = shown_indices(self.indices)
        return f"process {self.pid} on {self.hostname} since {since} UTC ({what})"


def _within(indices: range, first: int, last: int) -> range:
    """Return those of a range that are neither below the first nor beyond the last."""
    step = indices.step
    left_out = max(-(-(first - indices.start) // step), 0)
    return range(indices.start + left_out * step, min(indices.stop, last + 1), step)


def shown_indices(indices: str) -> str:
    """Return the indices of a claim as a message has them, in one line at the most.

    Examples
    --------
    >>> shown_indices("all"), shown_indices("0-99,200")
    ('all indices', 'indices 0-99,200')
    """
    if indices == ALL:
        return "all indices"
    if len(indices) > _SHOWN:
        indices = f"{indices[:_SHOWN].rpartition(',')[0]},…"
    return f"indices {indices or 'none'}"


def claims_text(claims: Sequence[Claim]) -> str | None:
    """Return claims as a store keeps them: a JSON array, or ``None`` if there are none."""
    return json.dumps([attrs.asdict(claim) for claim in claims]) if claims else None


def claims_in(text: Any) -> tuple[Claim, ...]:
    """Return the claims that a store has kept.

    Raises
    ------
    ValueError
        If it is no text of :func:`claims_text`, nor that of a later psnc.
    """
    if text is None:
        return ()
    if not isinstance(text, str):
        raise ValueError("no text")
    entries = json.loads(text)
    if not isinstance(entries, list):
        raise ValueError("no array")
    return tuple(map(_claim_in, entries))


def _claim_in(entry: Any) -> Claim:
    if not isinstance(entry, dict):
        raise ValueError("an entry is no object")
    fields = attrs.fields(Claim)
    values: dict[str, Any] = {field.name: entry.get(field.name) for field in fields}
    for field in fields:
        kind = int if field.name in ("pid", "beat") else str
        if type(values[field.name]) is not kind:
            raise ValueError(f"an entry has no {field.name}")
    claim = Claim(**values)
    if claim.pid <= 0 or (claim.indices != ALL and not all(ranges_in(claim.indices))):
        raise ValueError("an entry names no process or no indices")
    return claim
