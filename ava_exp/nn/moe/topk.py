"""Top-k routing [shazeer2017moe] §2.1, without its noise, on softmax probabilities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ava_exp.nn.moe.routing import Routing, count_assignments, load_balancing_loss, router_z_loss


class TopKRouter(nn.Module):
    """Every token goes to the `moe_top_k` experts with the highest probability.

    Logits and softmax are computed in fp32 or wider whatever the model's format [fedus2022switch] §2.4. `jitter`
    multiplies the router's input by uniform noise in [1 - jitter, 1 + jitter] while training [fedus2022switch] app. C;
    the Ava text adds it to the logits instead. `routing_temperature` divides the logits: it changes the weights, and
    never the noiseless selection.
    """

    def __init__(
        self,
        moe_top_k: int,
        renormalize: bool,
        routing_temperature: float,
        jitter: float,
        dim: int,
        num_experts: int,
    ) -> None:
        super().__init__()
        self.moe_top_k, self.renormalize = moe_top_k, renormalize
        self.routing_temperature, self.jitter = routing_temperature, jitter
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x_ND: Tensor) -> Routing:
        """Route N tokens, (N, D) in any dtype."""
        x = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        if self.training and self.jitter > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits_NE = (x @ self.weight.to(x.dtype).t()) / self.routing_temperature
        probabilities_NE = logits_NE.softmax(dim=-1)
        weights_Nk, expert_ids_Nk = probabilities_NE.topk(self.moe_top_k, dim=-1)
        if self.renormalize:
            weights_Nk = weights_Nk / weights_Nk.sum(dim=-1, keepdim=True)
        counts_E = count_assignments(expert_ids_Nk, logits_NE.shape[-1])
        losses = {
            "load_balancing_loss": load_balancing_loss(probabilities_NE, counts_E),
            "router_z_loss": router_z_loss(logits_NE),
        }
        return Routing(expert_ids_Nk, weights_Nk, counts_E, losses)
