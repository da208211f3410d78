"""The rules that the values of a run must keep among themselves, those of its architecture in `architecture_rules`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from ava_exp.config import generation
from ava_exp.config.architecture_rules import ARCHITECTURE_RULES
from ava_exp.config.bounds import BOUNDS, value_at
from ava_exp.config.data import BPEConfig
from ava_exp.config.distributed import Backend, GradientCompression
from ava_exp.config.faults import Fault, Rule, Severity, error
from ava_exp.config.launcher import SlurmLauncherConfig
from ava_exp.config.machine import Precision
from ava_exp.config.mod import DepthConfig
from ava_exp.config.model import MoEConfig
from ava_exp.config.pipeline import pipeline_faults
from ava_exp.config.run import RunConfig
from ava_exp.config.stage import GenerateConfig, PipelineStageConfig, PlanConfig, SurgeryConfig
from ava_exp.config.surgery import faults_of
from ava_exp.config.sweep import sweep_faults
from ava_exp.config.training import AdamWConfig, Recompute, WSDConfig

SPECIAL_TOKENS = 8
"""Tokens that a trained tokenizer reserves for documents and roles."""
MIN_VOCABULARY = 256 + SPECIAL_TOKENS
CHINCHILLA_RANGE = (5, 50)
NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
"""A run's name is the name of its folder."""
NAME_EXPECTED = "letters, digits, `.`, `_` and `-`, not starting with `.`"


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


def _pipeline_is_whole(config: RunConfig) -> Iterator[Fault]:
    for key, expected, value in pipeline_faults(config.pipeline):
        yield error(key, expected, value)
    if isinstance(config.stage, PipelineStageConfig) and not config.pipeline.steps:
        yield error("pipeline.steps", "at least one step; `pipeline=NAME` chooses some", {})
    if config.pipeline.steps and config.stage.computes:
        yield error("stage", "pipeline with `pipeline.steps`", config.stage.name)


def _generation_is_whole(config: RunConfig) -> Iterator[Fault]:
    if isinstance(config.stage, GenerateConfig):
        for name, expected, value in generation.faults_of(config.stage):
            yield error(f"stage.{name}", expected, value)


def _nodes_are_shared_by_training(config: RunConfig) -> Iterator[Fault]:
    launcher, stage = config.launcher, config.stage
    if isinstance(launcher, SlurmLauncherConfig) and stage.computes and not stage.trains and launcher.num_nodes > 1:
        yield error("launcher.num_nodes", f"1 with `stage={stage.name}`, which is one process", launcher.num_nodes)


def _single_is_one_task(config: RunConfig) -> Iterator[Fault]:
    launcher, backend = config.launcher, config.distributed.backend
    if not isinstance(launcher, SlurmLauncherConfig) or not config.stage.trains or backend is not Backend.single:
        return
    if max(config.hardware.num_devices, launcher.num_nodes) > 1:
        yield error("distributed.backend", "`auto` or `ddp` with several devices or nodes", backend.value)


def _the_warning_comes_before_the_end(config: RunConfig) -> Iterator[Fault]:
    launcher = config.launcher
    if isinstance(launcher, SlurmLauncherConfig) and launcher.time_limit_minutes is not None:
        seconds = 60 * launcher.time_limit_minutes
        if launcher.warning_s >= seconds:
            expected = f"below the {seconds} s of `launcher.time_limit_minutes`"
            yield error("launcher.warning_s", expected, launcher.warning_s)


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


def _compiled_blocks_are_not_skipped(config: RunConfig) -> Iterator[Fault]:
    if config.training.compile and isinstance(config.mod, DepthConfig):
        expected = "false with a Mixture of Depths"
        yield error("training.compile", expected, True, "How many tokens a layer gets is data, and cannot be compiled.")


def _copies_alone_are_compressed(config: RunConfig) -> Iterator[Fault]:
    backend, compression = config.distributed.backend, config.distributed.gradient_compression
    if compression is not GradientCompression.none and backend not in (Backend.auto, Backend.ddp):
        expected = f"`none` with `distributed={backend.value}`"
        yield error("distributed.gradient_compression", expected, compression.value, "`distributed=ddp` goes with it.")
    if compression is not GradientCompression.none and config.distributed.expert_parallel > 1:
        expected = "`none` with `distributed.expert_parallel`"
        yield error("distributed.gradient_compression", expected, compression.value, "Tokens travel as they are.")


def _what_is_cut_is_as_it_is(config: RunConfig) -> Iterator[Fault]:
    backend = config.distributed.backend
    if backend.cuts_weights:
        mend = "`distributed=ddp` goes with it."
        for key in ("compile", "offload_activations"):
            if getattr(config.training, key):
                yield error(f"training.{key}", f"false with `distributed={backend.value}`", True, mend)


def _deepspeed_keeps_masters(config: RunConfig) -> Iterator[Fault]:
    precision, backend = config.precision.training, config.distributed.backend
    if backend.zero_stage and precision in (Precision.bf16, Precision.fp16):
        mend = "DeepSpeed keeps fp32 masters; `distributed=zero0` and `distributed=ddp` do without."
        expected = f"`fp32`, `mixed_{precision.value}` or `auto` with `distributed={backend.value}`"
        yield error("precision.training", expected, precision.value, mend)


def _compiled_blocks_are_recomputed_whole(config: RunConfig) -> Iterator[Fault]:
    training = config.training
    if training.compile and training.recompute is Recompute.selective:
        mend = "Or set `training.compile=false`."
        yield error("training.recompute", "`none` or `full` with `training.compile`", training.recompute.value, mend)


def _sweep_is_of_one_kind(config: RunConfig) -> Iterator[Fault]:
    for key, expected, value in sweep_faults(config.sweep):
        yield error(key, expected, value)


def _experts_divide_among_ranks(config: RunConfig) -> Iterator[Fault]:
    backend, num_devices = config.distributed.backend, config.hardware.num_devices
    num_experts = config.sparsity.num_experts if isinstance(config.sparsity, MoEConfig) else 1
    asked = {"distributed.expert_parallel": config.distributed.expert_parallel}
    if isinstance(config.stage, PlanConfig) and config.stage.expert_parallel is not None:
        asked["stage.expert_parallel"] = config.stage.expert_parallel
    for key, number in asked.items():
        if number < 1:
            continue
        if num_experts % number:
            yield error(key, f"a divisor of the number of experts ({num_experts})", number)
        elif num_devices % number:
            yield error(key, f"a divisor of `hardware.num_devices` ({num_devices})", number)
    if config.distributed.expert_parallel > 1 and backend not in (Backend.auto, Backend.ddp):
        yield error("distributed.backend", "`auto` or `ddp` with `distributed.expert_parallel`", backend.value)


RULES: tuple[Rule, ...] = (
    _bounds,
    _numbers_are_finite,
    _name_is_a_file_name,
    *ARCHITECTURE_RULES,
    _vocabulary_holds_the_tokens,
    _betas_are_two_ratios,
    _surgery_is_whole,
    _pipeline_is_whole,
    _generation_is_whole,
    _speculation_is_of_one_text,
    _schedule_fits,
    _budget_is_usual,
    _only_bf16_rounds_stochastically,
    _compiled_blocks_are_not_skipped,
    _compiled_blocks_are_recomputed_whole,
    _sweep_is_of_one_kind,
    _experts_divide_among_ranks,
    _copies_alone_are_compressed,
    _what_is_cut_is_as_it_is,
    _deepspeed_keeps_masters,
    _nodes_are_shared_by_training,
    _single_is_one_task,
    _the_warning_comes_before_the_end,
)
