"""The loss moves only when it is meant to. `curves.py` says how to regenerate what it is compared with."""

from __future__ import annotations

import json

import pytest

from tests.golden.curves import COMPOSITIONS, FILE, TOLERANCE, Curve, train

GOLDEN: dict[str, Curve] = json.loads(FILE.read_text(encoding="utf-8"))


def deviation(actual: Curve, expected: Curve) -> float:
    """Return the largest relative difference of any number."""
    assert {name: len(values) for name, values in actual.items()} == {name: len(v) for name, v in expected.items()}
    return max(abs(a - b) / abs(b) for name in expected for a, b in zip(actual[name], expected[name], strict=True))


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_the_curve_is_the_golden_one(name: str) -> None:
    actual = train(COMPOSITIONS[name])
    assert actual["train/loss"][-1] < actual["train/loss"][0] - 2, "it must learn, or nothing is compared"
    for metric, expected in GOLDEN[name].items():
        assert actual[metric] == pytest.approx(expected, rel=TOLERANCE), metric
    assert deviation(actual, GOLDEN[name]) <= TOLERANCE


@pytest.mark.parametrize(
    "change",
    [
        "model.norm_epsilon=2e-3",
        "model.rope_theta=9_000",
        "attention.qk_norm=false",
        "sparsity.router.load_balancing_weight=0.011",
        "sparsity.router.router_z_loss_weight=0.0011",
        "sparsity.router.renormalize=false",
        "sparsity.router.moe_top_k=1",
        "optimizer.weight_decay=0.11",
        "optimizer.betas=[0.9,0.951]",
        "optimizer.epsilon=1e-6",
        "schedule.min_lr_ratio=0.11",
        "schedule.warmup_steps=5",
        "training.gradient_clip_val=1.1",
        "seed=1",
    ],
)
def test_the_comparison_sees_small_changes_of_the_mathematics(change: str) -> None:
    key = change.partition("=")[0]
    overrides = [given for given in COMPOSITIONS["mixture_of_experts"] if not given.startswith(f"{key}=")]
    assert deviation(train([*overrides, change]), GOLDEN["mixture_of_experts"]) > 2 * TOLERANCE


@pytest.mark.parametrize(
    "change",
    ["sparsity.dispatch=loop", "sparsity.dispatch=grouped", "attention.backend=sdpa", "attention.backend=plain"],
)
def test_how_it_is_computed_does_not_move_the_curve(change: str) -> None:
    overrides = [*COMPOSITIONS["mixture_of_experts"], change]
    assert deviation(train(overrides), GOLDEN["mixture_of_experts"]) <= TOLERANCE
