"""A configuration's fields are the keywords of what it builds."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from ava_exp.config.base import ComponentConfig
from ava_exp.config.stage import StageConfig
from ava_exp.config.store import SCHEMAS

COMPONENTS = {kind: schema for kind, schema in SCHEMAS.items() if issubclass(schema, ComponentConfig)}


def component(schema: type[ComponentConfig]) -> object:
    return schema.component(schema.__new__(schema))


def keywords(component: object) -> set[str]:
    """Return the keywords that a function or class accepts; a class that hands `**` on accepts its base's, too."""
    accepted: set[str] = set()
    for owner in inspect.getmro(component) if inspect.isclass(component) else (component,):
        parameters = inspect.signature(owner).parameters  # type: ignore[arg-type]
        accepted |= set(parameters)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return accepted


@pytest.mark.parametrize("kind", sorted(kind for kind in COMPONENTS if not kind.startswith("stage/")))
def test_fields_are_keywords_of_the_component(kind: str) -> None:
    schema = COMPONENTS[kind]
    fields = {field.name for field in dataclasses.fields(schema)} - schema.runtime_fields
    accepted = keywords(component(schema))
    assert fields <= accepted, f"not accepted by {schema.builds}: {fields - accepted}"


@pytest.mark.parametrize("kind", sorted(kind for kind in COMPONENTS if kind.startswith("stage/")))
def test_a_stage_is_a_function_of_the_run(kind: str) -> None:
    schema = COMPONENTS[kind]
    assert issubclass(schema, StageConfig)
    assert list(inspect.signature(component(schema)).parameters) == ["config"]  # type: ignore[arg-type]
    assert kind == f"stage/{schema.name}"
