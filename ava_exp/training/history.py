"""What routers did before, as far as later records depend on it: as resumable as the weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ava_exp.evaluation.routing import ProbeChoices

DEAD_WINDOW_STEPS = 100
"""Over how many steps, or as many as there were, an expert's visits are counted before it is called dead."""
DEAD_SHARE = 0.01
"""An expert with less than this of the balanced share is dead: by chance alone, a living one never gets so little."""

Counts = npt.NDArray[np.int64]


@dataclass(slots=True)
class RoutingHistory:
    """The visits of the last steps, and what the probe's tokens chose when they were last looked at."""

    choices: ProbeChoices | None = None
    recent: deque[Counts] = field(default_factory=lambda: deque(maxlen=DEAD_WINDOW_STEPS))
    """Of every step, oldest first, the visits of all experts, layer after layer."""
    num_experts: list[int] = field(default_factory=list)
    """By layer."""

    def add(self, visits: Sequence[Sequence[int]]) -> None:
        """Take a step's visits, by layer and expert. What was counted for other numbers of experts is forgotten."""
        num_experts = [len(layer) for layer in visits]
        if num_experts != self.num_experts:
            self.recent.clear()
            self.num_experts = num_experts
        if num_experts:
            self.recent.append(np.concatenate([np.asarray(layer, dtype=np.int64) for layer in visits]))

    def dead_experts(self) -> list[int]:
        """Return how many experts of each layer are dead."""
        if not self.recent:
            return [0] * len(self.num_experts)
        layers = np.split(np.sum(self.recent, axis=0), np.cumsum(self.num_experts)[:-1])
        return [int((layer < DEAD_SHARE * layer.mean()).sum()) for layer in layers]

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what `from_tensors` restores; nothing for a model without experts."""
        tensors: dict[str, Tensor] = {}
        if self.recent:
            tensors["num_experts"] = torch.tensor(self.num_experts)
            tensors["recent"] = torch.from_numpy(np.stack(self.recent))
        return tensors | (self.choices.to_tensors() if self.choices is not None else {})

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> RoutingHistory:
        """Restore a history; an empty one where a checkpoint has none. Raises KeyError for half of one."""
        history = cls(ProbeChoices.from_tensors(tensors))
        if "recent" in tensors:
            history.num_experts = tensors["num_experts"].tolist()
            history.recent.extend(tensors["recent"].numpy())
        return history
