"""The dense feed-forward network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ava_exp.config.model import Activation, MixedActivation
from ava_exp.nn.activation import build_mixture, draw_activation


def num_up_rows(activation: Activation, intermediate_size: int) -> int:
    """Rows of the first projection: SwiGLU's gate and value stand above one another in one matrix."""
    return 2 * intermediate_size if activation is Activation.swiglu else intermediate_size


class FeedForward(nn.Module):
    """Two projections around an activation, which is learned if it is a mixture of `mixed_activations`."""

    def __init__(
        self,
        dim: int,
        intermediate_size: int,
        activation: Activation,
        bias: bool = False,
        mixed_activations: Sequence[MixedActivation] = (),
    ) -> None:
        super().__init__()
        self.activation = activation
        self.mixture = build_mixture(activation, mixed_activations)
        self.up = nn.Linear(dim, num_up_rows(activation, intermediate_size), bias=bias)
        self.down = nn.Linear(intermediate_size, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, D) to (…, D)."""
        return self.down(draw_activation(self.activation, self.mixture)(self.up(x)))  # type: ignore[no-any-return]
