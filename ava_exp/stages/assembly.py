"""Builds the parts of a run from its configuration and the runtime."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ava_exp.config.distributed import Backend
from ava_exp.config.machine import DeviceType, Precision
from ava_exp.config.mod import DepthConfig
from ava_exp.config.run import RunConfig
from ava_exp.config.validate import offload_faults, raise_if_fatal
from ava_exp.data.loader import Batch, BatchLoader, EvaluationLoader
from ava_exp.data.prepare import PreparedData, prepare_data
from ava_exp.errors import ConfigError, must_be
from ava_exp.evaluation.depth import DepthObserver, token_kinds
from ava_exp.evaluation.language import LanguageMetrics, evaluate_language
from ava_exp.evaluation.routing import RoutingObserver, choose_probe
from ava_exp.losses.terms import LossTerm, build_losses
from ava_exp.models.arithmetic import count_parameters, training_flops
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.models.surgery import Parameters, Surgeon, count_parameters_of
from ava_exp.optim.schedules import Schedule
from ava_exp.optim.update import LossScale, Updater
from ava_exp.parallel.experts import ExpertParallelUpdater
from ava_exp.parallel.sharded import ShardedUpdater
from ava_exp.parallel.zero import ZeroUpdater
from ava_exp.runtime import DTYPES, Runtime
from ava_exp.training.loop import Record, Trainer
from ava_exp.training.objective import Objective
from ava_exp.training.state import TrainState

SHORTEST_INTERVAL = 10
"""Steps between evaluations or checkpoints, where the configuration leaves it to the budget, are at least this many."""

NUMERIC_PACKAGES = ("data", "losses", "models", "nn", "optim", "parallel", "tokenizer", "training")
"""Packages whose code decides a run's numbers."""


def prepare(config: RunConfig, tell: Callable[[str], None]) -> PreparedData:
    """Prepare data and tokenizer. Raises ConfigError when the tokenizer has more tokens than the model has rows."""
    data = prepare_data(config.data, config.tokenizer, Path(config.cache_dir), tell)
    if data.tokenizer.vocab_size > config.model.vocab_size:
        expected = f"at least the tokenizer's {data.tokenizer.vocab_size}"
        raise ConfigError(must_be("model.vocab_size", expected, config.model.vocab_size))
    return data


def build_decoder(
    config: RunConfig, runtime: Runtime, precision: Precision | None = None, device: torch.device | None = None
) -> Decoder:
    """Build the model on the run's device or another one, in the format that `precision` (or the run's own) computes
    in."""
    return build_model(
        config.architecture,
        seed=config.seed,
        device=device or runtime.device,
        dtype=DTYPES[precision or runtime.precision],
    )


def build_trained_decoder(config: RunConfig, runtime: Runtime) -> Decoder:
    """Build the model as it is trained. Raises ConfigError where the device cannot do what `training` asks for."""
    training = config.training
    raise_if_fatal(offload_faults(DeviceType(runtime.resolution.device), training.offload_activations))
    backend = runtime.ranks.backend
    precision = Precision.fp32 if backend is Backend.fsdp2 and runtime.mixed else None
    device = torch.device("cpu") if backend.zero_stage == 3 else None  # which may hold what ranks have parts of
    model = build_decoder(config, runtime, precision, device)
    runtime.shard(model)
    model.recompute, model.offload_activations = training.recompute, training.offload_activations
    if training.compile:
        model.compile_blocks()
    return model


def build_updater(config: RunConfig, runtime: Runtime, model: Decoder) -> Updater:
    """Build optimizer, master weights and loss scale."""
    fp16 = runtime.dtype is torch.float16
    settings = config.precision
    scale = LossScale(
        scale=settings.init_scale if fp16 else 1.0,
        scale_factor=settings.scale_factor,
        scale_window=settings.scale_window,
        min_scale=settings.min_scale,
        dynamic=fp16,
    )
    ranks, stage = runtime.ranks, runtime.ranks.backend.zero_stage
    updater: Callable[..., Updater] = Updater
    if ranks.backend is Backend.fsdp2:
        updater = partial(ShardedUpdater, ranks=ranks)
    elif stage:
        start = partial(runtime.start_engine, Objective(model, build_terms(config), ranks))
        updater = partial(ZeroUpdater, engine_of=start, ranks=ranks, device=runtime.device)
    elif ranks.experts is not None:
        updater = partial(ExpertParallelUpdater, experts=ranks.experts)
    return updater(
        model,
        lambda groups: config.optimizer.build(groups=groups),
        weight_decay=config.optimizer.weight_decay,
        master_weights=runtime.mixed and not stage and ranks.backend is not Backend.fsdp2,
        # Squared fp16 gradients vanish below 6e-8: fp16 without masters still keeps its Adam moments in fp32.
        wide_states=runtime.precision is Precision.fp16,
        stochastic_rounding=settings.stochastic_rounding,
        loss_scale=scale,
    )


def build_terms(config: RunConfig) -> list[LossTerm]:
    """Build the terms of the objective."""
    return build_losses(
        config.sparsity, config.loss, attention=config.attention, mod=config.mod, prediction=config.prediction
    )


def build_loader(config: RunConfig, runtime: Runtime, data: PreparedData) -> BatchLoader:
    """Build the training loader."""
    return BatchLoader(
        data.train,
        sequence_length=config.data.sequence_length,
        batch_size=runtime.resolution.batch_size,
        gradient_accumulation_steps=accumulation_steps(config, dataclasses.asdict(runtime.resolution)),
        seed=config.seed,
        rank=runtime.ranks.rank,
        num_ranks=runtime.ranks.num_ranks,
        mask_documents=config.data.mask_documents,
    )


def accumulation_steps(config: RunConfig, resolution: dict[str, Any]) -> int:
    """Return the micro-batches of a rank in one optimizer step; `resolution` is a runtime's, in plain values."""
    return resolution.get("gradient_accumulation_steps") or config.training.gradient_accumulation_steps


def tokens_per_step(config: RunConfig, resolution: dict[str, Any]) -> int:
    """Return the training tokens of one optimizer step, over all ranks."""
    sequences = resolution["batch_size"] * accumulation_steps(config, resolution) * resolution.get("num_ranks", 1)
    return int(sequences * config.data.sequence_length)


def build_schedule(config: RunConfig, runtime: Runtime, total_steps: int) -> Schedule:
    """Build the learning-rate schedule for a budget in steps."""
    schedule: Schedule = config.schedule.build(
        total_steps=total_steps, tokens_per_step=tokens_per_step(config, dataclasses.asdict(runtime.resolution))
    )
    return schedule


def build_evaluation(
    config: RunConfig,
    runtime: Runtime,
    data: PreparedData,
    model: Decoder,
    updater: Updater,
    state: TrainState,
    is_stopping: Callable[[], bool],
) -> Callable[[bool], LanguageMetrics | None]:
    """Return the function that measures `model`: on part of the validation split, and at the end on all of it.

    A run that trained on fewer tokens than the split has is measured on part of it at the end, too. Once
    `is_stopping` says so, the measurement is given up and None returned.
    """

    def evaluate(final: bool) -> LanguageMetrics | None:
        whole = final and state.tokens >= data.validation.num_tokens
        batches = EvaluationLoader(
            data.validation,
            sequence_length=config.data.sequence_length,
            batch_size=runtime.resolution.batch_size,
            max_tokens=None if whole else config.evaluation.max_tokens,
            rank=runtime.ranks.rank,
            num_ranks=runtime.ranks.num_ranks,
            mask_documents=config.data.mask_documents,
        )
        probe = choose_probe(batches.windows(config.evaluation.max_tokens), config.data.sequence_length)
        observer = RoutingObserver(data.validation.sources, probe, state.routing.choices)
        depth_observer = build_depth_observer(config, data)
        measured = inference_copy(config, runtime, model, updater)
        metrics = evaluate_language(
            measured,
            _until(is_stopping, batches),
            data.tokenizer.token_bytes(),
            runtime.device,
            observer,
            depth_observer,
            runtime.ranks.gather,
        )
        return None if is_stopping() else metrics

    return evaluate


def _until(is_stopping: Callable[[], bool], batches: EvaluationLoader) -> Iterator[Batch]:
    """Yield this rank's batches until ranks are to stop, which all of them ask as often as the others."""
    own = iter(batches)
    for _ in range(batches.most_batches):
        if is_stopping():
            return
        yield from itertools.islice(own, 1)


def build_depth_observer(config: RunConfig, data: PreparedData) -> DepthObserver | None:
    """Return what watches tokens skip layers, where they may."""
    return DepthObserver(token_kinds(data.tokenizer)) if isinstance(config.mod, DepthConfig) else None


def inference_copy(config: RunConfig, runtime: Runtime, model: Decoder, updater: Updater) -> Decoder:
    """Return the model in the inference precision: itself when that is the training precision, else a copy.

    Where ranks have parts of it, all of them call this, and each gets a copy of the whole.
    """
    inference = config.precision.inference
    inference = runtime.precision if inference in (None, Precision.auto) else inference
    if updater.holds_model and inference is runtime.precision:
        return model
    duplicate = build_decoder(config, runtime, inference) if updater.is_sharded else copy.deepcopy(model)
    duplicate.to(DTYPES[inference])
    with torch.no_grad():
        for name, parameter in duplicate.named_parameters():
            parameter.copy_(updater.whole(name, updater.weights[name], everywhere=True))
        for name, buffer in updater.buffers.items():
            duplicate.get_buffer(name).copy_(buffer)
    if model.mod_capacity is not None:
        duplicate.mod_capacity = model.mod_capacity
    return duplicate


def build_trainer(
    config: RunConfig,
    runtime: Runtime,
    data: PreparedData,
    total_steps: int,
    *,
    model: Decoder,
    updater: Updater,
    state: TrainState | None = None,
    is_stopping: Callable[[], bool] = lambda: False,
    save: Callable[[TrainState], None] | None = None,
    sinks: Sequence[Callable[[Record], None]] = (),
    surgeon: Surgeon | None = None,
) -> Trainer:
    """Put the parts of a run together."""
    interval = max(SHORTEST_INTERVAL, total_steps // 10)
    peak = runtime.resolution.peak_tflops
    state = state or TrainState()
    terms = build_terms(config)
    strategy = runtime.spread(Objective(model, terms, runtime.ranks), updater, model, config.distributed)
    return Trainer(
        model,
        build_loader(config, runtime, data),
        updater,
        build_schedule(config, runtime, total_steps),
        terms,
        total_steps,
        strategy=strategy,
        state=state,
        gradient_clip_val=config.training.gradient_clip_val,
        max_skipped_steps=config.training.max_skipped_steps,
        log_interval=config.training.log_interval,
        evaluation_interval=config.evaluation.interval_steps or interval,
        save_interval=config.checkpoint.save_every_n_batches or interval,
        evaluate=build_evaluation(config, runtime, data, model, updater, state, is_stopping),
        save=save,
        sinks=sinks,
        device=runtime.device,
        backward=strategy.backward or runtime.backward,
        flops=training_flops(config.architecture, config.data.sequence_length),
        peak_flops=peak * 1e12 * runtime.ranks.num_ranks if peak else None,
        surgeon=surgeon,
    )


def fingerprints(data: PreparedData) -> dict[str, str]:
    """Return hashes of what a run's numbers depend on besides its configuration: data, tokenizer, code."""
    return {"data": data.fingerprint, "tokenizer": data.tokenizer.fingerprint, "code": code_fingerprint()}


def code_fingerprint() -> str:
    """Return a SHA-256 over the source of the packages that decide a run's numbers."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package in NUMERIC_PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def parameters_of(config: RunConfig, model: Decoder, updater: Updater) -> Parameters:
    """Return the parameters of the model as it is; of one that is cut over ranks, on which nobody operates, as it is
    configured: to look into its stacks would need all ranks."""
    return Parameters(**sizes(config)) if updater.is_sharded else count_parameters_of(model)


def sizes(config: RunConfig) -> dict[str, int]:
    """Return total and active parameters."""
    breakdown = count_parameters(config.architecture)
    return {"total": breakdown.total, "active": breakdown.active}
