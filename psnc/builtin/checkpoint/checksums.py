"""Checksums of an index's rows, so that a changed byte is never taken for a result.

SQLite notices a page that is no page any more, but not a digit that became another one. Two
columns of ``index_results`` have CRC-32 checksums: ``checksum`` of what a resumed run relies on,
which is cheap to verify in the query that reads it, and ``details_checksum`` of all else that is
recorded of the index in this and in three other tables. Either is NULL in rows of a psnc that did
not know them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any
from zlib import crc32

__all__ = ["details_checksum", "result_checksum"]


def result_checksum(
    run_id: int, index: int, status: str, output_paths: str, error: str | None
) -> int:
    """Return the checksum of what a resumed run relies on.

    Parameters
    ----------
    run_id, index, status, output_paths, error
        The columns of ``index_results``.

    Examples
    --------
    >>> result_checksum(1, 7, "completed", '["out/7.txt"]', None)
    1813111719
    """
    text = f"{run_id}\0{index}\0{status}\0{output_paths}\0{error or ''}"
    return crc32(text.encode("utf-8", "surrogatepass"))


def details_checksum(
    run_id: int,
    index: int,
    figures: tuple[Any, ...],
    stages: Sequence[Iterable[Any]],
    outputs: Sequence[tuple[Any, ...]],
    artifacts: Sequence[Iterable[Any]],
) -> int:
    """Return the checksum of all else that is recorded of an index.

    Parameters
    ----------
    run_id, index : int
        Which index.
    figures : tuple
        ``completed_at``, ``wall_time_ns``, ``peak_memory_bytes``, ``gpu_memory_bytes``,
        ``worker_id`` and ``measurements``; then ``attempts`` and ``code_digest``.
    stages : sequence
        ``stage_order``, ``stage_name`` and ``wall_time_ns`` of each stage, in order.
    outputs : sequence of tuple
        ``seq``, ``path``, ``size_bytes`` and ``content_digest`` of each output file, in order.
    artifacts : sequence
        ``filter_order``, ``path`` and ``filter_name`` of each artifact, sorted.
    """
    counts = (len(stages), len(outputs), len(artifacts))
    rows = chain.from_iterable((*stages, *map(_known, outputs), *artifacts))
    figures = _known(figures, always=_FIGURES_ALWAYS)
    text = "\0".join(map(str, chain((run_id, index), figures, counts, rows)))
    return crc32(text.encode("utf-8", "surrogatepass"))


_FIGURES_ALWAYS = 6


def _known(values: tuple[Any, ...], always: int = 2) -> tuple[Any, ...]:
    """Return values without the columns that came later, where they are NULL.

    So rows of an earlier psnc, whose tables have got these columns since, keep their checksum.
    """
    later = values[always:]
    if later.count(None) == 0:
        return values
    return (*values[:always], *(value for value in later if value is not None))
