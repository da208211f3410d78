"""Normalisation of a block's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ava_exp.config.model import Norm


def build_norm(kind: Norm, dim: int, epsilon: float) -> nn.Module:
    """Return RMSNorm [zhang2019rmsnorm] eq. 4, or LayerNorm [ba2016layernorm] eq. 3 without bias, of the last axis."""
    if kind is Norm.rms:
        return RMSNorm(dim, eps=epsilon)
    return nn.LayerNorm(dim, eps=epsilon, bias=False)


class RMSNorm(nn.RMSNorm):
    """torch's own, except on a CPU: there its backward is not fused, and this one takes half of the time."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, D) to (…, D); computed in fp32 or wider."""
        is_single = x.shape[-2] == 1 and not torch.is_grad_enabled()  # one new token: one operation is quicker than ten
        if x.device.type == "cpu" and not is_single:
            y: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
            return y
        return super().forward(x)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / √(mean x² + ε) and y = x r w: ∂x = r (g w − x r² mean(g w x)) and ∂w = Σ g x r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        x_wide = x.to(wide)
        mean_square = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        y: Tensor = (x_wide * scale).mul_(weight.to(wide)).to(x.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        x_wide, grad_wide, weight_wide = (tensor.to(scale.dtype) for tensor in (x, grad, weight))
        product = grad_wide * x_wide
        grad_weight = scale.flatten() @ product.flatten(0, -2)
        mean = (product @ weight_wide)[..., None] / x.shape[-1]
        torch.mul(grad_wide, weight_wide, out=product)
        grad_x = product.addcmul_(x_wide, mean * scale.square(), value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
