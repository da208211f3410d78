"""Grouped-query attention [ainslie2023gqa] §2.2; as many key/value heads as query heads is multi-head attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ava_exp.config.model import AttentionBackend
from ava_exp.nn.attention.context import AttentionContext
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
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q = apply_rope(self.query_norm(q), context.cos, context.sin)
        k = apply_rope(self.key_norm(k), context.cos, context.sin)
        if context.cache is not None:
            k, v = context.cache.extend(self.layer, k, v)
        y = self._attend(q, k, v)
        return self.output(y.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]

    def _attend(self, q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
        dropout = self.attention_dropout if self.training else 0.0
        if self.backend is AttentionBackend.plain or (
            self.backend is AttentionBackend.auto and q_BHTC.device.type == "cpu" and k_BKSC.shape[2] <= PLAIN_LENGTH
        ):
            return plain_attention(q_BHTC, k_BKSC, v_BKSC, dropout)
        length, num_keys = q_BHTC.shape[2], k_BKSC.shape[2]
        mask = None if length in (1, num_keys) else causal_mask(length, num_keys, q_BHTC.device)
        return F.scaled_dot_product_attention(
            q_BHTC,
            k_BKSC,
            v_BKSC,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=length == num_keys and length > 1,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )


def causal_mask(length: int, num_keys: int, device: torch.device) -> Tensor:
    """Return (T, S) booleans, true where one of the last T of S positions may look."""
    return torch.ones(length, num_keys, dtype=torch.bool, device=device).tril(num_keys - length)


def plain_attention(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, dropout: float = 0.0) -> Tensor:
    """Softmax attention [vaswani2017attention] eq. 1 by two matrix products; makes the (T, S) scores of every head."""
    batch, num_heads, length, head_dim = q_BHTC.shape
    num_kv_heads, num_keys = k_BKSC.shape[1], k_BKSC.shape[2]
    # Query heads of one group stand next to each other: fold them into rows of the same product.
    q = q_BHTC.reshape(batch, num_kv_heads, -1, head_dim)
    scores = (q @ k_BKSC.transpose(-1, -2)).view(batch, num_heads, length, num_keys) / math.sqrt(head_dim)
    if length > 1:
        bias = torch.zeros(length, num_keys, dtype=scores.dtype, device=scores.device)
        bias.masked_fill_(~causal_mask(length, num_keys, scores.device), float("-inf"))
        scores = scores + bias
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return (weights.view(batch, num_kv_heads, -1, num_keys) @ v_BKSC).view(batch, num_heads, length, head_dim)
