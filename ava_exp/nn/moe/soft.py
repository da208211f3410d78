"""Soft routing: a dense mixture of all experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ava_exp.nn.moe.router import TokenChoiceRouter


class SoftRouter(TokenChoiceRouter):
    """Every token goes to every expert, weighted by the softmax [jacobs1991adaptive] eq. 1.1.

    Nothing is sparse: it is the upper bound that sparse routers are measured against, at E times an expert's cost.
    It is not Soft MoE, which mixes tokens of a sequence with one another and so cannot predict the next one.
    `log_gate` is added to the logits; 0 until surgery splits an expert's probability or merges two.
    """

    log_gate: Tensor

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.register_buffer("log_gate", torch.zeros(self.num_experts, dtype=torch.float32))

    def logits(self, x_BTD: Tensor) -> Tensor:
        return super().logits(x_BTD) + self.log_gate[: self.num_experts]

    def choose(self, preferences_NE: Tensor) -> Tensor:
        experts = torch.arange(self.num_experts, device=preferences_NE.device)
        return experts.expand(preferences_NE.shape[0], -1)
