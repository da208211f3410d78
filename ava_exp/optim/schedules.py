"""Learning-rate schedules: pure functions of the step, so that nothing of them needs to be saved."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class Schedule(ABC):
    """Linear warm-up to 1, then `shape` of the remaining progress; multiplies the peak learning rate.

    Explicit `warmup_steps` win over `warmup_tokens`, and these over `warmup_ratio` of the budget.
    """

    warmup_ratio: float
    warmup_steps: int | None
    warmup_tokens: int | None
    min_lr_ratio: float
    total_steps: int
    tokens_per_step: int

    @property
    def num_warmup_steps(self) -> int:
        """Steps of warm-up, at most the whole budget."""
        steps = self.warmup_steps
        if steps is None and self.warmup_tokens is not None:
            steps = math.ceil(self.warmup_tokens / self.tokens_per_step)
        if steps is None:
            steps = round(self.warmup_ratio * self.total_steps)
        return min(steps, self.total_steps)

    def factor(self, step: int) -> float:
        """Return the multiplier of update number `step`, counted from 0."""
        warmup = self.num_warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        return self.shape(progress, step)

    @abstractmethod
    def shape(self, progress: float, step: int) -> float:
        """Return the multiplier after warm-up; `progress` runs from 0 to 1 over the rest of the budget."""

    def _above_minimum(self, share: float) -> float:
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * share


@dataclass(kw_only=True, slots=True)
class Cosine(Schedule):
    """Half a cosine: [loshchilov2017sgdr] eq. 5 without restarts."""

    def shape(self, progress: float, step: int) -> float:
        return self._above_minimum(0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(kw_only=True, slots=True)
class CosineRestarts(Schedule):
    """`num_cycles` cosines of equal length: [loshchilov2017sgdr] eq. 5 with T_mult = 1."""

    num_cycles: int

    def shape(self, progress: float, step: int) -> float:
        within = 1.0 if progress >= 1 else (progress * self.num_cycles) % 1
        return self._above_minimum(0.5 * (1 + math.cos(math.pi * within)))


@dataclass(kw_only=True, slots=True)
class Linear(Schedule):
    """A straight line down."""

    def shape(self, progress: float, step: int) -> float:
        return self._above_minimum(1 - progress)


@dataclass(kw_only=True, slots=True)
class WarmupStableDecay(Schedule):
    """A plateau, then a straight line down over the last `decay_ratio` of the budget [hu2024minicpm] §4.2.

    The paper's decay is exponential.
    """

    decay_ratio: float

    def shape(self, progress: float, step: int) -> float:
        decay_steps = max(1, round(self.decay_ratio * self.total_steps))
        return self._above_minimum(min(1.0, max(0.0, (self.total_steps - step) / decay_steps)))


@dataclass(kw_only=True, slots=True)
class Constant(Schedule):
    """The peak until the end."""

    def shape(self, progress: float, step: int) -> float:
        return 1.0


@dataclass(kw_only=True, slots=True)
class InverseSqrt(Schedule):
    """√(warm-up / step) [vaswani2017attention] eq. 3, never below the minimum."""

    def shape(self, progress: float, step: int) -> float:
        return max(self.min_lr_ratio, math.sqrt(max(1, self.num_warmup_steps) / (step + 1)))
