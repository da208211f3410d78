"""Closed forms: parameters and FLOPs of a configured model. No torch, nothing allocated.

Every count is asserted against built models in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from ava_exp.config.model import (
    Activation,
    AttentionConfig,
    GroupedAttentionConfig,
    ModelConfig,
    MoEConfig,
    SparsityConfig,
    TopKRouterConfig,
)


@dataclass(kw_only=True, slots=True, frozen=True)
class Part:
    """One kind of parameter: how many there are, how many act on one token, and how many of these multiply matrices."""

    name: str
    total: int
    active: int
    multiplied: int


@dataclass(kw_only=True, slots=True, frozen=True)
class ParameterBreakdown:
    """Parameters by part. `active` counts what one token meets: k of E experts, everything else whole."""

    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts)

    @property
    def active(self) -> int:
        return sum(part.active for part in self.parts)

    @property
    def multiplied(self) -> int:
        """Weights that take part in a matrix product for one token: the head does, the embedding's look-up does not."""
        return sum(part.multiplied for part in self.parts)


def count_parameters(model: ModelConfig, attention: AttentionConfig, sparsity: SparsityConfig) -> ParameterBreakdown:
    """Count the parameters of the decoder that these configurations build."""
    hidden, layers, vocabulary = model.hidden_size, model.num_layers, model.vocab_size
    embedding = vocabulary * hidden
    parts = [
        _part("embedding", embedding, multiplied=embedding if model.tie_embeddings else 0),
        _attention_part(model, attention),
        *_feed_forward_parts(model, sparsity),
        _part("norms", (2 * layers + 1) * hidden, multiplied=0),
    ]
    if not model.tie_embeddings:
        parts.append(_part("head", embedding, multiplied=embedding))
    return ParameterBreakdown(parts=tuple(parts))


def _part(name: str, total: int, multiplied: int) -> Part:
    return Part(name=name, total=total, active=total, multiplied=multiplied)


def _attention_part(model: ModelConfig, attention: AttentionConfig) -> Part:
    assert model.num_kv_heads is not None and model.head_dim is not None
    query, key_value = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    weights = model.hidden_size * (query + key_value) + query * model.hidden_size
    bias = query + key_value + model.hidden_size if model.bias else 0
    norms = 2 * model.head_dim if isinstance(attention, GroupedAttentionConfig) and attention.qk_norm else 0
    return _part("attention", model.num_layers * (weights + bias + norms), multiplied=model.num_layers * weights)


def _feed_forward_parts(model: ModelConfig, sparsity: SparsityConfig) -> list[Part]:
    hidden, layers = model.hidden_size, model.num_layers
    assert model.intermediate_size is not None
    matrices = 3 if model.activation is Activation.swiglu else 2
    if not isinstance(sparsity, MoEConfig):
        weights = layers * matrices * hidden * model.intermediate_size
        bias = layers * ((matrices - 1) * model.intermediate_size + hidden) if model.bias else 0
        return [_part("feed-forward", weights + bias, multiplied=weights)]
    expert = matrices * hidden * (sparsity.intermediate_size or model.intermediate_size)
    router = layers * hidden * sparsity.num_experts
    active = layers * expert * experts_per_token(sparsity)
    return [
        _part("router", router, multiplied=router),
        Part(name="experts", total=layers * expert * sparsity.num_experts, active=active, multiplied=active),
    ]


def experts_per_token(sparsity: MoEConfig) -> int:
    """Return how many experts one token visits."""
    assert isinstance(sparsity.router, TopKRouterConfig)
    return sparsity.router.moe_top_k


def forward_flops_per_token(
    model: ModelConfig, attention: AttentionConfig, sparsity: SparsityConfig, sequence_length: int
) -> float:
    """Floating-point operations of one token's forward pass: 2 for each multiplied weight, and attention's products.

    Softmax, norms and the rotary embedding are left out, as in [chowdhery2022palm] app. B. Attention is counted
    causally: a token looks at (T + 1) / 2 positions on average, where the paper counts all T.
    """
    assert model.head_dim is not None
    weights = 2 * count_parameters(model, attention, sparsity).multiplied
    positions = (sequence_length + 1) / 2
    return weights + 4 * model.num_layers * model.num_heads * model.head_dim * positions


def training_flops_per_token(
    model: ModelConfig, attention: AttentionConfig, sparsity: SparsityConfig, sequence_length: int
) -> float:
    """Forward and backward: three times the forward pass."""
    return 3 * forward_flops_per_token(model, attention, sparsity, sequence_length)
