"""Closed forms: parameters and FLOPs of a configured model. No torch, nothing allocated.

Every count is asserted against built models in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import AttentionConfig
from ava_exp.config.mod import DepthConfig, DepthPart, NoModConfig
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
    """Parameters by part. `active` counts what one token meets: k of E experts, everything else whole; of a layer that
    tokens may skip, the share of them that do not."""

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
    if isinstance(architecture.mod, DepthConfig):
        parts = [_with_skips(part, architecture, architecture.mod) for part in parts]
        parts.append(_depth_part(model, architecture.mod))
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


def _with_skips(part: Part, architecture: Architecture, mod: DepthConfig) -> Part:
    """Return a part as the average token meets it, that skips some of the layers it is in."""
    model, num_layers = architecture.model, architecture.model.num_layers
    skippable = mod.skippable_layers(num_layers)
    first_sparse = num_layers - num_sparse_layers(model, architecture.sparsity)
    whole_block = mod.part is DepthPart.block
    if part.name in ("embedding", "head") or (part.name == "attention" and not whole_block):
        return part
    if part.name == "norms":
        skipped = (2 if whole_block else 1) * len(skippable) * model.hidden_size
        return replace(part, active=round(part.active - (1 - mod.capacity_factor) * skipped))
    layers = {"attention": range(num_layers), "feed-forward": range(first_sparse)}
    there = layers.get(part.name, range(first_sparse, num_layers))
    left = 1 - (1 - mod.capacity_factor) * sum(layer in there for layer in skippable) / len(there)
    return replace(part, active=round(part.active * left), multiplied=round(part.multiplied * left))


def _depth_part(model: ModelConfig, mod: DepthConfig) -> Part:
    """Count what decides which tokens skip."""
    count, hidden = len(mod.skippable_layers(model.num_layers)), model.hidden_size
    weights = count * (mod.router_weights(hidden) + mod.predictor_weights(hidden))
    return _part("depth routers", weights + count * mod.predictor_biases(), multiplied=weights)


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


def routed_parameters(architecture: Architecture) -> int:
    """Return the parameters that belong to one expert or another, not to all: what experts on several ranks divide."""
    model, sparsity = architecture.model, architecture.sparsity
    if not isinstance(sparsity, MoEConfig):
        return 0
    own, _ = _expert_weights(model, sparsity)
    norm = expert_width(model, sparsity) if sparsity.expert_norm else 0
    return num_sparse_layers(model, sparsity) * sparsity.num_experts * (own + norm)


def visits_per_token(architecture: Architecture, sequence_length: int) -> float:
    """Return how many experts a token visits on its way through all layers, on average, while training."""
    model, sparsity, mod = architecture.model, architecture.sparsity, architecture.mod
    if not isinstance(sparsity, MoEConfig):
        return 0.0
    sparse = range(model.num_layers - num_sparse_layers(model, sparsity), model.num_layers)
    visits = float(len(sparse))
    if isinstance(mod, DepthConfig):
        skippable = [(place, layer) for place, layer in enumerate(mod.skippable_layers(model.num_layers))]
        shares = [
            mod.num_processed(sequence_length, place) / sequence_length for place, layer in skippable if layer in sparse
        ]
        visits += sum(shares) - len(shares)
    return visits * experts_per_token(sparsity)


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
    Where tokens may skip layers it is the average token's while training at the final capacity: of a layer that
    processes k of T tokens the others skip all products, and attention is that of a text of k tokens.
    """
    whole = _flops_without_skips(architecture, sequence_length)
    for layer in _skippable_layers(architecture, sequence_length):
        own = layer.num_processed * layer.per_processed + layer.scores(layer.num_processed)
        whole += own / sequence_length - layer.without_skips + layer.per_token
    return whole


def _flops_without_skips(architecture: Architecture, sequence_length: int) -> float:
    weights = 2 * count_parameters(replace(architecture, mod=NoModConfig())).multiplied
    scores = architecture.model.num_layers * _score_flops(architecture, sequence_length)
    return weights + scores / sequence_length


def _score_flops(architecture: Architecture, num_tokens: int) -> float:
    """Operations of one layer's attention over a text of so many tokens: scores, and the values that are added up."""
    model = architecture.model
    assert model.head_dim is not None
    if num_tokens == 0:
        return 0.0
    return 4 * model.head_dim * num_tokens * scores_per_token(model, architecture.attention, num_tokens)


def _no_scores(num_tokens: int) -> float:
    return 0.0


@dataclass(kw_only=True, slots=True, frozen=True)
class _SkippableLayer:
    """Operations of the forward pass of a layer that tokens may skip."""

    num_processed: int
    """Of the tokens of a sequence, while training at the final capacity."""
    without_skips: float
    """Of a token, did none skip."""
    per_token: float
    """Of any token: what decides whether it skips."""
    per_processed: float
    """Of a token that does not skip, without attention's scores: products with weights, and its gate."""
    per_visit: float
    """Of a visit to an expert, `num_visits` of which are part of `per_processed`."""
    num_visits: float
    scores: Callable[[int], float]
    """Of attention, for so many tokens of a sequence that do not skip."""


def _skippable_layers(architecture: Architecture, sequence_length: int) -> list[_SkippableLayer]:
    model, sparsity, mod = architecture.model, architecture.sparsity, architecture.mod
    if not isinstance(mod, DepthConfig):
        return []
    hidden, attends = model.hidden_size, mod.part is DepthPart.block
    attention = _attention_part(model, architecture.attention).multiplied // model.num_layers if attends else 0
    scores = partial(_score_flops, architecture) if attends else _no_scores
    layers = []
    for place, layer in enumerate(mod.skippable_layers(model.num_layers)):
        number = mod.num_processed(sequence_length, place)
        weights, visit, num_visits = _feed_forward_weights(model, sparsity, layer)
        products = 2 * (attention + weights + num_visits * visit)
        router = 2 * mod.router_weights(hidden)
        layers.append(
            _SkippableLayer(
                num_processed=number,
                without_skips=products + scores(sequence_length) / sequence_length,
                per_token=2 * mod.predictor_weights(hidden) + (router if number < sequence_length else 0),
                per_processed=products + router,
                per_visit=2 * visit,
                num_visits=num_visits,
                scores=scores,
            )
        )
    return layers


def _feed_forward_weights(model: ModelConfig, sparsity: SparsityConfig, layer: int) -> tuple[int, int, float]:
    """Return the weights of one layer that every token meets, those of an expert, and how many experts it visits."""
    assert model.intermediate_size is not None
    matrices = _up_matrices(model) + 1
    if not isinstance(sparsity, MoEConfig) or layer < sparsity.first_k_dense:
        return matrices * model.hidden_size * model.intermediate_size, 0, 0.0
    own, common = _expert_weights(model, sparsity)
    shared = sparsity.num_shared_experts * matrices * model.hidden_size * expert_width(model, sparsity)
    router = sparsity.router.num_weights(model.hidden_size, sparsity.num_experts)
    return common + shared + router, own, experts_per_token(sparsity)


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
    """Floating-point operations of training: of a token outside of experts and of layers that tokens may skip, of a
    visit to an expert, and, in layers that tokens may skip, of a token that does not, by layer, and of attention there.
    """

    per_token: float
    per_visit: float
    per_processed: tuple[float, ...] = ()
    scores: Callable[[int], float] = _no_scores
    """Of attention in a layer that tokens may skip, for so many tokens of a sequence that do not."""
    without_skips: float = 0.0
    """Of a token, experts included, did none skip; what was saved is measured by it."""

    def of(self, num_tokens: int, num_visits: int, num_processed: Sequence[int] = (), num_sequences: int = 1) -> float:
        """Return the operations of a step: routers may refuse visits, or choose how many a token makes. `num_processed`
        is by layer that tokens may skip, the same number of each of `num_sequences`."""
        inside = 0.0
        for number, flops in zip(num_processed, self.per_processed, strict=True):
            inside += number * flops + num_sequences * self.scores(number // num_sequences)
        return num_tokens * self.per_token + num_visits * self.per_visit + inside


def training_flops(architecture: Architecture, sequence_length: int) -> StepFlops:
    """Split `training_flops_per_token` into what every token costs, what a visit to an expert costs, and what a layer
    that tokens may skip costs those that do not."""
    model, sparsity = architecture.model, architecture.sparsity
    forward = _flops_without_skips(architecture, sequence_length)
    total = 3 * (forward + prediction_flops_per_token(architecture, sequence_length))
    per_visit, visits = 0.0, 0.0
    if isinstance(sparsity, MoEConfig):
        per_visit = 6.0 * _expert_weights(model, sparsity)[0]
        visits = num_sparse_layers(model, sparsity) * experts_per_token(sparsity)
    layers = _skippable_layers(architecture, sequence_length)
    inside = sum(layer.without_skips - layer.num_visits * layer.per_visit for layer in layers)
    return StepFlops(
        per_token=total - visits * per_visit - 3 * inside + 3 * sum(layer.per_token for layer in layers),
        per_visit=per_visit,
        per_processed=tuple(3 * (layer.per_processed - layer.num_visits * layer.per_visit) for layer in layers),
        scores=partial(_training_scores, layers[0].scores) if layers else _no_scores,
        without_skips=total,
    )


def _training_scores(scores: Callable[[int], float], num_tokens: int) -> float:
    return 3 * scores(num_tokens)
