"""The mixture-of-experts layer against naive references, degenerate identities and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ava_exp.config.model import Activation, DispatchBackend
from ava_exp.errors import ConfigError
from ava_exp.losses.balance import load_balancing_loss
from ava_exp.nn.ffn import FeedForward
from ava_exp.nn.moe.experts import Experts
from ava_exp.nn.moe.layer import MoELayer
from ava_exp.nn.moe.routing import router_z_loss
from ava_exp.nn.moe.topk import TopKRouter

DIM, WIDTH = 16, 24


def build_layer(
    num_experts: int = 4,
    top_k: int = 2,
    activation: Activation = Activation.swiglu,
    dispatch: DispatchBackend = DispatchBackend.loop,
    dtype: torch.dtype = torch.float32,
    renormalize: bool = True,
    jitter: float = 0.0,
) -> MoELayer:
    router = TopKRouter(
        moe_top_k=top_k,
        renormalize=renormalize,
        routing_temperature=1.0,
        jitter=jitter,
        whole_expert_dropout=0.0,
        dim=DIM,
        num_experts=num_experts,
    )
    layer = MoELayer(router, Experts(num_experts, DIM, WIDTH, activation, dispatch))
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)
    return layer.to(dtype)


def random_input(num_tokens: int = 20, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, num_tokens, DIM, generator=torch.Generator().manual_seed(4)).to(dtype)


def expert_output(layer: MoELayer, expert: int, x: Tensor) -> Tensor:
    h = layer.experts.up[expert] @ x
    h = F.silu(h[:WIDTH]) * h[WIDTH:] if layer.experts.activation is Activation.swiglu else F.gelu(h)
    return layer.experts.down[expert] @ h


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("dispatch", [DispatchBackend.loop, DispatchBackend.grouped])
def test_equals_a_token_by_token_reference(activation: Activation, dispatch: DispatchBackend) -> None:
    layer, x = build_layer(activation=activation, dispatch=dispatch), random_input()
    y, _ = layer(x)
    for token in range(x.shape[1]):
        probabilities = (layer.router.weight @ x[0, token]).softmax(dim=0)
        best = probabilities.argsort(descending=True)[:2]
        weights = probabilities[best] / probabilities[best].sum()
        expected = sum(w * expert_output(layer, int(e), x[0, token]) for w, e in zip(weights, best, strict=True))
        torch.testing.assert_close(y[0, token], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_grouped_equals_loop_in_output_and_gradients(activation: Activation, top_k: int) -> None:
    results = []
    for dispatch in (DispatchBackend.loop, DispatchBackend.grouped):
        layer = build_layer(activation=activation, top_k=top_k, dispatch=dispatch, renormalize=False)
        x = random_input(50).requires_grad_()
        y, _ = layer(x)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(9))).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for loop, grouped in zip(*results, strict=True):
        assert (loop - grouped).norm() <= 1e-5 * loop.norm()


@pytest.mark.parametrize("activation", list(Activation))
def test_one_expert_equals_the_dense_network_bit_for_bit(activation: Activation) -> None:
    layer = build_layer(num_experts=1, top_k=1, activation=activation)
    dense = FeedForward(DIM, WIDTH, activation)
    dense.up.weight.data.copy_(layer.experts.up[0])
    dense.down.weight.data.copy_(layer.experts.down[0])
    x = random_input(64)
    assert torch.equal(layer(x)[0], dense(x))


def test_equal_gates_over_all_experts_are_the_average() -> None:
    layer = build_layer(top_k=4)
    layer.router.weight.data.zero_()
    x = random_input(8)
    average = torch.stack([torch.stack([expert_output(layer, e, t) for t in x[0]]) for e in range(4)]).mean(dim=0)
    torch.testing.assert_close(layer(x)[0][0], average)


@pytest.mark.parametrize("renormalize", [True, False])
def test_gradcheck_in_float64(renormalize: bool) -> None:
    layer = build_layer(num_experts=3, dtype=torch.float64, renormalize=renormalize)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        y, _ = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return y  # type: ignore[no-any-return]

    inputs = [random_input(5, torch.float64), *(p.detach() for p in layer.parameters())]
    assert torch.autograd.gradcheck(run, [value.clone().requires_grad_() for value in inputs])


def test_auto_falls_back_to_the_loop_once_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    layer = build_layer(dispatch=DispatchBackend.auto, dtype=torch.float64)
    layer(random_input(dtype=torch.float64))
    layer(random_input(dtype=torch.float64))
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "float64" in caplog.text


def test_grouped_refuses_what_it_cannot_compute() -> None:
    layer = build_layer(dispatch=DispatchBackend.grouped, dtype=torch.float64)
    with pytest.raises(ConfigError, match=r"sparsity\.dispatch=auto"):
        layer(random_input(dtype=torch.float64))


@pytest.mark.parametrize("dispatch", [DispatchBackend.loop, DispatchBackend.grouped])
def test_an_expert_without_tokens_gets_a_gradient_of_zeros(dispatch: DispatchBackend) -> None:
    layer = build_layer(top_k=1, dispatch=dispatch)
    layer.router.weight.data[0] = 0
    layer.router.weight.data[1:] = -10.0  # positive inputs below: expert 0 always wins
    y, routing = layer(random_input().abs())
    y.square().sum().backward()
    assert routing.counts.tolist() == [20, 0, 0, 0]
    assert layer.experts.up.grad is not None and layer.experts.up.grad[0].abs().sum() > 0
    assert layer.experts.up.grad[1:].abs().sum() == 0


def test_a_token_does_not_see_the_others() -> None:
    layer, x = build_layer(dispatch=DispatchBackend.grouped), random_input()
    changed = x.clone()
    changed[0, 10] += 1
    before, after = layer(x)[0], layer(changed)[0]
    others = torch.arange(20) != 10
    assert torch.equal(before[0, others], after[0, others])
    assert not torch.equal(before[0, 10], after[0, 10])


def test_counts_and_shares() -> None:
    _, routing = build_layer()(random_input(20))
    assert routing.counts.sum() == 40
    assert torch.equal(routing.counts, torch.bincount(routing.expert_ids.flatten(), minlength=4))
    torch.testing.assert_close(routing.weights.sum(dim=1), torch.ones(20))


def test_balance_loss_is_one_when_uniform_and_grows_to_the_number_of_experts() -> None:
    uniform = torch.full((8, 4), 0.25)
    assert load_balancing_loss(uniform, torch.full((4,), 4)).item() == pytest.approx(1.0)
    collapsed = torch.tensor([[1.0, 0, 0, 0]] * 8)
    assert load_balancing_loss(collapsed, torch.tensor([16, 0, 0, 0])).item() == pytest.approx(4.0)


def test_z_loss_is_the_mean_squared_log_partition() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    expected = (torch.tensor(2.0).log() ** 2 + (torch.tensor(1.0).exp() + torch.tensor(2.0).exp()).log() ** 2) / 2
    assert router_z_loss(logits).item() == pytest.approx(expected.item())


def test_jitter_acts_while_training_only() -> None:
    layer, x = build_layer(jitter=0.5), random_input()
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_renormalised_top_1_gives_the_router_no_gradient_from_the_output() -> None:
    sizes = []
    for renormalize in (False, True):
        layer = build_layer(top_k=1, renormalize=renormalize)
        layer(random_input())[0].square().sum().backward()
        gradient = layer.router.weight.grad
        sizes.append(0.0 if gradient is None else gradient.abs().max().item())
    assert sizes[0] > 0
    assert sizes[1] < 1e-5 * sizes[0]
