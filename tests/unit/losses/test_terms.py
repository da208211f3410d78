"""Loss terms against direct computations, and their independence of how a step is cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ava_exp.config.loss import LossConfig
from ava_exp.config.model import DenseConfig, MoEConfig
from ava_exp.config.router import BalanceScope, TopKRouterConfig
from ava_exp.data.loader import IGNORED
from ava_exp.losses.balance import absolute_deviation_loss
from ava_exp.losses.head import Measure
from ava_exp.losses.terms import CrossEntropy, LossTerm, OutputLoss, RouterLoss, StepContext, build_losses
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


ALL_TERMS = LossConfig(
    label_smoothing=0.1,
    z_loss_weight=0.01,
    immediate_repetition_weight=1.0,
    repetition_penalty_weight=0.5,
    repetition_ngram_size=2,
    entropy_regularization=0.2,
    output_diversity_weight=0.7,
)


def test_every_weight_is_a_term_and_what_is_rewarded_has_a_negative_one() -> None:
    terms = {term.name: term.weight_at(0.3) for term in build_losses(DenseConfig(), ALL_TERMS)}
    assert terms == {
        "loss": 1.0,
        "label_smoothing_loss": 0.1,
        "z_loss": 0.01,
        "immediate_repetition_loss": 1.0,
        "repetition_loss": 0.5,
        "output_entropy": -0.2,
        "output_diversity": -0.7,
    }


class Step:
    """Ids of few kinds, an output for them, and what a step makes of some terms."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(0, 5, (4, 13), generator=generator)
        self.inputs, self.labels = ids[:, :-1], ids[:, 1:].clone()
        self.labels[:, ::5] = IGNORED
        self.labels[0] = IGNORED  # a micro-batch of fewer tokens than the others
        self.hidden = torch.randn(4, 12, 6, generator=generator, dtype=torch.float64)
        self.head = torch.randn(17, 6, generator=generator, dtype=torch.float64)

    def take(self, terms: list[LossTerm], size: int = 4, scale: float = 1.0) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return the values of the terms and the gradients of the objective, summed over micro-batches of a size."""
        hidden, head = self.hidden.clone().requires_grad_(), self.head.clone().requires_grad_()
        weighted = [(term, term.weight_at(0.0)) for term in terms]
        values = torch.zeros(len(terms), dtype=torch.float64)
        for start in range(0, 4, size):
            rows = slice(start, start + size)
            context = StepContext(
                num_tokens=int((self.labels != IGNORED).sum()),
                loss_scale=scale,
                input_ids=self.inputs[rows],
                terms=weighted,
            )
            output = ModelOutput(hidden[rows], head)
            found = torch.stack([term(output, self.labels[rows], context) for term in terms])
            assert (context.shared is not None) is any(isinstance(term, OutputLoss) for term in terms)
            (found @ torch.tensor([weight for _, weight in weighted], dtype=found.dtype) * scale).backward()
            values += found.detach()
        assert hidden.grad is not None and head.grad is not None
        return dict(zip([term.name for term in terms], values, strict=True)), [hidden.grad / scale, head.grad / scale]


def test_the_objective_is_the_weighted_sum_of_terms_that_were_computed_alone() -> None:
    terms = build_losses(DenseConfig(), ALL_TERMS)
    values, gradients = Step().take(terms)
    expected = [torch.zeros_like(gradient) for gradient in gradients]
    for term in terms:
        alone, added = Step().take([term])
        torch.testing.assert_close(alone[term.name], values[term.name])
        expected = [total + more for total, more in zip(expected, added, strict=True)]
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("order", ["as built", "backwards"])
def test_the_order_and_the_number_of_terms_are_free(order: str) -> None:
    terms = build_losses(DenseConfig(), ALL_TERMS)
    values, gradients = Step().take(terms)
    others = terms[1:4] if order == "as built" else terms[::-1]
    again, found = Step().take(others)
    for name, value in again.items():
        torch.testing.assert_close(value, values[name])
    assert all(torch.allclose(*pair) for pair in zip(found, gradients, strict=True)) is (order == "backwards")


@pytest.mark.parametrize("size", [1, 2])
def test_all_but_diversity_are_independent_of_how_the_step_is_cut(size: int) -> None:
    config = copy.copy(ALL_TERMS)
    config.output_diversity_weight = 0.0
    terms = build_losses(DenseConfig(), config)
    for found, expected in zip(Step().take(terms, size), Step().take(terms), strict=True):
        torch.testing.assert_close(found, expected)


def test_diversity_is_the_mean_of_the_micro_batches_by_their_tokens() -> None:
    (term,) = (term for term in build_losses(DenseConfig(), ALL_TERMS) if term.name == Measure.diversity.value)
    step = Step()
    values, _ = step.take([term], size=1)
    expected = 0.0
    for hidden, labels in zip(step.hidden, step.labels, strict=True):
        valid = labels != IGNORED
        mean = (hidden @ step.head.t()).softmax(dim=1)[valid].mean(dim=0)
        expected += float(torch.special.entr(mean).sum() * valid.sum()) if valid.any() else 0.0
    assert float(values[term.name]) == pytest.approx(expected / int((step.labels != IGNORED).sum()))
    assert float(step.take([term])[0][term.name]) > float(values[term.name]) + 0.1


def test_a_loss_scale_leaves_values_and_gradients_alone() -> None:
    terms = build_losses(DenseConfig(), ALL_TERMS)
    for found, expected in zip(Step().take(terms, scale=1024.0), Step().take(terms), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("config", [LossConfig(), ALL_TERMS])
def test_cross_entropy_leaves_what_every_label_costs_to_later_terms(config: LossConfig) -> None:
    step = Step()
    logits = step.hidden @ step.head.t()
    expected = F.cross_entropy(logits.flatten(0, 1), step.labels.flatten(), ignore_index=IGNORED, reduction="none")
    weighted = [(term, term.weight_at(0.0)) for term in build_losses(DenseConfig(), config)]
    context = StepContext(num_tokens=1, input_ids=step.inputs, terms=weighted)
    weighted[0][0](ModelOutput(step.hidden, step.head), step.labels, context)
    valid = step.labels != IGNORED
    assert context.label_nats is not None
    torch.testing.assert_close(context.label_nats[valid], expected.view_as(step.labels)[valid])


def test_the_reported_loss_is_the_plain_cross_entropy() -> None:
    plain, _ = Step().take(build_losses(DenseConfig()))
    values, _ = Step().take(build_losses(DenseConfig(), ALL_TERMS))
    assert torch.equal(values["loss"], plain["loss"])
