"""A mixture of experts in place of a feed-forward network."""

from __future__ import annotations

from torch import Tensor, nn

from ava_exp.config.model import Activation, DispatchBackend
from ava_exp.nn.moe.experts import Experts
from ava_exp.nn.moe.routing import Routing


class MoELayer(nn.Module):
    """Routes every token to some of E feed-forward networks and adds their outputs up, weighted by the router."""

    def __init__(
        self,
        router: nn.Module,
        num_experts: int,
        dim: int,
        intermediate_size: int,
        activation: Activation,
        dispatch: DispatchBackend = DispatchBackend.auto,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = Experts(num_experts, dim, intermediate_size, activation, dispatch)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        """Map (B, T, D) to (B, T, D) and return the routing of the B·T tokens."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.router(x_ND)
        y_ND = self.experts(x_ND, routing.expert_ids, routing.weights)
        return y_ND.view_as(x_BTD), routing
