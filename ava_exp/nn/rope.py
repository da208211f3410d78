"""Rotary position embeddings [su2021roformer] §3.4.2, with other pairs of channels."""

from __future__ import annotations

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
    first, second = x_BHTC.chunk(2, dim=-1)
    cos, sin = cos_Tc.to(x_BHTC.dtype), sin_Tc.to(x_BHTC.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
