"""Closed forms: parameters and FLOPs of a configured model. No torch, nothing allocated.

Every count is asserted against built models in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import AttentionConfig
from ava_exp.config.model import Activation, ModelConfig, MoEConfig, Overflow, SharedProjection, SparsityConfig
from ava_exp.config.prediction import MultiTokenConfig
from ava_exp.models.attention import attention_parameters, scores_per_token


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


PREDICTION_HEADS = "prediction heads"
"""They act while training and on drafts, not on the forward pass of a token: none of them is active."""


def count_parameters(architecture: Architecture) -> ParameterBreakdown:
    """Count the parameters of the decoder that these configurations build."""
    model, attention, sparsity = architecture.model, architecture.attention, architecture.sparsity
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
    if num_heads := num_prediction_heads(architecture):
        weights = num_heads * (_prediction_head_weights(architecture) + 3 * hidden + model.num_mixed_activations)
        parts.append(Part(name=PREDICTION_HEADS, total=weights, active=0, multiplied=0))
    return ParameterBreakdown(parts=tuple(parts))


def num_prediction_heads(architecture: Architecture) -> int:
    """Return how many heads predict tokens after the next one."""
    prediction = architecture.prediction
    return prediction.num_prediction_heads if isinstance(prediction, MultiTokenConfig) else 0


def prediction_head_width(architecture: Architecture) -> int:
    """Return the width of such a head's feed-forward network."""
    prediction = architecture.prediction
    own = prediction.head_width if isinstance(prediction, MultiTokenConfig) else None
    return own or architecture.model.hidden_size


def _prediction_head_weights(architecture: Architecture) -> int:
    """The matrix weights of one head: state and embedding are projected to a state, a feed-forward network follows."""
    model = architecture.model
    network = (_up_matrices(model) + 1) * model.hidden_size * prediction_head_width(architecture)
    return 2 * model.hidden_size**2 + network


def _part(name: str, total: int, multiplied: int) -> Part:
    return Part(name=name, total=total, active=total, multiplied=multiplied)


def _attention_part(model: ModelConfig, attention: AttentionConfig) -> Part:
    total, multiplied = attention_parameters(model, attention)
    return _part("attention", model.num_layers * total, multiplied=model.num_layers * multiplied)


def _feed_forward_parts(model: ModelConfig, sparsity: SparsityConfig) -> list[Part]:
    hidden = model.hidden_size
    assert model.intermediate_size is not None
    matrices = _up_matrices(model) + 1
    num_sparse = num_sparse_layers(model, sparsity)
    parts = []
    if num_dense := model.num_layers - num_sparse:
        weights = num_dense * matrices * hidden * model.intermediate_size
        bias = num_dense * ((matrices - 1) * model.intermediate_size + hidden) if model.bias else 0
        mixtures = num_dense * model.num_mixed_activations
        parts.append(_part("feed-forward", weights + bias + mixtures, multiplied=weights))
    if isinstance(sparsity, MoEConfig) and num_sparse:
        router = num_sparse * sparsity.router.num_weights(hidden, sparsity.num_experts)
        parts += [_part("router", router, multiplied=router), _experts_part(model, sparsity)]
        network = num_sparse * matrices * hidden * expert_width(model, sparsity)
        mixtures = num_sparse * model.num_mixed_activations
        if sparsity.num_shared_experts:
            shared = sparsity.num_shared_experts * network
            parts.append(_part("shared experts", shared + mixtures, multiplied=shared))
        if sparsity.capacity_factor is not None and sparsity.overflow is Overflow.residual:
            parts.append(Part(name="residual expert", total=network + mixtures, active=0, multiplied=0))
    return parts


def _experts_part(model: ModelConfig, sparsity: MoEConfig) -> Part:
    layers, width = num_sparse_layers(model, sparsity), expert_width(model, sparsity)
    own, common = _expert_weights(model, sparsity)
    norm = width if sparsity.expert_norm else 0
    visits = experts_per_token(sparsity)
    return Part(
        name="experts",
        total=layers * (sparsity.num_experts * (own + norm) + common + model.num_mixed_activations),
        active=round(layers * (visits * (own + norm) + common + model.num_mixed_activations)),
        multiplied=round(layers * (visits * own + common)),
    )


def _expert_weights(model: ModelConfig, sparsity: MoEConfig) -> tuple[int, int]:
    """Return the matrix weights of one expert, and those that all experts of a layer have in common."""
    matrix = model.hidden_size * expert_width(model, sparsity)
    up, down = _up_matrices(model) * matrix, matrix
    if sparsity.share_projection is SharedProjection.up:
        return down, up
    if sparsity.share_projection is SharedProjection.down:
        return up, down
    return up + down, 0


def _up_matrices(model: ModelConfig) -> int:
    return 2 if model.activation is Activation.swiglu else 1


def num_sparse_layers(model: ModelConfig, sparsity: SparsityConfig) -> int:
    """Return how many layers are mixtures of experts."""
    return max(0, model.num_layers - sparsity.first_k_dense) if isinstance(sparsity, MoEConfig) else 0


def expert_width(model: ModelConfig, sparsity: MoEConfig) -> int:
    """Return the width of one expert."""
    assert model.intermediate_size is not None
    return sparsity.intermediate_size or model.intermediate_size


def experts_per_token(sparsity: MoEConfig) -> float:
    """Return how many experts one token visits, or at most visits."""
    return sparsity.router.experts_per_token(sparsity.num_experts)


def forward_flops_per_token(architecture: Architecture, sequence_length: int) -> float:
    """Floating-point operations of one token's forward pass: 2 for each multiplied weight, and attention's products.

    Softmax, norms and the rotary embedding are left out, as in [chowdhery2022palm] app. B. Attention is counted
    causally: a token looks at (T + 1) / 2 positions on average, where the paper counts all T; see `scores_per_token`.
    """
    model = architecture.model
    assert model.head_dim is not None
    weights = 2 * count_parameters(architecture).multiplied
    scores = scores_per_token(model, architecture.attention, sequence_length)
    return weights + 4 * model.num_layers * model.head_dim * scores


def training_flops_per_token(architecture: Architecture, sequence_length: int) -> float:
    """Forward and backward: three times the forward pass, and the prediction heads' as far as they are sure.

    Head j runs at T - j of T positions. How many of them come to the product with the vocabulary, only the text tells,
    unless the confidence gate is open: behind a gate that product is left out.
    """
    forward = forward_flops_per_token(architecture, sequence_length)
    return 3 * (forward + prediction_flops_per_token(architecture, sequence_length))


def prediction_flops_per_token(architecture: Architecture, sequence_length: int) -> float:
    """Operations of all prediction heads' forward pass along a text, for one of its T tokens."""
    model, prediction = architecture.model, architecture.prediction
    if not isinstance(prediction, MultiTokenConfig):
        return 0.0
    weights = _prediction_head_weights(architecture)
    if prediction.confidence_threshold_train == 0:
        weights += model.vocab_size * model.hidden_size
    distances = range(1, prediction.num_prediction_heads + 1)
    positions = sum(max(0, sequence_length - distance) for distance in distances)
    return 2 * weights * positions / sequence_length


@dataclass(kw_only=True, slots=True, frozen=True)
class StepFlops:
    """Floating-point operations of training: of one token outside the experts, and of one visit to an expert."""

    per_token: float
    per_visit: float

    def of(self, num_tokens: int, num_visits: int) -> float:
        """Return the operations of a step: routers may refuse visits, or choose how many a token makes."""
        return num_tokens * self.per_token + num_visits * self.per_visit


def training_flops(architecture: Architecture, sequence_length: int) -> StepFlops:
    """Split `training_flops_per_token` into what every token costs and what a visit to an expert costs."""
    model, sparsity = architecture.model, architecture.sparsity
    total = training_flops_per_token(architecture, sequence_length)
    if not isinstance(sparsity, MoEConfig):
        return StepFlops(per_token=total, per_visit=0.0)
    per_visit = 6.0 * _expert_weights(model, sparsity)[0]
    visits = num_sparse_layers(model, sparsity) * experts_per_token(sparsity)
    return StepFlops(per_token=total - visits * per_visit, per_visit=per_visit)
