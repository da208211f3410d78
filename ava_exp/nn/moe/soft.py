"""Soft routing: a dense mixture of all experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ava_exp.nn.moe.router import TokenChoiceRouter


class SoftRouter(TokenChoiceRouter):
    """Every token goes to every expert, weighted by the softmax [jacobs1991adaptive] eq. 1.1.

    Nothing is sparse: it is the upper bound that sparse routers are measured against, at E times an expert's cost.
    It is not Soft MoE, which mixes tokens of a sequence with one another and so cannot predict the next one.
    """

    def choose(self, preferences_NE: Tensor) -> Tensor:
        experts = torch.arange(self.num_experts, device=preferences_NE.device)
        return experts.expand(preferences_NE.shape[0], -1)
