"""Loss terms against direct computations, and their independence of how a step is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ava_exp.config.model import DenseConfig, MoEConfig
from ava_exp.config.router import BalanceScope, TopKRouterConfig
from ava_exp.data.loader import IGNORED
from ava_exp.losses.balance import absolute_deviation_loss
from ava_exp.losses.terms import CrossEntropy, RouterLoss, StepContext, build_losses
from ava_exp.nn.moe.routing import Routing
from ava_exp.nn.output import ModelOutput


def output_of(batch: int, length: int) -> ModelOutput:
    generator = torch.Generator().manual_seed(0)
    return ModelOutput(
        torch.randn(batch, length, 5, generator=generator), torch.randn(17, 5, generator=generator), routings=[]
    )


def test_shares_of_micro_batches_add_up_to_the_mean() -> None:
    output = output_of(4, 6)
    labels = torch.randint(0, 17, (4, 6), generator=torch.Generator().manual_seed(1))
    labels[:, ::5] = IGNORED
    context = StepContext(num_tokens=20)
    whole = CrossEntropy()(output, labels, context)
    parts = [
        CrossEntropy()(ModelOutput(output.hidden[i : i + 1], output.head), labels[i : i + 1], context) for i in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole)
    logits = output.logits.flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum") / 20
    torch.testing.assert_close(whole, expected)


def routing(**changes: Any) -> Routing:
    empty = torch.zeros(0)
    names = ("expert_ids", "weights", "counts", "chosen_counts", "affinities", "probabilities", "preferences")
    return Routing(**dict.fromkeys(names, empty) | changes)


def one_token(routings: list[Routing]) -> ModelOutput:
    return ModelOutput(torch.zeros(1, 1, 3), torch.zeros(7, 3), routings)


def router_loss(config: TopKRouterConfig, name: str) -> RouterLoss:
    (term,) = (term for term in build_losses(MoEConfig(router=config)) if term.name == name)
    assert isinstance(term, RouterLoss)
    return term


def test_router_loss_is_the_mean_over_layers_times_the_share_of_tokens() -> None:
    routings = [routing(losses={"router_z_loss": torch.tensor(value)}) for value in (1.0, 3.0)]
    labels = torch.zeros(2, 5, dtype=torch.long)
    context = StepContext(num_tokens=40, chosen_counts=[torch.zeros(0)] * 2)
    value = router_loss(TopKRouterConfig(), "router_z_loss")(
        ModelOutput(torch.zeros(2, 5, 3), torch.zeros(7, 3), routings), labels, context
    )
    assert value.item() == pytest.approx(2.0 * 10 / 40)


def test_terms_and_weights_follow_the_router() -> None:
    sparse = MoEConfig(router=TopKRouterConfig(load_balancing_weight=0.12, router_z_loss_weight=0.5))
    terms = {term.name: term.weight_at(0.3) for term in build_losses(sparse)}
    assert terms == {"loss": 1.0, "load_balancing_loss": 0.12, "router_z_loss": 0.5}
    assert [term.name for term in build_losses(DenseConfig())] == ["loss"]


def test_a_scheduled_weight_moves_linearly() -> None:
    term = router_loss(
        TopKRouterConfig(load_balancing_weight=0.1, load_balancing_weight_end=0.0), "load_balancing_loss"
    )
    assert [term.weight_at(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.05, 0.0])


@pytest.mark.parametrize(("scope", "expected"), [(BalanceScope.micro_batch, 2.0), (BalanceScope.step, 1.0)])
def test_the_balance_loss_counts_visits_over_its_scope(scope: BalanceScope, expected: float) -> None:
    probabilities = torch.tensor([[1.0, 0.0]])
    routings = [routing(probabilities=probabilities, chosen_counts=torch.tensor([4, 0]))]
    context = StepContext(num_tokens=1, chosen_counts=[torch.tensor([4, 4])])
    term = router_loss(TopKRouterConfig(balance_over=scope), "load_balancing_loss")
    value = term(
        ModelOutput(torch.zeros(1, 1, 3), torch.zeros(7, 3), routings), torch.zeros(1, 1, dtype=torch.long), context
    )
    assert value.item() == pytest.approx(expected)


@pytest.mark.parametrize(("weight", "weight_end", "learns"), [(0.0, None, False), (0.0, 0.1, True), (0.1, None, True)])
def test_a_loss_of_weight_0_is_watched_without_a_gradient(
    weight: float, weight_end: float | None, learns: bool
) -> None:
    probabilities = torch.tensor([[0.4, 0.6]], requires_grad=True)
    routings = [routing(probabilities=probabilities, chosen_counts=torch.tensor([1, 3]))]
    config = TopKRouterConfig(load_balancing_weight=weight, load_balancing_weight_end=weight_end)
    context = StepContext(num_tokens=1, chosen_counts=[torch.zeros(2)])
    term = router_loss(config, "load_balancing_loss")
    value = term(
        ModelOutput(torch.zeros(1, 1, 3), torch.zeros(7, 3), routings), torch.zeros(1, 1, dtype=torch.long), context
    )
    assert value.item() == pytest.approx(2 * (0.25 * 0.4 + 0.75 * 0.6))
    assert value.requires_grad is learns


def test_the_deviation_loss_is_0_when_uniform_and_most_when_collapsed() -> None:
    assert absolute_deviation_loss(torch.full((6, 4), 0.25)).item() == pytest.approx(0.0)
    assert absolute_deviation_loss(torch.eye(4)[:1]).item() == pytest.approx(2 * 3 / 4)
