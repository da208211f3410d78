"""Configuration of launchers: who starts the processes of a run, and where.

A launcher is found by the name of its class when a run needs it. Nothing below imports the package of launchers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ava_exp.config.base import ComponentConfig
from ava_exp.config.stage import StageConfig


@dataclass(kw_only=True, slots=True)
class LauncherConfig(ComponentConfig):
    """Base of every launcher; `builds` names a class with `launch(config, overrides) -> exit code`."""

    grace_s: float = 30.0
    """When a process of the run has failed, the others have this long to end by themselves."""
    hang_timeout_s: float | None = None
    """End the run when a process has finished no step for this long; null waits for ever."""

    def takes(self, stage: StageConfig, num_devices: int) -> bool:
        """Whether a stage on so many devices is this launcher's work; else the process that was asked does it."""
        return stage.trains and (num_devices > 1 or self.hang_timeout_s is not None)


@dataclass(kw_only=True, slots=True)
class LocalLauncherConfig(LauncherConfig):
    """One process for each device, on this machine."""

    builds: ClassVar[str] = "ava_launchers.local:LocalLauncher"


@dataclass(kw_only=True, slots=True)
class SlurmLauncherConfig(LocalLauncherConfig):  # an option replaces the default only as a kind of it
    """A job on a cluster with SLURM, one task for each device."""

    builds: ClassVar[str] = "ava_launchers.slurm:SlurmLauncher"
    manages: ClassVar[str] = "ava_launchers.slurm_commands:SlurmJobs"
    """What answers questions about jobs that were submitted."""

    num_nodes: int = 1
    """Nodes, each with `hardware.num_devices` divided by it, rounded up."""
    partition: str | None = None
    account: str | None = None
    time_limit_minutes: int | None = None
    """Null is the limit of the partition."""
    warning_s: int = 90
    """How long before the end of its time a job is told to save and stop."""
    memory_gib: float | None = None
    """Of a node; null is the cluster's default."""
    cpus_per_device: int | None = None
    gres_per_device: str | None = None
    """What a device is called on this cluster (`gpu:h100`); null asks for any GPU where the hardware is one."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that run first on the node: modules, environments, variables."""
    python: str | None = None
    """The command that starts Python on the node, a container for example; null is the Python that submits."""
    sbatch_parameters: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch, without the dashes in front."""
    srun_arguments: list[str] = field(default_factory=list)
    max_requeues: int = 20
    """How often a job that was stopped and saved its state is put back into the queue."""
    wait: bool = False
    """Stay until the job has ended, and end with 0 only if it did."""

    def takes(self, stage: StageConfig, num_devices: int) -> bool:
        """Every stage that computes something; what only tells about a configuration is told here."""
        return stage.computes
