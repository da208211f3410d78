"""Configuration of attention."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from ava_exp.config.base import ComponentConfig


class AttentionBackend(Enum):
    """How softmax attention is computed: chosen by device and length, by torch's fused product (any kernel of it, or
    one by name), by torch's flexible product, or by plain products."""

    auto = "auto"
    sdpa = "sdpa"
    flash = "flash"
    memory_efficient = "memory_efficient"
    math = "math"
    flex = "flex"
    plain = "plain"


@dataclass(kw_only=True, slots=True)
class AttentionConfig(ComponentConfig):
    """Base of every attention."""


@dataclass(kw_only=True, slots=True)
class GroupedAttentionConfig(AttentionConfig):
    """Causal softmax attention in which groups of query heads share a key/value head."""

    builds: ClassVar[str] = "ava_exp.nn.attention.grouped:GroupedAttention"

    attention_dropout: float = 0.0
    qk_norm: bool = False
    backend: AttentionBackend = AttentionBackend.auto
    sliding_window: int | None = None
    """Entries that a position sees, itself included; null is all before it."""


@dataclass(kw_only=True, slots=True)
class MultiLevelAttentionConfig(GroupedAttentionConfig):
    """Attention at full resolution and over means of 2, 4, … entries, fused by learned weights."""

    builds: ClassVar[str] = "ava_exp.nn.attention.multi_level:MultiLevelAttention"

    num_levels: int = 3
    progressive_sparsity: float = 1.0
    """By what the number of blocks that a position sees is multiplied from one level to the next."""

    def window_of(self, level: int) -> int | None:
        """Return how many entries of a level a position sees; None is all."""
        return level_window(self.sliding_window, self.progressive_sparsity, level)


def level_window(sliding_window: int | None, progressive_sparsity: float, level: int) -> int | None:
    """Return how many entries of a level a position sees; None is all."""
    return None if sliding_window is None else max(1, round(sliding_window * progressive_sparsity**level))


@dataclass(kw_only=True, slots=True)
class MixtureOfHeadsConfig(GroupedAttentionConfig):
    """Attention whose heads are chosen per token, beside shared heads that every token uses."""

    builds: ClassVar[str] = "ava_exp.nn.attention.mixture_of_heads:MixtureOfHeads"
    runtime_fields: ClassVar[frozenset[str]] = frozenset({"head_balance_weight"})

    num_shared_heads: int = 1
    heads_per_token: int = 1
    """Routed heads that a token uses beside the shared ones."""
    head_balance_weight: float = 0.01
