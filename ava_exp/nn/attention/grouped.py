"""Grouped-query attention [ainslie2023gqa] §2.2; as many key/value heads as query heads is multi-head attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ava_exp.config.attention import AttentionBackend
from ava_exp.nn.attention.cache import AttentionContext, Held, LayerCache, visible
from ava_exp.nn.norm import RMSNorm
from ava_exp.nn.rope import apply_rope

PLAIN_LENGTH = 512
"""On a CPU plain products beat torch's fused kernel up to about this many keys (25 % at 256), and need T·S memory."""


class GroupedAttention(nn.Module):
    """Causal softmax attention in which groups of query heads share a key/value head."""

    def __init__(
        self,
        attention_dropout: float,
        qk_norm: bool,
        backend: AttentionBackend,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer: int,
        bias: bool = False,
        norm_epsilon: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.attention_dropout, self.backend, self.layer = attention_dropout, backend, layer
        self.query_key_value = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias)
        self.output = nn.Linear(num_heads * head_dim, dim, bias=bias)
        self.query_norm = RMSNorm(head_dim, eps=norm_epsilon) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(head_dim, eps=norm_epsilon) if qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        """Mix positions causally; (B, T, D) to (B, T, D). With a cache, T new positions see all that it holds."""
        batch, length, _ = x_BTD.shape
        heads = self.query_key_value(x_BTD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = self._rotated(heads, context)
        held = Held(k, v, 0) if context.cache is None else context.extend_cache(self.layer, k, v)
        y = self._attend(q, held, context.documents)
        return self.output(y.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]

    def _rotated(self, heads_BHTC: Tensor, context: AttentionContext) -> tuple[Tensor, ...]:
        """Return queries, keys and values, the first two at their positions."""
        num_q, num_kv = self.num_heads, self.num_kv_heads
        if heads_BHTC.shape[2] == 1 and isinstance(self.query_norm, nn.Identity) and not torch.is_grad_enabled():
            # One new token: the number of operations is what counts, so both are turned at once.
            rotated, v = torch.split(heads_BHTC, [num_q + num_kv, num_kv], dim=1)
            return *torch.split(apply_rope(rotated, context.cos, context.sin), [num_q, num_kv], dim=1), v
        q, k, v = torch.split(heads_BHTC, [num_q, num_kv, num_kv], dim=1)
        q = apply_rope(self.query_norm(q), context.cos, context.sin)
        return q, apply_rope(self.key_norm(k), context.cos, context.sin), v

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """Return an empty cache for at most `capacity` positions of `batch_size` sequences."""
        return LayerCache(batch_size, self.num_kv_heads, capacity, self.head_dim, dtype, device)

    def _attend(self, q_BHTC: Tensor, held: Held, documents_BT: Tensor | None) -> Tensor:
        dropout = self.attention_dropout if self.training else 0.0
        length, num_keys = q_BHTC.shape[2], held.keys.shape[2]
        whole = held.starts == 0 if isinstance(held.starts, int) else False
        mask = None if whole and documents_BT is None else visible(held, length)
        if documents_BT is not None:
            assert whole and mask is not None, "documents are told apart while training only"
            mask = mask & (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])
        if self.backend is AttentionBackend.plain or (
            self.backend is AttentionBackend.auto
            and q_BHTC.device.type == "cpu"
            and (num_keys <= PLAIN_LENGTH or length == 1)
        ):
            if length == 1 and dropout == 0:
                return single_query_attention(q_BHTC, held.keys, held.values, mask)
            if mask is None and length > 1:
                mask = visible(held, length)
            return plain_attention(q_BHTC, held.keys, held.values, mask, dropout)
        return F.scaled_dot_product_attention(
            q_BHTC,
            held.keys,
            held.values,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None and length > 1,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )


def plain_attention(
    q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, mask: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Softmax attention [vaswani2017attention] eq. 1 by two matrix products; makes the (T, S) scores of every head.

    `mask` is true where a query sees a key, (T, S) or (B, 1, T, S); None is everywhere.
    """
    batch, num_heads, length, head_dim = q_BHTC.shape
    num_kv_heads, num_keys = k_BKSC.shape[1], k_BKSC.shape[2]
    # Query heads of one group stand next to each other: fold them into rows of the same product.
    q = q_BHTC.reshape(batch, num_kv_heads, -1, head_dim)
    scores = (q @ k_BKSC.transpose(-1, -2)).view(batch, num_heads, length, num_keys) / math.sqrt(head_dim)
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
        scores = scores + bias.masked_fill_(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return (weights.view(batch, num_kv_heads, -1, num_keys) @ v_BKSC).view(batch, num_heads, length, head_dim)


def single_query_attention(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, mask: Tensor | None) -> Tensor:
    """`plain_attention` of T = 1 query. Keys times queries, not queries times keys: keys need no transposed copy then,
    which a CPU makes in bf16, at the cost of all the rest.
    """
    batch, num_heads, _, head_dim = q_BHTC.shape
    keys, values = k_BKSC.flatten(0, 1), v_BKSC.flatten(0, 1)
    q = (q_BHTC / math.sqrt(head_dim)).reshape(keys.shape[0], -1, head_dim)
    scores = torch.bmm(keys, q.transpose(1, 2)).transpose(1, 2)
    if mask is not None:
        scores = scores.reshape(batch, num_heads, 1, -1).masked_fill(~mask, float("-inf")).view_as(scores)
    return torch.bmm(scores.softmax(dim=-1), values).view(batch, num_heads, 1, head_dim)
