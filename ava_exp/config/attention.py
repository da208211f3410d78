"""Configuration of attention."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from ava_exp.config.base import ComponentConfig


class AttentionBackend(Enum):
    """How softmax attention is computed: chosen by device and length, torch's fused product, or plain products."""

    auto = "auto"
    sdpa = "sdpa"
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
