"""The rules that the values of a run must keep among themselves. A bound on one value is a line of `BOUNDS`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ava_exp.config import generation
from ava_exp.config.attention import AttentionBackend, MixtureOfHeadsConfig, MultiLevelAttentionConfig
from ava_exp.config.data import BPEConfig
from ava_exp.config.faults import Fault, Rule, Severity, error
from ava_exp.config.machine import Precision
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
from ava_exp.config.stage import GenerateConfig, SurgeryConfig
from ava_exp.config.surgery import faults_of
from ava_exp.config.training import AdamWConfig, Recompute, WSDConfig

SPECIAL_TOKENS = 8
"""Tokens that a trained tokenizer reserves for documents and roles."""
MIN_VOCABULARY = 256 + SPECIAL_TOKENS
CHINCHILLA_RANGE = (5, 50)
NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
"""A run's name is the name of its folder."""
NAME_EXPECTED = "letters, digits, `.`, `_` and `-`, not starting with `.`"


def value_at(config: Any, key: str) -> Any:
    """Return the value at a dotted key; None where it is null or the chosen option has no such key."""
    for part in key.split("."):
        config = getattr(config, part, None)
    return config


@dataclass(frozen=True, slots=True)
class Bound:
    """A condition that the values at `keys` must meet; keys that are null or absent are left out."""

    expected: str
    holds: Callable[[Any], bool]
    keys: tuple[str, ...]


BOUNDS = (
    Bound(
        "at least 1",
        lambda value: value >= 1,
        (
            "model.vocab_size",
            "model.hidden_size",
            "model.num_layers",
            "model.num_heads",
            "model.num_kv_heads",
            "model.head_dim",
            "model.intermediate_size",
            "model.max_position_embeddings",
            "model.original_max_position_embeddings",
            "model.rope_scaling_factor",
            "model.num_experts",
            "model.claimed_parameters",
            "model.claimed_active_parameters",
            "sparsity.num_experts",
            "sparsity.intermediate_size",
            "prediction.head_width",
            "sparsity.router.moe_top_k",
            "sparsity.router.num_iterations",
            "sparsity.router.num_groups",
            "sparsity.router.groups_per_token",
            "sparsity.router.max_experts",
            "attention.sliding_window",
            "attention.num_levels",
            "attention.heads_per_token",
            "data.sequence_length",
            "tokenizer.min_frequency",
            "schedule.num_cycles",
            "loss.repetition_ngram_size",
            "hardware.batch_size",
            "hardware.num_devices",
            "hardware.num_threads",
            "precision.scale_window",
            "budget.steps",
            "budget.tokens",
            "training.batch_size",
            "training.gradient_accumulation_steps",
            "training.max_skipped_steps",
            "training.log_interval",
            "evaluation.interval_steps",
            "evaluation.max_tokens",
            "checkpoint.save_every_n_batches",
            "stage.max_new_tokens",
            "stage.num_beams",
            "stage.num_samples",
            "stage.max_tokens",
            "stage.sequence_length",
        ),
    ),
    Bound(
        "above 0",
        lambda value: value > 0,
        (
            "model.norm_epsilon",
            "model.rope_theta",
            "model.yarn_beta_fast",
            "model.yarn_beta_slow",
            "model.yarn_attention_factor",
            "model.initializer_range",
            "sparsity.capacity_factor",
            "sparsity.router.routing_temperature",
            "sparsity.router.routed_scaling_factor",
            "sparsity.router.average_experts",
            "model.learning_rate",
            "optimizer.learning_rate",
            "stage.learning_rate",
            "optimizer.epsilon",
            "model.claimed_memory_gb",
            "hardware.memory_gib",
            "hardware.bandwidth_gb_per_s",
            "hardware.price_per_hour",
            "hardware.peak_tflops.fp32",
            "hardware.peak_tflops.tf32",
            "hardware.peak_tflops.fp16",
            "hardware.peak_tflops.bf16",
            "hardware.peak_tflops.fp8",
            "precision.init_scale",
            "precision.min_scale",
            "budget.epochs",
            "budget.seconds",
            "budget.default_seconds",
            "budget.chinchilla_multiplier",
            "training.gradient_clip_val",
            "stage.repetition_penalty",
        ),
    ),
    Bound(
        "0 or more",
        lambda value: value >= 0,
        (
            "seed",
            "model.load_balancing_weight",
            "sparsity.num_shared_experts",
            "attention.num_shared_heads",
            "attention.head_balance_weight",
            "sparsity.first_k_dense",
            "sparsity.router.load_balancing_weight",
            "sparsity.router.load_balancing_weight_end",
            "sparsity.router.absolute_deviation_weight",
            "sparsity.router.router_z_loss_weight",
            "sparsity.router.sequence_balance_weight",
            "sparsity.router.routing_entropy_weight",
            "sparsity.router.bias_update_rate",
            "loss.z_loss_weight",
            "loss.immediate_repetition_weight",
            "loss.repetition_penalty_weight",
            "loss.entropy_regularization",
            "loss.output_diversity_weight",
            "optimizer.weight_decay",
            "prediction.num_prediction_heads",
            "prediction.mtp_weight",
            "schedule.warmup_steps",
            "schedule.warmup_tokens",
            "data.max_bad_rows",
            "evaluation.sample_tokens",
            "checkpoint.save_total_limit",
            "stage.temperature",
            "stage.top_k",
            "stage.no_repeat_ngram_size",
            "stage.length_penalty",
            "stage.layer",
            "stage.expert",
            "stage.other",
            "stage.noise",
        ),
    ),
    Bound(
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
        (
            "model.dropout",
            "attention.attention_dropout",
            "sparsity.expert_dropout",
            "loss.label_smoothing",
            "sparsity.router.jitter",
            "sparsity.router.whole_expert_dropout",
            "sparsity.router.threshold_momentum",
            "schedule.warmup_ratio",
        ),
    ),
    Bound(
        "between 0 and 1",
        lambda value: 0 <= value <= 1,
        (
            "schedule.min_lr_ratio",
            "schedule.decay_ratio",
            "prediction.confidence_threshold",
            "prediction.confidence_threshold_train",
            "stage.confidence_threshold",
        ),
    ),
    Bound("above 0 and below 1", lambda value: 0 < value < 1, ("data.validation_fraction",)),
    Bound(
        "above 0 and at most 1",
        lambda value: 0 < value <= 1,
        ("stage.top_p", "stage.assumed_mfu", "sparsity.router.threshold", "attention.progressive_sparsity"),
    ),
    Bound("above 1", lambda value: value > 1, ("precision.scale_factor",)),
)


def _bounds(config: RunConfig) -> Iterator[Fault]:
    for bound in BOUNDS:
        for key in bound.keys:
            value = value_at(config, key)
            if value is not None and not bound.holds(value):
                yield error(key, bound.expected, value)


def _numbers_are_finite(config: RunConfig) -> Iterator[Fault]:
    for key, value in _floats(config, ""):
        if not math.isfinite(value):
            yield error(key, "a finite number", value)


def _floats(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _floats(item, f"{key}[{index}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _floats(getattr(value, field.name), f"{key}.{field.name}".lstrip("."))


def _name_is_a_file_name(config: RunConfig) -> Iterator[Fault]:
    if not NAME_PATTERN.fullmatch(config.name):
        yield error("name", NAME_EXPECTED, config.name)


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


def _vocabulary_holds_the_tokens(config: RunConfig) -> Iterator[Fault]:
    if not isinstance(config.tokenizer, BPEConfig):
        return
    size = config.tokenizer.vocab_size
    if size < MIN_VOCABULARY:
        expected = f"at least {MIN_VOCABULARY}: 256 bytes and {SPECIAL_TOKENS} special tokens"
        yield error("tokenizer.vocab_size", expected, size, "It follows `model.vocab_size`.")
    if size > config.model.vocab_size:
        yield error("tokenizer.vocab_size", f"at most `model.vocab_size` ({config.model.vocab_size})", size)


def _betas_are_two_ratios(config: RunConfig) -> Iterator[Fault]:
    if not isinstance(config.optimizer, AdamWConfig):
        return
    betas = config.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield error("optimizer.betas", "two numbers, each at least 0 and below 1", betas)


def _surgery_is_whole(config: RunConfig) -> Iterator[Fault]:
    if isinstance(config.stage, SurgeryConfig):
        for name, expected, value in faults_of(config.stage):
            yield error(f"stage.{name}", expected, value)


def _generation_is_whole(config: RunConfig) -> Iterator[Fault]:
    if isinstance(config.stage, GenerateConfig):
        for name, expected, value in generation.faults_of(config.stage):
            yield error(f"stage.{name}", expected, value)


PLAIN_GENERATION = {
    "prompt_file": None,
    "num_beams": 1,
    "num_samples": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


def _speculation_is_of_one_text(config: RunConfig) -> Iterator[Fault]:
    if isinstance(config.stage, GenerateConfig) and config.stage.speculative:
        for name, plain in PLAIN_GENERATION.items():
            if (value := getattr(config.stage, name)) != plain:
                expected = f"{'null' if plain is None else f'{plain:g}'} with `stage.speculative`"
                yield error(f"stage.{name}", expected, value, "One text is written as the model has it.")


def _schedule_fits(config: RunConfig) -> Iterator[Fault]:
    schedule, steps = config.schedule, config.budget.steps
    if schedule.warmup_steps is not None and schedule.warmup_tokens is not None:
        message = "`schedule.warmup_steps` and `schedule.warmup_tokens` are both given."
        yield Fault(Severity.warning, "schedule.warmup_tokens", message, "The steps are taken.")
    if steps is not None and schedule.warmup_steps is not None and schedule.warmup_steps >= steps:
        message = f"Warm-up takes {schedule.warmup_steps} steps, but the budget is {steps}: the peak is never reached."
        yield Fault(Severity.warning, "schedule.warmup_steps", message, "Raise `budget.steps` or warm up for less.")
    if isinstance(schedule, WSDConfig) and schedule.warmup_ratio + schedule.decay_ratio > 1:
        expected = f"at most 1 - `schedule.warmup_ratio` ({schedule.warmup_ratio})"
        yield error("schedule.decay_ratio", expected, schedule.decay_ratio)


def _budget_is_usual(config: RunConfig) -> Iterator[Fault]:
    multiplier, (low, high) = config.budget.chinchilla_multiplier, CHINCHILLA_RANGE
    if multiplier is not None and not low <= multiplier <= high:
        message = f"`budget.chinchilla_multiplier` is {multiplier}; {low} to {high} tokens per parameter are usual."
        yield Fault(Severity.warning, "budget.chinchilla_multiplier", message)


def _only_bf16_rounds_stochastically(config: RunConfig) -> Iterator[Fault]:
    precision = config.precision
    if precision.stochastic_rounding and precision.training is not Precision.bf16:
        expected = "false unless `precision.training` is `bf16`"
        yield error("precision.stochastic_rounding", expected, True, "The others round nothing that has no master.")


def _compiled_blocks_are_recomputed_whole(config: RunConfig) -> Iterator[Fault]:
    training = config.training
    if training.compile and training.recompute is Recompute.selective:
        mend = "Or set `training.compile=false`."
        yield error("training.recompute", "`none` or `full` with `training.compile`", training.recompute.value, mend)


RULES: tuple[Rule, ...] = (
    _bounds,
    _numbers_are_finite,
    _name_is_a_file_name,
    _heads_divide,
    _heads_are_enough,
    _levels_have_windows,
    _flexible_attention_drops_nothing,
    _mixture_has_activations,
    _router_fits_the_experts,
    _capacity_has_a_meaning,
    _dense_layers_leave_some,
    _sequence_fits_positions,
    _rope_scaling_is_whole,
    _yarn_constants_have_a_meaning,
    _prediction_heads_see_their_labels,
    _vocabulary_holds_the_tokens,
    _betas_are_two_ratios,
    _surgery_is_whole,
    _generation_is_whole,
    _speculation_is_of_one_text,
    _schedule_fits,
    _budget_is_usual,
    _only_bf16_rounds_stochastically,
    _compiled_blocks_are_recomputed_whole,
)
