"""Closed forms of attention: parameters, scores and memory of one layer. No torch, nothing allocated."""

from __future__ import annotations

from dataclasses import dataclass

from ava_exp.config.attention import (
    AttentionBackend,
    AttentionConfig,
    GroupedAttentionConfig,
    MixtureOfHeadsConfig,
    MultiLevelAttentionConfig,
)
from ava_exp.config.model import ModelConfig

PLAIN_LENGTH = 512
"""Up to here a CPU computes attention by plain products, which keep all scores: of `nn/attention/softmax.py`."""
SMALLEST_CHUNK, CHUNKS_A_WINDOW = 32, 2
"""How sliding windows are cut into chunks: of `nn/attention/band.py`."""
MOST_GATHERED = 0.75
"""The busiest head's share of the tokens up to which queries are gathered: of `nn/attention/mixture_of_heads.py`."""
UNEVENNESS = 1.4
"""What the busiest head of a sequence was seen to be chosen more often than the mean, before training."""


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


@dataclass(kw_only=True, slots=True, frozen=True)
class _Read:
    """One softmax attention of E entries: Q values of queries, V of keys, H heads; numbers of values by entry."""

    length: int
    window: int | None
    query: int
    key_value: int
    num_heads: int
    plain: bool
    copies: int
    """Of every score: dropout keeps three."""

    def values(self) -> float:
        """Values that are kept for the backward pass, without what was read."""
        chunk, num_chunks = self._chunk()
        if not chunk:
            scores = self.copies * self.num_heads * self.length if self.plain else 0
            return self.query + 2 * self.key_value + scores
        num_keys = chunk * (num_chunks + 1)
        # The fused product keeps what it read, chunk by chunk, and its mask as numbers.
        scores = self.copies * self.num_heads * num_keys if self.plain else self.query + num_keys
        padded = -(-self.length // chunk) * chunk / self.length
        return padded * (self.query + 2 * (num_chunks + 1) * self.key_value + scores)

    @property
    def in_band(self) -> bool:
        return self._chunk()[0] > 0

    def _chunk(self) -> tuple[int, int]:
        """Return the entries of a chunk and how many chunks before its own it reads; 0 where nothing is cut."""
        if self.window is None or self.window >= self.length:
            return 0, 0
        chunk = max(SMALLEST_CHUNK, -(-(self.window - 1) // CHUNKS_A_WINDOW))
        num_before = -(-(self.window - 1) // chunk)
        return (chunk, num_before) if 2 * chunk * (num_before + 1) <= self.length else (0, 0)


def kept_attention_bytes(
    model: ModelConfig, attention: AttentionConfig, size: int, sequence_length: int, on_cpu: bool
) -> float:
    """Return the bytes that one layer keeps of a token for the backward pass: queries, keys, values, scores where
    products are plain, and what was read. `size` is that of a number; tests compare with what autograd keeps."""
    assert isinstance(attention, GroupedAttentionConfig)
    assert model.head_dim is not None and model.num_kv_heads is not None
    query = model.num_heads * model.head_dim

    def level(number: int, window: int | None) -> _Read:
        length = sequence_length // 2**number
        return _Read(
            length=max(1, length),
            window=window,
            query=query,
            key_value=model.num_kv_heads * model.head_dim,  # type: ignore[operator]
            num_heads=model.num_heads,
            plain=_is_plain(attention, length, on_cpu),
            copies=3 if attention.attention_dropout > 0 else 1,
        )

    finest = level(0, attention.sliding_window)
    values = finest.values() + query
    # The fused product keeps the values as they stand in the one result of all three projections, norms the others.
    if attention.qk_norm or not (finest.plain or finest.in_band):
        values += query + finest.key_value
    if isinstance(attention, MultiLevelAttentionConfig) and attention.num_levels > 1:
        values += query
        for number in range(1, attention.num_levels):
            values += (level(number, attention.window_of(number)).values() + query) / 2**number
    if isinstance(attention, MixtureOfHeadsConfig):
        values += _values_of_mixture(model, attention, finest)
        return size * values + (4 * model.hidden_size if size == 2 else 0)
    return size * values


def _is_plain(attention: GroupedAttentionConfig, num_keys: int, on_cpu: bool) -> bool:
    automatic = attention.backend is AttentionBackend.auto and on_cpu and num_keys <= PLAIN_LENGTH
    return attention.backend is AttentionBackend.plain or automatic


def _values_of_mixture(model: ModelConfig, attention: MixtureOfHeadsConfig, all_heads: _Read) -> float:
    """Return what a mixture of heads keeps beyond grouped attention: less, where only chosen scores are computed."""
    routed = model.num_heads - attention.num_shared_heads
    busiest = UNEVENNESS * attention.heads_per_token / routed
    if not all_heads.plain or all_heads.in_band or busiest > MOST_GATHERED:
        return all_heads.query  # what was read, before it is weighted
    assert model.head_dim is not None
    saved = (1 - busiest) * routed * all_heads.copies * all_heads.length
    gathered = routed * model.head_dim * busiest + all_heads.key_value
    projected = 0 if attention.qk_norm else all_heads.query + all_heads.key_value
    return all_heads.query + gathered + projected - saved
