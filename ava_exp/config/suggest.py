"""Turns what Hydra, OmegaConf and YAML raise into one sentence that says what is wrong and what would be right."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable

from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)
from yaml import MarkedYAMLError

from ava_exp.config.run import RunConfig
from ava_exp.config.schema import all_keys, annotations_at, field_types, in_words, keys_beside, options_with
from ava_exp.errors import did_you_mean, must_be, nearest


def explain(error: BaseException, groups: Iterable[str] = ()) -> str:
    """Return one line for `error`; `groups` are the names that can stand left of `=` beside the keys."""
    if isinstance(error, MarkedYAMLError):
        return _yaml_error(error)
    if isinstance(error, OverrideParseException):
        return _unreadable_override(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"`{group}` has no option `{option}`: {did_you_mean(option, error.options)}"
    cause = _cause_with_key(error)
    if cause is not None:
        return _place(error) + _key_error(cause, groups)
    unused = re.search(r"Could not override '([^']+)'\. No match in the defaults list", str(error))
    if unused:
        return f"{_place(error)}the group `{unused[1]}` has no part in this run: no chosen option uses it."
    return " ".join(str(error).split()) or type(error).__name__


def _yaml_error(error: MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{error.problem or error.context}"


def _unreadable_override(error: OverrideParseException) -> str:
    key, equals, value = error.override.partition("=")
    if not equals:
        return f"`{error.override}` is not `key=value`; `--help` shows examples."
    return f"`{error.override}` cannot be read; if the value is text, quote it twice: '{key}=\"{value}\"'."


def _cause_with_key(error: BaseException) -> OmegaConfBaseException | None:
    """Return the first error of the chain that knows the key it speaks of."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OmegaConfBaseException) and current.full_key:
            return current
        current = current.__cause__ or current.__context__
    return None


def _place(error: BaseException) -> str:
    """Return 'in `experiment/mine`: ' when the error comes from a file and not from the command line."""
    match = re.match(r"In '([^']+)'", str(error)) if isinstance(error, ConfigCompositionException) else None
    return f"in `{match[1]}`: " if match else ""


def _key_error(error: OmegaConfBaseException, groups: Iterable[str]) -> str:
    key = str(error.full_key)
    if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
        return _unknown_key(key, error, groups)
    if isinstance(error, MissingMandatoryValue):
        return f"`{key}` must be given: add `{key}=…`, or choose an option that sets it."
    if isinstance(error, InterpolationResolutionError):
        return f"`{key}` cannot be resolved: {_first_line(error)}."
    annotations = annotations_at(key.partition("[")[0])
    if isinstance(error, ValidationError) and annotations:
        items = typing.get_args(annotations[0])
        return must_be(key, in_words(items[0] if "[" in key else annotations[0]), error.value)
    return f"`{key}`: {_first_line(error)}."


def _unknown_key(key: str, error: OmegaConfBaseException, groups: Iterable[str]) -> str:
    parent, dot, _ = key.rpartition(".")
    if error.object_type is dict:
        return f"`{key}` is new in a mapping: write `+{key}=…`."
    elsewhere = options_with(key) if dot else []
    if elsewhere:
        return f"`{key}` is not a key of the chosen option, but of " + ", ".join(f"`{o}`" for o in elsewhere) + "."
    if not dot:
        return f"`{key}` does not exist: {_like_top_level(key, groups)}"
    chosen = error.object_type
    siblings = [f"{parent}.{field}" for field in field_types(chosen)] if dataclasses.is_dataclass(chosen) else []
    if siblings:  # those of other options last: a letter too many there is still nearer than any key of this one
        siblings += [other for other in keys_beside(key) if other not in siblings]
    return f"`{key}` does not exist: " + (suggest_key(key, siblings) if siblings else f"`{parent}` has no keys here.")


def suggest_key(key: str, siblings: Iterable[str]) -> str:
    """Return 'did you mean …?' with full keys, or all of them. Only the last parts are compared: the rest is equal."""
    by_last_part = {sibling.rpartition(".")[2]: sibling for sibling in siblings}
    close = nearest(key.rpartition(".")[2], by_last_part)
    if close:
        return _did_you_mean(by_last_part[part] for part in close)
    return "there is " + ", ".join(f"`{sibling}`" for sibling in by_last_part.values()) + "."


def _did_you_mean(names: Iterable[str]) -> str:
    return "did you mean " + " or ".join(f"`{name}`" for name in names) + "?"


def _like_top_level(word: str, groups: Iterable[str]) -> str:
    """Suggest for a first word: a group, a section, or the full key whose last part looks like it."""
    by_last_part: dict[str, list[str]] = {}
    for key in all_keys():
        by_last_part.setdefault(key.rpartition(".")[2], []).append(key)
    exact = by_last_part.get(word, [])
    names = {*field_types(RunConfig), *groups}
    close = exact or nearest(word, names) or [key for part in nearest(word, by_last_part) for key in by_last_part[part]]
    return _did_you_mean(close) if close else did_you_mean(word, names)


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0]
