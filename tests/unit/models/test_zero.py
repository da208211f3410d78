"""Memory under ZeRO: the figures of the paper, and shares computed by hand."""

from __future__ import annotations

import pytest

from ava_exp.models.arithmetic import ParameterBreakdown, Part
from ava_exp.models.memory import MemoryEstimate
from ava_exp.models.zero import divide, layer_parameters

WHOLE = MemoryEstimate(weights=200, master_weights=400, gradients=100, optimizer=800, activations=30, logits=7)


def divided(stage: int, num_devices: int = 8, layer_weights: int = 40, *, offload: bool = False) -> tuple[int, int]:
    """Return bytes on one device and on the host."""
    memory = divide(WHOLE, stage=stage, num_devices=num_devices, layer_weights=layer_weights, offload_optimizer=offload)
    return memory.total, memory.host


@pytest.mark.parametrize(("stage", "expected_gb"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_the_figures_of_the_paper(stage: int, expected_gb: float) -> None:
    """[rajbhandari2020zero] figure 1: 7.5 B parameters on 64 devices, 2 + 2 + 12 bytes for each."""
    parameters = 7_500_000_000
    whole = MemoryEstimate(
        weights=2 * parameters,
        gradients=2 * parameters,
        master_weights=4 * parameters,
        optimizer=8 * parameters,
        activations=0,
        logits=0,
    )
    memory = divide(whole, stage=stage, num_devices=64, layer_weights=0)
    assert memory.total / 1e9 == pytest.approx(expected_gb, rel=3e-3)
    assert memory.host == 0


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, 200 + 400 + 100 + 800 + 37),
        (1, 200 + 50 + 100 + 100 + 37),
        (2, 200 + 50 + 13 + 100 + 37),
        (3, 25 + 50 + 13 + 100 + 37 + 35),  # 35: seven eighths of a layer come from the others
    ],
)
def test_shares_of_eight_devices(stage: int, expected: int) -> None:
    assert divided(stage) == (expected, 0)


@pytest.mark.parametrize(("stage", "expected"), [(1, 200 + 100 + 37), (2, 200 + 13 + 37), (3, 25 + 13 + 37 + 35)])
def test_offload_moves_the_share_of_the_optimizer_to_the_host(stage: int, expected: int) -> None:
    assert divided(stage, offload=True) == (expected, 50 + 100)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_device_saves_nothing_without_offload(stage: int) -> None:
    assert divided(stage, num_devices=1) == divided(0)
    assert divided(stage, num_devices=1, offload=True) == (200 + 100 + 37, 400 + 800)


def test_more_devices_never_need_more_each() -> None:
    totals = [divided(3, num_devices=count, layer_weights=0)[0] for count in range(1, 50)]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] > WHOLE.activations + WHOLE.logits, "what is not divided stays"


def test_stage_zero_has_nothing_to_offload() -> None:
    with pytest.raises(AssertionError):
        divided(0, offload=True)


def test_a_layer_is_everything_between_embedding_and_head() -> None:
    sizes = {"embedding": 1000, "attention": 60, "experts": 30, "norms": 11, "head": 1000}
    parts = tuple(Part(name=name, total=total, active=total, multiplied=0) for name, total in sizes.items())
    assert layer_parameters(ParameterBreakdown(parts=parts), num_layers=10) == 11
