"""The dense feed-forward network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ava_exp.config.model import Activation


def num_up_rows(activation: Activation, intermediate_size: int) -> int:
    """Rows of the first projection: SwiGLU's gate and value stand above one another in one matrix."""
    return 2 * intermediate_size if activation is Activation.swiglu else intermediate_size


def activate(h: Tensor, activation: Activation) -> Tensor:
    """Apply GELU, or SwiGLU [shazeer2020glu] to the concatenated gate and value: (…, 2F) → (…, F)."""
    if activation is Activation.gelu:
        return F.gelu(h)
    gate, value = h.chunk(2, dim=-1)
    return F.silu(gate) * value


class FeedForward(nn.Module):
    """Two projections around an activation."""

    def __init__(self, dim: int, intermediate_size: int, activation: Activation, bias: bool = False) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(dim, num_up_rows(activation, intermediate_size), bias=bias)
        self.down = nn.Linear(intermediate_size, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, D) to (…, D)."""
        return self.down(activate(self.up(x), self.activation))  # type: ignore[no-any-return]
