"""Which points a sweep has: from its file and the command line to one set of overrides for each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from ava_exp.config.faults import error, raise_if_fatal
from ava_exp.config.folders import SWEEP_GROUP
from ava_exp.config.overrides import check_overrides
from ava_exp.config.points import PointComposer
from ava_exp.config.sweep import SweepConfig, sweep_faults
from ava_exp.errors import ConfigError

AD_HOC = "multirun"
"""The name of a sweep that is written on the command line alone."""
SEED = "seed"
Axes = dict[str, list[str]]
"""By key or group: the override, or all of them that are combined."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Definition:
    """What a command line sweeps over. `points` are whole sets of overrides, each an ordinary command line."""

    name: str
    settings: SweepConfig
    points: list[list[str]]
    common: list[str]
    """What every point has, without what varies."""


def define(
    config: DictConfig, arguments: Sequence[str], params: Mapping[str, str], composer: PointComposer
) -> Definition:
    """Return what is asked for.

    Args:
        config: the configuration that Hydra composed of the arguments, with its own settings.
        arguments: the overrides of the command line, without those of Hydra's own settings.
        params: `hydra.sweeper.params`, values by key as in a `grid`.

    Raises:
        ConfigError: the definition contradicts itself, or an override of it cannot be used.
    """
    parsed = [composer.parse(text) for text in arguments]
    name, settings = _name(config, filter(_is_setting, parsed)), OmegaConf.to_object(config.sweep)
    assert isinstance(settings, SweepConfig)
    raise_if_fatal(error(key, expected, actual) for key, expected, actual in sweep_faults(settings))
    where = f"in `{SWEEP_GROUP}={name}`: " if name != AD_HOC else ""
    _check(settings, where)
    given = [text for text, override in zip(arguments, parsed, strict=True) if not _is_setting(override)]
    below = _axes([*settings.overrides, *_as_texts(settings.grid), *_as_texts(params)], composer)
    above = _axes(given, composer)
    points = [
        list(combination)
        for chosen in settings.points or [[]]
        for combination in itertools.product(*_merged(below, _axes(chosen, composer), above).values())
    ]
    if settings.optuna.space and len(points) > 1:
        varying = [key for key, texts in {**below, **above}.items() if len(texts) > 1]
        raise ConfigError(f"{where}with `sweep.optuna.space` nothing else varies, but `{varying[0]}` does.")
    common = [texts[0] for texts in _merged(below, above).values() if len(texts) == 1]
    return Definition(name=name, settings=settings, points=points, common=common)


def varying(points: Iterable[Sequence[str]], composer: PointComposer) -> list[dict[str, str]]:
    """Return for every point what it has that others have not: values by key or group, in order; "" where it has none.

    A single point varies in nothing.
    """
    values = [{_key(parsed): _value(parsed) for parsed in map(composer.parse, point)} for point in points]
    keys = dict.fromkeys(key for point in values for key in point)
    differing = [key for key in keys if len({point.get(key) for point in values}) > 1]
    return [{key: point.get(key, "") for key in differing} for point in values]


def _name(config: DictConfig, settings: Iterable[Override]) -> str:
    chosen = config.hydra.runtime.choices.get(SWEEP_GROUP)
    several = [override for override in settings if override.is_sweep_override()]
    if several:
        raise ConfigError(f"`{several[0].input_line}`: a sweep is one at a time, and so is how it is run.")
    return str(chosen) if chosen is not None else AD_HOC


def _check(settings: SweepConfig, where: str) -> None:
    """Apply the rules of the command line to the overrides of a file."""
    single = [*settings.overrides, *(text for point in settings.points for text in point)]
    several = [*_as_texts(settings.grid), *_as_texts(settings.optuna.space)]
    for text in (*single, *several):
        if text.lstrip("+~").partition("=")[0].replace("/", ".").split(".")[0] in (SWEEP_GROUP, "hydra"):
            raise ConfigError(f"{where}`{text}`: a point has neither a sweep of its own nor settings of Hydra.")
    try:
        check_overrides(single, may_sweep=False)
        check_overrides(several, may_sweep=True)
    except ConfigError as fault:
        raise ConfigError(f"{where}{fault}") from fault


def _is_setting(override: Override) -> bool:
    """Whether an override says how to sweep, and not what a point is."""
    return str(override.key_or_group).split(".")[0] == SWEEP_GROUP


def _as_texts(values: Mapping[str, str]) -> list[str]:
    return [f"{key}={text}" for key, text in values.items()]


def _axes(texts: Iterable[str], composer: PointComposer) -> Axes:
    return _merged(*({_key(parsed): _alternatives(parsed, text)} for text, parsed in _parsed(texts, composer)))


def _parsed(texts: Iterable[str], composer: PointComposer) -> list[tuple[str, Override]]:
    return [(text, composer.parse(text)) for text in texts]


def _merged(*several: Axes) -> Axes:
    """Return all axes in order; one that is given again stands where it was given last, as the last one wins."""
    merged: Axes = {}
    for axes in several:
        for key, texts in axes.items():
            merged.pop(key, None)
            merged[key] = texts
    return merged


def _alternatives(override: Override, text: str) -> list[str]:
    if not override.is_sweep_override():
        return [text]
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"`{text}` is not one of several values: write `a,b` or `range(…)`, or search with `sweep.optuna`."
        )
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _key(override: Override) -> str:
    return str(override.key_or_group)


def _value(override: Override) -> str:
    return "" if override.is_delete() else str(override.get_value_element_as_str())
