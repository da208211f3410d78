"""From override texts to a `RunConfig`: what the command line does, for Python."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ava_exp.config.folders import group_names
from ava_exp.config.overrides import check_overrides
from ava_exp.config.run import RunConfig
from ava_exp.config.source import CONFIG_NAME, register_source
from ava_exp.config.store import register_schemas
from ava_exp.config.suggest import explain
from ava_exp.errors import ConfigError, UserError


def compose(overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run that `python -m ava_exp OVERRIDES` composes; nothing is run or written.

    Raises:
        ConfigError: an override or a file cannot be used; the message is one line.
    """
    register_schemas()
    register_source()
    setup_globals()
    with composition_errors_in_one_line():
        check_overrides(overrides, may_sweep=False)
        loader = ConfigLoaderImpl(create_config_search_path(None))
        config = loader.load_configuration(CONFIG_NAME, list(overrides), RunMode.RUN)
        with open_dict(config):
            del config["hydra"]
        return to_run_config(config)


def to_run_config(config: DictConfig) -> RunConfig:
    """Resolve a composed configuration into typed dataclasses.

    Raises:
        ConfigError: a value is missing, or refers to something that does not exist.
    """
    with composition_errors_in_one_line():
        run = OmegaConf.to_object(config)
    assert isinstance(run, RunConfig), type(run)
    return run


@contextmanager
def composition_errors_in_one_line() -> Iterator[None]:
    """Turn whatever Hydra and its libraries raise for a wrong override or file into a `ConfigError`.

    Hydra raises `ValueError` and `OSError` too: what runs inside must keep its own to itself.
    """
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        raise ConfigError(explain(error, group_names())) from error
