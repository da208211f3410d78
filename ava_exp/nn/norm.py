"""Normalisation of a block's input."""

from __future__ import annotations

from torch import nn

from ava_exp.config.model import Norm


def build_norm(kind: Norm, dim: int, epsilon: float) -> nn.Module:
    """Return RMSNorm [zhang2019rmsnorm] eq. 4, or LayerNorm [ba2016layernorm] eq. 3 without bias, of the last axis."""
    if kind is Norm.rms:
        return nn.RMSNorm(dim, eps=epsilon)
    return nn.LayerNorm(dim, eps=epsilon, bias=False)
