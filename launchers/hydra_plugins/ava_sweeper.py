"""The Hydra sweeper of this project. Hydra imports this file at every start: it imports nothing that takes time.

Hydra runs the file before the module is known to Python: dataclasses cannot have annotations that are text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class AvaSweeperConfig:
    """`hydra/sweeper=ava`. How a sweep is run is said in its section `sweep`."""

    _target_: str = "hydra_plugins.ava_sweeper.AvaSweeper"
    params: dict[str, str] | None = None
    """What varies, in a file, as with Hydra's own sweeper."""
    max_batch_size: int | None = None
    """At most so many points run at a time, whatever `sweep.num_parallel` is; null is no limit."""


ConfigStore.instance().store(group="hydra/sweeper", name="ava", node=AvaSweeperConfig, provider="ava_exp")


class AvaSweeper(Sweeper):
    """Hands a sweep over to `ava_exp.sweeping`, and ends the program with its exit code if that is not 0."""

    def __init__(self, params: dict[str, str] | None = None, max_batch_size: int | None = None) -> None:
        self.params, self.max_batch_size = dict(params or {}), max_batch_size

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context: HydraContext | None = hydra_context
        self.task_function = task_function
        self.config: DictConfig | None = config

    def sweep(self, arguments: list[str]) -> Any:
        from ava_exp.sweeping.sweep import run_sweep

        assert self.hydra_context is not None and self.config is not None
        loader = self.hydra_context.config_loader
        code = run_sweep(
            self.config,
            arguments,
            params=self.params,
            max_parallel=self.max_batch_size,
            loader=loader,
            task=self.task_function,
            launch=self._launch,
        )
        if code != 0:
            raise SystemExit(code)

    def _launch(self, points: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        """Run points with the launcher of Hydra that was chosen."""
        assert self.hydra_context is not None and self.config is not None
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=self.task_function, config=self.config
        )
        return launcher.launch(points, initial_job_idx=0)
