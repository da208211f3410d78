"""The dense feed-forward network."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ava_exp.config.model import Activation

BLOCK_ROWS = 256


def num_up_rows(activation: Activation, intermediate_size: int) -> int:
    """Rows of the first projection: SwiGLU's gate and value stand above one another in one matrix."""
    return 2 * intermediate_size if activation is Activation.swiglu else intermediate_size


def activate(h: Tensor, activation: Activation) -> Tensor:
    """Apply GELU [hendrycks2016gelu] §2, or SwiGLU [shazeer2020glu] eq. 5 to gate and value: (…, 2F) → (…, F)."""
    if activation is Activation.gelu:
        return F.gelu(h)
    if not torch.is_grad_enabled() and h.numel() <= BLOCK_ROWS * h.shape[-1]:
        gate, value = h.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)
    y: Tensor = _SwiGLU.apply(h)  # type: ignore[no-untyped-call]
    return y


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · value. Its backward writes both gradients into one buffer and keeps the input only,
    where autograd would keep three tensors and join the halves by a copy. On a CPU it goes block by block."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        y = torch.empty(*h.shape[:-1], h.shape[-1] // 2, dtype=h.dtype, device=h.device)
        for h_block, y_block in zip(_blocks(h), _blocks(y), strict=True):
            gate, value = h_block.chunk(2, dim=-1)
            torch.ops.aten.silu(gate, out=y_block).mul_(value)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        grad_h = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        for h_block, grad_block, out in zip(_blocks(h), _blocks(grad), _blocks(grad_h), strict=True):
            gate, value = h_block.chunk(2, dim=-1)
            grad_gate, grad_value = out.chunk(2, dim=-1)
            torch.mul(grad_block, F.silu(gate), out=grad_value)
            torch.ops.aten.silu_backward(grad_block * value, gate, grad_input=grad_gate)
        return grad_h


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    """Cut the rows so that on a CPU what one operation writes is still in the cache when the next one reads it."""
    rows = x.reshape(-1, x.shape[-1])
    return torch.split(rows, BLOCK_ROWS) if x.device.type == "cpu" else (rows,)


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
