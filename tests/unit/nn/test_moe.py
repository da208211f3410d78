"""Dispatch of the mixture-of-experts layer, and losses of routers. What routers choose is in `test_routers.py`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ava_exp.config.model import Activation, DispatchBackend
from ava_exp.errors import ConfigError
from ava_exp.losses.balance import load_balancing_loss
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
) -> MoELayer:
    router = TopKRouter(
        moe_top_k=top_k,
        renormalize=False,
        routing_temperature=1.0,
        jitter=0.0,
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


@pytest.mark.parametrize("activation", [Activation.gelu, Activation.swiglu])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_grouped_equals_loop_in_output_and_gradients(activation: Activation, top_k: int) -> None:
    results = []
    for dispatch in (DispatchBackend.loop, DispatchBackend.grouped):
        layer = build_layer(activation=activation, top_k=top_k, dispatch=dispatch)
        x = random_input(50).requires_grad_()
        y, _ = layer(x)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(9))).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for loop, grouped in zip(*results, strict=True):
        assert (loop - grouped).norm() <= 1e-5 * loop.norm()


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


def test_balance_loss_is_one_when_uniform_and_grows_to_the_number_of_experts() -> None:
    uniform = torch.full((8, 4), 0.25)
    assert load_balancing_loss(uniform, torch.full((4,), 4)).item() == pytest.approx(1.0)
    collapsed = torch.tensor([[1.0, 0, 0, 0]] * 8)
    assert load_balancing_loss(collapsed, torch.tensor([16, 0, 0, 0])).item() == pytest.approx(4.0)


def test_z_loss_is_the_mean_squared_log_partition() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    expected = (torch.tensor(2.0).log() ** 2 + (torch.tensor(1.0).exp() + torch.tensor(2.0).exp()).log() ** 2) / 2
    assert router_z_loss(logits).item() == pytest.approx(expected.item())
