"""A mixture of attention heads [jin2024moh]: every token uses the shared heads and chooses some of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ava_exp.config.attention import AttentionBackend
from ava_exp.nn.attention.band import Band
from ava_exp.nn.attention.cache import AttentionContext, Held
from ava_exp.nn.attention.grouped import GroupedAttention

MOST_GATHERED = 0.75
"""Queries are gathered by head where the busiest one has at most this share of the tokens. Above, padding to that one
and a mask of its own for every head cost more than the scores that are left out."""


@dataclass(slots=True)
class HeadRouting:
    """Which of R routed heads the N tokens of a layer chose."""

    probabilities: Tensor
    """Shape (N, R), fp32 or wider."""
    counts: Tensor
    """Shape (R,), int64: how many tokens chose each."""
    num_tokens: int


def _observed(probabilities_BTR: Tensor, chosen_BTR: Tensor, counts_B: Tensor | None) -> HeadRouting:
    if counts_B is None:
        probabilities, chosen = probabilities_BTR.flatten(0, 1), chosen_BTR.flatten(0, 1)
    else:
        real_BT = torch.arange(chosen_BTR.shape[1], device=chosen_BTR.device) < counts_B[:, None]
        probabilities, chosen = probabilities_BTR[real_BT], chosen_BTR[real_BT]
    return HeadRouting(probabilities, chosen.sum(dim=0), chosen.shape[0])


class MixtureOfHeads(GroupedAttention):
    """Grouped attention in which a token uses `num_shared_heads` heads and `heads_per_token` of the others.

    The first heads are the shared ones. Their weights are a softmax over them, those of the chosen heads what a softmax
    over all routed heads gives them; two further weights, a softmax of their own, balance the two kinds [jin2024moh].
    Each of the three is multiplied by the number that it is over, unlike in the paper, so that equal weights are 1 and
    with all heads chosen give multi-head attention. Weights are not renormalised over the chosen heads: with one a
    token, its weight would always be 1, and the choice would not be learned. Heads share keys and values in groups as
    in grouped attention, and a head reads those of all tokens, whether or not they chose it.
    """

    def __init__(self, dim: int, num_heads: int, num_shared_heads: int, heads_per_token: int, **grouped: Any) -> None:
        """`grouped` are the other keywords of `GroupedAttention`."""
        super().__init__(dim=dim, num_heads=num_heads, **grouped)
        self.num_shared_heads, self.heads_per_token = num_shared_heads, heads_per_token
        self.num_routed_heads = num_heads - num_shared_heads
        self.head_router = nn.Linear(dim, num_heads + (2 if num_shared_heads else 0), bias=False)

    def forward(self, x_BTD: Tensor, context: AttentionContext) -> tuple[Tensor, HeadRouting]:  # type: ignore[override]
        """Mix positions causally; (B, T, D) to (B, T, D). With a cache, T new positions see all that it holds."""
        q, k, v = self.project(x_BTD, context)
        held = Held(k, v, 0) if context.cache is None else context.extend_cache(self.layer, k, v)
        weights_BTH, chosen_BTR, routing = self.route(x_BTD, context.counts)
        y = self._read_gathered(q, held, chosen_BTR, context.documents)
        if y is None:
            y = self._read(q, held, context.documents)
        return self.merge(y * weights_BTH.transpose(1, 2)[..., None]), routing

    def route(self, x_BTD: Tensor, counts_B: Tensor | None = None) -> tuple[Tensor, Tensor, HeadRouting]:
        """Return the weights of all heads (B, T, H) in the format of x, 0 where a head is not used; which of the
        routed ones are chosen, (B, T, R) bool; and the routing of the first `counts_B` tokens of every sequence."""
        x = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        logits = F.linear(x, self.head_router.weight.to(x.dtype))
        sizes = [self.num_shared_heads, self.num_routed_heads, self._num_kinds]
        shared, routed, kinds = torch.split(logits, sizes, dim=-1)
        probabilities = routed.softmax(dim=-1)
        ids = probabilities.detach().topk(self.heads_per_token, dim=-1).indices
        chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, ids, True)
        weights = self.num_routed_heads * probabilities.where(chosen, 0)
        if self.num_shared_heads:
            balance = 2 * kinds.softmax(dim=-1)
            of_shared = self.num_shared_heads * shared.softmax(dim=-1)
            weights = torch.cat((of_shared * balance[..., :1], weights * balance[..., 1:]), dim=-1)
        return weights.to(x_BTD.dtype), chosen, _observed(probabilities, chosen, counts_B)

    @property
    def _num_kinds(self) -> int:
        return 2 if self.num_shared_heads else 0

    def _read(self, q_BHTC: Tensor, held: Held, documents_BT: Tensor | None) -> Tensor:
        return self.attend(
            q_BHTC, held, window=self.sliding_window, documents_RT=documents_BT, dropout=self.dropout_now
        )

    def _read_gathered(
        self, q_BHTC: Tensor, held: Held, chosen_BTR: Tensor, documents_BT: Tensor | None
    ) -> Tensor | None:
        """Compute scores of the tokens that chose a head only, in whole sequences; None where that does not pay."""
        length = q_BHTC.shape[2]
        whole = isinstance(held.starts, int) and held.starts == 0 and length > 1
        if not whole or self.heads_per_token > MOST_GATHERED * self.num_routed_heads:
            return None
        # Fused kernels and bands leave out what nobody sees; with a mask for gathered tokens they would compute it.
        in_band = self.sliding_window is not None and Band.of(length, self.sliding_window) is not None
        if in_band or self.attend.choose(q_BHTC.device, length, length) is not AttentionBackend.plain:
            return None
        busiest = int(chosen_BTR.sum(dim=1).max())
        if busiest > MOST_GATHERED * length:
            return None
        # Those that chose the head come first, in the order of the text; what fills up is weighted by 0 afterwards.
        tokens_BRM = (~chosen_BTR.transpose(1, 2)).sort(dim=-1, stable=True).indices[:, :, :busiest]
        routed = self._heads(held, self.num_shared_heads, self.num_heads)
        index = tokens_BRM[..., None].expand(-1, -1, -1, self.head_dim)
        q_routed = q_BHTC[:, self.num_shared_heads :]
        mask = self._mask(tokens_BRM, length, documents_BT)
        read = self.attend.masked(q_routed.gather(2, index), routed.keys, routed.values, mask, self.dropout_now)
        y = torch.zeros_like(q_routed).scatter(2, index, read)
        if not self.num_shared_heads:
            return y
        shared = self._heads(held, 0, self.num_shared_heads)
        return torch.cat((self._read(q_BHTC[:, : self.num_shared_heads], shared, documents_BT), y), dim=1)

    def _heads(self, held: Held, start: int, stop: int) -> Held:
        """Return the keys and values that query heads `start` to `stop` (excluded) read."""
        group = self.num_heads // self.num_kv_heads
        if start % group == 0 and stop % group == 0:
            heads: slice | Tensor = slice(start // group, stop // group)
        else:
            heads = torch.arange(start, stop, device=held.keys.device) // group
        return Held(held.keys[:, heads], held.values[:, heads], held.starts)

    def _mask(self, tokens_BRM: Tensor, length: int, documents_BT: Tensor | None) -> Tensor:
        """Return which of T keys the gathered tokens see, (B, R, M, T) bool."""
        keys = torch.arange(length, device=tokens_BRM.device)
        last = tokens_BRM[..., None]
        seen = keys <= last
        if self.sliding_window is not None:
            seen &= keys > last - self.sliding_window
        if documents_BT is not None:
            own = documents_BT[:, None].expand(-1, tokens_BRM.shape[1], -1).gather(2, tokens_BRM)
            seen &= own[..., None] == documents_BT[:, None, None, :]
        return seen
