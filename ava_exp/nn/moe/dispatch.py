"""Send tokens through their experts and add the outputs up: a loop that is the reference, and one grouped product.

Both are dropless: every assignment is computed, whatever the load. Both take every expert's weights in one stacked
tensor: an expert without tokens still receives a gradient, of zeros, and no data-parallel back end waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_exp.config.model import Activation
from ava_exp.nn.ffn import activate
from ava_exp.nn.moe.routing import Routing

ROW_MULTIPLE = 32
"""On a CPU every new number of rows compiles another kernel (8 % of a step): groups are filled up to few sizes."""


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
    rows = sort_assignments(routing, ROW_MULTIPLE if x_ND.device.type == "cpu" else 1)
    h: Tensor = _Gather.apply(x_ND, rows.token, rows.place, routing.expert_ids.shape[1])  # type: ignore[no-untyped-call]
    h = F.grouped_mm(h, up_EFD.transpose(1, 2), offs=rows.ends)
    h = F.grouped_mm(activate(h, activation), down_EDF.transpose(1, 2), offs=rows.ends)
    combined: Tensor = _Combine.apply(h, routing.weights, rows.token, rows.place)  # type: ignore[no-untyped-call]
    return combined


@dataclass(slots=True)
class SortedRows:
    """R rows in the order of the experts. `token` (R,) says whose each is, `place` (N·k,) where each assignment went,
    and `ends` (E,) int32 where each expert's rows end. Rows that only fill a group up are token 0's, and unplaced."""

    token: Tensor
    place: Tensor
    ends: Tensor


def sort_assignments(routing: Routing, multiple: int) -> SortedRows:
    """Sort by expert, each group filled up to a multiple of `multiple` rows; with 1 nothing waits for the device."""
    experts, num_choices = routing.expert_ids.flatten(), routing.expert_ids.shape[1]
    order = experts.argsort(stable=True)
    position = torch.arange(order.numel(), device=order.device)
    place = torch.empty_like(order)
    place[order] = position
    if multiple == 1:
        return SortedRows(order // num_choices, place, routing.counts.cumsum(0, dtype=torch.int32))
    filled = -(-routing.counts // multiple) * multiple
    ends = filled.cumsum(0)
    place = place + ((ends - filled) - (routing.counts.cumsum(0) - routing.counts))[experts]
    token = torch.zeros(int(ends[-1]), dtype=order.dtype, device=order.device)
    token[place] = position // num_choices
    return SortedRows(token, place, ends.to(torch.int32))


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
    """y_n = Σ_k w_nk · h[place of assignment (n, k)]. Rows without an assignment get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, h_RD: Tensor, weights_Nk: Tensor, token_R: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(h_RD, weights_Nk, token_R, place)
        rows = h_RD[place].view(*weights_Nk.shape, -1)
        return torch.bmm(weights_Nk.to(h_RD.dtype)[:, None], rows).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> Any:
        h_RD, weights_Nk, token_R, place = ctx.saved_tensors
        rows = h_RD[place].view(*weights_Nk.shape, -1)
        grad_weights = torch.bmm(rows, grad_ND[:, :, None]).squeeze(2).to(weights_Nk.dtype)
        scale_R = torch.zeros(token_R.shape, dtype=grad_ND.dtype, device=grad_ND.device)
        scale_R[place] = weights_Nk.flatten().to(grad_ND.dtype)
        return grad_ND[token_R].mul_(scale_R[:, None]), grad_weights, None, None
