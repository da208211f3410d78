"""Closed forms of models in which tokens may skip layers, against what is built and what torch counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ava_exp.config.architecture import Architecture
from ava_exp.config.machine import Precision
from ava_exp.config.mod import (
    DepthConfig,
    DepthLayers,
    DepthPart,
    LearnedModConfig,
    NoModConfig,
    RandomModConfig,
    StaticModConfig,
)
from ava_exp.config.model import ModelConfig
from ava_exp.config.training import Recompute
from ava_exp.models.arithmetic import (
    count_parameters,
    forward_flops_per_token,
    training_flops,
    training_flops_per_token,
)
from ava_exp.models.decoder import build_model
from ava_exp.models.memory import estimate_memory
from ava_exp.models.surgery import count_parameters_of
from tests.unit.models.test_memory import kept_bytes
from tests.unit.nn.mod_cases import CASES, Case, architecture_of

LENGTH, BATCH = 16, 3
COUNTED = [case for case in CASES if case[2] not in ("capacity", "expert_choice")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters_are_those_of_the_model(case: Case) -> None:
    architecture = architecture_of(case, capacity_factor=0.5)
    model, counted = build_model(architecture, device="meta"), count_parameters(architecture)
    own = [p.numel() for name, p in model.named_parameters() if ".mod." in name]
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert {part.name: part.total for part in counted.parts}["depth routers"] == sum(own)
    without = count_parameters(replace(architecture, mod=NoModConfig()))
    assert counted.total - without.total == sum(own)
    built = count_parameters_of(model)
    assert (built.total, built.active) == (counted.total, pytest.approx(counted.active, abs=len(counted.parts)))
    assert counted.active < without.active


def test_active_parameters_by_hand() -> None:
    architecture = architecture_of(("static", DepthPart.block, "dense", DepthLayers.later), capacity_factor=0.25)
    model = build_model(architecture, device="meta")
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    everything = sum(p.numel() for p in model.parameters())
    assert count_parameters(architecture).active == everything - 0.75 * sum(in_blocks[2:])


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_forward_flops_are_those_that_torch_counts(case: Case) -> None:
    """torch counts all pairs of attention, ours only those that causality leaves."""
    architecture = architecture_of(case)
    model = build_model(architecture).train()
    ids = torch.stack([torch.randperm(40)[:LENGTH] for _ in range(BATCH)])
    with FlopCounterMode(display=False) as counter:
        output = model(ids)
        assert output.logits.shape == (BATCH, LENGTH, 40)
    lengths = [LENGTH] * 4
    if case[1] is DepthPart.block:
        for layer, depth in zip(model.mod_layers(), output.depths, strict=True):
            lengths[layer] = depth.num_processed // BATCH
    hidden_pairs = sum(length * (length - 1) // 2 for length in lengths) * BATCH
    beyond_causal = 4 * 4 * 4 * hidden_pairs  # heads of size 4
    ours = forward_flops_per_token(architecture, LENGTH) * BATCH * LENGTH
    assert counter.get_total_flops() - beyond_causal == pytest.approx(ours, rel=1e-12)


@pytest.mark.parametrize("case", COUNTED, ids=str)
@pytest.mark.parametrize("capacity", [None, 0.7])
def test_a_step_is_counted_by_what_was_processed(case: Case, capacity: float | None) -> None:
    """Also while the capacity is another one than the configuration's."""
    architecture = architecture_of(case)
    model = build_model(architecture).train()
    if capacity is not None:
        model.mod_capacity = capacity
    output = model(torch.zeros(BATCH, LENGTH, dtype=torch.int64))
    visits = sum(routing.expert_ids.numel() for routing in output.routings)
    processed = [depth.num_processed for depth in output.depths]
    flops = training_flops(architecture, LENGTH)
    counted = flops.of(BATCH * LENGTH, visits, processed, BATCH)
    assert isinstance(architecture.mod, DepthConfig)
    other = replace(architecture, mod=replace(architecture.mod, capacity_factor=model.mod_capacity))
    assert counted == pytest.approx(training_flops_per_token(other, LENGTH) * BATCH * LENGTH, rel=1e-12)
    whole = training_flops_per_token(replace(architecture, mod=NoModConfig()), LENGTH)
    assert flops.without_skips == whole and counted < whole * BATCH * LENGTH


def test_without_skips_nothing_has_changed() -> None:
    architecture = replace(architecture_of(CASES[1]), mod=NoModConfig())
    flops = training_flops(architecture, LENGTH)
    assert flops.per_processed == () and flops.scores(LENGTH) == 0.0


def test_what_is_saved_is_not_1_minus_the_capacity() -> None:
    """Of a block at a capacity of c, weights save 1 - c and pairs nearly 1 - c²; the head saves nothing."""
    model = ModelConfig(vocab_size=8, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128)
    plain = Architecture(model)
    half = Architecture(model, mod=StaticModConfig(capacity_factor=0.5))
    head, length = 2 * 8 * 64, 512
    inside = forward_flops_per_token(plain, length) - head
    saved = inside - (forward_flops_per_token(half, length) - head)
    pairs = 2 * 4 * 64 * (length + 1) / 2
    assert saved == pytest.approx(0.5 * (inside - pairs) + pairs * (1 - 0.25), rel=2e-3)


MEMORY: list[tuple[Any, Any]] = [
    (LearnedModConfig(), DepthPart.block),
    (StaticModConfig(capacity_factor=0.25), DepthPart.block),
    (RandomModConfig(layers=DepthLayers.alternating), DepthPart.block),
    (LearnedModConfig(), DepthPart.feed_forward),
]


@pytest.mark.parametrize(("mod", "part"), MEMORY)
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_activations_are_what_autograd_keeps(mod: DepthConfig, part: DepthPart, precision: Precision) -> None:
    sizes = {"vocab_size": 500, "hidden_size": 256, "num_layers": 4, "num_heads": 4, "intermediate_size": 512}
    model = ModelConfig(**sizes, max_position_embeddings=256)  # type: ignore[arg-type]
    architecture = Architecture(model, mod=replace(mod, part=part))
    dtype = torch.float32 if precision is Precision.fp32 else torch.bfloat16
    ids = torch.randint(0, 500, (4, 256), generator=torch.Generator().manual_seed(0))
    kept = kept_bytes(build_model(architecture, dtype=dtype).train(), ids)

    def estimated(of: Architecture, **settings: Any) -> int:
        return estimate_memory(of, precision=precision, batch_size=4, sequence_length=256, **settings).activations

    assert estimated(architecture) == pytest.approx(kept * (1 + 1 / 4), rel=0.12)
    if part is DepthPart.block:
        assert estimated(architecture) < estimated(replace(architecture, mod=NoModConfig()))
    annealed = replace(architecture, mod=replace(mod, part=part, annealing_ratio=0.1))
    assert estimated(annealed) > estimated(architecture), "the peak is at the start"
    assert estimated(architecture, recompute=Recompute.full) < estimated(architecture)
