"""The loss of a large head against the plain computation, which makes all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ava_exp.losses.cross_entropy as module
from ava_exp.data.loader import IGNORED
from ava_exp.losses.cross_entropy import linear_cross_entropy, score_labels

VOCABULARY = 17


@pytest.fixture(params=[(17, 17), (100, 40), (10_000, 10_000)], ids=["one row", "uneven slices", "one slice"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of one row, slices that divide neither each other nor the rows, and everything at once."""
    monkeypatch.setattr(module, "SLICE_VALUES", request.param[0])
    monkeypatch.setattr(module, "CACHED_VALUES", request.param[1])


def problem(dtype: torch.dtype = torch.float32, rows: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    labels[::7] = IGNORED
    hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    head = 2 * torch.randn(VOCABULARY, 6, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), labels


def plain(hidden: Tensor, head: Tensor, labels: Tensor, divisor: float = 1.0) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head), labels, ignore_index=IGNORED, reduction="sum") / divisor


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return [gradient.double() for gradient in torch.autograd.grad(loss, of)]


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_loss_and_gradients_equal_the_plain_ones(weight: float) -> None:
    hidden, head, labels = problem()
    ours, expected = linear_cross_entropy(hidden, head, labels, 7.0), plain(hidden, head, labels, 7.0)
    torch.testing.assert_close(ours, expected)
    both = zip(gradients(ours * weight, hidden, head), gradients(expected * weight, hidden, head), strict=True)
    for actual, wanted in both:
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("slices")
def test_gradcheck() -> None:
    hidden, head, labels = problem(torch.float64, rows=8)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, labels, 3.0), (hidden, head))


def test_a_tied_head_gets_the_gradient_of_both_its_uses() -> None:
    _, table, labels = problem(torch.float64)
    ids = labels.where(labels != IGNORED, 3)
    ours, wanted = (loss(torch.tanh(table[ids]), table, labels) for loss in (linear_cross_entropy, plain))
    torch.testing.assert_close(gradients(ours, table), gradients(wanted, table))


def test_bf16_is_as_near_to_the_exact_gradient_as_the_plain_computation() -> None:
    """Also over slices, whose sum rounds the head's gradient once for each: here six of them."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(96, 64, generator=generator).bfloat16().requires_grad_()
    head = (0.3 * torch.randn(500, 64, generator=generator)).bfloat16().requires_grad_()
    labels = torch.randint(0, 500, (96,), generator=generator)
    exact = plain(hidden.double(), head.double(), labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLICE_VALUES", 16 * 500)
        ours = linear_cross_entropy(hidden, head, labels)
    usual = F.cross_entropy(F.linear(hidden, head).float(), labels, reduction="sum")
    assert ours.dtype == torch.float32
    assert abs(ours - exact) < 1e-3 * exact
    for actual, beside, wanted in zip(
        *(gradients(loss, hidden, head) for loss in (ours, usual, exact)),
        strict=True,
    ):
        assert (actual - wanted).norm() < 1.5 * (beside - wanted).norm()


def test_fp16_gradients_are_computed_at_the_loss_scale_and_do_not_vanish() -> None:
    """Divided by many tokens a probability's gradient is below what fp16 can hold, 6e-8."""
    hidden, head, labels = problem()
    small, num_tokens, scale = (hidden.detach().half().requires_grad_(), 2.0**24, 2.0**20)
    exact = plain(small.detach().float(), head, labels, num_tokens)
    (wanted,) = gradients(exact, head)
    found = {}
    for expected in (1.0, scale):
        head_16 = head.detach().half().requires_grad_()
        loss = linear_cross_entropy(small, head_16, labels, num_tokens, expected)
        (gradient,) = gradients(loss * scale, head_16)
        found[expected] = (gradient.float() / scale - wanted).norm() / wanted.norm()
    assert found[scale] < 0.01 < 0.2 < found[1.0]


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    hidden, head, labels = problem()
    (hidden if frozen == "hidden" else head).requires_grad_(False)
    trained = head if frozen == "hidden" else hidden
    ours, wanted = linear_cross_entropy(hidden, head, labels), plain(hidden, head, labels)
    torch.testing.assert_close(gradients(ours, trained), gradients(wanted, trained), rtol=1e-5, atol=1e-6)


class Products(TorchDispatchMode):
    """Counts matrix products, and remembers the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_without_gradients_only_the_logits_are_computed() -> None:
    hidden, head, labels = problem()
    with torch.no_grad(), Products() as products:
        value = linear_cross_entropy(hidden, head, labels)
    assert products.count == 1
    torch.testing.assert_close(value, plain(hidden, head, labels).detach())
    with Products() as products:
        linear_cross_entropy(hidden, head, labels).backward()
    assert products.count == 3, "the logits and two gradients"


def test_all_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE_VALUES", 5 * VOCABULARY)
    hidden, head, labels = problem(rows=60)
    with Products() as products:
        linear_cross_entropy(hidden, head, labels).backward()
        score_labels(hidden, head, labels)
    assert products.largest == max(hidden.numel(), head.numel()) < 60 * VOCABULARY


@pytest.mark.usefixtures("slices")
def test_scores_count_the_labels_with_the_largest_logit() -> None:
    hidden, head, labels = problem()
    nats, correct = score_labels(hidden, head, labels)
    torch.testing.assert_close(nats, plain(hidden, head, labels).detach())
    assert int(correct) == int((F.linear(hidden, head).argmax(dim=1) == labels).sum())
    assert 0 < int(correct) < (labels != IGNORED).sum()


def test_a_label_whose_probability_vanishes_still_has_its_loss() -> None:
    hidden, head = torch.tensor([[1.0]]), torch.tensor([[200.0], [0.0]])
    assert linear_cross_entropy(hidden, head, torch.tensor([1])).item() == 200.0
