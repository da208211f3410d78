"""The loss of the prediction heads against plain loops over positions, heads and the gate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ava_exp.losses.cross_entropy as module
from ava_exp.data.loader import IGNORED
from ava_exp.losses.cross_entropy import linear_cross_entropy, score_labels
from ava_exp.losses.terms import CrossEntropy, MultiTokenLoss, StepContext
from ava_exp.nn.output import ModelOutput

BATCH, LENGTH, DIM, VOCABULARY, HEADS = 4, 9, 5, 7, 3
NUM_TOKENS = 31


@pytest.fixture(params=[7, 20, 10_000], ids=["one row", "uneven slices", "one slice"])
def _slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE_VALUES", 2 * request.param)
    monkeypatch.setattr(module, "CACHED_VALUES", request.param)


def problem() -> tuple[ModelOutput, list[Tensor], Tensor]:
    """Sharp predictions, so that the gate lets some through; labels that are ignored in the middle and at the end."""
    generator = torch.Generator().manual_seed(3)
    hidden, *states = (
        torch.randn(BATCH, LENGTH - j, DIM, generator=generator, dtype=torch.float64).requires_grad_()
        for j in range(HEADS + 1)
    )
    head = torch.randn(VOCABULARY, DIM, generator=generator, dtype=torch.float64).requires_grad_()
    best = (hidden @ head.T).argmax(dim=-1)
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels = torch.where(torch.rand(BATCH, LENGTH, generator=generator) < 0.6, best, labels)
    labels[1, 3] = IGNORED
    labels[2, -2:] = IGNORED
    return ModelOutput(hidden, head, chain=lambda: states), states, labels


def plain_loss(output: ModelOutput, states: list[Tensor], labels: Tensor, threshold: float) -> tuple[Tensor, int]:
    """Return the loss, and how many labels count."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(BATCH):
        for t in range(LENGTH):
            state = output.hidden[row, t]
            for j in range(HEADS + 1):
                if t + j >= LENGTH or labels[row, t + j] == IGNORED:
                    break
                log_p = (output.head @ (state if j == 0 else states[j - 1][row, t])).log_softmax(dim=0)
                nats = -log_p[labels[row, t + j]]
                if j > 0:
                    total, count = total + nats, count + 1
                if math.exp(-nats.item()) < threshold:
                    break
    return total / HEADS / NUM_TOKENS, count


def our_loss(output: ModelOutput, labels: Tensor, threshold: float) -> Tensor:
    context = StepContext(num_tokens=NUM_TOKENS)
    CrossEntropy()(output, labels, context)
    return MultiTokenLoss(0.1, threshold)(output, labels, context)


@pytest.mark.usefixtures("_slices")
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.6, 1.0])
def test_it_equals_plain_loops_with_its_gradients(threshold: float) -> None:
    output, states, labels = problem()
    wanted, count = plain_loss(output, states, labels, threshold)
    counts = {t: plain_loss(output, states, labels, t)[1] for t in (0.0, 0.2, 0.6, 1.0)}
    assert counts[0.0] > counts[0.2] > counts[0.6] > counts[1.0] == 0, "the gate must have something to do"
    ours = our_loss(output, labels, threshold)
    torch.testing.assert_close(ours, wanted)
    if count:
        inputs = [output.head, *states]
        torch.testing.assert_close(
            torch.autograd.grad(ours, inputs), torch.autograd.grad(wanted, inputs, materialize_grads=True)
        )


def test_without_a_gradient_it_is_the_same() -> None:
    output, states, labels = problem()
    with torch.no_grad():
        value = our_loss(output, labels, 0.3)
    torch.testing.assert_close(value, plain_loss(output, states, labels, 0.3)[0].detach())


def test_a_gate_that_nothing_passes_still_gives_gradients_of_zero() -> None:
    output, states, labels = problem()
    our_loss(output, labels, 1.0).backward()
    assert all(state.grad is not None and not state.grad.any() for state in states)


def test_micro_batches_add_up_to_the_whole() -> None:
    output, states, labels = problem()
    parts = [
        our_loss(
            ModelOutput(output.hidden[i : i + 1], output.head, chain=lambda i=i: [s[i : i + 1] for s in states]),  # type: ignore[misc]
            labels[i : i + 1],
            0.3,
        )
        for i in range(BATCH)
    ]
    torch.testing.assert_close(sum(parts), our_loss(output, labels, 0.3))


@pytest.mark.usefixtures("_slices")
@pytest.mark.parametrize("with_gradient", [True, False])
def test_every_row_s_own_loss_is_told(with_gradient: bool) -> None:
    output, _, labels = problem()
    hidden, labels_N = output.hidden.flatten(0, 1), labels.flatten()
    nats = torch.full((len(labels_N),), math.nan, dtype=torch.float64)
    with torch.set_grad_enabled(with_gradient):
        total = linear_cross_entropy(hidden, output.head, labels_N, 3.0, 1.0, nats)
    valid = labels_N != IGNORED
    wanted = -(hidden @ output.head.T).log_softmax(dim=1)[torch.arange(len(labels_N)), labels_N.clamp(min=0)]
    torch.testing.assert_close(nats[valid], wanted[valid].detach())
    torch.testing.assert_close(total.detach(), nats[valid].sum() / 3)


@pytest.mark.usefixtures("_slices")
def test_every_row_s_own_hit_is_told() -> None:
    output, _, labels = problem()
    hidden, labels_N = output.hidden.flatten(0, 1), labels.flatten()
    hits = torch.empty(len(labels_N), dtype=torch.bool)
    _, correct = score_labels(hidden, output.head, labels_N, hits_N=hits)
    assert torch.equal(hits, (hidden @ output.head.T).argmax(dim=1) == labels_N)
    assert int(correct) == int(hits.sum()) > 0
