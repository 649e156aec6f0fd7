"""Say, before a run goes on, which of its earlier results are of other code, or run them again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Literal, get_args

from psnc.code_versions import CodeVersion
from psnc.errors import CodeChangedError, PipelineError
from psnc.store import CheckpointStore

__all__ = ["OnCodeChange", "answer_code_change", "require_on_code_change"]

OnCodeChange = Literal["warn", "error", "rerun", "ignore"]

_logger = logging.getLogger("psnc.code")


def require_on_code_change(value: str) -> None:
    """Raise :class:`psnc.PipelineError` for what is none of the choices."""
    if value not in get_args(OnCodeChange):
        choices = ", ".join(map(repr, get_args(OnCodeChange)))
        raise PipelineError(f"on_code_change={value!r}: choose one of {choices}")


def answer_code_change(
    store: CheckpointStore, now: CodeVersion, requested: Collection[int], answer: OnCodeChange
) -> None:
    """Do what was asked for about completed indices that ran with other code.

    Parameters
    ----------
    store : CheckpointStore
        The store, turned to the run.
    now : CodeVersion
        What the code is.
    requested : collection of int
        The indices that the run is about.
    answer : {"warn", "error", "rerun", "ignore"}
        What to do.

    Raises
    ------
    CodeChangedError
        If there are any, and that is the answer.
    """
    if answer == "ignore":
        return
    others = store.other_code(now.digest)
    affected = {digest: _affected(store, digest, requested) for digest in others}
    affected = {digest: indices for digest, indices in affected.items() if indices}
    if not affected:
        return
    text = _what_changed(affected, store.code_versions(), now)
    if answer == "error":
        raise CodeChangedError(
            f"{text}: say on_code_change='rerun' (--on-code-change rerun) to run them again, or "
            "'ignore' to keep them"
        )
    if answer == "rerun":
        store.reset_indices([index for indices in affected.values() for index in indices])
        _logger.warning("%s: they run again", text)
    else:
        _logger.warning(
            "%s: they stay as they are; --on-code-change rerun runs them again, ignore keeps quiet",
            text,
        )


def _affected(store: CheckpointStore, digest: str, requested: Collection[int]) -> list[int]:
    among = requested if isinstance(requested, range) else frozenset(requested)
    return [index for index in store.indices_of_code(digest) if index in among]


def _what_changed(
    affected: Mapping[str, Collection[int]], versions: Mapping[str, CodeVersion], now: CodeVersion
) -> str:
    total = sum(map(len, affected.values()))
    counts: Counter[str] = Counter()
    for digest, indices in affected.items():
        earlier = versions.get(digest)
        if earlier is None:
            counts["code that is not on record"] += len(indices)
            continue
        for stage, what in now.changes_since(earlier) or [_of_python(earlier, now)]:
            counts[f"{stage} ({what})"] += len(indices)
    # The number goes without saying where it is all of them.
    parts = [what if count == total else f"{what}, {count}" for what, count in counts.items()]
    are = "is" if total == 1 else "are"
    results = "result" if total == 1 else "results"
    return (
        f"the code has changed, and {total} {results} {are} of the earlier one: {'; '.join(parts)}"
    )


def _of_python(earlier: CodeVersion, now: CodeVersion) -> tuple[str, str]:
    """Say what has changed where no stage's own code has."""
    return "all stages", f"Python {earlier.python}, now {now.python}"
