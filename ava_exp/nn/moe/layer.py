"""A mixture of experts in place of a feed-forward network."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ava_exp.config.model import Overflow
from ava_exp.nn.ffn import FeedForward
from ava_exp.nn.moe.capacity import expert_capacity, limit
from ava_exp.nn.moe.experts import Experts
from ava_exp.nn.moe.router import Router
from ava_exp.nn.moe.routing import Routing


@dataclass(slots=True, kw_only=True)
class CapacityLimit:
    """How many tokens an expert takes, and when. `experts_per_token` is what the capacity is a multiple of."""

    factor: float
    experts_per_token: float
    overflow: Overflow
    at_evaluation: bool


class MoELayer(nn.Module):
    """Routes every token to some of E feed-forward networks and adds their outputs up, weighted by the router.

    `shared` takes every token besides [dai2024deepseekmoe] §3.2. With `capacity` an expert takes no more tokens of a
    micro-batch than that allows; `residual` computes the visits that were refused, with their weight.
    [rajbhandari2022deepspeed] §4.1 has such a network for every token, the Ava text for those that overflow.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: FeedForward | None = None,
        residual: FeedForward | None = None,
        capacity: CapacityLimit | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.shared, self.residual, self.capacity = shared, residual, capacity
        self.load_balancing_factor = 1.0

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        """Map (B, T, D) to (B, T, D) and return the routing of the B·T tokens."""
        x_ND = x_BTD.flatten(0, 1)
        chosen: Routing = self.router(x_BTD)
        routing = self._limit(chosen, num_sequences=x_BTD.shape[0])
        routing.load_balancing_factor = self.load_balancing_factor
        y_ND = self.experts(x_ND, routing.expert_ids, routing.weights, routing.ragged)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        if self.residual is not None and routing is not chosen:
            y_ND = self._add_residual(y_ND, x_ND, (chosen.weights - routing.weights).sum(dim=1))
        return y_ND.view_as(x_BTD), routing

    def _limit(self, routing: Routing, num_sequences: int) -> Routing:
        limits = self.capacity
        if limits is None or not (self.training or limits.at_evaluation):
            return routing
        num_tokens, num_experts = routing.affinities.shape
        capacity = expert_capacity(num_tokens, limits.experts_per_token, num_experts, limits.factor)
        return limit(routing, self.router, capacity, limits.overflow, num_sequences)

    def _add_residual(self, y_ND: Tensor, x_ND: Tensor, lost_weights_N: Tensor) -> Tensor:
        assert self.residual is not None
        (tokens,) = lost_weights_N.detach().nonzero(as_tuple=True)
        outputs = self.residual(x_ND[tokens]) * lost_weights_N[tokens, None].to(x_ND.dtype)
        return y_ND.index_add(0, tokens, outputs)
