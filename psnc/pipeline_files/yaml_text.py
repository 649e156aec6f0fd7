"""YAML as plain values: nothing but data, no key twice, no value inside itself."""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["YamlError", "read_yaml", "write_yaml"]

_MOST_VALUES = 10_000_000


class YamlError(ValueError):
    """The text is not YAML, or more than plain data; says where."""


def read_yaml(text: str) -> Any:
    """Return what a YAML document holds.

    Raises
    ------
    YamlError
        If it cannot be read, with the line.
    """
    try:
        # A subclass of the safe loader: it makes plain data only.
        tree = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(filter(None, [error.context, error.problem]))
        raise YamlError(f"{_position(mark)}: {problem}" if mark else problem) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"line {line}: a character that YAML does not allow") from error
    _count_values(tree, {})
    return tree


def write_yaml(tree: Any) -> str:
    """Return the YAML of plain values, keys in their order."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    def represent_str(self, data: str) -> Any:
        # PyYAML takes some of the rarer line ends for spaces, unless they are escaped.
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        # Merges of merges bring the same pairs over and over, of which the last counts.
        last = {id(pair[0]): pair for pair in reversed(node.value)}
        node.value = list(reversed(last.values()))

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            # A date such as 2024-13-01: PyYAML lets Python's own error through.
            raise yaml.constructor.ConstructorError(
                None, None, str(error), node.start_mark
            ) from error


def _position(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _count_values(value: Any, counts: dict[int, int | None]) -> int:
    """Count the values that a tree has once its anchors are written out."""
    if not isinstance(value, (dict, list, set)):
        return 1
    if id(value) in counts:
        known = counts[id(value)]
        if known is None:
            raise YamlError("an anchor refers to itself")
        return known
    counts[id(value)] = None
    items = value.values() if isinstance(value, dict) else value
    count = 1 + sum(_count_values(item, counts) for item in items)
    if count > _MOST_VALUES:
        raise YamlError(f"its anchors make more than {_MOST_VALUES:,} values")
    counts[id(value)] = count
    return count
