"""Grouped-query attention [ainslie2023gqa] §2.2; as many key/value heads as query heads is multi-head attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ava_exp.config.attention import AttentionBackend
from ava_exp.nn.attention.cache import AttentionContext, Held, LayerCache
from ava_exp.nn.attention.softmax import SoftmaxAttention
from ava_exp.nn.norm import RMSNorm
from ava_exp.nn.rope import apply_rope


class GroupedAttention(nn.Module):
    """Causal softmax attention in which groups of query heads share a key/value head.

    With `sliding_window` a position sees that many of the last entries that the layer processed, itself included
    [beltagy2020longformer] §3.1, there on both sides.
    """

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
        sliding_window: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.attention_dropout, self.sliding_window, self.layer = attention_dropout, sliding_window, layer
        self.attend = SoftmaxAttention(backend, tells=layer == 0)
        self.query_key_value = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias)
        self.output = nn.Linear(num_heads * head_dim, dim, bias=bias)
        self.query_norm = RMSNorm(head_dim, eps=norm_epsilon) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(head_dim, eps=norm_epsilon) if qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, context: AttentionContext) -> Tensor:
        """Mix positions causally; (B, T, D) to (B, T, D). With a cache, T new positions see all that it holds."""
        q, k, v = self.project(x_BTD, context)
        held = Held(k, v, 0) if context.cache is None else context.extend_cache(self.layer, k, v)
        return self.merge(
            self.attend(q, held, window=self.sliding_window, documents_RT=context.documents, dropout=self.dropout_now)
        )

    def project(self, x_BTD: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, C), keys and values (B, K, T, C); queries and keys normalised and rotated."""
        batch, length, _ = x_BTD.shape
        heads = self.query_key_value(x_BTD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        if length == 1 and isinstance(self.query_norm, nn.Identity) and not torch.is_grad_enabled():
            # One new token: the number of operations is what counts, so both are turned at once.
            rotated, v = torch.split(heads, [self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
            q, k = torch.split(
                apply_rope(rotated, context.cos, context.sin), [self.num_heads, self.num_kv_heads], dim=1
            )
            return q, k, v
        q, k, v = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q = apply_rope(self.query_norm(q), context.cos, context.sin)
        k = apply_rope(self.key_norm(k), context.cos, context.sin)
        return q, k, v

    def merge(self, y_BHTC: Tensor) -> Tensor:
        """Return the output projection of what the heads read, (B, T, D)."""
        batch, _, length, _ = y_BHTC.shape
        return self.output(y_BHTC.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]

    @property
    def dropout_now(self) -> float:
        """The share of attention weights that is dropped: none at inference."""
        return self.attention_dropout if self.training else 0.0

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """Return an empty cache for at most `capacity` positions of `batch_size` sequences."""
        return LayerCache(batch_size, self.num_kv_heads, capacity, self.head_dim, dtype, device)
