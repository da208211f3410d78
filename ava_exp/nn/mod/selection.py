"""Which tokens of a batch a layer processes, and how they are taken out of it and put back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_exp.nn.attention.cache import AttentionContext


@dataclass(slots=True, kw_only=True)
class Selection:
    """N of the B · T tokens of a batch, and how attention meets them: R sequences of M tokens in the order of the text.

    Where sequences have different numbers of tokens the shorter ones are filled up at their end: causality keeps real
    tokens from seeing that. Everything but attention works on the N tokens alone.
    """

    token_ids: Tensor
    """Shape (N,), int64: places among the B · T tokens, no two alike."""
    num_tokens: int
    """B · T, without the padding of prompts."""
    shape: tuple[int, int]
    """B and T."""
    tokens: Tensor | None = None
    """Shape (R, M), int64: places among the T tokens of a sequence; None where all B · T tokens are processed."""
    rows: Tensor | None = None
    """Shape (R,), int64: which of the B sequences; None is all."""
    counts: Tensor | None = None
    """Shape (R,), int64: how many of a sequence's M tokens are real; None is all."""
    places: Tensor | None = None
    """Shape (N,), int64: where the N tokens stand among R · M; None is one after the other."""

    @property
    def is_everything(self) -> bool:
        return self.tokens is None

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a key that attention has without a cache."""
        if self.counts is not None:
            return int((self.counts * (self.counts + 1) // 2).sum())
        num_rows, longest = self.shape if self.tokens is None else self.tokens.shape
        return num_rows * longest * (longest + 1) // 2

    def take(self, x_BTD: Tensor) -> Tensor:
        """Return the tokens as attention wants them, (R, M, D)."""
        if self.tokens is None:
            return x_BTD
        if self.places is None:
            x_RMD: Tensor = _Take.apply(x_BTD, self.token_ids, self.tokens.shape)  # type: ignore[no-untyped-call]
            return x_RMD
        batch, length, _ = x_BTD.shape
        rows = torch.arange(batch, device=x_BTD.device) if self.rows is None else self.rows
        places = (rows[:, None] * length + self.tokens).flatten()
        return x_BTD.flatten(0, 1).index_select(0, places).view(*self.tokens.shape, -1)

    def compact(self, x_RMD: Tensor, multiple: int = 1) -> Tensor:
        """Return the N tokens without padding: (R, M, D) as it is, or (1, N, D) where sequences differ.

        With a `multiple` a larger N is filled up to one, by tokens that `put` leaves out.
        """
        if self.places is None:
            return x_RMD
        missing = -len(self.places) % multiple if len(self.places) > multiple else 0
        places = F.pad(self.places, (0, missing)) if missing else self.places
        return x_RMD.flatten(0, 1).index_select(0, places)[None]

    def put(self, x_BTD: Tensor, processed: Tensor) -> Tensor:
        """Return (B, T, D) with the N tokens, as `compact` gave them, in place of what they were."""
        if self.tokens is None:
            return processed
        flat = x_BTD.flatten(0, 1).index_copy(0, self.token_ids, processed.flatten(0, 1)[: len(self.token_ids)])
        return flat.view_as(x_BTD)

    def context(self, context: AttentionContext, positions_BT: Tensor) -> AttentionContext:
        """Return the context of the (R, M) tokens. `positions_BT` says where in their texts the B · T tokens stand."""
        if self.tokens is None:
            return dataclasses.replace(context, positions=positions_BT) if context.cache is not None else context
        return context.of(self.tokens, rows=self.rows, counts=self.counts)


class _Take(torch.autograd.Function):
    """Rows of a tensor, no two alike: the gradient is a copy, where indexing would add row by row."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, token_ids_N: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(token_ids_N)
        ctx.shape = x_BTD.shape
        return x_BTD.flatten(0, 1).index_select(0, token_ids_N).view(*shape, -1)

    @staticmethod
    def backward(ctx: Any, grad_RMD: Tensor) -> Any:
        (token_ids_N,) = ctx.saved_tensors
        grad = grad_RMD.new_zeros(ctx.shape)
        grad.view(-1, ctx.shape[-1]).index_copy_(0, token_ids_N, grad_RMD.flatten(0, 1))
        return grad, None, None


def select_everything(batch: int, length: int, device: torch.device) -> Selection:
    """Return the selection of all B · T tokens."""
    token_ids = torch.arange(batch * length, device=device)
    return Selection(token_ids=token_ids, num_tokens=batch * length, shape=(batch, length))


def select_alike(tokens_M: Tensor, batch: int, length: int) -> Selection:
    """Return the selection of the same tokens, in order, in all sequences."""
    if tokens_M.numel() == length:
        return select_everything(batch, length, tokens_M.device)
    return select_as_many(tokens_M.expand(batch, -1), length)


def select_as_many(tokens_BM: Tensor, length: int) -> Selection:
    """Return the selection of as many tokens of every sequence, each row in order."""
    batch = tokens_BM.shape[0]
    starts = torch.arange(0, batch * length, length, device=tokens_BM.device)
    token_ids = (tokens_BM + starts[:, None]).flatten()
    return Selection(token_ids=token_ids, num_tokens=batch * length, shape=(batch, length), tokens=tokens_BM)


def multiple_of(x: Tensor) -> int:
    """Return a number of which the numbers of rows that products get should be multiples: in 16 bits a CPU compiles a
    kernel for every number that it has not met, which takes longer than to multiply a few rows more."""
    return 32 if x.device.type == "cpu" and x.element_size() == 2 else 1


def select_where(chosen_BT: Tensor, num_tokens: int, multiple: int = 1) -> Selection:
    """Return the selection of the true ones; waits for the device. `num_tokens` is how many could be; sequences are
    filled up to a `multiple` of tokens if they are long enough.

    The N tokens come in the order of their place in the sequence, and at the same place in that of the sequences: as
    experts with a capacity admit them.
    """
    batch, length = chosen_BT.shape
    if length == 1:  # texts are written: the number of operations is what counts
        chosen = chosen_BT.flatten().nonzero().squeeze(1)
        if len(chosen) == batch:
            return select_everything(batch, length, chosen_BT.device)
        tokens_RM = torch.zeros_like(chosen)[:, None]
        return Selection(token_ids=chosen, num_tokens=num_tokens, shape=(batch, 1), tokens=tokens_RM, rows=chosen)
    counts_B = chosen_BT.sum(dim=1)
    total, longest, shortest = (int(value) for value in (counts_B.sum(), counts_B.max(), counts_B.min()))
    longest = min(length, longest + -longest % multiple)
    if total == batch * length:
        return select_everything(batch, length, chosen_BT.device)
    rows = counts_B.nonzero().squeeze(1) if shortest == 0 else None
    chosen_RT = chosen_BT if rows is None else chosen_BT[rows]
    counts_R = counts_B if rows is None else counts_B[rows]
    # Chosen ones first, each group in the order of the text.
    tokens_RM = (~chosen_RT).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
    rank_M = torch.arange(longest, device=chosen_BT.device)
    place, row = (rank_M[:, None] < counts_R).nonzero(as_tuple=True)  # place by place
    sequences = row if rows is None else rows[row]
    return Selection(
        token_ids=sequences * length + tokens_RM[row, place],
        num_tokens=num_tokens,
        shape=(batch, length),
        tokens=tokens_RM,
        rows=rows,
        counts=counts_R if total < counts_R.numel() * longest else None,
        places=row * longest + place,
    )
