"""Send tokens through their experts and add the outputs up: a loop that is the reference, and one grouped product.

Both are dropless: every assignment is computed, whatever the load. Both take every expert's weights in one stacked
tensor: an expert without tokens still receives a gradient, of zeros, and no data-parallel back end waits for it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_exp.config.model import Activation
from ava_exp.nn.ffn import activate
from ava_exp.nn.moe.routing import Routing


def loop_dispatch(x_ND: Tensor, routing: Routing, up_EFD: Tensor, down_EDF: Tensor, activation: Activation) -> Tensor:
    """Compute one expert after the other; any dtype. Its backward makes a full-size gradient per expert: slow."""
    y_ND = torch.zeros_like(x_ND)
    for expert in range(up_EFD.shape[0]):
        token, choice = (routing.expert_ids == expert).nonzero(as_tuple=True)
        h = F.linear(activate(F.linear(x_ND[token], up_EFD[expert]), activation), down_EDF[expert])
        y_ND = y_ND.index_add(0, token, h * routing.weights[token, choice, None].to(h.dtype))
    return y_ND


def grouped_dispatch(
    x_ND: Tensor, routing: Routing, up_EFD: Tensor, down_EDF: Tensor, activation: Activation
) -> Tensor:
    """Sort assignments by expert and multiply all groups at once; fp32, bf16 or fp16."""
    num_choices = routing.expert_ids.shape[1]
    order = routing.expert_ids.flatten().argsort(stable=True)  # position in the sorted list → assignment
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)  # assignment → position in the sorted list
    ends = routing.counts.cumsum(0, dtype=torch.int32)
    h: Tensor = _Gather.apply(x_ND, order // num_choices, place, num_choices)  # type: ignore[no-untyped-call]
    h = F.grouped_mm(h, up_EFD.transpose(1, 2), offs=ends)
    h = F.grouped_mm(activate(h, activation), down_EDF.transpose(1, 2), offs=ends)
    combined: Tensor = _Combine.apply(h, routing.weights, order, place)  # type: ignore[no-untyped-call]
    return combined


def can_group(x_ND: Tensor, up_EFD: Tensor, down_EDF: Tensor) -> str | None:
    """Return why the grouped product cannot serve these tensors, or None when it can."""
    if x_ND.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped products are computed in fp32, bf16 and fp16, not in {x_ND.dtype}"
    row_bytes = [size * x_ND.element_size() for size in (x_ND.shape[-1], up_EFD.shape[1], down_EDF.shape[2])]
    if any(size % 16 for size in row_bytes):
        return f"grouped products need rows that are multiples of 16 bytes, but they have {row_bytes} bytes"
    return None


class _Gather(torch.autograd.Function):
    """Rows of x in sorted order. Each token stands there k times, so its gradient is a gather and a sum of k rows:
    the same numbers as scatter-add, in an order that does not depend on threads, and faster."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token: Tensor, place: Tensor, num_choices: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.num_choices = num_choices
        return x_ND[token]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (place,) = ctx.saved_tensors
        return grad[place].view(-1, ctx.num_choices, grad.shape[-1]).sum(dim=1), None, None, None


class _Combine(torch.autograd.Function):
    """y_n = Σ_k w_nk · h[place of assignment (n, k)]; its gradients are gathers too."""

    @staticmethod
    def forward(ctx: Any, h_AD: Tensor, weights_Nk: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(h_AD, weights_Nk, order, place)
        rows = h_AD[place].view(*weights_Nk.shape, -1)
        return torch.bmm(weights_Nk.to(h_AD.dtype)[:, None], rows).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> Any:
        h_AD, weights_Nk, order, place = ctx.saved_tensors
        rows = h_AD[place].view(*weights_Nk.shape, -1)
        grad_weights = torch.bmm(rows, grad_ND[:, :, None]).squeeze(2).to(weights_Nk.dtype)
        scale = weights_Nk.flatten()[order, None].to(grad_ND.dtype)
        return grad_ND[order // weights_Nk.shape[1]] * scale, grad_weights, None, None
