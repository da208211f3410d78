"""Composes many points that differ in few things: once for each choice of options, then the values on a copy.

Hydra composes a run in two parts: files, as the chosen options of groups say, and then the values of the command line,
one after the other. The first takes nearly all of the time and is the same for all points that choose the same options.
The second is done here by Hydra's own code, so that types, errors and references are those of a whole composition.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from ava_exp.config.source import CONFIG_NAME, register_source
from ava_exp.config.store import register_schemas


class PointComposer:
    """Composes the configurations of points. What they have in common is composed once and kept."""

    def __init__(self, loader: ConfigLoaderImpl | None = None) -> None:
        if loader is None:
            register_schemas()
            register_source()
            setup_globals()
            loader = ConfigLoaderImpl(create_config_search_path(None))
        self._loader = loader
        self._parser = OverridesParser.create(config_loader=loader)
        self._parsed: dict[str, Override] = {}
        self._is_group: dict[str, bool] = {}
        self._bases: dict[tuple[str, ...], DictConfig] = {}

    @property
    def num_compositions(self) -> int:
        """How many whole compositions there were."""
        return len(self._bases)

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Return what Hydra composes of these overrides, without its own settings.

        Raises whatever Hydra raises for them; `composition_errors_in_one_line` says it in one line.
        """
        parsed = [self.parse(text) for text in overrides]
        values = [override for override in parsed if self._is_value(override)]
        options = tuple(text for text, override in zip(overrides, parsed, strict=True) if not self._is_value(override))
        if options not in self._bases:
            self._bases[options] = self._compose_options(list(options))
        config = copy.deepcopy(self._bases[options])
        try:
            self._loader._apply_overrides_to_config(values, config)
        except OmegaConfBaseException as error:
            raise ConfigCompositionException() from error
        return config

    def parse(self, text: str) -> Override:
        """Return an override as Hydra reads it; every text is read once."""
        if text not in self._parsed:
            (self._parsed[text],) = self._parser.parse_overrides([text])
        return self._parsed[text]

    def _is_value(self, override: Override) -> bool:
        """Whether an override sets a value, as Hydra decides it; the others choose what is composed."""
        key = override.key_or_group
        if key not in self._is_group:
            self._is_group[key] = self._loader.repository.group_exists(key)
        return isinstance(override.value(), dict) or not self._is_group[key]

    def _compose_options(self, options: list[str]) -> DictConfig:
        config = self._loader.load_configuration(CONFIG_NAME, options, RunMode.RUN)
        with open_dict(config):
            del config["hydra"]
        return config
