"""Gradients of every router with both activations and every overflow, and those that are missing by design."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from ava_exp.config.model import (
    Activation,
    DispatchBackend,
    Overflow,
)
from ava_exp.config.router import (
    DeepSeekRouterConfig,
    DynamicRouterConfig,
    HierarchicalRouterConfig,
    RouterConfig,
    SinkhornRouterConfig,
    TopKRouterConfig,
    TwoStageRouterConfig,
)
from ava_exp.losses.balance import absolute_deviation_loss
from tests.unit.nn.routing_cases import (
    ALL_CASES,
    CASES,
    NUM_EXPERTS,
    backward,
    build_layer,
    case_id,
    some_input,
)

WITHOUT_A_GRADIENT_FROM_THE_OUTPUT: dict[str, tuple[RouterConfig, slice]] = {
    "topk": (TopKRouterConfig(moe_top_k=1), slice(None)),
    "sinkhorn": (SinkhornRouterConfig(moe_top_k=1), slice(None)),
    "deepseek": (DeepSeekRouterConfig(moe_top_k=1), slice(None)),
    "two_stage": (TwoStageRouterConfig(moe_top_k=1), slice(None)),
    "dynamic": (DynamicRouterConfig(max_experts=1, renormalize=True), slice(None)),
    "hierarchical": (HierarchicalRouterConfig(choices=[1, 1], renormalize=True), slice(None)),
    "root of a tree that follows one child": (HierarchicalRouterConfig(renormalize=True), slice(0, 2)),
}
"""A weight that is divided by itself is 1: these rows of routers learn from the losses of routers alone."""


@pytest.mark.parametrize(("name", "overflow", "activation"), ALL_CASES, ids=case_id)
def test_every_parameter_has_a_gradient(name: str, overflow: Overflow | None, activation: Activation) -> None:
    layer = build_layer(name, overflow, activation)
    routing = backward(layer, some_input(3, 12).requires_grad_())
    used = routing.counts > 0
    assert used.all()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None, parameter_name
        rows = parameter.grad.flatten(1).abs().sum(dim=1)
        assert (rows > 1e-8).all(), parameter_name


@pytest.mark.parametrize("name", WITHOUT_A_GRADIENT_FROM_THE_OUTPUT)
def test_what_is_divided_by_itself_has_no_gradient_from_the_output(name: str) -> None:
    config, rows = WITHOUT_A_GRADIENT_FROM_THE_OUTPUT[name]
    layer, x = build_layer(config), some_input()
    backward(layer, x)
    gradient = layer.router.weight.grad
    assert gradient is not None and gradient[rows].abs().max() < 1e-12
    routing = layer(x)[1]
    (absolute_deviation_loss(routing.probabilities) + routing.losses["router_z_loss"]).backward()
    assert (gradient[rows].abs().sum(dim=1) > 1e-6).all(), "the router's own losses reach it"
    plain = copy.copy(config)
    plain.renormalize = False  # type: ignore[attr-defined]
    other = build_layer(plain)
    backward(other, some_input())
    assert other.router.weight.grad is not None and other.router.weight.grad[rows].abs().max() > 1e-4


@pytest.mark.parametrize(("name", "overflow"), CASES, ids=case_id)
def test_an_expert_without_tokens_gets_zeros(
    name: str, overflow: Overflow | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = build_layer(name, overflow)
    absent = torch.arange(NUM_EXPERTS) < 3
    monkeypatch.setattr(layer.router, "absent_experts", lambda: absent)
    routing = backward(layer, some_input())
    assert routing.counts[:3].tolist() == [0, 0, 0] and (routing.counts[3:] > 0).any()
    for weights in (layer.experts.up, layer.experts.down):
        assert weights.grad is not None
        assert weights.grad[:3].abs().sum() == 0
        assert (weights.grad[3:].abs().sum() > 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dispatch", [DispatchBackend.loop, DispatchBackend.grouped])
def test_a_micro_batch_without_any_visit(dispatch: DispatchBackend) -> None:
    """One token that no expert takes, as happens while generating."""
    layer = build_layer("expert_choice", dtype=torch.float32, dispatch=dispatch).eval()
    layer.router.get_buffer("threshold").fill_(2)
    x = some_input(1, 1, torch.float32).requires_grad_()
    routing = backward(layer, x)
    assert not routing.counts.any() and not layer(x)[0].any()
    assert all(p.grad is not None and not p.grad.any() for p in (x, *layer.parameters()))


def test_a_residual_network_without_tokens_gets_zeros() -> None:
    layer = build_layer("topk", Overflow.residual, capacity_factor=100.0)
    backward(layer, some_input())
    assert layer.residual is not None
    assert all(p.grad is not None and not p.grad.any() for p in layer.residual.parameters())


@pytest.mark.parametrize(("name", "overflow", "activation"), ALL_CASES, ids=case_id)
def test_gradcheck(name: str, overflow: Overflow | None, activation: Activation) -> None:
    layer, x = build_layer(name, overflow, activation), some_input(2, 4)
    names = [parameter_name for parameter_name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        y, routing = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return y, routing.probabilities, *routing.losses.values()

    inputs = [x, *(parameter.detach() for parameter in layer.parameters())]
    assert torch.autograd.gradcheck(run, [value.clone().requires_grad_() for value in inputs], fast_mode=True)


def test_the_loss_of_a_router_is_finite_where_a_probability_is_zero() -> None:
    """As it is for an expert out of reach, and for logits that are far apart."""
    layer = build_layer("dynamic", dtype=torch.float32)
    layer.router.weight.data.mul_(1000)
    _, routing = layer(some_input(dtype=torch.float32))
    assert (routing.probabilities == 0).any()
    sum(routing.losses.values(), start=torch.zeros(())).backward()
    assert layer.router.weight.grad is not None and layer.router.weight.grad.isfinite().all()
