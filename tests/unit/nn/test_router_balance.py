"""Noise of routers, and how each keeps the load of experts even."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from ava_exp.config.model import (
    Overflow,
)
from ava_exp.config.router import (
    DeepSeekRouterConfig,
    ExpertChoiceRouterConfig,
)
from ava_exp.nn.moe.expert_choice import ExpertChoiceRouter
from ava_exp.nn.moe.router import Router
from ava_exp.nn.moe.routing import Routing
from ava_exp.nn.moe.sinkhorn import sinkhorn
from tests.unit.nn.routing_cases import (
    DIM,
    NUM_EXPERTS,
    ROUTERS,
    build_layer,
    some_input,
)

TOKEN_CHOICE = [name for name in ROUTERS if name != "expert_choice"]


@pytest.mark.parametrize("name", ROUTERS)
def test_dropped_experts_are_not_visited_and_never_all(name: str) -> None:
    config = copy.copy(ROUTERS[name])
    config.whole_expert_dropout = 0.9
    layer, x = build_layer(config), some_input()
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        absent = layer.router.absent_experts()
        torch.manual_seed(seed)
        _, routing = layer(x)
        assert absent is not None and not absent.all()
        assert routing.counts[absent].sum() == 0 and routing.counts.sum() > 0
        torch.manual_seed(seed)
        assert torch.equal(routing.expert_ids, layer(x)[1].expert_ids)
        seen.add(int(absent.sum()))
    assert len(seen) > 1 and max(seen) == NUM_EXPERTS - 1
    assert layer.eval().router.absent_experts() is None
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("num_absent", [1, 4, 6, 7])
@pytest.mark.parametrize("name", ["topk", "topk_3_plain", "switch", "sinkhorn", "deepseek"])
def test_a_token_keeps_its_visits_while_experts_are_left(
    name: str, num_absent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = build_layer(name, Overflow.next_best), some_input()
    layer.router.weight.data.mul_(500)  # probabilities of 0 for experts that are present, too
    absent = torch.arange(NUM_EXPERTS) < num_absent
    monkeypatch.setattr(layer.router, "absent_experts", lambda: absent)
    routing = layer.router(x)
    wanted = min(int(ROUTERS[name].experts_per_token(NUM_EXPERTS)), NUM_EXPERTS - num_absent)
    assert ((routing.expert_ids >= 0).sum(dim=1) == wanted).all()
    assert (routing.expert_ids[routing.expert_ids >= 0] >= num_absent).all()
    assert layer(x)[1].counts[:num_absent].sum() == 0, "nor where visits overflow to"


def test_a_group_is_reached_while_one_of_its_experts_is_present(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = build_layer("deepseek_groups"), some_input()
    absent = torch.arange(NUM_EXPERTS) % 2 == 0
    monkeypatch.setattr(layer.router, "absent_experts", lambda: absent)
    chosen = layer.router(x).expert_ids
    assert ((chosen >= 0).sum(dim=1) == 2).all()
    groups = chosen[chosen >= 0].view(-1, 2) // 2
    scores = layer.router(x).affinities + layer.router.get_buffer("bias")
    best = scores.masked_fill(absent, -1).view(-1, 4, 2).amax(dim=-1).topk(2, dim=-1).indices
    assert torch.equal(groups.sort(dim=1).values, best.sort(dim=1).values)


@pytest.mark.parametrize("name", TOKEN_CHOICE)
def test_jitter_acts_while_training_only(name: str) -> None:
    config = copy.copy(ROUTERS[name])
    config.jitter = 0.3  # type: ignore[attr-defined]
    layer, x = build_layer(config), some_input()
    first, second = layer(x)[1].affinities, layer(x)[1].affinities
    assert not torch.equal(first, second)
    plain = build_layer(ROUTERS[name])(x)[1].affinities
    assert 0 < (first - plain).abs().max() < 0.5
    assert torch.equal(layer.eval()(x)[1].affinities, layer(x)[1].affinities)


@pytest.mark.parametrize("name", ["topk", "switch", "two_stage", "deepseek", "hierarchical"])
def test_temperature_changes_weights_and_not_the_choice(name: str) -> None:
    """A hierarchical router chooses node by node, where the order is the same at any temperature."""
    config, hot = copy.copy(ROUTERS[name]), copy.copy(ROUTERS[name])
    hot.routing_temperature = 3.0  # type: ignore[attr-defined]
    x = some_input()
    cold, warm = (build_layer(router) for router in (config, hot))
    for layer in (cold, warm):
        for buffer in layer.router.buffers():
            buffer.zero_()
    first, second = cold(x)[1], warm(x)[1]
    assert torch.equal(first.counts, second.counts)
    assert torch.equal(first.expert_ids.sort(dim=1).values, second.expert_ids.sort(dim=1).values)
    assert first.probabilities.amax(dim=1).mean() > second.probabilities.amax(dim=1).mean()


def skewed_input(num_tokens: int, seed: int = 0) -> Tensor:
    """Tokens with much in common: routers send most of them to the same experts."""
    x = torch.randn(1, num_tokens, DIM, generator=torch.Generator().manual_seed(seed))
    return x + torch.linspace(-1.5, 1.5, DIM)


def imbalance(routing: Routing) -> float:
    return float(routing.chosen_counts.max() / routing.chosen_counts.float().mean())


def test_the_bias_moves_by_its_rate_against_the_load() -> None:
    router = build_layer(DeepSeekRouterConfig(bias_update_rate=0.01)).router
    router.get_buffer("bias").zero_()
    router.adapt(torch.tensor([5, 0, 2, 2, 3, 1, 2, 1]), None)  # mean 2
    expected = [-0.01, 0.01, 0, 0, -0.01, 0.01, 0, 0.01]
    torch.testing.assert_close(router.get_buffer("bias"), torch.tensor(expected))


def test_the_bias_balances_a_skewed_router_and_leaves_its_scores_alone() -> None:
    layer = build_layer(DeepSeekRouterConfig(bias_update_rate=0.01), dtype=torch.float32)
    router, x = layer.router, skewed_input(256)
    router.get_buffer("bias").zero_()
    before = router(x)
    assert imbalance(before) > 2
    for step in range(150):
        router.adapt(router(skewed_input(256, seed=step)).chosen_counts, None)
    after = router(x)
    assert imbalance(after) < 1.35
    assert torch.equal(before.affinities, after.affinities)


def test_sinkhorn_makes_rows_1_and_columns_even() -> None:
    logits = torch.randn(64, NUM_EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    scores = sinkhorn(logits + torch.arange(NUM_EXPERTS), num_iterations=200).exp()
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(
        scores.sum(dim=0), torch.full((NUM_EXPERTS,), 8.0, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )
    logits[:, 2] = -torch.inf
    present = sinkhorn(logits, num_iterations=200).exp().sum(dim=0)
    assert present[2] == 0 and torch.allclose(present[present > 0], torch.tensor(64 / 7, dtype=torch.float64))


def test_sinkhorn_balances_a_skewed_router_while_training() -> None:
    layer, x = build_layer("sinkhorn", dtype=torch.float32), skewed_input(256)
    assert imbalance(layer(x)[1]) < 1.2
    assert imbalance(layer.eval()(x)[1]) > 2


def test_experts_choose_equally_many_tokens() -> None:
    _, routing = build_layer("expert_choice", dtype=torch.float32)(skewed_input(256))
    assert routing.counts.tolist() == [48] * NUM_EXPERTS


def test_thresholds_are_a_mean_of_what_steps_observed() -> None:
    router = build_layer(ExpertChoiceRouterConfig(threshold_momentum=0.5)).router
    assert isinstance(router, ExpertChoiceRouter)
    for buffer in router.buffers():
        buffer.zero_()
    for value, expected in ((0.4, 0.4), (0.2, 0.3), (0.5, 0.4)):
        router.adapt(torch.zeros(NUM_EXPERTS), torch.full((NUM_EXPERTS,), value))
        torch.testing.assert_close(router.threshold, torch.full((NUM_EXPERTS,), expected))


def test_thresholds_reproduce_the_training_load_at_inference() -> None:
    layer = build_layer("expert_choice", dtype=torch.float32)
    router = layer.router
    for buffer in router.buffers():
        buffer.zero_()
    untrained = router.eval()(skewed_input(512, seed=1000))
    assert untrained.counts.sum() == 512 * 2, "the best experts, while there are no thresholds"
    assert imbalance(untrained) > 2
    router.train()
    for step in range(60):
        routing = router(skewed_input(512, seed=step))
        assert routing.observed is not None
        router.adapt(routing.chosen_counts, routing.observed)
    loads = router.eval()(skewed_input(8192, seed=1000)).counts / 8192
    torch.testing.assert_close(loads, torch.full((NUM_EXPERTS,), 1.5 / NUM_EXPERTS), rtol=0.1, atol=0.0)


def test_a_router_that_does_not_learn_beside_gradients_does_not_adapt() -> None:
    router: Router = build_layer("topk").router
    before = router.weight.clone()
    router.adapt(torch.arange(NUM_EXPERTS), None)
    assert torch.equal(router.weight, before) and not list(router.buffers())
