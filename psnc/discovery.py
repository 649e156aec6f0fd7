"""Find stages and backends, and say what each is and takes, by reading source text.

Importing a stage may import a library that takes seconds. What plugins offer is therefore described
from the text of the class; only a module or file that somebody names is imported.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, get_type_hints

from attrs import frozen

from psnc.class_fields import ClassField, NotInTextError, constructor_for, own_fields
from psnc.errors import StageError

if TYPE_CHECKING:
    from psnc.manager import PluginManager
    from psnc.offers import Offer, OfferKind

__all__ = [
    "Listed",
    "ListedParameter",
    "offered",
    "parameter_descriptions",
    "stages_of_module",
]

STAGE_KINDS: tuple[OfferKind, ...] = ("source", "filter", "sink")

# Bases that bring no parameters of their own.
_BASES = {"Source", "Filter", "Sink", "Backend", "ABC", "Generic", "Protocol", "object"}
_HOMES_OF_BASES = {"psnc", "abc", "typing", "typing_extensions"}

# What a backend is always given, so that it is no option.
_GIVEN = "n_jobs"


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
        The first sentences of its documentation.
    parameters : tuple of ListedParameter, optional
        The constructor's; ``None`` if they are not known.
    problem : str
        Why nobody can tell the parameters; empty where it is only the text that does not.
    """

    kind: str
    name: str
    reference: str
    origin: str = ""
    description: str = ""
    parameters: tuple[ListedParameter, ...] | None = None
    problem: str = ""


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
    module, _, name = reference.partition(":")
    try:
        text = _ModuleText.find(module)
    except SyntaxError as error:
        return Listed(kind, offer.name, reference, origin, problem=f"{module}: {error}")
    if text is None:
        problem = f"there is no module {module}"
        return Listed(kind, offer.name, reference, origin, problem=problem)
    node = text.stage_of(name)
    if node is None:
        return Listed(kind, offer.name, reference, origin)
    description = _first_paragraph(ast.get_docstring(node) or "")
    parameters = text.parameters(node)
    return Listed(
        kind, offer.name, reference, origin, description, _without_given(kind, parameters)
    )


def _without_given(
    kind: OfferKind, parameters: tuple[ListedParameter, ...] | None
) -> tuple[ListedParameter, ...] | None:
    if kind != "backend" or parameters is None:
        return parameters
    return tuple(each for each in parameters if each.name != _GIVEN)


class _ModuleText:
    """A module as its text has it."""

    def __init__(self, tree: ast.Module) -> None:
        self._classes: dict[str, ast.ClassDef] = {}
        self._functions: dict[str, ast.FunctionDef] = {}
        self._made: dict[ast.ClassDef, ast.FunctionDef] = {}
        self._values: dict[str, ast.expr] = {}
        self._imported: dict[str, str] = {}
        for each in tree.body:
            self._note(each)

    @classmethod
    def find(cls, module: str) -> _ModuleText | None:
        """Return the text of a module, ``None`` if there is no such module.

        Raises
        ------
        SyntaxError
            If its file is no Python.
        """
        path = _module_path(module)
        if path is None:
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return cls(ast.parse(path.read_bytes(), str(path)))
        except (OSError, ValueError):
            # A compiled module, say.
            return cls(ast.Module([], []))

    def stage_of(self, path: str) -> ast.ClassDef | ast.FunctionDef | None:
        """Return the class, or the function, that has a name in the end."""
        name, *inner = path.split(".")
        if not inner and name in self._functions:
            return self._functions[name]
        node = self._classes.get(name)
        for name in inner:
            found = None if node is None else _binding(node, name)
            node = found if isinstance(found, ast.ClassDef) else None
        return node

    def parameters(
        self, node: ast.ClassDef | ast.FunctionDef
    ) -> tuple[ListedParameter, ...] | None:
        """Return a constructor's parameters; ``None`` if the text does not tell."""
        if isinstance(node, ast.FunctionDef):
            taken = self._taken_by_data(node)
            described = parameter_descriptions(ast.get_docstring(node) or "")
            return None if taken is None else tuple(self._parameters_of(node, described, taken))
        try:
            constructor = self._constructor(node, ())
        except NotInTextError:
            return None
        if constructor is None:
            return ()
        return tuple(self._parameters_of(constructor, self._described(node, ())))

    def _note(self, statement: ast.stmt) -> None:
        match statement:
            case ast.ClassDef(name=name):
                self._classes[name] = statement
                self._functions.pop(name, None)
            case ast.FunctionDef(name=name):
                self._functions[name] = statement
                self._classes.pop(name, None)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self._values[name] = value
            case ast.Import(names=names):
                for each in names:
                    shown = each.asname or each.name.partition(".")[0]
                    self._imported[shown] = each.name if each.asname else shown
            case ast.ImportFrom(module=module, names=names, level=0):
                for each in names:
                    self._imported[each.asname or each.name] = f"{module}.{each.name}"

    # --- constructors -------------------------------------------------------------------------

    def _constructor(
        self, node: ast.ClassDef, inner: tuple[ast.ClassDef, ...]
    ) -> ast.FunctionDef | None:
        """Return a class's constructor, ``None`` if it has that of ``object``."""
        if _binding(node, "params") is not None:
            raise NotInTextError
        inherited = [
            found
            for base in self._bases(node, inner)
            if (found := self._constructor(base, (*inner, node))) is not None
        ]
        own = _binding(node, "__init__")
        if own is not None:
            if not isinstance(own, ast.FunctionDef):
                raise NotInTextError
            return own
        if node.decorator_list:
            return self._made_constructor(node, inner)
        if len(set(inherited)) > 1:
            raise NotInTextError
        return inherited[0] if inherited else None

    def _taken_by_data(self, node: ast.FunctionDef) -> int | None:
        """Return how many parameters of a function stage are for the data."""
        if len(node.decorator_list) != 1:
            return None
        (decorator,) = node.decorator_list
        if isinstance(decorator, ast.Call):
            decorator = decorator.func
        home, _, last = self._resolved(ast.unparse(decorator)).rpartition(".")
        return {"filter": 1, "sink": 2}.get(last) if home.partition(".")[0] == "psnc" else None

    def _made_constructor(
        self, node: ast.ClassDef, inner: tuple[ast.ClassDef, ...]
    ) -> ast.FunctionDef:
        """Return the constructor that a class is given for its fields."""
        if node not in self._made:
            self._made[node] = constructor_for(self._fields(node, inner))
        return self._made[node]

    def _fields(self, node: ast.ClassDef, inner: tuple[ast.ClassDef, ...]) -> list[ClassField]:
        """Return the fields of a class and of those that it inherits from."""
        by_name: dict[str, ClassField] = {}
        for base in self._bases(node, inner):
            for each in self._fields(base, (*inner, node)) if base.decorator_list else ():
                if by_name.setdefault(each.name, each) is not each:
                    raise NotInTextError
        for each in own_fields(node, self._resolved):
            if each.name in by_name:
                raise NotInTextError
            by_name[each.name] = each
        return list(by_name.values())

    def _bases(self, node: ast.ClassDef, inner: tuple[ast.ClassDef, ...]) -> Iterator[ast.ClassDef]:
        known = _binding(node, "__init__") is not None
        for expression in node.bases:
            name = ast.unparse(expression).partition("[")[0]
            base = self._classes.get(name)
            if base is not None and base is not node and base not in inner:
                yield base
            elif not known and not self._is_plain(name):
                raise NotInTextError

    def _is_plain(self, base: str) -> bool:
        name = self._resolved(base)
        home, _, last = name.rpartition(".")
        return last in _BASES and (home.partition(".")[0] in _HOMES_OF_BASES or name == "object")

    def _resolved(self, name: str) -> str:
        """Return a dotted name as other modules would write it."""
        first, dot, rest = name.partition(".")
        return f"{self._imported.get(first, first)}{dot}{rest}"

    # --- parameters ---------------------------------------------------------------------------

    def _described(self, node: ast.ClassDef, inner: tuple[ast.ClassDef, ...]) -> dict[str, str]:
        described: dict[str, str] = {}
        for expression in node.bases:
            base = self._classes.get(ast.unparse(expression).partition("[")[0])
            if base is not None and base is not node and base not in inner:
                described |= self._described(base, (*inner, node))
        return described | parameter_descriptions(ast.get_docstring(node) or "")

    def _parameters_of(
        self, constructor: ast.FunctionDef, described: dict[str, str], taken: int = 1
    ) -> Iterator[ListedParameter]:
        given = constructor.args
        positional = [*given.posonlyargs, *given.args]
        missing: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults))
        pairs = zip(positional, [*missing, *given.defaults], strict=True)
        for argument, default in list(pairs)[taken:]:
            yield self._parameter(argument.arg, argument, default, described)
        if given.vararg is not None:
            yield self._parameter(f"*{given.vararg.arg}", given.vararg, None, described)
        for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
            yield self._parameter(argument.arg, argument, default, described)
        if given.kwarg is not None:
            yield self._parameter(f"**{given.kwarg.arg}", given.kwarg, None, described)

    def _parameter(
        self, name: str, argument: ast.arg, default: ast.expr | None, described: dict[str, str]
    ) -> ListedParameter:
        annotation = _Annotation(self._values, self._resolved)
        type = annotation.without_annotated(argument.annotation)
        text = annotation.description or described.get(argument.arg, "")
        shown = None if default is None else "…" if annotation.secret else ast.unparse(default)
        return ListedParameter(name, type, shown, text)


class _Annotation(ast.NodeTransformer):
    """Takes ``Annotated[int, Param(description="…")]`` apart, wherever it stands."""

    def __init__(self, values: dict[str, ast.expr], resolved: Callable[[str], str]) -> None:
        self._values = values
        self._resolved = resolved
        self.description = ""
        self.secret = False

    def without_annotated(self, annotation: ast.expr | None) -> str:
        """Return an annotation's text, and note what its ``Param`` says."""
        if annotation is None:
            return ""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            quoted = annotation.value
            try:
                annotation = ast.parse(quoted, mode="eval").body
            except SyntaxError:
                return repr(quoted)
        return ast.unparse(self.visit(copy.deepcopy(annotation)))

    def visit_Name(self, node: ast.Name) -> Any:
        """Put in what a name of the module stands for, if that is annotated."""
        value = self._values.get(node.id)
        if value is None or not _is_annotated(value):
            return node
        inside = {name: value for name, value in self._values.items() if name != node.id}
        outside, self._values = self._values, inside
        try:
            return self.visit(copy.deepcopy(value))
        finally:
            self._values = outside

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        """Leave of ``Annotated`` the type."""
        if not _is_annotated(node) or not isinstance(node.slice, ast.Tuple):
            return self.generic_visit(node)
        type, *notes = node.slice.elts
        for note in notes:
            self._read(note)
        return self.visit(type)

    def _read(self, note: ast.expr) -> None:
        if isinstance(note, ast.Name):
            note = self._values.get(note.id, note)
        if isinstance(note, ast.Name):
            # Made in another module: it may say that the value is secret.
            self.secret = True
        if not isinstance(note, ast.Call):
            return
        if self._resolved(ast.unparse(note.func)).rpartition(".")[2] != "Param":
            return
        for keyword in note.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg == "secret":
                self.secret = value is not False
            if keyword.arg == "description" and isinstance(value, str):
                self.description = value


def _is_annotated(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Subscript)
        and ast.unparse(node.value).rpartition(".")[2] == "Annotated"
    )


def _binding(node: ast.ClassDef, name: str) -> ast.stmt | None:
    """Return the last statement of a class that binds a name, wherever it stands in it."""
    found: ast.stmt | None = None
    for statement in node.body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if statement.name == name:
                found = statement
            continue
        for each in ast.walk(statement):
            is_function = isinstance(each, ast.FunctionDef) and each.name == name
            if is_function or (isinstance(each, ast.Name) and each.id == name):
                found = statement
    return found


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
        return Path(spec.origin or "")
    for place in spec.submodule_search_locations or ():
        file = Path(place).joinpath(*inner)
        for candidate in (file.with_suffix(".py"), file / "__init__.py"):
            if candidate.is_file():
                return candidate
        if any(file.parent.glob(f"{file.name}.*")):
            return file
    return None


# --- modules and files that somebody names ----------------------------------------------------


def stages_of_module(module: ModuleType) -> list[Listed]:
    """Describe the sources, filters and sinks that a module defines, or a package shows."""
    found = []
    shown = (_shown(module, name) for name in _shown_names(module))
    for value in _with_inner_classes(each for each in shown if isinstance(each, type)):
        kind = _kind_of(value)
        if kind is None or not _belongs_to(value, module):
            continue
        found.append(_describe_class(kind, _name_in_module(value), value, module.__name__))
    # A class may be shown under several names.
    return list(dict.fromkeys(found))


def _with_inner_classes(classes: Iterable[type]) -> Iterator[type]:
    """Yield classes, each followed by those that are defined in it."""
    for each in classes:
        yield each
        prefix = f"{each.__qualname__}."
        yield from _with_inner_classes(
            value
            for value in vars(each).values()
            if isinstance(value, type)
            and value.__module__ == each.__module__
            and value.__qualname__.startswith(prefix)
        )


def _name_in_module(cls: type) -> str:
    # One that a function made has no name in its module.
    return cls.__name__ if "<locals>" in cls.__qualname__ else cls.__qualname__


def _shown_names(module: ModuleType) -> Iterator[str]:
    # A package may import what it shows only when it is asked for.
    yield from dict.fromkeys([*vars(module), *getattr(module, "__all__", ())])


def _shown(module: ModuleType, name: str) -> Any:
    try:
        return getattr(module, name, None)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise StageError(
            f"{name} of {module.__name__} cannot be imported ({reason}): install what it needs"
        ) from error


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
    description = _first_paragraph(inspect.cleandoc(cls.__dict__.get("__doc__") or ""))
    reference = f"{cls.__module__}:{cls.__qualname__}"
    try:
        parameters = tuple(_parameters_of_class(cls))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        problem = f"asking the class raised {reason}"
        return Listed(kind, name, reference, origin, description, problem=problem)
    return Listed(kind, name, reference, origin, description, _without_given(kind, parameters))


def _parameters_of_class(cls: Any) -> Iterable[ListedParameter]:
    from psnc.stages import Stage, _params_from_signature

    described: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        described |= parameter_descriptions(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
    stars = _stars(cls)
    for param in cls.params() if issubclass(cls, Stage) else _params_from_signature(cls):
        description = param.description or described.get(param.name, "")
        star = stars.get(param.name, "")
        default = None if param.required or star else "…" if param.secret else repr(param.default)
        yield ListedParameter(f"{star}{param.name}", _type_text(param.type), default, description)


def _stars(cls: Any) -> dict[str, str]:
    kinds = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(cls.__init__).parameters
    return {name: kinds[each.kind] for name, each in parameters.items() if each.kind in kinds}


def _type_text(annotation: Any) -> str:
    if annotation is Any:
        return ""
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return annotation.__qualname__
    if not isinstance(annotation, str):
        holder = SimpleNamespace(__annotations__={"type": annotation})
        # What only type checkers import stays as it is.
        with suppress(NameError, TypeError):
            annotation = get_type_hints(holder)["type"]
    # Without the modules, but for quoted text.
    return re.sub(r"('[^']*')|\b(?:[A-Za-z_]\w*\.)+|~", r"\1", str(annotation))


# --- documentation ----------------------------------------------------------------------------


def _first_paragraph(documentation: str) -> str:
    return " ".join(documentation.partition("\n\n")[0].split())


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
