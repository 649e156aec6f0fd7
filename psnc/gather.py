"""What completed indices left, put together: shards of stateful filters, and what sinks gather."""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from psnc.atomic import atomic_path
from psnc.errors import PipelineError, StageError
from psnc.execution import output_paths, take_longer_suffix
from psnc.stages import Filter, constructor_arguments, gathers, is_stateful, stage_name
from psnc.store import shown_url

if TYPE_CHECKING:
    from psnc.pipeline import Pipeline

__all__ = ["Gathered", "gather", "gather_pipeline", "require_gatherable"]


@frozen
class Gathered:
    """What came of gathering.

    Attributes
    ----------
    files : tuple of str
        The files written, in the order of the filters, then those of the sink.
    completed : int
        The indices whose shards are in them.
    total : int
        The indices of the source.
    """

    files: tuple[str, ...]
    completed: int
    total: int


def gather_pipeline(pipeline: Pipeline[Any]) -> list[str]:
    """Put together what filters added up, and sinks left to gather, in the completed indices.

    A filter's ``merge`` is given the files that its ``flush`` wrote for the completed indices, in
    the order of the indices, and nothing else: none of an index that failed, was reset or is at
    work, and none twice. So the outcome depends on which indices are completed, and not on how they
    came to be. It can be called at any time, again too: each file is written anew as a whole
    (see :func:`psnc.atomic_write`).

    The file is the filter's ``output``: an attribute or a constructor's argument that is text or a
    path. For a filter without one it lies beside the database, in a directory with its name and
    ``.gathered``, and is named after the filter. If a filter's ``flush`` wrote nothing in any
    completed index, it has no file, and one of an earlier call is removed.

    Last comes the sink: its ``gather``, if it has one, is given the same indices, and says which
    files it made (see :meth:`psnc.Sink.gather`).

    Parameters
    ----------
    pipeline : Pipeline
        The pipeline that was run, or with ``resume=True`` one like it.

    Returns
    -------
    list of str
        The files, in the order of the filters, then those of the sink; empty if the pipeline has
        neither a stateful filter nor a sink that gathers.

    Raises
    ------
    PipelineError
        If no index is completed, or a file that ``flush`` wrote is not there any more.
    StageError
        If a filter has no ``merge``, or one that does not write its file; if two filters have
        the same ``output``; or if the sink's ``gather`` returns something else than paths.
    OutputError
        If a file cannot be written.
    TrackingDisabledError
        If the pipeline records nothing.
    Exception
        Whatever ``merge``, or the sink's ``gather``, raises.

    Examples
    --------
    >>> import json
    >>> from psnc import Filter
    >>> class Total(Filter[int, int]):
    ...     def __init__(self, output: str):
    ...         self.output, self.total = output, 0
    ...     def __call__(self, items):
    ...         for item in items:
    ...             self.total += item
    ...             yield item
    ...     def flush(self, path):
    ...         path.write_text(json.dumps(self.total))
    ...     def merge(self, shards, output):
    ...         output.write_text(json.dumps(sum(json.loads(each.read_text()) for each in shards)))
    >>> pipeline = Numbers(4).filter(Total("total.json")).write(WriteText("out"))
    >>> paths = pipeline[2], pipeline[3]
    >>> gather_pipeline(pipeline)
    ['total.json']
    >>> Path("total.json").read_text()
    '5'
    """
    gathered = gather(pipeline)
    if pipeline.gathers and not gathered.completed:
        place = shown_url(pipeline.store_url)
        raise PipelineError(f"no index of {place} is completed: run the pipeline before gathering")
    return list(gathered.files)


def gather(pipeline: Pipeline[Any]) -> Gathered:
    """Do what :func:`gather_pipeline` does, and say of how many indices."""
    sink = pipeline.require_sink()
    store = pipeline.require_store("gather_pipeline()")
    outputs = require_gatherable(pipeline)
    total = len(pipeline.source)
    # First which are completed: what is completed meanwhile is left out as a whole.
    completed = sorted(index for index in store.completed_indices() if index < total)
    artifacts = store.artifacts() if outputs and completed else {}
    shards = {order: _shards_of(order, completed, artifacts) for order in outputs}
    for order in outputs:
        _require_all(pipeline, order, shards[order])
    files = []
    for order, output in outputs.items() if completed else ():
        paths = list(shards[order].values())
        if paths:
            _merge(pipeline.filters[order - 1], paths, output)
            files.append(str(output))
        elif output.is_file():
            output.unlink()
    if completed and gathers(sink):
        files += output_paths(sink, sink.gather(completed))
    return Gathered(tuple(files), len(completed), total)


def require_gatherable(pipeline: Pipeline[Any]) -> dict[int, Path]:
    """Return where each stateful filter's file is to be, by the filter's place in the pipeline.

    Raises
    ------
    StageError
        If what a filter adds up cannot be put together.
    """
    outputs: dict[int, Path] = {}
    for order, filter in enumerate(pipeline.filters, start=1):
        if not is_stateful(filter):
            continue
        if not callable(getattr(filter, "merge", None)):
            raise StageError(
                f"{stage_name(filter)} has flush() and no merge(), so that its files cannot be put "
                "together: write merge(shards, output), or do without (psnc run --no-gather)"
            )
        outputs[order] = _own_output(filter) or pipeline.gathered_path(order, filter)
    owners: dict[str, str] = {}
    for order, output in outputs.items():
        name = f"{stage_name(pipeline.filters[order - 1])} (filter {order})"
        place = os.path.realpath(output)
        if place in owners:
            raise StageError(
                f"{owners[place]} and {name} have the same output, {output}: give each its own"
            )
        owners[place] = name
    return outputs


def _own_output(filter: Filter[Any, Any]) -> Path | None:
    """Return where a filter wants its file, if it says so."""
    arguments = constructor_arguments(filter)
    for output in (getattr(filter, "output", None), arguments.get("output")):
        if output and isinstance(output, (str, os.PathLike)):
            return Path(output).expanduser()
    return None


def _shards_of(
    order: int, completed: Sequence[int], artifacts: Mapping[int, Sequence[Mapping[str, Any]]]
) -> dict[int, Path]:
    """Return the shards of one filter by index, in the order of the indices."""
    return {
        index: Path(artifact["path"])
        for index in completed
        for artifact in artifacts.get(index, ())
        if artifact["filter_order"] == order
    }


def _require_all(pipeline: Pipeline[Any], order: int, shards: Mapping[int, Path]) -> None:
    missing = [index for index, path in shards.items() if not path.is_file()]
    if not missing:
        return
    index = missing[0]
    others = f" (and those of {len(missing) - 1} more)" if len(missing) > 1 else ""
    url = pipeline.store_url
    reset = shlex.join(["psnc", "reset", shown_url(url), "--index", str(index)])
    share = "have all machines share db_dir, " if "://" in url else ""
    raise PipelineError(
        f"index {index}: what {stage_name(pipeline.filters[order - 1])} flushed is recorded, but "
        f"{shards[index]} is not there{others}: {share}put it back, or say {reset} and resume"
    )


def _merge(filter: Filter[Any, Any], shards: list[Path], output: Path) -> None:
    with atomic_path(output) as draft:
        # As every index has a filter of its own, so that this one stays as it was constructed.
        copy.deepcopy(filter).merge(shards, draft)  # type: ignore[attr-defined]
        if draft.exists():
            return
        suffix = take_longer_suffix(draft)
        if suffix:
            raise StageError(
                f"{stage_name(filter)}.merge() wrote a file with {suffix!r} added to the name that "
                f"it was given: end its output in {suffix!r}, or its artifact_suffix if it has none"
            )
        raise StageError(f"{stage_name(filter)}.merge() did not write the file that it was told to")
