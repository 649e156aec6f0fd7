"""Where a command's pipeline is recorded, as its options say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import click

from psnc.errors import PipelineError
from psnc.pipeline import Pipeline
from psnc.store import open_store, shown_url

__all__ = ["at_place", "recorded", "refuse_several_places"]


def refuse_several_places(**places: str | None) -> None:
    """Refuse more than one of ``--db-dir``, ``--db-file`` and ``--store``."""
    given = [f"--{name.replace('_', '-')}" for name, value in places.items() if value is not None]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)}: give one of them")


def at_place(pipeline: Pipeline[Any], db_file: str | None, store: str | None) -> Pipeline[Any]:
    """Return a pipeline that is recorded to the file or store that was given, if one was."""
    if db_file is not None:
        pipeline = attrs.evolve(pipeline, db_file=db_file, store=None)
    if store is not None:
        pipeline = attrs.evolve(pipeline, store=store, db_file=None)
    return pipeline


def recorded(pipeline: Pipeline[Any], db_dir: str | None, asked: str) -> Pipeline[Any]:
    """Return a pipeline as an earlier run recorded it, or say that none did."""
    overrides: dict[str, Any] = {"resume": True}
    if db_dir is not None:
        overrides |= {"db_dir": db_dir, "db_file": None, "store": None}
    pipeline = attrs.evolve(pipeline, **overrides)
    if not pipeline.track_metrics or not _is_recorded(pipeline):
        raise PipelineError(
            f"{asked}: nothing is recorded of this pipeline at {_place(pipeline)}: run it "
            "with --resume first, or name its database with --db-file"
        )
    return pipeline


def _place(pipeline: Pipeline[Any]) -> str:
    return shown_url(pipeline.store_url) if pipeline.track_metrics else "any place"


def _is_recorded(pipeline: Pipeline[Any]) -> bool:
    url = pipeline.configured_store_url
    if "://" not in url and not Path(url).exists():
        return False
    # Looked at first: whoever asks a pipeline begins a run of it where there is none.
    store = open_store(url)
    if store is None:
        return False
    try:
        return any(row.config_hash == pipeline.config_hash for row in store.runs())
    finally:
        store.close()
