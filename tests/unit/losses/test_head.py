"""Measures of the output distribution against direct computations on all logits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ava_exp.losses.cross_entropy as cross_entropy
from ava_exp.data.loader import IGNORED
from ava_exp.losses.cross_entropy import linear_cross_entropy
from ava_exp.losses.head import Measure, linear_measures
from ava_exp.losses.repetition import TokenSets, last_tokens, repeating_tokens

VOCABULARY, SEQUENCES, LENGTH = 7, 3, 12
UNLIKELY = (Measure.immediate_repetition, Measure.repetition)
WEIGHTS = {
    Measure.cross_entropy: 1.0,
    Measure.label_smoothing: 0.1,
    Measure.z: 0.03,
    Measure.immediate_repetition: 0.7,
    Measure.repetition: 0.5,
    Measure.entropy: -0.2,
    Measure.diversity: -0.9,
}


@pytest.fixture(params=[(7, 7), (63, 21), (10_000, 10_000)], ids=["one row", "uneven slices", "one slice"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of one row, slices that divide neither each other nor the rows, and everything at once."""
    monkeypatch.setattr(cross_entropy, "SLICE_VALUES", request.param[0])
    monkeypatch.setattr(cross_entropy, "CACHED_VALUES", request.param[1])


class Problem:
    """Tokens of few kinds, so that much is repeated; some labels are ignored."""

    def __init__(self, dtype: torch.dtype = torch.float64, length: int = LENGTH, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, VOCABULARY - 3, (SEQUENCES, length + 1), generator=generator)
        self.inputs, self.labels = ids[:, :-1], ids[:, 1:].clone()
        self.labels[:, ::5] = IGNORED
        hidden = torch.randn(SEQUENCES * length, 5, generator=generator, dtype=torch.float64)
        head = scale * torch.randn(VOCABULARY, 5, generator=generator, dtype=torch.float64)
        self.hidden, self.head = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()

    @property
    def unwanted(self) -> dict[Measure, TokenSets]:
        return {
            Measure.immediate_repetition: last_tokens(self.inputs, self.labels),
            Measure.repetition: repeating_tokens(self.inputs, self.labels, 3),
        }

    def measured(self, weights: dict[Measure, float], **settings: Any) -> dict[Measure, Tensor]:
        return linear_measures(
            self.hidden, self.head, self.labels.flatten(), weights, unwanted=self.unwanted, **settings
        )

    def direct(self) -> dict[Measure, Tensor]:
        """By the definitions, one position after the other."""
        logits = F.linear(self.hidden, self.head)
        log_p = logits.log_softmax(dim=1)
        valid = self.labels.flatten() != IGNORED
        values = {measure: logits.new_zeros(()) for measure in Measure}
        for n, y in enumerate(self.labels.flatten().tolist()):
            if y == IGNORED:
                continue
            sequence, t = divmod(n, self.inputs.shape[1])
            values[Measure.cross_entropy] -= log_p[n, y]
            values[Measure.label_smoothing] += log_p[n, y] - log_p[n].mean()
            values[Measure.z] += logits[n].exp().sum().log() ** 2
            values[Measure.entropy] -= (log_p[n].exp() * log_p[n]).sum()
            context = self.inputs[sequence, : t + 1].tolist()
            for measure, tokens in (
                (Measure.immediate_repetition, {context[-1]} - {y}),
                (Measure.repetition, completing(context, 3) - {y}),
            ):
                for token in tokens:
                    values[measure] -= (1 - log_p[n, token].exp()).log()
        mean = log_p[valid].exp().mean(dim=0)
        values[Measure.diversity] = -(mean * mean.log()).sum() * valid.sum()
        return values


def completing(context: list[int], size: int) -> set[int]:
    """Return what would complete an n-gram of the context."""
    ngrams = [context[i : i + size] for i in range(len(context) - size + 1)]
    last = context[len(context) - size + 1 :]
    return {ngram[-1] for ngram in ngrams if ngram[:-1] == last} if len(context) >= size else set()


def weighted(values: dict[Measure, Tensor], weights: dict[Measure, float]) -> Tensor:
    return torch.stack([weight * values[measure] for measure, weight in weights.items()]).sum()


def assert_equal(problem: Problem, weights: dict[Measure, float], factor: float = 1.0) -> None:
    ours, direct = problem.measured(weights, divisor=7.0), problem.direct()
    assert list(ours) == list(weights)
    for measure, value in ours.items():
        torch.testing.assert_close(value, direct[measure] / 7.0)
    inputs = (problem.hidden, problem.head)
    found = torch.autograd.grad(factor * weighted(ours, weights), inputs)
    wanted = torch.autograd.grad(factor * weighted(direct, weights) / 7.0, inputs)
    torch.testing.assert_close(found, wanted)
    assert all(gradient.abs().max() > 1e-3 for gradient in wanted)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("measure", list(Measure))
def test_each_measure_is_its_definition(measure: Measure) -> None:
    assert_equal(Problem(), {measure: 1.0})


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_all_at_once_are_the_weighted_sum(factor: float) -> None:
    assert_equal(Problem(), WEIGHTS, factor)


@pytest.mark.parametrize("pair", list(itertools.combinations(Measure, 2)), ids=lambda pair: f"{pair[0]}-{pair[1]}")
def test_every_two_compose(pair: tuple[Measure, Measure]) -> None:
    assert_equal(Problem(), {measure: WEIGHTS[measure] for measure in pair})


@pytest.mark.parametrize("measure", list(Measure))
def test_gradcheck(measure: Measure) -> None:
    problem = Problem(length=4)

    def value(hidden: Tensor, head: Tensor) -> Tensor:
        problem.hidden, problem.head = hidden, head
        return problem.measured({measure: WEIGHTS[measure]})[measure] * WEIGHTS[measure]

    assert torch.autograd.gradcheck(value, (problem.hidden, problem.head))


def test_label_smoothing_is_torch_s() -> None:
    problem, epsilon = Problem(), 0.2
    values = problem.measured({Measure.cross_entropy: 1.0, Measure.label_smoothing: epsilon})
    logits, labels = F.linear(problem.hidden, problem.head), problem.labels.flatten()
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=epsilon)
    torch.testing.assert_close(values[Measure.cross_entropy] + epsilon * values[Measure.label_smoothing], expected)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cross_entropy_alone_is_the_usual_one(dtype: torch.dtype) -> None:
    """Bit for bit: what is reported as the loss does not depend on what else is measured."""
    problem = Problem(dtype)
    usual = linear_cross_entropy(problem.hidden, problem.head, problem.labels.flatten(), 7.0)
    ours = problem.measured({Measure.cross_entropy: 1.0}, divisor=7.0)[Measure.cross_entropy]
    beside = problem.measured(WEIGHTS, divisor=7.0)[Measure.cross_entropy]
    assert torch.equal(ours, usual) and torch.equal(beside, usual)
    inputs = (problem.hidden, problem.head)
    for found, wanted in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(usual, inputs), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.usefixtures("slices")
def test_a_weight_of_0_measures_without_a_gradient() -> None:
    problem, alone = Problem(), {Measure.cross_entropy: 1.0}
    values = problem.measured(dict.fromkeys(Measure, 0.0) | alone)
    for measure, value in problem.direct().items():
        torch.testing.assert_close(values[measure], value)
    inputs = (problem.hidden, problem.head)
    found = torch.autograd.grad(values[Measure.cross_entropy], inputs)
    torch.testing.assert_close(found, torch.autograd.grad(problem.direct()[Measure.cross_entropy], inputs))
    nothing = problem.measured({Measure.z: 0.0})[Measure.z]
    assert not any(gradient.any() for gradient in torch.autograd.grad(nothing, inputs))


@pytest.mark.usefixtures("slices")
def test_every_row_s_own_nats() -> None:
    problem, nats = Problem(), torch.empty(SEQUENCES * LENGTH, dtype=torch.float64)
    labels = problem.labels.flatten()
    problem.measured(WEIGHTS, nats_N=nats)
    expected = F.cross_entropy(F.linear(problem.hidden, problem.head), labels, ignore_index=IGNORED, reduction="none")
    valid = labels != IGNORED
    torch.testing.assert_close(nats[valid], expected.detach()[valid])


def test_gradients_of_another_combination_are_refused() -> None:
    values = Problem().measured({Measure.cross_entropy: 1.0, Measure.z: 0.1})
    with pytest.raises(AssertionError, match="minimised with their weights"):
        (values[Measure.cross_entropy] + values[Measure.z]).backward()


def test_without_gradients_the_values_are_the_same() -> None:
    problem = Problem()
    with torch.no_grad():
        values = problem.measured(WEIGHTS)
    expected = problem.measured(WEIGHTS)
    assert not any(value.requires_grad for value in values.values())
    assert all(torch.equal(values[measure], expected[measure]) for measure in WEIGHTS)


@pytest.mark.parametrize("measure", list(Measure))
def test_bf16_is_as_near_to_the_exact_gradient_as_the_plain_computation(measure: Measure) -> None:
    problem = Problem(torch.bfloat16, length=40)
    ours = problem.measured({measure: 1.0})[measure]
    assert ours.dtype == torch.float32
    exact, usual = Problem(torch.bfloat16, length=40), Problem(torch.bfloat16, length=40)
    exact.hidden, exact.head = exact.hidden.detach().double(), exact.head.detach().double()
    usual.hidden, usual.head = usual.hidden.detach(), usual.head.detach()
    for other in (exact, usual):
        other.hidden.requires_grad_(), other.head.requires_grad_()
    wanted = exact.direct()[measure]
    torch.testing.assert_close(ours.double(), wanted, rtol=0.01, atol=0.01)
    gradients = torch.autograd.grad(ours, (problem.hidden, problem.head))
    for found, expected in zip(gradients, torch.autograd.grad(wanted, (exact.hidden, exact.head)), strict=True):
        assert (found.double() - expected).norm() < 0.01 * expected.norm()


def test_fp16_gradients_are_computed_at_the_loss_scale_and_do_not_vanish() -> None:
    num_tokens, scale, found = 2.0**24, 2.0**20, {}
    exact = Problem(torch.float16)
    exact.hidden, exact.head = (t.detach().double().requires_grad_() for t in (exact.hidden, exact.head))
    (wanted,) = torch.autograd.grad(weighted(exact.direct(), WEIGHTS) / num_tokens, exact.head)
    for expected in (1.0, scale):
        problem = Problem(torch.float16)
        values = problem.measured(WEIGHTS, divisor=num_tokens, expected_scale=expected)
        (gradient,) = torch.autograd.grad(weighted(values, WEIGHTS) * scale, problem.head)
        found[expected] = float((gradient.double() / scale - wanted).norm() / wanted.norm())
    assert found[scale] < 0.01 < 0.2 < found[1.0]


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    problem = Problem()
    getattr(problem, frozen).requires_grad_(False)
    trained = problem.head if frozen == "hidden" else problem.hidden
    found = torch.autograd.grad(weighted(problem.measured(WEIGHTS), WEIGHTS), trained)
    torch.testing.assert_close(found, torch.autograd.grad(weighted(problem.direct(), WEIGHTS), trained))


def test_a_batch_without_labels_is_worth_nothing() -> None:
    problem = Problem(torch.float32)
    problem.labels.fill_(IGNORED)
    values = problem.measured(WEIGHTS)
    gradients = torch.autograd.grad(weighted(values, WEIGHTS), (problem.hidden, problem.head))
    assert not any(value.any() for value in values.values())
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("measure", list(Measure))
def test_certainty_gives_finite_values_and_gradients(measure: Measure) -> None:
    """Probabilities of 1, and of 0 in fp32: what is repeated with certainty costs most, and still has a gradient."""
    problem = Problem(torch.float32, scale=1000.0)
    value = problem.measured({measure: 1.0})[measure]
    gradients = torch.autograd.grad(value, (problem.hidden, problem.head))
    assert value.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    if measure in UNLIKELY:
        assert value > 11 and gradients[0].abs().max() > 100


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


@pytest.mark.parametrize(("measures", "products"), [(set(Measure) - {Measure.diversity}, 3), (set(Measure), 4)])
def test_one_pass_is_enough_but_for_diversity(measures: set[Measure], products: int) -> None:
    problem = Problem()
    weights = {measure: weight for measure, weight in WEIGHTS.items() if measure in measures}
    with Products() as counted:
        weighted(problem.measured(weights), weights).backward()
    assert counted.count == products


def test_all_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "SLICE_VALUES", 5 * VOCABULARY)
    problem = Problem(length=40)
    unwanted = problem.unwanted
    with Products() as counted:
        values = linear_measures(problem.hidden, problem.head, problem.labels.flatten(), WEIGHTS, unwanted=unwanted)
        weighted(values, WEIGHTS).backward()
    assert counted.largest <= max(problem.hidden.numel(), *(len(one.rows) for one in unwanted.values()))
    assert counted.largest < problem.labels.numel() * VOCABULARY


def as_sets(tokens: TokenSets) -> dict[int, set[int]]:
    sets: dict[int, set[int]] = {}
    for row, token in zip(tokens.rows.tolist(), tokens.ids.tolist(), strict=True):
        assert token not in sets.setdefault(row, set()), "a pair is there twice"
        sets[row].add(token)
    assert tokens.rows.tolist() == sorted(tokens.rows.tolist())
    return sets


@pytest.mark.parametrize("compared", [1, 10_000], ids=["sequence by sequence", "at once"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 30])
def test_repeating_tokens_are_those_of_the_definition(
    size: int, compared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ava_exp.losses.repetition.COMPARED_PAIRS", compared)
    problem = Problem(length=25)
    expected = {}
    for sequence, (inputs, labels) in enumerate(zip(problem.inputs.tolist(), problem.labels.tolist(), strict=True)):
        for t, label in enumerate(labels):
            tokens = completing(inputs[: t + 1], size) - {label} if label != IGNORED else set()
            expected |= {sequence * 25 + t: tokens} if tokens else {}
    assert as_sets(repeating_tokens(problem.inputs, problem.labels, size)) == expected
    assert bool(expected) is (size < 30)


def test_a_sequence_of_one_token_repeats_nothing_but_itself() -> None:
    ids, labels = torch.tensor([[3]]), torch.tensor([[4]])
    assert as_sets(last_tokens(ids, labels)) == {0: {3}}
    assert as_sets(repeating_tokens(ids, labels, 2)) == {}
    assert as_sets(repeating_tokens(ids, labels, 1)) == {0: {3}}
