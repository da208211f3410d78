"""What back ends keep and send, computed by hand, and over every preset, device and number of them."""

from __future__ import annotations

import dataclasses

import pytest

from ava_exp.config.compose import compose
from ava_exp.config.machine import Precision
from ava_exp.config.training import Recompute
from ava_exp.models.arithmetic import count_parameters, routed_parameters, visits_per_token
from ava_exp.models.backends import (
    LIVE_PARAMETERS,
    REDUCE_BUCKET_PARAMETERS,
    BackEnd,
    Sizes,
    host_adam_seconds,
    rank_memory,
    sizes_of,
    transfers_of,
)
from ava_exp.models.communication import Collective, Group, sent_by_collective, world
from ava_exp.models.memory import MemoryEstimate
from ava_exp.models.zero import divide

SIZES = Sizes(
    common=4000,
    experts=8000,
    outside=1000,
    layer=2000,
    layer_experts=1600,
    weight_bytes=2,
    visits_bytes=640.0,
    num_sparse_layers=2,
)
WHOLE = MemoryEstimate(
    weights=24_000, master_weights=48_000, gradients=72_000, optimizer=96_000, activations=500, logits=70
)
FOUR = Group(num_ranks=4, per_node=4)
ROUND, BOTH = 3 / 4, 2 * 3 / 4
"""Of a tensor: what each of four ranks sends to scatter or gather it, and to reduce it for all."""


def sent(back_end: BackEnd, *, accumulation: int = 1, expert_parallel: int = 1) -> dict[Collective, float]:
    return sent_by_collective(
        transfers_of(back_end, SIZES, FOUR, expert_parallel=expert_parallel, num_micro_batches=accumulation)
    )


@pytest.mark.parametrize("accumulation", [1, 3])
def test_bytes_by_hand(accumulation: int) -> None:
    """12,000 parameters: 24,000 bytes of weights and of gradients, 48,000 of gradients in fp32; 2,000 bytes of weights
    are outside of blocks."""
    scatter, gather, reduce = Collective.reduce_scatter, Collective.all_gather, Collective.all_reduce
    often = accumulation
    expected: dict[BackEnd, dict[Collective, float]] = {
        BackEnd.single: {},
        BackEnd.ddp: {reduce: BOTH * 48_000},
        BackEnd.zero1: {scatter: ROUND * 24_000, gather: ROUND * 24_000},
        BackEnd.zero2: {scatter: often * ROUND * 24_000, gather: ROUND * 24_000},
        BackEnd.zero3: {scatter: often * ROUND * 24_000, gather: often * ROUND * 2 * 24_000},
        BackEnd.fsdp2: {scatter: ROUND * 48_000, gather: often * ROUND * (2 * 24_000 - 2000)},
    }
    for back_end, bytes_sent in expected.items():
        assert sent(back_end, accumulation=accumulation) == pytest.approx(bytes_sent), back_end
    offload = {**expected[BackEnd.zero3], Collective.host_copy: often * 6000 + 6000}
    assert sent(BackEnd.zero3_offload, accumulation=accumulation) == pytest.approx(offload)


def test_experts_on_two_ranks_each_are_trained_by_two_ranks() -> None:
    """Of four ranks each has 4,000 experts' parameters, reduced over the pair that has the same."""
    found = sent(BackEnd.ddp, accumulation=3, expert_parallel=2)
    assert found[Collective.all_reduce] == pytest.approx(BOTH * 4 * 4000 + 1.0 * 4 * 4000)
    assert found[Collective.all_to_all] == pytest.approx(3 * 4 * 640 / 2)


def test_experts_divided_among_all_ranks_are_reduced_by_nobody() -> None:
    found = sent(BackEnd.zero1, expert_parallel=4)
    assert found[Collective.reduce_scatter] == pytest.approx(ROUND * 2 * 4000)
    assert found[Collective.all_gather] == pytest.approx(ROUND * 2 * 4000)


def test_the_volumes_of_the_paper() -> None:
    """[rajbhandari2020zero]: stages 1 and 2 send as much as plain data parallelism, stage 3 half as much again."""
    even = dataclasses.replace(SIZES, weight_bytes=4)
    totals = {
        back_end: sum(sent_by_collective(transfers_of(back_end, even, FOUR)).values())
        for back_end in (BackEnd.ddp, BackEnd.zero1, BackEnd.zero2, BackEnd.zero3)
    }
    assert totals[BackEnd.zero1] == totals[BackEnd.zero2] == pytest.approx(totals[BackEnd.ddp])
    assert totals[BackEnd.zero3] == pytest.approx(1.5 * totals[BackEnd.ddp])


@pytest.mark.parametrize("back_end", [end for end in BackEnd if end is not BackEnd.single])
def test_one_rank_sends_nothing_to_others(back_end: BackEnd) -> None:
    found = sent_by_collective(transfers_of(back_end, SIZES, world(1, 8)))
    assert set(found) <= {Collective.host_copy}


@pytest.mark.parametrize(
    ("back_end", "state", "buffers"),
    [
        (BackEnd.ddp, 24_000 + 48_000 + 72_000 + 96_000, 48_000),
        (BackEnd.zero1, 24_000 + 12_000 + 72_000 + 24_000, 24_000),
        (BackEnd.zero2, 24_000 + 12_000 + 18_000 + 24_000, 24_000),
        (BackEnd.zero3, 6000 + 12_000 + 18_000 + 24_000, 24_000 + 24_000),
        (BackEnd.fsdp2, 12_000 + 12_000 + 24_000, 2 * 2 * (1000 + 2000) + 4 * 2000),
        (BackEnd.zero3_offload, 6000 + 18_000, 24_000 + 24_000),
    ],
)
def test_memory_by_hand(back_end: BackEnd, state: int, buffers: int) -> None:
    found = rank_memory(back_end, WHOLE, SIZES, FOUR)
    assert (found.device.total, found.buffers) == (state + 570, buffers)
    assert found.host == (12_000 + 24_000 if back_end is BackEnd.zero3_offload else 0)
    assert found.total == state + 570 + buffers


def test_sums_in_the_format_of_the_gradients_need_no_room() -> None:
    assert rank_memory(BackEnd.ddp, WHOLE, dataclasses.replace(SIZES, weight_bytes=4), FOUR).buffers == 0


def test_gradients_wait_beside_their_buckets() -> None:
    once, twice = (rank_memory(BackEnd.ddp, WHOLE, SIZES, FOUR, num_micro_batches=n).buffers for n in (1, 2))
    assert twice - once == 24_000
    assert rank_memory(BackEnd.fsdp2, WHOLE, SIZES, FOUR, num_micro_batches=2).buffers == 48_000 + 2 * (1000 + 6000)
    once, twice = (rank_memory(BackEnd.zero2, WHOLE, SIZES, FOUR, num_micro_batches=n).buffers for n in (1, 2))
    assert twice == once


def test_state_is_that_of_the_stage() -> None:
    """Without experts divided, a rank's share is what `zero.divide` says."""
    for back_end, stage in ((BackEnd.ddp, 0), (BackEnd.zero1, 1), (BackEnd.zero2, 2), (BackEnd.zero3, 3)):
        share = divide(WHOLE, stage=stage, num_devices=4, layer_weights=0)
        assert rank_memory(back_end, WHOLE, SIZES, FOUR).device == share.device


def test_divided_experts_leave_a_rank_its_share() -> None:
    """4,000 parameters of all and 8,000 / 4 of experts are half of the model."""
    found = rank_memory(BackEnd.ddp, WHOLE, SIZES, FOUR, expert_parallel=4)
    assert (found.device.weights, found.device.optimizer) == (12_000, 48_000)
    assert found.device.activations == WHOLE.activations
    assert found.buffers == 6000 * 4 + 2 * 640 // 2


def test_what_is_divided_whole_does_not_depend_on_the_order() -> None:
    """Experts divided among two ranks and then between two pairs are divided among four."""
    plain, experts = (rank_memory(BackEnd.zero3, WHOLE, SIZES, FOUR, expert_parallel=n) for n in (1, 2))
    assert plain.device == experts.device


def test_a_large_model_has_a_part_of_its_weights_whole() -> None:
    large = dataclasses.replace(SIZES, common=10**10, experts=0, layer=10**8)
    found = rank_memory(BackEnd.zero3, WHOLE, large, FOUR)
    assert found.buffers == 2 * LIVE_PARAMETERS + 2 * REDUCE_BUCKET_PARAMETERS


def test_the_host_updates_the_shares_of_its_ranks() -> None:
    sizes = dataclasses.replace(SIZES, common=8 * 10**9, experts=0)
    assert host_adam_seconds(BackEnd.zero3_offload, sizes, world(16, 8)) == pytest.approx(1.0)
    assert host_adam_seconds(BackEnd.zero3, sizes, world(16, 8)) == 0


def sizes_at(*overrides: str, recompute: Recompute = Recompute.none) -> tuple[Sizes, int]:
    architecture = compose(["~local", *overrides]).architecture
    sizes = sizes_of(
        architecture, precision=Precision.mixed_bf16, batch_size=3, sequence_length=32, recompute=recompute
    )
    return sizes, count_parameters(architecture).total


def test_sizes_of_a_built_model() -> None:
    """Counted on the parameters themselves, by name."""
    from ava_exp.models.decoder import build_model

    overrides = ["model=debug", "sparsity.num_shared_experts=1", "sparsity.expert_norm=true"]
    sizes, total = sizes_at(*overrides)
    model = build_model(compose(["~local", *overrides]).architecture)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(count for name, count in counts.items() if ".experts." in name)
    assert sizes.experts == experts
    assert sizes.parameters == total == sum(counts.values())
    outside = sum(count for name, count in counts.items() if not name.startswith("blocks."))
    assert sizes.outside == outside
    inside = total - outside
    assert sizes.layer == pytest.approx(inside / 2, rel=0.001)


def test_visits_of_a_micro_batch() -> None:
    """Three sequences of 32 tokens, two of eight experts in both layers, 128 values of two bytes."""
    sizes, _ = sizes_at("model=debug")
    assert sizes.visits_bytes == 3 * 32 * 2 * 2 * 128 * 2
    assert (sizes.num_crossings, sizes.num_sparse_layers) == (4, 2)
    assert sizes_at("model=debug", recompute=Recompute.full)[0].num_crossings == 6
    dense, total = sizes_at("model=debug", "sparsity=dense")
    assert (dense.visits_bytes, dense.experts, dense.common) == (0, 0, total)


def test_tokens_that_skip_a_layer_visit_no_expert() -> None:
    architecture = compose(["~local", "model=small", "mod=learned", "mod.capacity_factor=0.5"]).architecture
    skippable = len(architecture.mod.skippable_layers(architecture.model.num_layers))
    assert skippable > 1
    expected = 2 * (architecture.model.num_layers - skippable / 2)
    assert visits_per_token(architecture, 64) == pytest.approx(expected)


def test_a_shared_projection_is_on_every_rank() -> None:
    own = routed_parameters(compose(["~local", "model=debug"]).architecture)
    shared = routed_parameters(compose(["~local", "model=debug", "sparsity.share_projection=down"]).architecture)
    assert shared == pytest.approx(own * 2 / 3)
