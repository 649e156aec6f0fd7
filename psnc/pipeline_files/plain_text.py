"""TOML, YAML and JSON: three ways to write the same tree of plain values.

Each lacks something that the others have. A tree holds it in the form of `plain_values`:
``{"$none": true}`` where there is no null, ``{"$float": "nan"}`` where numbers are finite.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = [
    "SUFFIXES",
    "TOO_DEEP",
    "PlainTextError",
    "has_null",
    "is_too_deep",
    "parse",
    "read_text",
    "syntax_of",
    "write",
]

SUFFIXES = (".toml", ".yaml", ".yml", ".json")

# What Python itself can follow depends on its version, and on who calls.
_LEVELS = 200
TOO_DEEP = f"lists or tables are nested more than {_LEVELS} levels deep"


class PlainTextError(ValueError):
    """A file that cannot be read, or a tree that cannot be written; says what and where."""


def syntax_of(path: str | os.PathLike[str]) -> str:
    """Return ``"toml"``, ``"yaml"`` or ``"json"`` by a file's suffix.

    Raises
    ------
    PlainTextError
        For any other suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise PlainTextError(f"its name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    return "yaml" if suffix == ".yml" else suffix.removeprefix(".")


def has_null(syntax: str) -> bool:
    """Tell whether a syntax can write ``None`` as it is."""
    return syntax != "toml"


def read_text(path: Path) -> str:
    """Read a file of UTF-8, with or without the mark that Windows programs begin it with."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise PlainTextError("no such file: check the path") from None
    except IsADirectoryError:
        raise PlainTextError("a directory: give the path of a file in it") from None
    except OSError as error:
        raise PlainTextError(f"it cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise PlainTextError(f"line {line}: not UTF-8: save it in this encoding") from error


def parse(text: str, syntax: str) -> Any:
    """Return the tree that a text holds; an empty one for a text without any values."""
    if not text.strip():
        return {}
    try:
        tree = _PARSERS[syntax](text)
    except RecursionError:
        raise PlainTextError(TOO_DEEP) from None
    except ValueError as error:
        raise PlainTextError(str(error)) from error
    if is_too_deep(tree):
        raise PlainTextError(TOO_DEEP)
    return {} if tree is None else tree


def is_too_deep(tree: Any) -> bool:
    """Tell whether a tree has more levels than files may have."""
    level = [tree]
    for _ in range(_LEVELS + 1):
        containers = [each for each in level if isinstance(each, (dict, list))]
        if not containers:
            return False
        level = [
            item
            for each in containers
            for item in (each.values() if isinstance(each, dict) else each)
        ]
    return True


def write(tree: dict[str, Any], syntax: str) -> bytes:
    """Return the text of a tree, as UTF-8.

    On its top level it has tables, and lists of tables, each with a value that is no table.
    """
    text = _WRITERS[syntax](tree)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        part = ascii(text[max(0, error.start - 20) : error.end])
        raise PlainTextError(
            f"TOML cannot write a text that is not Unicode, as there is at {part}: save it as .json"
        ) from error


def _parse_toml(text: str) -> Any:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        position = re.search(r" \(at (line \d+, column \d+)\)$", message)
        if position is None:
            raise
        raise ValueError(f"{position[1]}: {message[: position.start()]}") from error


def _parse_json(text: str) -> Any:
    try:
        return json.loads(
            text, object_pairs_hook=_table_of_unique_keys, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from error


def _table_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice in one object")
    return table


def _refuse_constant(name: str) -> Any:
    text = {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}[name]
    raise ValueError(f'{name} is not JSON: write {{"$float": "{text}"}}')


def _parse_yaml(text: str) -> Any:
    from psnc.pipeline_files.yaml_text import read_yaml

    return read_yaml(text)


def _write_toml(tree: dict[str, Any]) -> str:
    import tomli_w

    parts = []
    for key, section in _without_nulls(tree).items():
        # One table after the other, where tomli-w alone would put short ones into one line.
        for table in section if isinstance(section, list) else [section]:
            text = tomli_w.dumps({key: table})
            is_listed = isinstance(section, list)
            parts.append(text.replace(f"[{key}]", f"[[{key}]]", 1) if is_listed else text)
    return "\n".join(parts)


def _write_json(tree: dict[str, Any]) -> str:
    text = json.dumps(_with_finite_numbers(tree), indent=2, ensure_ascii=False, allow_nan=False)
    # Names of files may have bytes that are no text, which only an escape can write.
    return re.sub("[\ud800-\udfff]", lambda each: f"\\u{ord(each[0]):04x}", text) + "\n"


def _write_yaml(tree: dict[str, Any]) -> str:
    from psnc.pipeline_files.yaml_text import write_yaml

    return write_yaml(tree)


def _without_nulls(tree: Any) -> Any:
    return {"$none": True} if tree is None else _mapped(_without_nulls, tree)


def _with_finite_numbers(tree: Any) -> Any:
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"$float": str(tree)}
    return _mapped(_with_finite_numbers, tree)


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: change(item) for key, item in tree.items()}
    if isinstance(tree, list):
        return [change(item) for item in tree]
    return tree


_PARSERS = {"toml": _parse_toml, "yaml": _parse_yaml, "json": _parse_json}
_WRITERS = {"toml": _write_toml, "yaml": _write_yaml, "json": _write_json}
