"""The rules that the parts of a decoder must keep among themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ava_exp.config.attention import AttentionBackend, MixtureOfHeadsConfig, MultiLevelAttentionConfig
from ava_exp.config.bounds import value_at
from ava_exp.config.faults import Fault, Rule, Severity, error
from ava_exp.config.mod import DepthConfig, num_chosen
from ava_exp.config.model import MoEConfig, RopeScaling
from ava_exp.config.prediction import MultiTokenConfig
from ava_exp.config.router import (
    DeepSeekRouterConfig,
    ExpertChoiceRouterConfig,
    HierarchicalRouterConfig,
    SoftRouterConfig,
    TwoStageRouterConfig,
    balanced_divisor,
)
from ava_exp.config.run import RunConfig

FEWEST_VISITS = 8
"""Visits of an expert in a micro-batch, on average, below which a run is warned of."""


def _heads_divide(config: RunConfig) -> Iterator[Fault]:
    model = config.model
    if model.num_heads < 1 or model.head_dim is None or model.num_kv_heads is None:
        return
    if model.hidden_size % model.num_heads and model.head_dim == model.hidden_size // model.num_heads:
        expected = f"a divisor of `model.hidden_size` ({model.hidden_size})"
        yield error("model.num_heads", expected, model.num_heads, "Or give `model.head_dim`.")
    if model.num_kv_heads > 0 and model.num_heads % model.num_kv_heads:
        yield error("model.num_kv_heads", f"a divisor of `model.num_heads` ({model.num_heads})", model.num_kv_heads)
    if model.head_dim % 2:
        yield error("model.head_dim", "even, since rotary positions turn pairs of values", model.head_dim)


def _heads_are_enough(config: RunConfig) -> Iterator[Fault]:
    attention, num_heads = config.attention, config.model.num_heads
    if isinstance(attention, MixtureOfHeadsConfig):
        shared, chosen = attention.num_shared_heads, attention.heads_per_token
        if shared >= num_heads:
            yield error("attention.num_shared_heads", f"below `model.num_heads` ({num_heads})", shared)
        elif shared + chosen > num_heads:
            expected = f"at most {num_heads - shared}, the heads that are not shared"
            yield error("attention.heads_per_token", expected, chosen)


def _flexible_attention_drops_nothing(config: RunConfig) -> Iterator[Fault]:
    dropout = value_at(config, "attention.attention_dropout")
    if value_at(config, "attention.backend") is AttentionBackend.flex and dropout:
        yield error("attention.attention_dropout", "0 with `attention.backend=flex`, which has none", dropout)


def _levels_have_windows(config: RunConfig) -> Iterator[Fault]:
    attention = config.attention
    if not isinstance(attention, MultiLevelAttentionConfig):
        return
    if attention.progressive_sparsity != 1 and attention.sliding_window is None:
        remedy = "It says how the window shrinks from level to level."
        yield error(
            "attention.progressive_sparsity",
            "1 without `attention.sliding_window`",
            attention.progressive_sparsity,
            remedy,
        )
    coarsest, length = 2 ** (min(attention.num_levels, 64) - 1), config.data.sequence_length
    if coarsest > length:
        expected = f"so few that a block of the coarsest ({coarsest}) fits `data.sequence_length` ({length})"
        yield error("attention.num_levels", expected, attention.num_levels)


def _mixture_has_activations(config: RunConfig) -> Iterator[Fault]:
    names = [activation.name for activation in config.model.mixed_activations]
    if not names or len(set(names)) < len(names):
        yield error("model.mixed_activations", "at least one activation, none of them twice", names)


def _router_fits_the_experts(config: RunConfig) -> Iterator[Fault]:
    sparsity = config.sparsity
    if not isinstance(sparsity, MoEConfig):
        return
    num_experts, key = sparsity.num_experts, "sparsity.router.moe_top_k"
    top_k = value_at(sparsity.router, "moe_top_k")
    if top_k is not None and top_k > num_experts:
        yield error(key, f"1 to `sparsity.num_experts` ({num_experts})", top_k)
    if isinstance(sparsity.router, TwoStageRouterConfig | DeepSeekRouterConfig):
        yield from _groups_fit(sparsity.router, num_experts)
    if isinstance(sparsity.router, HierarchicalRouterConfig):
        yield from _tree_fits(sparsity.router, num_experts)


def _groups_fit(router: TwoStageRouterConfig | DeepSeekRouterConfig, num_experts: int) -> Iterator[Fault]:
    num_groups = router.num_groups or balanced_divisor(max(1, num_experts))
    if num_experts < 1 or num_groups < 1:
        return
    if num_experts % num_groups:
        expected = f"a divisor of `sparsity.num_experts` ({num_experts})"
        yield error("sparsity.router.num_groups", expected, router.num_groups)
    elif router.groups_per_token > num_groups:
        yield error("sparsity.router.groups_per_token", f"at most the {num_groups} groups", router.groups_per_token)
    elif router.moe_top_k > router.groups_per_token * (num_experts // num_groups):
        expected = (
            f"at most {router.groups_per_token * (num_experts // num_groups)}, the experts of "
            f"{router.groups_per_token} of {num_groups} groups"
        )
        remedy = "Raise `sparsity.router.groups_per_token`, or lower `sparsity.router.num_groups`."
        yield error("sparsity.router.moe_top_k", expected, router.moe_top_k, remedy)


def _tree_fits(router: HierarchicalRouterConfig, num_experts: int) -> Iterator[Fault]:
    if num_experts < 1:
        return
    levels = router.levels(num_experts)
    if not levels or min(levels) < 1 or math.prod(levels) != num_experts:
        expected = f"numbers of children whose product is `sparsity.num_experts` ({num_experts})"
        yield error("sparsity.router.branching", expected, levels)
    elif len(router.choices) != len(levels):
        yield error("sparsity.router.choices", f"as long as the branching {levels}", router.choices)
    elif any(not 1 <= followed <= children for followed, children in zip(router.choices, levels, strict=True)):
        yield error("sparsity.router.choices", f"at each level 1 to its number of children, {levels}", router.choices)


def _capacity_has_a_meaning(config: RunConfig) -> Iterator[Fault]:
    sparsity = config.sparsity
    if not isinstance(sparsity, MoEConfig):
        return
    if sparsity.capacity_factor is None:
        return
    if isinstance(sparsity.router, SoftRouterConfig | ExpertChoiceRouterConfig):
        reason = "in soft routing every expert takes every token"
        if isinstance(sparsity.router, ExpertChoiceRouterConfig):
            reason = "with expert choice `sparsity.router.average_experts` says what an expert takes"
        yield error("sparsity.capacity_factor", f"null, for {reason}", sparsity.capacity_factor)


def _dense_layers_leave_some(config: RunConfig) -> Iterator[Fault]:
    sparsity = config.sparsity
    if isinstance(sparsity, MoEConfig) and sparsity.first_k_dense >= config.model.num_layers > 0:
        expected = f"below `model.num_layers` ({config.model.num_layers})"
        yield error("sparsity.first_k_dense", expected, sparsity.first_k_dense, "Or take `sparsity=dense`.")


def _skipped_layers_exist(config: RunConfig) -> Iterator[Fault]:
    mod, num_layers = config.mod, config.model.num_layers
    if not isinstance(mod, DepthConfig) or num_layers < 1:
        return
    if mod.start_layer >= num_layers:
        yield error("mod.start_layer", f"below `model.num_layers` ({num_layers})", mod.start_layer)
    elif mod.end_layer is not None and not mod.start_layer <= mod.end_layer < num_layers:
        expected = f"`mod.start_layer` ({mod.start_layer}) to {num_layers - 1}, the last layer"
        yield error("mod.end_layer", expected, mod.end_layer)
    elif not mod.skippable_layers(num_layers):
        expected = "`all` or `later` for a range of one layer"
        yield error("mod.layers", expected, mod.layers.value, "Or widen it.")


def _processed_tokens_suffice(config: RunConfig) -> Iterator[Fault]:
    mod, sparsity, length = config.mod, config.sparsity, config.data.sequence_length
    if not isinstance(mod, DepthConfig) or length < 1:
        return
    for name in ("capacity_factor", "capacity_start"):
        if 0 < (value := getattr(mod, name)) < 1 / length:
            yield error(f"mod.{name}", f"at least 1 / `data.sequence_length` ({length}), one token", value)
    batch_size = config.training.batch_size or config.hardware.batch_size
    if not isinstance(sparsity, MoEConfig) or sparsity.num_experts < 1 or batch_size is None:
        return
    processed = batch_size * num_chosen(mod.capacity_factor, length)
    visits = processed * sparsity.router.experts_per_token(sparsity.num_experts) / sparsity.num_experts
    if visits < FEWEST_VISITS:
        message = (
            f"Of a micro-batch, layers process {processed} tokens, which leaves an expert {visits:.2g}: "
            f"with fewer than {FEWEST_VISITS} it hardly learns, and its balance is chance."
        )
        mend = "Raise `mod.capacity_factor` or `training.batch_size`, or take fewer experts."
        yield Fault(Severity.warning, "mod.capacity_factor", message, mend)


def _sequence_fits_positions(config: RunConfig) -> Iterator[Fault]:
    limit = config.model.max_position_embeddings
    if config.data.sequence_length > limit:
        expected = f"at most `model.max_position_embeddings` ({limit})"
        yield error("data.sequence_length", expected, config.data.sequence_length)


def _rope_scaling_is_whole(config: RunConfig) -> Iterator[Fault]:
    model = config.model
    factor, original, length = (
        model.rope_scaling_factor,
        model.original_max_position_embeddings,
        model.max_position_embeddings,
    )
    if model.rope_scaling is RopeScaling.none:
        for name in ("rope_scaling_factor", "original_max_position_embeddings"):
            if (value := getattr(model, name)) is not None:
                yield error(f"model.{name}", "null without `model.rope_scaling`", value, "Choose one, such as `yarn`.")
        return
    if factor is None or original is None:
        expected = "given, or `model.original_max_position_embeddings`, with `model.rope_scaling`"
        yield error("model.rope_scaling_factor", expected, factor)
        return
    if original > length:
        expected = f"at most `model.max_position_embeddings` ({length})"
        yield error("model.original_max_position_embeddings", expected, original)
    if length > math.ceil(original * factor):
        message = (
            f"`model.max_position_embeddings` is {length}, but {original} positions scaled by {factor:g} are fewer."
        )
        yield Fault(Severity.warning, "model.max_position_embeddings", message, "Beyond those nothing was ever tried.")


def _yarn_constants_have_a_meaning(config: RunConfig) -> Iterator[Fault]:
    model, given = config.model, config.model.yarn_attention_factor
    if model.rope_scaling is not RopeScaling.yarn:
        if given is not None:
            yield error("model.yarn_attention_factor", "null unless `model.rope_scaling` is `yarn`", given)
        return
    if model.yarn_beta_fast <= model.yarn_beta_slow:
        expected = f"above `model.yarn_beta_slow` ({model.yarn_beta_slow:g})"
        yield error("model.yarn_beta_fast", expected, model.yarn_beta_fast)
    if model.rope_theta <= 1:
        yield error("model.rope_theta", "above 1 with `model.rope_scaling=yarn`", model.rope_theta)


def _prediction_heads_see_their_labels(config: RunConfig) -> Iterator[Fault]:
    prediction, length = config.prediction, config.data.sequence_length
    if isinstance(prediction, MultiTokenConfig) and prediction.num_prediction_heads >= length:
        expected = f"below `data.sequence_length` ({length}), so that every head has a token to predict"
        yield error("prediction.num_prediction_heads", expected, prediction.num_prediction_heads)


ARCHITECTURE_RULES: tuple[Rule, ...] = (
    _heads_divide,
    _heads_are_enough,
    _levels_have_windows,
    _flexible_attention_drops_nothing,
    _mixture_has_activations,
    _router_fits_the_experts,
    _capacity_has_a_meaning,
    _dense_layers_leave_some,
    _skipped_layers_exist,
    _processed_tokens_suffice,
    _sequence_fits_positions,
    _rope_scaling_is_whole,
    _yarn_constants_have_a_meaning,
    _prediction_heads_see_their_labels,
)
