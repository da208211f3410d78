"""The experts' computation: the loop against a naive one, every faster way against the loop."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ava_exp.config.model import Activation, DispatchBackend, MixedActivation, SharedProjection
from ava_exp.nn.ffn import FeedForward
from ava_exp.nn.moe.dispatch import fill_up, sort_assignments
from ava_exp.nn.moe.experts import NORM_EPSILON, Experts

NUM_EXPERTS, DIM, WIDTH, NUM_TOKENS = 6, 16, 24, 40
ACTIVATIONS = [Activation.gelu, Activation.swiglu, Activation.mixture]
MIXED = [MixedActivation.tanh, MixedActivation.gelu, MixedActivation.relu]
VARIANTS = list(itertools.product(ACTIVATIONS, SharedProjection, [False, True]))
ROUTINGS = ["two", "all", "one expert", "dropped", "expert choice", "nothing", "no tokens", "no tokens, ragged"]


def build(
    dispatch: DispatchBackend,
    activation: Activation = Activation.swiglu,
    share: SharedProjection = SharedProjection.none,
    norm: bool = False,
    num_experts: int = NUM_EXPERTS,
    **kwargs: Any,
) -> Experts:
    experts = Experts(num_experts, DIM, WIDTH, activation, dispatch, share, norm, mixed_activations=MIXED, **kwargs)
    generator = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)
    return experts


def route(name: str) -> tuple[Tensor, Tensor, bool]:
    """Return experts, weights, and whether some assignments do not exist; the weights of these are not numbers."""
    generator = torch.Generator().manual_seed(2)
    shuffled = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator).argsort()
    missing = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator) < 0.6
    expert_ids = {
        "two": shuffled[:, :2],
        "all": shuffled,
        "one expert": torch.full((NUM_TOKENS, 1), 3),
        "dropped": shuffled[:, :3].masked_fill(missing[:, :3], -1),
        "expert choice": torch.arange(NUM_EXPERTS).expand(NUM_TOKENS, -1).masked_fill(missing, -1),
        "nothing": torch.full((NUM_TOKENS, 2), -1),
        "no tokens": shuffled[:0, :2],
        "no tokens, ragged": shuffled[:0, :2],
    }[name]
    weights = torch.rand(expert_ids.shape, generator=generator).masked_fill(expert_ids < 0, float("nan"))
    return expert_ids, weights, name in ("dropped", "expert choice", "nothing", "no tokens, ragged")


def some(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(experts: Experts, x_ND: Tensor, expert_ids_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
    """One token and one of its experts at a time, by the definition."""
    y_ND = torch.zeros_like(x_ND)
    for token, choice in itertools.product(*map(range, expert_ids_Nk.shape)):
        expert = int(expert_ids_Nk[token, choice])
        if expert >= 0:
            h = (experts.up if experts.up.ndim == 2 else experts.up[expert]) @ x_ND[token]
            h = activated(experts, h)
            if experts.norm is not None:
                h = h / (h.square().mean() + NORM_EPSILON).sqrt() * experts.norm[expert]
            down = experts.down if experts.down.ndim == 2 else experts.down[expert]
            y_ND[token] += weights_Nk[token, choice] * (down @ h)
    return y_ND


def activated(experts: Experts, h: Tensor) -> Tensor:
    if experts.mixture is not None:
        weights = experts.mixture.logits.exp() / experts.mixture.logits.exp().sum()
        return weights[0] * h.tanh() + weights[1] * F.gelu(h) + weights[2] * h.clamp(min=0)
    return F.silu(h[:WIDTH]) * h[WIDTH:] if experts.activation is Activation.swiglu else F.gelu(h)


def results(experts: Experts, name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the output and the gradients of input, weights and parameters."""
    expert_ids, weights, ragged = route(name)
    x = some(len(expert_ids), DIM).to(dtype).requires_grad_()
    weights.requires_grad_()
    y = experts.to(dtype)(x, expert_ids, weights, ragged)
    assert y.dtype == dtype
    y.backward(some(len(expert_ids), DIM, seed=4).to(dtype))
    gradients = [x.grad, weights.grad, *(parameter.grad for parameter in experts.parameters())]
    assert all(gradient is not None for gradient in gradients)
    return [y.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize(("activation", "share", "norm"), VARIANTS)
@pytest.mark.parametrize("name", ["two", "all", "dropped", "expert choice"])
def test_the_loop_is_what_the_definition_says(
    name: str, activation: Activation, share: SharedProjection, norm: bool
) -> None:
    experts = build(DispatchBackend.loop, activation, share, norm).double()
    expert_ids, weights, ragged = route(name)
    x = some(NUM_TOKENS, DIM).double()
    torch.testing.assert_close(
        experts(x, expert_ids, weights, ragged), naive(experts, x, expert_ids, weights), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize(("activation", "share", "norm"), VARIANTS)
@pytest.mark.parametrize("name", ROUTINGS)
def test_grouped_equals_the_loop_in_output_and_gradients(
    name: str, activation: Activation, share: SharedProjection, norm: bool
) -> None:
    loop = results(build(DispatchBackend.loop, activation, share, norm), name)
    grouped = results(build(DispatchBackend.grouped, activation, share, norm), name)
    for expected, found in zip(loop, grouped, strict=True):
        assert (expected - found).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("dispatch", [DispatchBackend.loop, DispatchBackend.grouped])
@pytest.mark.parametrize(("activation", "share", "norm"), VARIANTS)
@pytest.mark.parametrize("name", ["two", "all", "expert choice"])
def test_bf16_is_near_fp64(
    name: str, activation: Activation, share: SharedProjection, norm: bool, dispatch: DispatchBackend
) -> None:
    """Compare with the same rounded weights, input and gradient, computed exactly."""
    rounded = build(dispatch, activation, share, norm).to(torch.bfloat16)
    exact = build(DispatchBackend.loop, activation, share, norm)
    exact.load_state_dict(rounded.state_dict())
    expert_ids, weights, ragged = route(name)
    x = some(NUM_TOKENS, DIM).to(torch.bfloat16)
    expected = exact.double()(x.double(), expert_ids, weights, ragged)
    found = rounded(x, expert_ids, weights, ragged).double()
    assert (expected - found).norm() <= 0.01 * expected.norm()
    for expected, found in zip(
        results(exact, name, torch.float64), results(rounded, name, torch.bfloat16), strict=True
    ):
        # What the weights of a mixture get is a small difference of sums over all activations.
        bound = 0.05 if expected.shape == (len(MIXED),) else 0.02
        assert (expected - found.double()).norm() <= bound * expected.norm()


@pytest.mark.parametrize("dispatch", [DispatchBackend.loop, DispatchBackend.grouped])
@pytest.mark.parametrize("name", ["dropped", "expert choice", "nothing"])
def test_what_does_not_exist_adds_nothing_whatever_its_weight(name: str, dispatch: DispatchBackend) -> None:
    """`route` gives the missing assignments weights that are not numbers."""
    expert_ids, _, _ = route(name)
    y, grad_x, grad_weights, *_ = results(build(dispatch), name)
    assert y.isfinite().all() and grad_x.isfinite().all()
    assert (grad_weights[expert_ids < 0] == 0).all()
    assert (grad_weights[expert_ids >= 0] != 0).all()
    alone = (expert_ids < 0).all(dim=1)
    assert alone.any() and (y[alone] == 0).all() and (grad_x[alone] == 0).all()


@pytest.mark.parametrize("dispatch", [DispatchBackend.loop, DispatchBackend.grouped])
@pytest.mark.parametrize("norm", [False, True])
def test_experts_without_tokens_get_gradients_of_zeros(norm: bool, dispatch: DispatchBackend) -> None:
    for name in ("one expert", "nothing", "no tokens"):
        _, _, _, *gradients = results(build(dispatch, norm=norm), name)
        used = {"one expert": [3]}.get(name, [])
        for gradient in gradients:
            assert [e for e in range(NUM_EXPERTS) if gradient[e].abs().sum() > 0] == used


@pytest.mark.parametrize(("activation", "share", "norm"), VARIANTS)
@pytest.mark.parametrize("name", ["two", "dropped"])
def test_gradcheck_of_the_loop(name: str, activation: Activation, share: SharedProjection, norm: bool) -> None:
    experts = build(DispatchBackend.loop, activation, share, norm, num_experts=NUM_EXPERTS).double()
    expert_ids, weights, ragged = (value[:4] if isinstance(value, Tensor) else value for value in route(name))
    names = [parameter for parameter, _ in experts.named_parameters()]

    def run(x: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        values = dict(zip(names, parameters, strict=True))
        y: Tensor = torch.func.functional_call(experts, values, (x, expert_ids, weights, ragged))
        return y

    assert isinstance(weights, Tensor)
    inputs = [some(4, DIM).double(), weights.nan_to_num(1.0).double(), *(p.detach() for p in experts.parameters())]
    assert torch.autograd.gradcheck(run, [value.clone().requires_grad_() for value in inputs], fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("share", list(SharedProjection))
def test_one_expert_is_the_dense_network_bit_for_bit(share: SharedProjection, activation: Activation) -> None:
    experts = build(DispatchBackend.loop, activation, share, num_experts=1)
    dense = FeedForward(DIM, WIDTH, activation, mixed_activations=MIXED)
    if experts.mixture is not None and dense.mixture is not None:
        dense.mixture.logits.data.copy_(experts.mixture.logits)
    dense.up.weight.data.copy_(experts.up.reshape(dense.up.weight.shape))
    dense.down.weight.data.copy_(experts.down.reshape(dense.down.weight.shape))
    x = some(NUM_TOKENS, DIM)
    y = experts(x, torch.zeros(NUM_TOKENS, 1, dtype=torch.long), torch.ones(NUM_TOKENS, 1))
    assert torch.equal(y, dense(x))


@pytest.mark.parametrize("share", list(SharedProjection))
def test_the_same_expert_twice_counts_twice(share: SharedProjection) -> None:
    """All six choices of a token may fall on fewer experts."""
    expert_ids = torch.randint(0, NUM_EXPERTS, (NUM_TOKENS, NUM_EXPERTS), generator=torch.Generator().manual_seed(5))
    weights, x = torch.rand(expert_ids.shape), some(NUM_TOKENS, DIM)
    loop, grouped = (
        build(dispatch, share=share)(x, expert_ids, weights)
        for dispatch in (DispatchBackend.loop, DispatchBackend.grouped)
    )
    assert (loop - grouped).norm() <= 1e-5 * loop.norm()


@pytest.mark.parametrize("name", ["two", "all", "expert choice"])
def test_a_repetition_gives_the_same_bits(name: str) -> None:
    first, second = (results(build(DispatchBackend.grouped, norm=True), name, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("dispatch", [DispatchBackend.loop, DispatchBackend.grouped])
@pytest.mark.parametrize("share", list(SharedProjection))
@pytest.mark.parametrize("name", ["two", "all"])
def test_dropout_is_seeded_unbiased_and_off_at_evaluation(
    name: str, share: SharedProjection, dispatch: DispatchBackend
) -> None:
    experts = build(dispatch, share=share, dropout=0.25)
    expert_ids, weights, ragged = route(name)
    x = some(NUM_TOKENS, DIM)

    def output(seed: int) -> Tensor:
        torch.manual_seed(seed)
        y: Tensor = experts(x, expert_ids, weights, ragged)
        return y.detach()

    assert torch.equal(output(0), output(0))
    assert not torch.equal(output(0), output(1))
    mean = torch.stack([output(seed) for seed in range(100)]).mean(dim=0)
    experts.eval()
    assert torch.equal(output(0), output(1))
    assert (mean - output(0)).norm() <= 0.1 * output(0).norm()  # a bias of 1 / (1 - 0.25) would be 0.33


def test_each_expert_drops_its_own_activations() -> None:
    """With one projection for all, two experts of a token still differ in what is dropped."""
    experts = build(DispatchBackend.grouped, share=SharedProjection.up, num_experts=2, dropout=0.5)
    experts.down.data[1] = -experts.down.data[0]
    expert_ids = torch.tensor([[0, 1]]).expand(NUM_TOKENS, -1)
    weights = torch.full((NUM_TOKENS, 2), 0.5)
    assert experts(some(NUM_TOKENS, DIM), expert_ids, weights).abs().max() > 0.1
    experts.eval()
    assert experts(some(NUM_TOKENS, DIM), expert_ids, weights).abs().max() < 1e-5


def test_a_missing_assignment_must_be_announced() -> None:
    expert_ids, weights, _ = route("dropped")
    with pytest.raises(AssertionError, match="ragged"):
        build(DispatchBackend.grouped)(some(NUM_TOKENS, DIM), expert_ids, weights)


@pytest.mark.parametrize("ragged", [False, True])
def test_rows_stand_in_the_order_of_the_experts(ragged: bool) -> None:
    expert_ids, _, _ = route("dropped" if ragged else "two")
    rows = sort_assignments(expert_ids, NUM_EXPERTS, ragged)
    real = expert_ids.flatten()[rows.kept] if rows.kept is not None else expert_ids.flatten()
    token = (expert_ids >= 0).nonzero()[:, 0]
    assert torch.equal(rows.experts()[rows.place], real)
    assert torch.equal(rows.token[rows.place], token)
    assert torch.equal(token[rows.starts[rows.starts < len(token)]].unique(), token.unique())
    assert rows.ends[-1] == len(rows.token) and rows.place.unique().numel() == len(token)


def test_sizes_of_groups_are_few_and_waste_little() -> None:
    sizes = [fill_up(num_rows) for num_rows in range(4097)]
    assert len(set(sizes)) < 100
    assert all(0 <= size - num_rows <= max(7, num_rows / 16) for num_rows, size in enumerate(sizes))
