"""Experts on several ranks: tokens travel to the ranks that hold their experts, and the outputs come back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """N ranks each hold an Nth of the experts, in order, and send one another rows [lepikhin2020gshard] §3.2.

    All ranks of `group` call every layer's experts, in the same order, also those without a token of their own.
    """

    def __init__(self, group: dist.ProcessGroup, num_ranks: int) -> None:
        self.group, self.num_ranks = group, num_ranks
        self.sent_bytes = 0
        """What this rank has sent to others since the last reset, forward and backward."""
        self._own_rank = dist.get_rank(group)

    def meet(self, counts_E: Tensor) -> Visits:
        """Tell one another how many rows go to each expert, (E,) int64 of all ranks' experts. Waits for the device."""
        received_NE = torch.empty_like(counts_E)
        dist.all_to_all_single(received_NE, counts_E, group=self.group)
        counts = torch.stack([counts_E, received_NE]).view(2, self.num_ranks, -1)
        sent, received = counts.sum(dim=2).tolist()
        experts = torch.arange(counts.shape[2], device=counts.device).repeat(self.num_ranks)
        return Visits(self, sent, received, experts.repeat_interleave(received_NE, output_size=sum(received)))

    def swap(self, x_RD: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send each rank its rows of `x_RD`, in order, and return what came from each."""
        others = sum(sent) - sent[self._own_rank]
        self.sent_bytes += others * x_RD[:1].numel() * x_RD.element_size() if others else 0
        result = x_RD.new_empty(sum(received), *x_RD.shape[1:])
        dist.all_to_all_single(result, x_RD.contiguous(), received, sent, group=self.group)
        return result


class Visits:
    """Rows on their way: `sent` to each rank, `received` from each, and the received ones' `experts` (R,) here."""

    def __init__(self, exchange: Exchange, sent: list[int], received: list[int], experts: Tensor) -> None:
        self.exchange, self.sent, self.received, self.experts = exchange, sent, received, experts

    def send(self, x_RD: Tensor) -> Tensor:
        """Return the rows that came here, those of the first rank first, given all that go elsewhere."""
        arrived: Tensor = _Swap.apply(x_RD, self.exchange, self.sent, self.received)  # type: ignore[no-untyped-call]
        return arrived

    def send_back(self, h_RD: Tensor) -> Tensor:
        """Return what became of the rows that were sent, in their order, given the outputs for those that came."""
        returned: Tensor = _Swap.apply(h_RD, self.exchange, self.received, self.sent)  # type: ignore[no-untyped-call]
        return returned


class _Swap(torch.autograd.Function):
    """Gradients travel the way back."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, exchange: Exchange, sent: list[int], received: list[int]) -> Tensor:
        ctx.exchange, ctx.sent, ctx.received = exchange, sent, received
        return exchange.swap(x_RD, sent, received)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> Any:
        return ctx.exchange.swap(grad_RD, ctx.received, ctx.sent), None, None, None
