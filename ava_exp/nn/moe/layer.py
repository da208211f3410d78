"""A mixture of experts in place of a feed-forward network."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from ava_exp.config.model import Activation, DispatchBackend
from ava_exp.errors import ConfigError
from ava_exp.nn.ffn import num_up_rows
from ava_exp.nn.moe.dispatch import can_group, grouped_dispatch, loop_dispatch
from ava_exp.nn.moe.routing import Routing

logger = logging.getLogger(__name__)


class MoELayer(nn.Module):
    """Routes every token to some of E feed-forward networks and adds their outputs up, weighted by the router.

    The experts' weights are stacked: `up` (E, F or 2F, D) and `down` (E, D, F), each row-major as in `nn.Linear`.
    """

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
        self.activation, self.dispatch = activation, dispatch
        self.up = nn.Parameter(torch.empty(num_experts, num_up_rows(activation, intermediate_size), dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, intermediate_size))
        self._told = False

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        """Map (B, T, D) to (B, T, D) and return the routing of the B·T tokens."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        routing = self.router(x_ND)
        apply = grouped_dispatch if self._use_grouped(x_ND) else loop_dispatch
        y_ND = apply(x_ND, routing, self.up, self.down, self.activation)
        return y_ND.view_as(x_BTD), routing

    def _use_grouped(self, x_ND: Tensor) -> bool:
        if self.dispatch is DispatchBackend.loop:
            return False
        obstacle = can_group(x_ND, self.up, self.down)
        if obstacle is None:
            return True
        if self.dispatch is DispatchBackend.grouped:
            raise ConfigError(
                f"`sparsity.dispatch` cannot be `grouped` here: {obstacle}. Use `sparsity.dispatch=auto`."
            )
        if not self._told:
            logger.warning("experts run one by one: %s. `sparsity.dispatch=grouped` makes this an error.", obstacle)
            self._told = True
        return False
