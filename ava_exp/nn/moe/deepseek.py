"""DeepSeek-V3 routing: sigmoid affinities, and balance without a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ava_exp.nn.moe.groups import keep_best_groups
from ava_exp.nn.moe.router import TokenChoiceRouter
from ava_exp.nn.moe.routing import Routing, renormalize


class DeepSeekRouter(TokenChoiceRouter):
    """Top-k of sigmoid affinities plus a bias that follows the load [deepseek2024v3] §2.1.2, eqs. 12-20.

    The bias takes part in the selection and not in the weights. After every step it moves by `bias_update_rate`, down
    for experts that got more than the mean of the whole step's tokens and up for the others [wang2024auxfree] alg. 1.
    Groups are as good as the sum of their two best experts, the paper's K_r / M of 8 / 4, as its released code has it.
    `sequence_balance_loss` is eq. 17.
    The Ava text calls a softmax top-k without any of this "DeepSeekRouter": that is `topk`.
    """

    bias: Tensor

    def __init__(
        self,
        moe_top_k: int,
        renormalize: bool,
        bias_update_rate: float,
        num_groups: int,
        groups_per_token: int,
        routed_scaling_factor: float,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.moe_top_k, self.renormalize = moe_top_k, renormalize
        self.bias_update_rate = bias_update_rate
        self.num_groups, self.groups_per_token = num_groups, groups_per_token
        self.routed_scaling_factor = routed_scaling_factor
        self.register_buffer("bias", torch.zeros(self.num_experts, dtype=torch.float32))

    def affinities(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def probabilities(self, affinities_NE: Tensor) -> Tensor:
        return renormalize(affinities_NE)

    def preferences(self, logits: Tensor, affinities_NE: Tensor) -> Tensor:
        scores_NE = (affinities_NE + self.bias[: self.num_experts]).masked_fill(logits == -torch.inf, -torch.inf)
        if self.num_groups == 1:
            return scores_NE
        experts_per_group = min(2, self.num_experts // self.num_groups)
        return keep_best_groups(scores_NE, self.num_groups, self.groups_per_token, experts_per_group)

    def weigh(self, affinities_NE: Tensor, expert_ids_Nk: Tensor) -> Tensor:
        return super().weigh(affinities_NE, expert_ids_Nk) * self.routed_scaling_factor

    def losses(self, logits: Tensor, routing: Routing, num_sequences: int) -> dict[str, Tensor]:
        losses = super().losses(logits, routing, num_sequences)
        return losses | {"sequence_balance_loss": self._sequence_balance_loss(routing, num_sequences)}

    def _sequence_balance_loss(self, routing: Routing, num_sequences: int) -> Tensor:
        chosen = routing.affinities.topk(self.moe_top_k, dim=-1).indices  # eq. 18 has the affinities without the bias
        visits = torch.zeros_like(routing.probabilities).scatter_(1, chosen, 1.0)
        shares = torch.unflatten(visits, 0, (num_sequences, -1)).mean(dim=1) * (self.num_experts / self.moe_top_k)
        means = torch.unflatten(routing.probabilities, 0, (num_sequences, -1)).mean(dim=1)
        return (shares * means).sum(dim=-1).mean()

    @torch.no_grad()
    def adapt(self, chosen_counts_E: Tensor, observed_E: Tensor | None) -> None:
        counts = chosen_counts_E.to(self.bias.dtype)
        self.bias[: self.num_experts] += self.bias_update_rate * (counts.mean() - counts).sign()
