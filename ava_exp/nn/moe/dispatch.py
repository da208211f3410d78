"""Bring tokens to their experts and the outputs back: rows sorted by expert, gathered, and summed up token by token.

Both directions are one pass over the rows. What one scatters the other gathers, so neither needs atomic additions,
the result does not depend on threads, and sums are accumulated in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(slots=True)
class SortedRows:
    """A assignments of N tokens as R rows in the order of the experts.

    `token` (R,) says whose each row is, `place` (A,) which row each assignment became, tokens in order, `starts` (N,)
    where a token's assignments start among the A, and `ends` (E,) int32 where each expert's rows end. Rows that only
    fill a group up are token 0's, and nothing is placed there. `kept` (A,) are the assignments among all N·k, or None
    for all of them.
    """

    token: Tensor
    place: Tensor
    starts: Tensor
    ends: Tensor
    kept: Tensor | None

    def weights(self, weights_Nk: Tensor) -> Tensor:
        """Return the weights of the A assignments."""
        flat = weights_Nk.flatten()
        return flat if self.kept is None else flat.index_select(0, self.kept)

    def experts(self) -> Tensor:
        """Return the expert of every row, (R,)."""
        position = torch.arange(self.token.numel(), dtype=self.ends.dtype, device=self.ends.device)
        return torch.searchsorted(self.ends, position, right=True)


def sort_assignments(expert_ids_Nk: Tensor, num_experts: int, ragged: bool, *, fill: bool = True) -> SortedRows:
    """Sort by expert. On a CPU, groups are filled up to one of few sizes if `fill`.

    Nothing waits for the device, except if `ragged`: assignments to -1 are then left out, and their number decides
    how many rows there are.
    """
    device, (num_tokens, num_choices) = expert_ids_Nk.device, expert_ids_Nk.shape
    experts, kept = expert_ids_Nk.flatten(), None
    starts = torch.arange(0, num_tokens * num_choices, num_choices, device=device)
    token = torch.arange(num_tokens, device=device).repeat_interleave(num_choices, output_size=experts.numel())
    if ragged:
        real_Nk = expert_ids_Nk >= 0
        kept = real_Nk.flatten().nonzero().squeeze(1)
        experts, token = experts[kept], token[kept]
        numbers = real_Nk.sum(dim=1)
        starts = numbers.cumsum(0) - numbers
    experts, order = experts.sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(num_experts, device=device), right=True)
    row = torch.arange(order.numel(), device=device)
    num_rows = order.numel()
    if fill and device.type == "cpu":
        counts = ends.diff(prepend=ends.new_zeros(1))
        filled = torch.tensor([fill_up(count) for count in counts.tolist()])
        row = row + ((filled - counts).cumsum(0) - (filled - counts))[experts]
        ends, num_rows = filled.cumsum(0), int(filled.sum())
    token_R = torch.zeros(num_rows, dtype=order.dtype, device=device).scatter_(0, row, token[order])
    place = torch.empty_like(order).scatter_(0, order, row)
    return SortedRows(token_R, place, starts, ends.to(torch.int32), kept)


def fill_up(num_rows: int) -> int:
    """Return the least of the sizes that groups have on a CPU which holds `num_rows`.

    There, oneDNN compiles a kernel for every size that it has not seen, which takes as long as multiplying 64 rows.
    So sizes are sparse, 16 from one power of two to the next, and the rows that only fill up are few.
    """
    step = max(8, 1 << num_rows.bit_length() >> 5)
    return -(-num_rows // step) * step


def gather(x_ND: Tensor, rows: SortedRows) -> Tensor:
    """Return every row's token, (R, D)."""
    gathered: Tensor = _Gather.apply(x_ND, rows)  # type: ignore[no-untyped-call]
    return gathered


def combine(h_RD: Tensor, weights_A: Tensor, rows: SortedRows) -> Tensor:
    """Return y_n = Σ_a w_a · h[row of a] over each token's assignments, (N, D) in the format of `h_RD`."""
    combined: Tensor = _Combine.apply(h_RD, weights_A.to(h_RD.dtype), rows)  # type: ignore[no-untyped-call]
    return combined


def _sum(h_RD: Tensor, rows: SortedRows, weights_A: Tensor | None = None) -> Tensor:
    return F.embedding_bag(rows.place, h_RD, rows.starts, mode="sum", per_sample_weights=weights_A)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, rows: SortedRows) -> Tensor:
        ctx.rows = rows
        return x_ND.index_select(0, rows.token)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> Any:
        return _sum(grad_RD.contiguous(), ctx.rows), None


class _Combine(torch.autograd.Function):
    """Rows without an assignment get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, h_RD: Tensor, weights_A: Tensor, rows: SortedRows) -> Tensor:
        ctx.save_for_backward(h_RD, weights_A)
        ctx.rows = rows
        return _sum(h_RD, rows, weights_A)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> Any:
        (h_RD, weights_A), rows = ctx.saved_tensors, ctx.rows
        grad_ND = grad_ND.contiguous()
        with torch.enable_grad():
            weights = weights_A.detach().requires_grad_()
            total = _sum(h_RD.detach(), rows, weights)
        (grad_weights,) = torch.autograd.grad(total, weights, grad_ND)
        scale_R = weights_A.new_zeros(h_RD.shape[0]).scatter_(0, rows.place, weights_A)
        each = torch.arange(h_RD.shape[0], device=h_RD.device)
        grad_h = F.embedding_bag(rows.token, grad_ND, each, mode="sum", per_sample_weights=scale_R)
        return grad_h, grad_weights, None
