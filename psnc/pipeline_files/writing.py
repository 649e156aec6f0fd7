"""From a pipeline to the tree of a pipeline file, or to all that cannot be written."""

from __future__ import annotations

import os
from typing import Any

import attrs
from attrs import Factory, frozen

from psnc.errors import ConfigurationError
from psnc.pipeline import Pipeline
from psnc.pipeline_files.annotations import classes_in
from psnc.pipeline_files.faults import Faults, item_place
from psnc.pipeline_files.plain_values import NoPlainFormError, PlainWriter
from psnc.pipeline_files.reading import own_fields
from psnc.pipeline_files.stage_lookup import class_reference
from psnc.pipeline_files.stage_parameters import StageParameters
from psnc.stages import Stage, constructor_arguments, secret_arguments, stage_name
from psnc.store import shown_url

__all__ = ["PipelineWriter"]


@frozen
class PipelineWriter:
    """Makes a file's tree of a pipeline, and notes all that cannot be written.

    Attributes
    ----------
    pipeline : Pipeline
        The pipeline.
    omit_none : bool
        Leave out parameters that are ``None`` by default and are so, since the file has no null.
    secrets : dict of str to str
        The secrets that the tree refers to, by environment variable.
    """

    pipeline: Pipeline[Any]
    omit_none: bool
    faults: Faults = Factory(Faults)
    secrets: dict[str, str] = Factory(dict)

    def tree(self) -> dict[str, Any]:
        """Return the tree."""
        pipeline = self.pipeline
        tree: dict[str, Any] = {"source": self._stage(pipeline.source, "source")}
        filters = [
            self._stage(each, item_place("filters", position))
            for position, each in enumerate(pipeline.filters)
        ]
        if filters:
            tree["filters"] = filters
        if pipeline.sink is not None:
            tree["sink"] = self._stage(pipeline.sink, "sink")
        fields = self._fields()
        if fields:
            tree["pipeline"] = fields
        return tree

    def _fields(self) -> dict[str, Any]:
        fields = {}
        for field in attrs.fields(Pipeline):
            value = getattr(self.pipeline, field.name)
            if field.name in own_fields() and value != field.default:
                fields[field.name] = os.fspath(value) if isinstance(value, os.PathLike) else value
        store = fields.get("store")
        if store is not None and shown_url(store) != store:
            advice = "leave it out, and set PSNC_STORE to the whole URL where the pipeline runs"
            self.faults.add(
                "pipeline.store", f"the URL has a password, which is not written: {advice}"
            )
        return fields

    def _stage(self, stage: Stage, place: str) -> dict[str, Any]:
        try:
            reference = class_reference(type(stage))
        except ConfigurationError as error:
            self.faults.add(place, str(error))
            return {}
        params = self._params(stage, item_place(place, "params"))
        return {"stage": reference, "params": params} if params else {"stage": reference}

    def _params(self, stage: Stage, place: str) -> dict[str, Any]:
        parameters = StageParameters.of(type(stage))
        secret = secret_arguments(stage)
        params: dict[str, Any] = {}
        for name, value in constructor_arguments(stage).items():
            is_default = value is parameters.default(name)
            is_secret = name in secret and value is not None
            if (is_default and (is_secret or (value is None and self.omit_none))) or (
                parameters.is_list(name) and not value
            ):
                continue
            inside = item_place(place, name)
            try:
                if is_secret:
                    params[name] = {"$env": self._variable(stage, name, value)}
                else:
                    params[name] = self._value_writer(parameters, name, inside).plain(value)
            except NoPlainFormError as error:
                # What is the default is the same again when it is left out.
                if not is_default:
                    self.faults.add(inside, f"{stage_name(stage)}({name}=…): {error}")
        return params

    def _value_writer(self, parameters: StageParameters, name: str, place: str) -> PlainWriter:
        param = parameters.find(name)
        classes = frozenset() if param is None else frozenset(classes_in(param.type))
        return PlainWriter(lambda stage: self._stage(stage, item_place(place, "$stage")), classes)

    def _variable(self, stage: Stage, name: str, value: Any) -> str:
        """Return an environment variable for a secret, the same one for equal secrets only."""
        if not isinstance(value, (str, os.PathLike)):
            raise NoPlainFormError("a secret is read from the environment, and so it must be text")
        secret = os.fspath(value)
        first_choice = f"PSNC_SECRET_{stage_name(stage)}_{name}".upper()
        variable, number = first_choice, 1
        while self.secrets.setdefault(variable, secret) != secret:
            number += 1
            variable = f"{first_choice}_{number}"
        return variable
