"""Find stages and backends, and say what each is and takes, by reading source text.

Importing a stage may import a library that takes seconds. What plugins offer is therefore described
from the text of the class; only a module or file that somebody names is imported.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from attrs import frozen

if TYPE_CHECKING:
    from psnc.manager import Offer, OfferKind, PluginManager

__all__ = [
    "Listed",
    "ListedParameter",
    "offered",
    "parameter_descriptions",
    "stages_of_module",
]

STAGE_KINDS: tuple[OfferKind, ...] = ("source", "filter", "sink")

# Bases that bring no parameters of their own.
_FROM_PSNC = {"Source", "Filter", "Sink", "Backend", "ABC", "Generic", "Protocol", "object"}


@frozen
class ListedParameter:
    """One parameter as a listing shows it: all is text."""

    name: str
    type: str = ""
    default: str | None = None
    description: str = ""

    def __str__(self) -> str:
        """Return it as a signature has it."""
        type = f": {self.type}" if self.type else ""
        if self.default is None:
            return f"{self.name}{type}"
        return f"{self.name}{type} = {self.default}" if type else f"{self.name}={self.default}"


@frozen
class Listed:
    """A stage or backend as a listing shows it.

    Attributes
    ----------
    kind : str
        ``"source"``, ``"filter"``, ``"sink"`` or ``"backend"``.
    name : str
        What it is registered as, or its class's name.
    reference : str
        ``module:Class``.
    origin : str
        The plugin and its distribution, or the module that was named.
    description : str
        The first line of its documentation.
    parameters : tuple of ListedParameter, optional
        The constructor's; ``None`` if the text does not tell.
    """

    kind: str
    name: str
    reference: str
    origin: str = ""
    description: str = ""
    parameters: tuple[ListedParameter, ...] | None = None


# --- what plugins offer -----------------------------------------------------------------------


def offered(manager: PluginManager, kind: OfferKind) -> list[Listed]:
    """Describe what the plugins offer of a kind, sorted by name, without importing any of it."""
    return [_describe_offer(kind, offer) for _, offer in sorted(manager.offers(kind).items())]


def _describe_offer(kind: OfferKind, offer: Offer) -> Listed:
    reference = offer.reference
    origin = offer.origin.name
    if offer.origin.distribution:
        origin += f", {offer.origin.distribution} {offer.origin.version}"
    if not isinstance(reference, str):
        return _describe_class(kind, offer.name, reference, origin)
    text = _ClassText.find(reference)
    if text is None:
        return Listed(kind, offer.name, reference, origin)
    parameters = text.parameters(skip=1 if kind == "backend" else 0)
    return Listed(kind, offer.name, reference, origin, text.description, parameters)


class _ClassText:
    """A class as its module's text has it."""

    def __init__(self, tree: ast.Module, node: ast.ClassDef) -> None:
        self._tree = tree
        self._node = node

    @classmethod
    def find(cls, reference: str) -> _ClassText | None:
        module, _, name = reference.partition(":")
        path = _module_path(module)
        if path is None:
            return None
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            return None
        node = _class_of(tree, name)
        return None if node is None else cls(tree, node)

    @property
    def documentation(self) -> str:
        return ast.get_docstring(self._node) or ""

    @property
    def description(self) -> str:
        return self.documentation.partition("\n")[0]

    def parameters(self, skip: int = 0) -> tuple[ListedParameter, ...] | None:
        """Return the constructor's parameters; ``None`` if they are made elsewhere."""
        if self._has("params"):
            return None
        constructor = self._member("__init__")
        if constructor is not None:
            return _parameters_of(constructor, self.documentation)[skip:]
        if self._node.decorator_list:
            return None
        return self._inherited(skip)

    def _inherited(self, skip: int) -> tuple[ListedParameter, ...] | None:
        for base in self._node.bases:
            name = ast.unparse(base).partition("[")[0].rpartition(".")[2]
            if name in _FROM_PSNC:
                continue
            node = _class_of(self._tree, name)
            return None if node is None else _ClassText(self._tree, node).parameters(skip)
        return ()

    def _has(self, name: str) -> bool:
        return self._member(name) is not None

    def _member(self, name: str) -> ast.FunctionDef | None:
        for each in self._node.body:
            if isinstance(each, ast.FunctionDef) and each.name == name:
                return each
        return None


def _module_path(name: str) -> Path | None:
    """Return the file of a module; importing the packages around it may import anything."""
    top, *inner = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not inner:
        return Path(spec.origin) if spec.origin else None
    for place in spec.submodule_search_locations or ():
        file = Path(place).joinpath(*inner)
        for candidate in (file.with_suffix(".py"), file / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def _class_of(tree: ast.Module, name: str) -> ast.ClassDef | None:
    for each in tree.body:
        if isinstance(each, ast.ClassDef) and each.name == name:
            return each
    return None


def _parameters_of(constructor: ast.FunctionDef, documentation: str) -> tuple[ListedParameter, ...]:
    described = parameter_descriptions(documentation)
    given = constructor.args
    positional = [*given.posonlyargs, *given.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults))
    pairs = list(zip(positional, [*missing, *given.defaults], strict=True))[1:]
    pairs += zip(given.kwonlyargs, given.kw_defaults, strict=True)
    parameters = [_parameter(each.arg, each, default, described) for each, default in pairs]
    for star, variadic in (("*", given.vararg), ("**", given.kwarg)):
        if variadic is not None:
            parameters.append(_parameter(f"{star}{variadic.arg}", variadic, None, described))
    return tuple(parameters)


def _parameter(
    name: str, argument: ast.arg, default: ast.expr | None, described: dict[str, str]
) -> ListedParameter:
    annotation, declared = _without_param(argument.annotation)
    text = declared.get("description", described.get(argument.arg, ""))
    shown = None if default is None else "…" if declared.get("secret") else ast.unparse(default)
    return ListedParameter(name, ast.unparse(annotation) if annotation else "", shown, text)


def _without_param(annotation: ast.expr | None) -> tuple[ast.expr | None, dict[str, Any]]:
    """Take ``Annotated[int, Param(description="…")]`` apart."""
    match annotation:
        case ast.Subscript(
            value=ast.Name("Annotated") | ast.Attribute(attr="Annotated"),
            slice=ast.Tuple(elts=[inner, ast.Call(keywords=keywords)]),
        ):
            return inner, {
                each.arg: each.value.value
                for each in keywords
                if each.arg is not None and isinstance(each.value, ast.Constant)
            }
    return annotation, {}


# --- modules and files that somebody names ----------------------------------------------------


def stages_of_module(module: ModuleType) -> list[Listed]:
    """Describe the sources, filters and sinks that a module defines, or a package shows."""
    found = []
    for name in _shown_names(module):
        value: Any = getattr(module, name, None)
        kind = _kind_of(value)
        if kind is None or not _belongs_to(value, module):
            continue
        found.append(_describe_class(kind, value.__name__, value, module.__name__))
    return found


def _shown_names(module: ModuleType) -> Iterator[str]:
    # A package may import what it shows only when it is asked for.
    yield from dict.fromkeys([*vars(module), *getattr(module, "__all__", ())])


def _kind_of(value: Any) -> OfferKind | None:
    from psnc.stages import Filter, Sink, Source

    if not isinstance(value, type) or inspect.isabstract(value):
        return None
    for kind, base in zip(STAGE_KINDS, (Source, Filter, Sink), strict=True):
        if issubclass(value, base) and value is not base:
            return kind
    return None


def _belongs_to(value: type, module: ModuleType) -> bool:
    inside = f"{module.__name__}." if hasattr(module, "__path__") else None
    home = value.__module__
    return home == module.__name__ or (inside is not None and home.startswith(inside))


def _describe_class(kind: OfferKind, name: str, cls: type, origin: str) -> Listed:
    documentation = inspect.cleandoc(cls.__dict__.get("__doc__") or "")
    reference = f"{cls.__module__}:{cls.__qualname__}"
    parameters = tuple(_listed(cls, documentation)) if kind != "backend" else None
    return Listed(kind, name, reference, origin, documentation.partition("\n")[0], parameters)


def _listed(cls: Any, documentation: str) -> Iterable[ListedParameter]:
    described = parameter_descriptions(documentation)
    for param in cls.params():
        description = param.description or described.get(param.name, "")
        default = None if param.required else "…" if param.secret else repr(param.default)
        yield ListedParameter(param.name, _type_text(param.type), default, description)


def _type_text(annotation: Any) -> str:
    if annotation is Any:
        return ""
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return annotation.__qualname__
    return str(annotation).replace("typing.", "")


# --- documentation ----------------------------------------------------------------------------


def parameter_descriptions(documentation: str) -> dict[str, str]:
    """Return what a docstring in NumPy's style says of each parameter, on one line.

    Examples
    --------
    >>> parameter_descriptions('''Reads files.
    ...
    ... Parameters
    ... ----------
    ... data_dir : str
    ...     Directory of
    ...     the files.
    ... ''')
    {'data_dir': 'Directory of the files.'}
    """
    section = re.search(
        r"^Parameters\n-+\n(.*?)(?=^\S[^\n]*\n-{3,}$|\Z)", documentation, re.DOTALL | re.MULTILINE
    )
    if section is None:
        return {}
    entries = re.findall(
        r"^(\S[^\n:]*?)(?: ?:[^\n]*)?\n((?:[ \t]+[^\n]*\n?|\n)*)", section[1], re.M
    )
    return {
        name.strip().lstrip("*"): " ".join(text.split())
        for names, text in entries
        for name in names.split(",")
    }
