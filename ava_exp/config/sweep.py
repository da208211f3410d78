"""Configuration of sweeps: which points there are, by what they are compared, and how many run at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum


class Objective(Enum):
    """The measure of the last evaluation by which points are compared; accuracy is the only one that should be high."""

    bits_per_byte = "bits_per_byte"
    loss = "loss"
    perplexity = "perplexity"
    token_accuracy = "token_accuracy"
    noncausal_loss = "noncausal_loss"

    @property
    def is_maximized(self) -> bool:
        return self is Objective.token_accuracy


@dataclass(kw_only=True, slots=True)
class OptunaConfig:
    """Let Optuna choose the points. `space` empty leaves it out."""

    space: dict[str, str] = field(default_factory=dict)
    """What may be chosen, by key or group: `interval(0, 1)`, `tag(log, interval(1e-4, 1e-2))`, `range(2, 9)`, `a,b`."""
    num_trials: int = 20
    num_startup_trials: int = 5
    """Points drawn at random before the sampler learns from them, and finished ones before any point is pruned."""
    seed: int = 0
    storage: str | None = None
    """URL of a database that several machines share; null is a SQLite file in the sweep's folder."""
    pruning: bool = True
    """Stop a point whose validation is worse than the median of the others at the same share of their budget."""
    num_warmup_evaluations: int = 2
    """Evaluations of a point that are not looked at for pruning."""


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """Many runs of one definition. What varies is written as on the command line: `optimizer.learning_rate: 1e-3,3e-3`.

    The points are `points`, each with every combination of `grid`; or what `optuna` chooses.
    """

    overrides: list[str] = field(default_factory=list)
    """What all points have in common."""
    grid: dict[str, str] = field(default_factory=dict)
    """Values by key or group, all of which are combined."""
    points: list[list[str]] = field(default_factory=list)
    """Sets of overrides, one a point."""
    optuna: OptunaConfig = field(default_factory=OptunaConfig)
    objective: Objective = Objective.bits_per_byte
    num_parallel: int = 1
    """Points that run at a time; they share the processor's threads."""
    devices: list[int] = field(default_factory=list)
    """Numbers of GPUs: as many points run at a time, each with one of them. Empty takes `num_parallel`."""
    max_retries: int = 1
    """How often a point that failed is tried again."""


def sweep_faults(sweep: SweepConfig) -> Iterator[tuple[str, str, object]]:
    """Yield (key, what it must be, what it is) for values that do not go together."""
    if sweep.optuna.space and (sweep.grid or sweep.points):
        key = "sweep.grid" if sweep.grid else "sweep.points"
        yield key, "empty with `sweep.optuna.space`", sweep.grid or sweep.points
    if len(set(sweep.devices)) != len(sweep.devices) or any(device < 0 for device in sweep.devices):
        yield "sweep.devices", "numbers of GPUs, each once", sweep.devices
    if any(not point for point in sweep.points) and len(sweep.points) > 1:
        yield "sweep.points", "sets of at least one override", sweep.points
