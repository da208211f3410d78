"""Configuration of the optimizer, the schedule, the budget and the loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from ava_exp.config.base import ComponentConfig


@dataclass(kw_only=True, slots=True)
class OptimizerConfig(ComponentConfig):
    """Base of every optimizer. `weight_decay` acts on matrices only: norms, biases and embeddings have none."""

    learning_rate: float = 1.5e-4
    weight_decay: float = 0.01


@dataclass(kw_only=True, slots=True)
class AdamWConfig(OptimizerConfig):
    """Adam with decoupled weight decay."""

    builds: ClassVar[str] = "ava_exp.optim.adamw:build_adamw"

    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    epsilon: float = 1e-8


@dataclass(kw_only=True, slots=True)
class ScheduleConfig(ComponentConfig):
    """Base of every learning-rate schedule: linear warm-up, then a shape that ends at `min_lr_ratio` of the peak.

    Warm-up is `warmup_steps`, else `warmup_tokens`, else `warmup_ratio` of the budget.
    """

    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    warmup_tokens: int | None = None
    min_lr_ratio: float = 0.1


@dataclass(kw_only=True, slots=True)
class CosineConfig(ScheduleConfig):
    builds: ClassVar[str] = "ava_exp.optim.schedules:Cosine"


@dataclass(kw_only=True, slots=True)
class CosineRestartsConfig(ScheduleConfig):
    builds: ClassVar[str] = "ava_exp.optim.schedules:CosineRestarts"

    num_cycles: int = 2


@dataclass(kw_only=True, slots=True)
class LinearConfig(ScheduleConfig):
    builds: ClassVar[str] = "ava_exp.optim.schedules:Linear"


@dataclass(kw_only=True, slots=True)
class WSDConfig(ScheduleConfig):
    """Warm-up, a stable plateau, and a linear decay over the last `decay_ratio` of the budget."""

    builds: ClassVar[str] = "ava_exp.optim.schedules:WarmupStableDecay"

    decay_ratio: float = 0.2


@dataclass(kw_only=True, slots=True)
class ConstantConfig(ScheduleConfig):
    builds: ClassVar[str] = "ava_exp.optim.schedules:Constant"


@dataclass(kw_only=True, slots=True)
class InverseSqrtConfig(ScheduleConfig):
    builds: ClassVar[str] = "ava_exp.optim.schedules:InverseSqrt"


class ParameterCount(Enum):
    """Which parameters a Chinchilla multiple is taken of."""

    active = "active"
    total = "total"


@dataclass(kw_only=True, slots=True)
class BudgetConfig:
    """How long to train. Several limits may be given: the smallest wins. None at all means `default_seconds`."""

    steps: int | None = None
    tokens: int | None = None
    epochs: float | None = None
    seconds: float | None = None
    chinchilla_multiplier: float | None = None
    """Tokens per parameter, 5 to 50; about 20 is compute-optimal for a dense model [hoffmann2022chinchilla] table 3."""
    chinchilla_parameters: ParameterCount = ParameterCount.active
    default_seconds: float = 200.0


class Recompute(Enum):
    """What the backward pass computes again instead of keeping it: nothing, what is cheap, or whole blocks."""

    none = "none"
    selective = "selective"
    full = "full"


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """The loop. `batch_size` is sequences per micro-batch and device; null takes the device's default."""

    batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    gradient_clip_val: float = 1.0
    max_skipped_steps: int = 10
    """Steps in a row with a loss or gradient that is not finite, after which the run stops."""
    log_interval: int = 1
    recompute: Recompute = Recompute.none
    """Activation checkpointing, as many call it."""
    offload_activations: bool = False
    """Keep what the backward pass needs in the processor's memory."""
    compile: bool = False
    """Compile the blocks with torch.compile."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """When and how much to evaluate. `interval_steps` null means ten times in the budget, at least 10 steps apart."""

    interval_steps: int | None = None
    max_tokens: int | None = 50_000
    """Validation tokens of a periodic evaluation. The last one reads the whole split, unless training read less."""
    sample_prompt: str = "def __init__(self"
    sample_tokens: int = 200


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When to save: `save_every_n_batches` null means ten times in the budget, at least 10 steps apart.

    The latest checkpoint stays, and `save_total_limit` others, those with the lowest validation loss first.
    """

    save_every_n_batches: int | None = None
    save_total_limit: int = 2
    asynchronous: bool = True
