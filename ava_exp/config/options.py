"""Read one option of a group as its typed configuration, outside a composition."""

from __future__ import annotations

from typing import TypeVar, cast

from omegaconf import DictConfig, OmegaConf

from ava_exp.config.folders import data_folder

T = TypeVar("T")


def read_option(group: str, option: str, schema: type[T]) -> T:
    """Return `conf/<group>/<option>.yaml` on top of `schema`. Raises FileNotFoundError when there is none."""
    values = OmegaConf.load(data_folder("conf") / group / f"{option}.yaml")
    assert isinstance(values, DictConfig)
    values.pop("defaults", None)
    return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values)))
