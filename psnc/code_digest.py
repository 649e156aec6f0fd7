"""One digest of all the code that a stage's class reaches, so that a change of it can be noticed.

It is of the bytecode, which is what runs: also in a notebook, or where a file is newer than what
was imported from it, and whatever its comments, docstrings and line numbers are. It is of the
class, of the functions and classes that its methods name, of those that these name, and so on, as
far as they are not part of Python, of psnc or of an installed library, whose version is recorded.

What no name in the code leads to is not seen: imports within functions, methods that are looked up
by text, compiled extensions, data files.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import os
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from psnc.stages import Stage, constructor_arguments

__all__ = ["code_digest", "is_installed"]

# More than any stage has of its own; a library that is being worked on may have more.
_MOST_PARTS = 1000


def code_digest(stage: Stage) -> str | None:
    """Return SHA-256 of a stage's code, the first 16 hexadecimal digits; ``None`` if there is none.

    It depends on the version of Python, as bytecode does.
    """
    parts = sorted(_Reached(stage).parts())
    if not parts:
        return None
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


class _Reached:
    """What a stage's code leads to, each function, class and constant once."""

    def __init__(self, stage: Stage) -> None:
        self._package = _top(type(stage).__module__)
        self._seen: set[int] = set()
        # Nothing that is made on the way may be collected, and its number be another's.
        self._kept: list[Any] = []
        self._left: deque[Any] = deque()
        self._add(type(stage))
        for argument in constructor_arguments(stage).values():
            self._add_all_of(argument, with_entries=True)

    def parts(self) -> Iterator[str]:
        """Yield a line for each part."""
        while self._left and len(self._seen) <= _MOST_PARTS:
            thing = self._left.popleft()
            yield from self._of_class(thing) if isinstance(thing, type) else self._of(thing)

    def _add(self, thing: Any) -> None:
        if id(thing) not in self._seen and self._is_followed(_module_of(thing)):
            self._seen.add(id(thing))
            self._kept.append(thing)
            self._left.append(thing)

    def _add_all_of(self, value: Any, *, with_entries: bool = False) -> None:
        for thing in _functions_of(value):
            self._add(thing)
        # What an object of the user's own class does is in its class.
        if not isinstance(value, (type, types.FunctionType)):
            self._add(type(value))
        for each in _entries(value) if with_entries else ():
            self._add_all_of(each)

    def _is_followed(self, module: str) -> bool:
        top = _top(module)
        if top == self._package:
            return True
        return top != "psnc" and not is_installed(module)

    def _of_class(self, thing: type) -> Iterator[str]:
        for base in thing.__bases__:
            self._add(base)
        for name, value in sorted(vars(thing).items()):
            if _is_special(name) and not isinstance(value, _CALLED):
                continue
            if _is_constant(value) or (name.isupper() and _is_table(value)):
                yield f"{thing.__qualname__}.{name} = {_constant(value)}"
            self._add_all_of(value, with_entries=name.isupper())

    def _of(self, function: types.FunctionType) -> Iterator[str]:
        if _is_made_anew(function):
            return
        defaults = (function.__defaults__, sorted((function.__kwdefaults__ or {}).items()))
        values = [_constant(value) for value in _flat(defaults) if _is_constant(value)]
        yield f"{function.__qualname__} {_code_form(function.__code__)} {values}"
        for cell in function.__closure__ or ():
            self._add_all_of(_content(cell))
        variables = function.__globals__
        names = sorted(_names(function.__code__))
        for name in names:
            if name in variables:
                yield from self._of_global(name, variables[name], names)

    def _of_global(self, name: str, value: Any, names: Iterable[str]) -> Iterator[str]:
        if isinstance(value, types.ModuleType):
            if self._is_followed(value.__name__):
                yield from self._of_module(value, names)
        elif _is_constant(value) or _is_table(value):
            # Others can be counters or caches, which change as the code runs.
            if name.isupper():
                yield f"{name} = {_constant(value)}"
        else:
            self._add_all_of(value, with_entries=name.isupper())

    def _of_module(self, module: types.ModuleType, names: Iterable[str]) -> Iterator[str]:
        there = vars(module)
        # One that imports what it is asked for has not the same in it at all times.
        if "__getattr__" in there:
            return
        for name in names:
            if name in there and there[name] is not module:
                # Of a package's package the names are those of the code still, one less.
                left = [each for each in names if each != name]
                yield from self._of_global(name, there[name], left)


def _functions_of(value: Any) -> Iterator[Any]:
    """Yield the functions and classes that a value is, or is made of."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        for each in (value.fget, value.fset, value.fdel):
            yield from _functions_of(each)
    elif isinstance(value, (functools.partial, functools.partialmethod)):
        for each in (value.func, *value.args, *value.keywords.values()):
            yield from _functions_of(each)
    elif isinstance(value, functools.cached_property):
        yield from _functions_of(value.func)
    elif isinstance(value, types.MethodType):
        yield from _functions_of(value.__func__)
    elif isinstance(value, (types.FunctionType, type)):
        yield value
    if isinstance(value, _WRAPPERS):
        yield from _functions_of(getattr(value, "__wrapped__", None))


_WRAPPERS = (types.FunctionType, functools._lru_cache_wrapper)


def _module_of(thing: Any) -> str:
    if isinstance(thing, types.FunctionType):
        # A decorator may have given it the name of what it wraps.
        return str(thing.__globals__.get("__name__", thing.__module__))
    return str(thing.__module__)


def _top(module: str) -> str:
    return module.partition(".")[0]


@functools.cache
def _standard_library() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple(os.path.join(paths[name], "") for name in ("stdlib", "platstdlib"))


def is_installed(module: str) -> bool:
    """Tell whether a module is Python's own, or was installed as a copy."""
    if module in ("__main__", "__mp_main__"):
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module in sys.builtin_module_names or _top(module) in sys.stdlib_module_names
    if {"site-packages", "dist-packages"} & set(file.split(os.sep)):
        return True
    return any(file.startswith(place) for place in _standard_library())


# --- what is compared -------------------------------------------------------------------------

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...))


def _is_constant(value: Any) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_constant, value))
    return type(value) in _PLAIN


def _is_table(value: Any, depth: int = 0) -> bool:
    """Tell whether a value is a list, set or dictionary of constants, or of such tables."""
    # One that is within itself has no end.
    if type(value) not in _TABLES or depth > _DEEPEST:
        return False
    parts = (*value, *_entries(value))
    return all(_is_constant(each) or _is_table(each, depth + 1) for each in parts)


def _entries(value: Any) -> Iterable[Any]:
    if type(value) is dict:
        return tuple(value.values())
    return tuple(value) if type(value) in (list, tuple) else ()


_TABLES = (list, set, dict)
_DEEPEST = 8
_CALLED = (types.FunctionType, staticmethod, classmethod, property)


def _is_made_anew(function: types.FunctionType) -> bool:
    """Tell whether attrs made a function of the fields, with a number of this process in it."""
    code = function.__code__
    return code.co_name == "__hash__" and code.co_filename.startswith("<attrs generated")


def _constant(value: Any) -> str:
    if isinstance(value, (frozenset, set)):
        return f"{type(value).__name__}{sorted(map(_constant, value))}"
    if isinstance(value, tuple):
        return f"({','.join(map(_constant, value))})"
    if isinstance(value, list):
        return f"[{','.join(map(_constant, value))}]"
    if isinstance(value, dict):
        pairs = (f"{_constant(key)}:{_constant(each)}" for key, each in value.items())
        return f"{{{','.join(pairs)}}}"
    return _code_form(value) if isinstance(value, types.CodeType) else repr(value)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return None


def _names(code: types.CodeType) -> set[str]:
    """Return all the names that code asks for, that of functions within it included."""
    names = set(code.co_names)
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            names |= _names(each)
    return names


@functools.lru_cache(maxsize=4096)
def _code_form(code: types.CodeType) -> str:
    """Return a digest of code, whatever its place in a file and its docstring."""
    signature = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    lines = [repr((signature, code.co_varnames, code.co_freevars))]
    for each in dis.get_instructions(code):
        constant = each.opcode in dis.hasconst
        # The place of a constant among them depends on whether there is a docstring.
        lines.append(f"{each.opname} {_constant(each.argval) if constant else each.argrepr}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
