"""What a decoder returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor

from ava_exp.nn.attention.mixture_of_heads import HeadRouting
from ava_exp.nn.mod.depth import Depth
from ava_exp.nn.moe.routing import Routing


@dataclass  # without slots: DeepSpeed looks in `__dict__` for the weight that leaves a module, the head
class ModelOutput:
    """`hidden` (B, T, D) after the last norm and `head` (V, D), whose product are the logits, in the model's format;
    `routings` one entry for every mixture-of-experts layer, `head_routings` one for every mixture of heads, `depths`
    one for every layer that tokens may skip. `chain` runs the prediction heads, if there are any."""

    hidden: Tensor
    head: Tensor
    routings: list[Routing] = field(default_factory=list)
    head_routings: list[HeadRouting] = field(default_factory=list)
    depths: list[Depth] = field(default_factory=list)
    chain: Callable[[], list[Tensor]] = list

    @property
    def future(self) -> list[Tensor]:
        """States of the prediction heads, computed at each call: of head j = 1, 2, … (B, T - j, D), in which state t
        predicts the j-th token after the next one of position t."""
        return self.chain()

    @property
    def logits(self) -> Tensor:
        """All logits, (B, T, V), computed at each call: large where the vocabulary is. The losses do without."""
        return F.linear(self.hidden, self.head)

    @property
    def last_logits(self) -> Tensor:
        """The logits of the last position, (B, V)."""
        return F.linear(self.hidden[:, -1], self.head)
