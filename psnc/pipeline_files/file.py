"""Pipelines as files of TOML, YAML or JSON: ``Pipeline.save`` and ``Pipeline.load``.

A file names stages and gives their parameters. Loading it imports the named modules, and calls
the constructors of the named stages; nothing else in a file makes anything run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from psnc.atomic import atomic_write
from psnc.errors import ConfigurationError, OutputError, PipelineError
from psnc.pipeline import Pipeline
from psnc.pipeline_files.faults import Faults, item_place, shown
from psnc.pipeline_files.plain_text import (
    TOO_DEEP,
    PlainTextError,
    has_null,
    is_too_deep,
    parse,
    read_text,
    syntax_of,
    write,
)
from psnc.pipeline_files.plain_values import exact_text
from psnc.pipeline_files.reading import PipelineReader, own_fields
from psnc.pipeline_files.writing import PipelineWriter
from psnc.stages import Stage, constructor_arguments, secret_arguments, stage_name

__all__ = ["load", "save"]


def load(path: str | os.PathLike[str]) -> Pipeline[Any]:
    """Return the pipeline that a file describes.

    Raises
    ------
    PipelineError
        If anything is wrong with the file; says all that is.
    """
    path = Path(path).expanduser()
    reader = PipelineReader(_constructed, os.environ)
    try:
        tree = parse(read_text(path), syntax_of(path))
    except PlainTextError as error:
        reader.faults.add("", str(error))
        raise PipelineError(reader.faults.report(path)) from error
    try:
        pipeline = reader.pipeline(tree)
    except RecursionError:
        reader.faults.add("", TOO_DEEP)
        pipeline = None
    if pipeline is None:
        raise PipelineError(reader.faults.report(path)) from reader.faults.cause
    return pipeline


def save(pipeline: Pipeline[Any], path: str | os.PathLike[str]) -> None:
    """Write a pipeline to a file from which it can be loaded again.

    Raises
    ------
    ConfigurationError
        If a stage or a parameter cannot be written so that it would be the same when read.
    PipelineError
        If the file cannot be written.
    """
    path = Path(path).expanduser()
    heading = f"{path} is not written"
    try:
        syntax = syntax_of(path)
        writer = PipelineWriter(pipeline, omit_none=not has_null(syntax))
        tree = writer.tree()
        if is_too_deep(tree):
            raise ConfigurationError(f"{heading}: {TOO_DEEP}")
        content = b"" if writer.faults else write(tree, syntax)
        if not writer.faults:
            _check_that_it_reads_back(writer, parse(content.decode("utf-8"), syntax))
    except PlainTextError as error:
        raise PipelineError(f"{heading}: {error}") from error
    except RecursionError:
        raise ConfigurationError(f"{heading}: {TOO_DEEP}") from None
    if writer.faults:
        raise ConfigurationError(writer.faults.report(heading))
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OutputError as error:
        raise PipelineError(str(error)) from error


def _constructed(cls: type[Stage], /, *args: Any, **kwargs: Any) -> Stage:
    return cls(*args, **kwargs)


def _remembering(cls: type[Stage], /, *args: Any, **kwargs: Any) -> Stage:
    """Return a stage that knows its arguments, and whose own constructor was not called."""
    return Stage.__new__(cls, *args, **kwargs)


def _check_that_it_reads_back(writer: PipelineWriter, tree: Any) -> None:
    """Read what would be written, without calling a constructor, and compare."""
    pipeline = writer.pipeline
    reader = PipelineReader(_remembering, writer.secrets)
    read = reader.pipeline(tree)
    if read is None:
        writer.faults.extend(reader.faults)
        return
    for name in own_fields():
        if getattr(read, name) != getattr(pipeline, name):
            writer.faults.add(f"pipeline.{name}", "would not be the same when it is read")
    stages = zip(_stages(pipeline).items(), _stages(read).values(), strict=True)
    for (place, before), after in stages:
        _compare(before, after, f"{place}.params", writer.faults)


def _stages(pipeline: Pipeline[Any]) -> dict[str, Stage]:
    stages: dict[str, Stage] = {"source": pipeline.source}
    for position, filter in enumerate(pipeline.filters):
        stages[item_place("filters", position)] = filter
    if pipeline.sink is not None:
        stages["sink"] = pipeline.sink
    return stages


def _compare(stage: Stage, read: Stage, place: str, faults: Faults) -> None:
    after = constructor_arguments(read)
    for name, value in constructor_arguments(stage).items():
        if exact_text(value) != exact_text(after.get(name)):
            values = f"{shown(value)} would be {shown(after.get(name))} when it is read"
            if name in secret_arguments(stage):
                values = "the secret would be another when it is read"
            faults.add(item_place(place, name), f"{stage_name(stage)}({name}=…): {values}")
