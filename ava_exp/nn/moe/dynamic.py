"""Dynamic routing: as many experts as a token needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ava_exp.nn.moe.router import TokenChoiceRouter
from ava_exp.nn.moe.routing import Routing


class DynamicRouter(TokenChoiceRouter):
    """The fewest experts whose probabilities add up to `threshold` [huang2024dynamic] §2, at most `max_experts`.

    Weights are the probabilities. With `renormalize`, which the paper does not have, they are divided by their sum;
    tokens with a single expert then teach their router nothing. `routing_entropy_loss` is the mean entropy of a token's
    probabilities, the paper's dynamic loss: it keeps the router from spreading its probability, which buys it more
    experts. The MoE++ text says no more than "confidence-based expert selection"; the cap is ours and bounds the cost
    of a step.
    """

    ragged = True

    def __init__(self, threshold: float, max_experts: int, renormalize: bool, **common: Any) -> None:
        super().__init__(**common)
        self.threshold, self.max_experts, self.renormalize = threshold, max_experts, renormalize

    def choose(self, preferences_NE: Tensor) -> Tensor:
        probabilities_Nk, expert_ids_Nk = preferences_NE.topk(min(self.max_experts, self.num_experts), dim=-1)
        before_Nk = probabilities_Nk.cumsum(dim=-1) - probabilities_Nk
        return expert_ids_Nk.masked_fill(before_Nk >= self.threshold, -1)

    def losses(self, logits: Tensor, routing: Routing, num_sequences: int) -> dict[str, Tensor]:
        probabilities = routing.probabilities
        # A probability of 0 has a gradient, too: that of its logarithm would be infinite.
        logs = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
        entropy = -(probabilities * logs).sum(dim=-1).mean()
        return super().losses(logits, routing, num_sequences) | {"routing_entropy_loss": entropy}
