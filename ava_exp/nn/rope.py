"""Rotary position embeddings [su2021roformer] §3.4.2, with other pairs of channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rope_tables(length: int, head_dim: int, theta: float, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (length, head_dim / 2), fp32: one angle for each position and pair of channels."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.arange(length, dtype=torch.float32, device=device).outer(frequencies)
    return angles.cos(), angles.sin()


def apply_rope(x_BHTC: Tensor, cos_Tc: Tensor, sin_Tc: Tensor) -> Tensor:
    """Rotate channel i with channel i + C/2 by the angle of their position; same shape and dtype as the input.

    The paper pairs neighbouring channels: the same up to an order of the channels, which the projections before learn.
    """
    if not torch.is_grad_enabled():
        return _rotate(x_BHTC, cos_Tc.to(x_BHTC.dtype), sin_Tc.to(x_BHTC.dtype))
    y: Tensor = _Rotate.apply(x_BHTC, cos_Tc.to(x_BHTC.dtype), sin_Tc.to(x_BHTC.dtype))  # type: ignore[no-untyped-call]
    return y


class _Rotate(torch.autograd.Function):
    """Writes both halves into one buffer. The gradient of a rotation is the rotation back: nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, x_BHTC: Tensor, cos_Tc: Tensor, sin_Tc: Tensor) -> Tensor:
        ctx.save_for_backward(cos_Tc, sin_Tc)
        return _rotate(x_BHTC, cos_Tc, sin_Tc)

    @staticmethod
    def backward(ctx: Any, grad_BHTC: Tensor) -> Any:
        cos_Tc, sin_Tc = ctx.saved_tensors
        return _rotate(grad_BHTC, cos_Tc, -sin_Tc), None, None


def _rotate(x_BHTC: Tensor, cos_Tc: Tensor, sin_Tc: Tensor) -> Tensor:
    first, second = x_BHTC.chunk(2, dim=-1)
    y_BHTC = torch.empty(x_BHTC.shape, dtype=x_BHTC.dtype, device=x_BHTC.device)
    y_first, y_second = y_BHTC.chunk(2, dim=-1)
    torch.mul(first, cos_Tc, out=y_first).addcmul_(second, sin_Tc, value=-1)
    torch.mul(second, cos_Tc, out=y_second).addcmul_(first, sin_Tc)
    return y_BHTC
