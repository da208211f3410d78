"""What a command line, a sweep or a file may say: closes the ways in which plain Hydra leaves `conf/`.

Hydra imports and calls what a `_target_` names, unpickles, reads any folder and any file it is pointed at, and takes
`+new.key=1` for a new key. Here a run is made of the options in `conf/` and of the keys that their schemas have.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import MISSING

from ava_exp.config.folders import group_names, option_names
from ava_exp.config.run import RunConfig
from ava_exp.config.schema import annotations_at, is_in_mapping, keys_beside
from ava_exp.config.suggest import suggest_key
from ava_exp.errors import ConfigError, did_you_mean

PLUGIN_SECTIONS = ("launcher", "sweeper")
PLUGIN_GROUPS = tuple(f"hydra/{section}" for section in PLUGIN_SECTIONS)


def check_overrides(texts: Sequence[str], *, may_sweep: bool) -> None:
    """Raise `ConfigError` at the first override that is not `key=value` or `group=option` of this project.

    Whether the key exists and takes the value is left to composition. `may_sweep` allows `key=1,2`.
    """
    groups = {*group_names(), *PLUGIN_GROUPS}
    overrides = OverridesParser.create().parse_overrides(list(texts))
    left_out = {override.key_or_group for override in overrides if override.is_delete()} & _without_default()
    for override in overrides:
        text = str(override.input_line)
        if override.is_sweep_override() and not may_sweep:
            raise ConfigError(f"`{text}` is several values: add `-m` to run each, or write a list as `[1,2]`.")
        if "_target_" in text:
            raise ConfigError(f"`{text}`: `_target_` is not accepted; components are chosen as options of their group.")
        if override.package is not None:
            raise ConfigError(f"`{text}`: the place of an option is fixed; leave `@{override.package}` out.")
        if (section := override.key_or_group.partition(".")[0]) in left_out and section != override.key_or_group:
            raise ConfigError(f"`{text}` sets a key of `{section}`, which `~{section}` leaves out.")
        if override.key_or_group in groups and not isinstance(override.value(), dict):
            _check_group(override, text)
        elif re.split(r"[./]", override.key_or_group)[0] == "hydra":
            _check_plugin_setting(override, text)
        else:
            _check_key(override, text, groups)


def _without_default() -> set[str]:
    """Return the sections that are nothing at all when their option is left out."""
    return {field.name for field in dataclasses.fields(RunConfig) if field.default == MISSING}


def check_option_name(name: str, where: str) -> None:
    """Raise `ConfigError` if `name` could reach out of its group's folder, or is not fixed text."""
    if any(character in name for character in "\0\\$") or name.startswith("/") or ".." in name.split("/"):
        raise ConfigError(f"`{where}`: an option is the name of a file in its group's folder, not a path.")


def check_sweep_parameters(parameters: Mapping[str, object]) -> None:
    """Apply `check_overrides` to `hydra.sweeper.params`, of which Hydra makes overrides."""
    check_overrides([f"{key}={values}" for key, values in parameters.items()], may_sweep=True)


def _check_group(override: Override, text: str) -> None:
    group, value = override.key_or_group, override.value()
    if override.is_delete():
        return
    if override.is_add() or override.is_force_add():
        raise ConfigError(f"`{text}`: write `{text.lstrip('+')}`; every group has one place.")
    if not override.is_sweep_override() and not (isinstance(value, (str, list)) and value):
        options = ", ".join(f"`{name}`" for name in option_names(group))
        raise ConfigError(f"`{text}`: `{group}` takes one of {options}; `~{group}` leaves it out.")
    for name in re.split(r"[\s,\[\]()'\"]+", text.partition("=")[2]):
        check_option_name(name, text)


def _check_plugin_setting(override: Override, text: str) -> None:
    key = override.key_or_group
    parts = key.split(".")
    if key != "hydra.verbose" and not (len(parts) > 2 and parts[1] in PLUGIN_SECTIONS):
        raise ConfigError(
            f"`{text}`: of Hydra's own settings only `hydra.verbose`, `hydra.launcher.*`, `hydra.sweeper.*`"
            " and the groups `hydra/launcher`, `hydra/sweeper` are open."
        )
    if "${" in text:
        raise ConfigError(f"`{text}`: settings of a launcher or sweeper are plain values, not interpolations.")
    if parts[1:3] == ["sweeper", "params"]:
        raise ConfigError(f"`{text}`: sweep with `-m key=value,value`, or with a file in `sweeps/`.")


def _check_key(override: Override, text: str, groups: set[str]) -> None:
    key = override.key_or_group
    if not key:
        raise ConfigError(f"`{text}` is not `key=value`; `--help` shows examples.")
    if "/" in key:
        raise ConfigError(f"`{key}` is not a group: {did_you_mean(key, groups)}")
    if override.is_delete():
        raise ConfigError(f"`{text}`: a key cannot be removed, only set to another value.")
    if (override.is_add() or override.is_force_add()) and not is_in_mapping(key):
        known = key in groups or annotations_at(key)
        mend = f"write `{text.lstrip('+')}`." if known else suggest_key(key, keys_beside(key) or groups)
        raise ConfigError(f"`{text}`: no key can be added; {mend}")
