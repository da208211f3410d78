"""Closed forms of attention: parameters and scores of one layer. No torch, nothing allocated."""

from __future__ import annotations

from ava_exp.config.attention import (
    AttentionConfig,
    GroupedAttentionConfig,
    MixtureOfHeadsConfig,
    MultiLevelAttentionConfig,
)
from ava_exp.config.model import ModelConfig


def attention_parameters(model: ModelConfig, attention: AttentionConfig) -> tuple[int, int]:
    """Return the parameters of one layer, and how many of them multiply matrices for every token."""
    assert isinstance(attention, GroupedAttentionConfig)
    assert model.num_kv_heads is not None and model.head_dim is not None
    query, key_value = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    weights = model.hidden_size * (query + key_value) + query * model.hidden_size
    weights += model.hidden_size * _choices(model, attention)
    bias = query + key_value + model.hidden_size if model.bias else 0
    norms = 2 * model.head_dim if attention.qk_norm else 0
    return weights + bias + norms, weights


def _choices(model: ModelConfig, attention: GroupedAttentionConfig) -> int:
    """Return how many logits a layer makes of a token, by which levels are fused or heads are weighted."""
    if isinstance(attention, MultiLevelAttentionConfig):
        return attention.num_levels if attention.num_levels > 1 else 0
    if isinstance(attention, MixtureOfHeadsConfig):
        return model.num_heads + (2 if attention.num_shared_heads else 0)
    return 0


def scores_per_token(model: ModelConfig, attention: AttentionConfig, sequence_length: int) -> float:
    """Return how many products of a query and a key one layer needs for a token, mean over a sequence, all heads.

    They are counted as attention is defined: causally, within windows, of complete blocks and for chosen heads only.
    What a back end computes beyond that and masks, or pads, is not counted; what documents mask is.
    """
    assert isinstance(attention, GroupedAttentionConfig)
    if isinstance(attention, MultiLevelAttentionConfig):
        levels = range(attention.num_levels)
        pairs = sum(_pairs(sequence_length // 2**level, attention.window_of(level)) for level in levels)
    else:
        pairs = _pairs(sequence_length, attention.sliding_window)
    return active_heads(model, attention) * pairs / sequence_length


def active_heads(model: ModelConfig, attention: AttentionConfig) -> int:
    """Return how many heads a token uses."""
    if isinstance(attention, MixtureOfHeadsConfig):
        return attention.num_shared_heads + attention.heads_per_token
    return model.num_heads


def _pairs(length: int, window: int | None) -> int:
    """Return how many pairs of a query and a key there are: every entry sees itself and those before it."""
    width = length if window is None else min(window, length)
    return width * (width + 1) // 2 + (length - width) * width
