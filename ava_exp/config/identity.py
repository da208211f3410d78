"""What makes a run that run: its configuration as plain values, a hash of it, and how it differs from the default."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from enum import Enum
from typing import Any

from ava_exp.config.distributed import GradientCompression
from ava_exp.config.rules import NAME_EXPECTED, NAME_PATTERN
from ava_exp.config.run import NOT_IDENTITY, RunConfig
from ava_exp.config.schema import KINDS, field_types, implementations, in_words, without_none
from ava_exp.errors import ConfigError, did_you_mean, must_be

HASH_LENGTH = 8
KIND = "kind"
"""Beside the fields of a registered schema: its name, since two options may have the same fields."""


def to_plain(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON values, each section of a registered schema with its `kind`."""
    plain = _to_plain(config)
    assert isinstance(plain, dict)
    return plain


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        kind = {KIND: KINDS[type(value)]} if type(value) in KINDS else {}
        return kind | {field.name: _to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return [_to_plain(item) for item in value]
    return dict(value) if isinstance(value, dict) else value


def from_plain(plain: Any) -> RunConfig:
    """Return the configuration that `to_plain` gave; only registered schemas and their fields are accepted.

    A field that is absent takes its default, so that what an older version stored can still be read.

    Raises:
        ConfigError: an unknown kind or key, a value of the wrong type, or a missing one.
    """
    run = _section(plain, RunConfig, "")
    assert isinstance(run, RunConfig)
    return run


def _section(plain: Any, annotation: Any, key: str) -> Any:
    if not isinstance(plain, dict):
        raise ConfigError(must_be(key or "the configuration", "a mapping", plain))
    allowed = {KINDS.get(schema, ""): schema for schema in implementations(annotation)}
    kind = plain.get(KIND, "")
    if kind not in allowed:
        raise ConfigError(f"`{key}.{KIND}` {kind!r} is unknown: {did_you_mean(str(kind), allowed)}")
    schema = allowed[kind]
    types = field_types(schema)
    unknown = set(plain) - set(types) - {KIND}
    if unknown:
        raise ConfigError(f"`{_join(key, min(unknown))}` does not exist: {did_you_mean(min(unknown), types)}")
    for field in dataclasses.fields(schema):
        if field.name not in plain and not _has_plain_default(field):
            raise ConfigError(f"`{_join(key, field.name)}` is missing.")
    return schema(**{name: _value(plain[name], types[name], _join(key, name)) for name in types if name in plain})


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _has_plain_default(field: dataclasses.Field[Any]) -> bool:
    """Whether leaving the field out gives a value, and neither `???` nor a reference to another key."""
    if field.default_factory is not dataclasses.MISSING:
        return True
    is_reference = isinstance(field.default, str) and (field.default == "???" or "${" in field.default)
    return field.default is not dataclasses.MISSING and not is_reference


def _value(plain: Any, annotation: Any, key: str) -> Any:
    inner = without_none(annotation)
    if plain is None and inner is not annotation:
        return None
    if dataclasses.is_dataclass(inner):
        return _section(plain, inner, key)
    origin = typing.get_origin(inner) or inner
    if origin is list and isinstance(plain, list):
        (item_type,) = typing.get_args(inner)
        return [_value(item, item_type, f"{key}[{index}]") for index, item in enumerate(plain)]
    if origin is dict and isinstance(plain, dict):
        _, item_type = typing.get_args(inner)
        return {str(name): _value(item, item_type, _join(key, name)) for name, item in plain.items()}
    return _scalar(plain, inner, key)


def _scalar(plain: Any, annotation: type, key: str) -> Any:
    if issubclass(annotation, Enum) and plain in annotation.__members__:
        return annotation[plain]
    if annotation is float and type(plain) is int:
        return float(plain)
    if type(plain) is not annotation:
        raise ConfigError(must_be(key, in_words(annotation), plain))
    return plain


def config_hash(config: RunConfig) -> str:
    """Return the same 8 hexadecimal digits for the same computation, however its configuration was written down."""
    whole = to_plain(config)
    plain = {key: value for key, value in whole.items() if key not in NOT_IDENTITY}
    if config.distributed.gradient_compression is not GradientCompression.none:  # which is no way to the same numbers
        plain["distributed"] = {key: whole["distributed"][key] for key in ("gradient_compression", "powersgd_rank")}
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:HASH_LENGTH]


def run_id(config: RunConfig) -> str:
    """Return `<name>-<hash>`: the name of the run's folder. Raises ConfigError for a name that is no file name."""
    if not NAME_PATTERN.fullmatch(config.name):
        raise ConfigError(must_be("name", NAME_EXPECTED, config.name))
    return f"{config.name}-{config_hash(config)}"


def difference_from_default(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return (default, actual) by dotted key for what differs from the bare command, without `conf/local`.

    The choice of an option stands at `<group>.kind`; a key that only one side has is None on the other.
    """
    from ava_exp.config.compose import compose

    default, actual = flatten(to_plain(compose(["~local"]))), flatten(to_plain(config))
    keys = [*actual, *(key for key in default if key not in actual)]
    return {key: (default.get(key), actual.get(key)) for key in keys if default.get(key) != actual.get(key)}


def flatten(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one mapping with dotted keys; a mapping that is empty stays."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        is_section = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return flat
