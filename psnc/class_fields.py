"""The constructor that attrs or ``dataclasses`` make for a class, read from the class's text."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator

from attrs import frozen

__all__ = ["ClassField", "NotInTextError", "constructor_for", "own_fields"]

_DECORATORS = {
    "dataclasses.dataclass",
    "attrs.define",
    "attrs.frozen",
    "attrs.mutable",
    "attr.define",
    "attr.frozen",
    "attr.mutable",
}
_MAKERS = {"dataclasses.field", "attrs.field", "attr.field"}


class NotInTextError(Exception):
    """The constructor is made elsewhere, or in a way that the text does not show."""


@frozen(eq=False)
class ClassField:
    """A field of a class, as its constructor takes it."""

    name: str
    annotation: ast.expr | None
    default: ast.expr | None
    by_keyword: bool


def own_fields(node: ast.ClassDef, resolved: Callable[[str], str]) -> Iterator[ClassField]:
    """Yield the fields that a decorated class adds to those that it inherits.

    Parameters
    ----------
    node : ast.ClassDef
        The class.
    resolved : callable
        Returns a dotted name as other modules would write it.

    Raises
    ------
    NotInTextError
        If the class is decorated with anything else, or a field is made in another way than those
        that are known here.
    """
    if len(node.decorator_list) != 1:
        raise NotInTextError
    name, options = _called(node.decorator_list[0], resolved)
    known = {"kw_only", "frozen", "slots", "order", "eq", "repr", "unsafe_hash", "weakref_slot"}
    if name not in _DECORATORS or not known >= options.keys():
        raise NotInTextError
    by_keyword = _is_true(options.get("kw_only"))
    strips = not name.startswith("dataclasses.")
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield from _field(statement, statement.target.id, by_keyword, strips, resolved)
        elif _makes_fields(statement, resolved):
            raise NotInTextError


def constructor_for(fields: Iterable[ClassField]) -> ast.FunctionDef:
    """Return a constructor that takes fields."""
    fields = list(fields)
    positional = [each for each in fields if not each.by_keyword]
    by_keyword = [each for each in fields if each.by_keyword]
    arguments = ast.arguments(
        posonlyargs=[],
        args=[ast.arg("self"), *(ast.arg(each.name, each.annotation) for each in positional)],
        defaults=[each.default for each in positional if each.default is not None],
        kwonlyargs=[ast.arg(each.name, each.annotation) for each in by_keyword],
        kw_defaults=[each.default for each in by_keyword],
    )
    return ast.FunctionDef("__init__", arguments, body=[ast.Pass()], decorator_list=[])


def _field(
    statement: ast.AnnAssign,
    name: str,
    by_keyword: bool,
    strips: bool,
    resolved: Callable[[str], str],
) -> Iterator[ClassField]:
    text = ast.unparse(statement.annotation).strip("'\"")
    kind = resolved(text.partition("[")[0]).rpartition(".")[2]
    if kind in ("KW_ONLY", "InitVar"):
        raise NotInTextError
    if kind == "ClassVar":
        return
    annotation: ast.expr | None = statement.annotation
    default = statement.value
    if strips:
        # As attrs names the arguments of private fields.
        name = name.lstrip("_")
    if isinstance(default, ast.Call):
        maker, options = _called(default, resolved)
        if maker in _MAKERS:
            if default.args or "alias" in options:
                raise NotInTextError
            if "init" in options and not _is_true(options["init"]):
                return
            if "converter" in options:
                annotation = None
            by_keyword = by_keyword or _is_true(options.get("kw_only"))
            factory = options.get("factory", options.get("default_factory"))
            default = options.get("default")
            if factory is not None:
                default = ast.Call(factory, [], [])
    yield ClassField(name, annotation, default, by_keyword)


def _makes_fields(statement: ast.stmt, resolved: Callable[[str], str]) -> bool:
    """Tell whether a statement makes a field without an annotation, or a default by a method."""
    if isinstance(statement, ast.FunctionDef):
        return any(
            isinstance(each, ast.Attribute) and each.attr == "default"
            for each in statement.decorator_list
        )
    calls = [each for each in ast.walk(statement) if isinstance(each, ast.Call)]
    names = {_called(each, resolved)[0] for each in calls}
    return not isinstance(statement, ast.ClassDef) and not names.isdisjoint(
        {*_MAKERS, "attr.ib", "attr.attrib"}
    )


def _called(
    expression: ast.expr, resolved: Callable[[str], str]
) -> tuple[str, dict[str, ast.expr]]:
    """Return what a decorator or a call names, and what it is given by keyword."""
    options: dict[str, ast.expr] = {}
    if isinstance(expression, ast.Call):
        options = {each.arg or "**": each.value for each in expression.keywords}
        expression = expression.func
    return resolved(ast.unparse(expression)), options


def _is_true(value: ast.expr | None) -> bool:
    if value is None:
        return False
    if not isinstance(value, ast.Constant):
        raise NotInTextError
    return bool(value.value)
