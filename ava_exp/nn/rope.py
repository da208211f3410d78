"""Rotary position embeddings [su2021roformer] §3.4.2, with other pairs of channels; and their scaling to longer texts.

A model that was trained on texts of `original_length` tokens reads `factor` times as many when the angles are scaled:
all frequencies alike (linear), by a larger base (NTK-aware), or by how often a pair of channels turns in a text (YaRN).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ava_exp.config.model import RopeScaling


@dataclass(slots=True, frozen=True, kw_only=True)
class RotaryScaling:
    """How angles are scaled. What stands after `original_length` is YaRN's; a factor of 1 scales nothing."""

    kind: RopeScaling
    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


def rope_tables(
    length: int,
    head_dim: int,
    theta: float,
    device: torch.device | None = None,
    scaling: RotaryScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (length, head_dim / 2), fp32: one angle for each position and pair of channels.

    YaRN's factor is in them: queries and keys are both multiplied by it, and so every kind of attention has it.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies, attention_factor = theta**-exponents, 1.0
    if scaling is not None:
        frequencies, attention_factor = _scaled(frequencies, exponents, theta, scaling)
    angles = torch.arange(length, dtype=torch.float32, device=device).outer(frequencies)
    if attention_factor == 1:
        return angles.cos(), angles.sin()
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def _scaled(frequencies: Tensor, exponents: Tensor, theta: float, scaling: RotaryScaling) -> tuple[Tensor, float]:
    """Return the scaled frequencies, and what cos and sin are multiplied by."""
    head_dim, given = 2 * len(frequencies), scaling.attention_factor
    is_yarn = scaling.kind is RopeScaling.yarn
    if scaling.factor == 1:
        return frequencies, given if is_yarn and given is not None else 1.0
    if scaling.kind is RopeScaling.linear:  # [chen2023extending] §2.3
        return frequencies / scaling.factor, 1.0
    if scaling.kind is RopeScaling.ntk:  # [peng2023yarn] §3.1: the slowest pair turns as it does with `linear`
        stretch = scaling.factor ** (head_dim / max(1, head_dim - 2))
        return (theta * stretch) ** -exponents, 1.0
    if is_yarn:  # [peng2023yarn] §3.4
        kept = _kept_share(head_dim, theta, scaling).to(frequencies.device)
        blended = frequencies / scaling.factor * (1 - kept) + frequencies * kept
        return blended, 0.1 * math.log(scaling.factor) + 1 if given is None else given
    return frequencies, 1.0


def _kept_share(head_dim: int, theta: float, scaling: RotaryScaling) -> Tensor:
    """Return (head_dim / 2,) fp32: 1 where a pair turns `beta_fast` times or more in a text, and its frequency is kept;
    0 where `beta_slow` times or less, and positions are interpolated; a ramp over those between [peng2023yarn] §3.2.

    As in the authors' code the ramp is linear in the number of the pair, not in the turns, and its ends are rounded.
    """

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(scaling.original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(0, math.floor(pair_that_turns(scaling.beta_fast)))
    high = max(low + 0.001, min(head_dim - 1, math.ceil(pair_that_turns(scaling.beta_slow))))
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    return 1 - ((pairs - low) / (high - low)).clamp(0, 1)


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
