"""Questions about the schemas: which keys exist, what a key may hold, which option a class belongs to."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from ava_exp.config.run import RunConfig
from ava_exp.config.store import SCHEMAS

KINDS: dict[type, str] = {schema: kind for kind, schema in SCHEMAS.items()}
"""The name of every registered schema, by its class."""

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "`true` or `false`",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


@functools.cache
def field_types(schema: type) -> dict[str, Any]:
    """Return the annotation of every field of a dataclass, resolved."""
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def without_none(annotation: Any) -> Any:
    """Return `T` for `T | None`, and any other annotation unchanged."""
    if isinstance(annotation, types.UnionType):
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def implementations(annotation: Any) -> list[type]:
    """Return the dataclasses that a field with this annotation can hold; none for a plain value."""
    if not dataclasses.is_dataclass(annotation):
        return []
    base = typing.cast(type, annotation)
    registered = [schema for schema in SCHEMAS.values() if issubclass(schema, base)]
    return registered or [base]


def annotations_at(key: str) -> list[Any]:
    """Return what the dotted `key` may hold, one annotation for each option that has it; empty when none has."""
    held: list[Any] = [RunConfig]
    for part in key.split("."):
        types_of_parent = [field_types(schema) for annotation in held for schema in implementations(annotation)]
        held = [fields[part] for fields in types_of_parent if part in fields]
    return held


def is_in_mapping(key: str) -> bool:
    """Whether `key` lies inside a mapping field, where names are free: `tracker.tags.note`."""
    parent, _, _ = key.rpartition(".")
    return any(typing.get_origin(annotation) is dict for annotation in annotations_at(parent))


def options_with(key: str) -> list[str]:
    """Return the options, as `group=option`, that have the dotted `key`."""
    parent, _, name = key.rpartition(".")
    schemas = [schema for annotation in annotations_at(parent) for schema in implementations(annotation)]
    kinds = [KINDS[schema] for schema in schemas if name in field_types(schema) and schema in KINDS]
    return sorted(kind.replace("/", "=") for kind in kinds if "/" in kind)


def keys_beside(key: str) -> list[str]:
    """Return the dotted keys of the section that `key` is in, sorted; those of every option that can stand there."""
    parent, dot, _ = key.rpartition(".")
    held = annotations_at(parent) if parent else [RunConfig]
    names = {name for annotation in held for schema in implementations(annotation) for name in field_types(schema)}
    return sorted(f"{parent}{dot}{name}" for name in names)


def all_keys() -> list[str]:
    """Return every dotted key that some option has, sorted; sections themselves are left out."""
    return sorted(set(_keys_below(RunConfig, "")))


def _keys_below(schema: type, prefix: str) -> Iterator[str]:
    for name, annotation in field_types(schema).items():
        below = implementations(annotation)
        if not below:
            yield prefix + name
        for inner in below:
            yield from _keys_below(inner, f"{prefix}{name}.")


def in_words(annotation: Any) -> str:
    """Say what a value with this annotation looks like on a command line."""
    inner = without_none(annotation)
    if isinstance(inner, type) and issubclass(inner, Enum):
        words = "one of " + ", ".join(f"`{member.name}`" for member in inner)
    elif dataclasses.is_dataclass(inner):
        words = "a section with keys of its own"
    else:
        words = _WORDS[typing.get_origin(inner) or inner]
    return words if inner is annotation else f"{words} or `null`"
