"""From the tree of a pipeline file to the pipeline, or to all that is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import attrs
from attrs import Factory, frozen

from psnc.errors import PsncError
from psnc.masking import masked
from psnc.pipeline import Pipeline
from psnc.pipeline_files.annotations import fitted
from psnc.pipeline_files.faults import Faults, did_you_mean, item_place, one_line, shown
from psnc.pipeline_files.plain_values import PlainReader
from psnc.pipeline_files.stage_lookup import find_stage
from psnc.pipeline_files.stage_parameters import StageParameters
from psnc.stages import Filter, Param, Sink, Source, Stage, stage_name

__all__ = ["PipelineReader", "own_fields"]

_SECTIONS = ("source", "filters", "sink", "pipeline")
_STAGE_KEYS = ("stage", "params")


def own_fields() -> dict[str, Any]:
    """Return the pipeline's fields besides its stages, with their types."""
    types = get_type_hints(Pipeline)
    return {
        field.name: types[field.name]
        for field in attrs.fields(Pipeline)
        if field.init and field.name not in _SECTIONS
    }


@frozen
class PipelineReader:
    """Makes a pipeline of a file's tree, and notes all that is wrong with it."""

    construct: Callable[..., Stage]
    environment: Mapping[str, str]
    faults: Faults = Factory(Faults)
    # Those of inner stages too, which an outer one's constructor may well quote.
    _secrets: list[str] = Factory(list)

    def pipeline(self, tree: Any) -> Pipeline[Any] | None:
        """Return the pipeline, ``None`` if there is something wrong."""
        if not isinstance(tree, dict):
            self.faults.add("", f"it must hold a table with a source, not {shown(tree)}")
            return None
        self._check_keys(tree, _SECTIONS, "")
        stages = self._stages(tree)
        fields = self._fields(tree.get("pipeline", {}))
        if self.faults:
            return None
        try:
            return Pipeline(**stages, **fields)
        except PsncError as error:
            self.faults.add("pipeline", str(error))
            return None

    def _stages(self, tree: dict[Any, Any]) -> dict[str, Any]:
        stages: dict[str, Any] = {}
        if "source" in tree:
            stages["source"] = self.stage(tree["source"], "source", Source)
        else:
            advice = 'write a table "source" with the name of a stage: every pipeline has one'
            self.faults.add("source", f"missing: {advice}")
        filters = tree.get("filters", [])
        if isinstance(filters, list):
            stages["filters"] = [
                self.stage(each, item_place("filters", position), Filter)
                for position, each in enumerate(filters)
            ]
        else:
            self.faults.add("filters", f"must be a list of tables, not {shown(filters)}")
        if "sink" in tree:
            stages["sink"] = self.stage(tree["sink"], "sink", Sink)
        return stages

    def _fields(self, section: Any) -> dict[str, Any]:
        if not self._is_table(section, "pipeline"):
            return {}
        types = own_fields()
        self._check_keys(section, types, "pipeline")
        values = PlainReader(self._inner_stage, self.faults)
        fields = {}
        for name in section:
            if name in types:
                place = item_place("pipeline", name)
                before = len(self.faults)
                value = values.value(section[name], place)
                if len(self.faults) == before:
                    fields[name] = fitted(value, types[name], place, self.faults)
        return fields

    def stage(self, section: Any, place: str, base: type[Stage]) -> Stage | None:
        """Return the stage that a section describes, ``None`` if there is something wrong."""
        before = len(self.faults)
        if not self._is_table(section, place):
            return None
        self._check_stage_keys(section, place)
        cls = self._class(section["stage"], place, base) if "stage" in section else None
        params = section.get("params", {})
        if not self._is_table(params, item_place(place, "params")) or cls is None:
            return None
        try:
            parameters = StageParameters.of(cls)
        except Exception as error:
            # The author's own params(), which may do anything.
            message = f"{stage_name(cls)}.params() raised {_reason(type(error), str(error))}"
            self.faults.add(place, message, error)
            return None
        arguments = self._arguments(params, item_place(place, "params"), cls, parameters)
        if len(self.faults) > before:
            return None
        return self._call(cls, parameters, arguments, place)

    def _inner_stage(self, section: Any, place: str) -> Stage | None:
        return self.stage(section, place, Stage)

    def _class(self, name: Any, place: str, base: type[Stage]) -> type[Stage] | None:
        place = item_place(place, "stage")
        if not isinstance(name, str):
            self.faults.add(place, f"must be a name as text, not {shown(name)}")
            return None
        try:
            return find_stage(name, base)
        except PsncError as error:
            self.faults.add(place, str(error), error)
            return None

    def _arguments(
        self, params: dict[Any, Any], place: str, cls: type[Stage], parameters: StageParameters
    ) -> dict[str, Any]:
        arguments = {}
        for name, plain in params.items():
            inside = item_place(place, name)
            param = parameters.find(name) if isinstance(name, str) else None
            if param is None:
                known = f"it takes {', '.join(parameters.names) or 'none'}"
                hint = did_you_mean(name, parameters.names, known)
                self.faults.add(inside, f"{stage_name(cls)} has no such parameter: {hint}")
            elif param.secret:
                arguments[name] = self._secret(plain, param, inside)
            else:
                arguments[name] = self._value(plain, param, inside)
        for name in parameters.required:
            if name not in params:
                message = f"missing: {stage_name(cls)} cannot do without it"
                self.faults.add(item_place(place, name), message)
        return arguments

    def _value(self, plain: Any, param: Param, place: str) -> Any:
        before = len(self.faults)
        value = PlainReader(self._inner_stage, self.faults).value(plain, place)
        if len(self.faults) > before:
            return None
        return fitted(value, param.type, place, self.faults)

    def _secret(self, plain: Any, param: Param, place: str) -> Any:
        """Return a secret, of which no message may say anything."""
        if plain is None or plain == {"$none": True}:
            return None
        name = plain.get("$env") if isinstance(plain, dict) and len(plain) == 1 else None
        if not isinstance(name, str):
            advice = 'write {"$env": "NAME"} and put it in this environment variable'
            self.faults.add(place, f"a secret does not belong in a file: {advice}")
            return None
        if name not in self.environment:
            self.faults.add(
                place, f"the environment variable {name} is not set: set it to the secret"
            )
            return None
        trial = Faults()
        self._secrets.append(self.environment[name])
        value = fitted(self.environment[name], param.type, place, trial)
        if trial:
            self.faults.add(place, f"{name} holds text, which does not fit the parameter's type")
        return value

    def _call(
        self,
        cls: type[Stage],
        parameters: StageParameters,
        arguments: dict[str, Any],
        place: str,
    ) -> Stage | None:
        bound = parameters.bind(arguments)
        try:
            return self.construct(cls, *bound.args, **bound.kwargs)
        except (Exception, SystemExit) as error:
            # Masked before its lines are joined, by which a secret of two lines would be another.
            reason = masked(str(error), self._secrets)
            if not isinstance(error, PsncError):
                reason = f"raised {_reason(type(error), reason)}"
            # A traceback would say the message in full.
            cause = None if self._secrets else error
            self.faults.add(place, f"{stage_name(cls)}(…): {reason}", cause)
            return None

    def _is_table(self, section: Any, place: str) -> bool:
        if not isinstance(section, dict):
            self.faults.add(place, f"must be a table, not {shown(section)}")
        return isinstance(section, dict)

    def _check_stage_keys(self, section: dict[Any, Any], place: str) -> None:
        if "stage" not in section:
            advice = "give a registered name, or module:Class"
            self.faults.add(item_place(place, "stage"), f"missing: {advice}")
        for key in section:
            if key not in _STAGE_KEYS:
                advice = f"parameters belong in {place}.params"
                hint = did_you_mean(key, _STAGE_KEYS, advice)
                self.faults.add(item_place(place, key), f"no such key: {hint}")

    def _check_keys(self, table: dict[Any, Any], known: Any, place: str) -> None:
        for key in table:
            if key not in known:
                hint = did_you_mean(key, known, f"there are {', '.join(known)}")
                if not isinstance(key, str):
                    hint = "a key is text, so put it in quotes"
                self.faults.add(item_place(place, key), f"no such key: {hint}")


def _reason(kind: type[BaseException], text: str) -> str:
    message = one_line(text)
    return f"{kind.__name__}: {message}" if message else kind.__name__
