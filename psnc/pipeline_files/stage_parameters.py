"""What a stage's constructor takes, as its signature and its ``params()`` say."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from attrs import evolve, frozen

from psnc.stages import Param, Stage, constructor_signature

__all__ = ["StageParameters"]

_Kind = inspect.Parameter


@frozen
class StageParameters:
    """The parameters of one class of stages, by name.

    ``*args`` go by the parameter's own name, as a list. What ``**kwargs`` takes goes by any name.

    Attributes
    ----------
    signature : inspect.Signature
        That of the constructor, without ``self``.
    declared : mapping
        What ``params()`` lists, by name.
    """

    signature: inspect.Signature
    declared: Mapping[str, Param]

    @classmethod
    def of(cls, stage: type[Stage]) -> StageParameters:
        """Return those of a class."""
        declared = {param.name: param for param in stage.params()}
        return cls(constructor_signature(stage), declared)

    @property
    def names(self) -> list[str]:
        """The names that are known beforehand."""
        by_signature = [
            name
            for name, each in self.signature.parameters.items()
            if each.kind != _Kind.VAR_KEYWORD
        ]
        more = self.declared if self._extra is not None else ()
        return list(dict.fromkeys([*by_signature, *(each for each in more if each != self._extra)]))

    @property
    def required(self) -> list[str]:
        """The names of those that have no default."""
        return [name for name in self.names if self._is_required(name)]

    def find(self, name: str) -> Param | None:
        """Return what is known of a parameter, ``None`` if the constructor takes none so called."""
        if name in self.signature.parameters and name != self._extra:
            param = self.declared.get(name) or Param(name=name)
            if self.is_list(name):
                return evolve(param, type=list[param.type])  # type: ignore[name-defined]
            return param
        if self._extra is None:
            return None
        template = self.declared.get(self._extra) or Param()
        param = self.declared.get(name) or template
        return evolve(param, name=name, secret=param.secret or template.secret)

    def is_secret(self, name: str) -> bool:
        """Tell whether a parameter's value must not be written anywhere."""
        param = self.find(name)
        return param is not None and param.secret

    def is_list(self, name: str) -> bool:
        """Tell whether a name is that of ``*args``."""
        parameter = self.signature.parameters.get(name)
        return parameter is not None and parameter.kind is _Kind.VAR_POSITIONAL

    def default(self, name: str) -> Any:
        """Return the constructor's default, ``inspect.Parameter.empty`` where it has none."""
        parameter = self.signature.parameters.get(name)
        if parameter is None or name == self._extra:
            return _Kind.empty
        return () if self.is_list(name) else parameter.default

    def bind(self, arguments: Mapping[str, Any]) -> inspect.BoundArguments:
        """Return arguments by name as the constructor takes them, defaults included."""
        bound: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for name, value in arguments.items():
            if name not in self.signature.parameters or name == self._extra:
                extra[name] = value
            else:
                bound[name] = tuple(value) if self.is_list(name) else value
        if self._extra is not None:
            bound[self._extra] = extra
        result = inspect.BoundArguments(self.signature, bound)
        # Those before *args can be passed by position only, and so all or none.
        result.apply_defaults()
        return result

    @property
    def _extra(self) -> str | None:
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is _Kind.VAR_KEYWORD:
                return name
        return None

    def _is_required(self, name: str) -> bool:
        parameter = self.signature.parameters.get(name)
        if parameter is None:
            return self.declared[name].required
        return parameter.default is _Kind.empty and not self.is_list(name)
