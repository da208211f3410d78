"""Every router with both activations and every overflow: reference, closed forms, degenerate identities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import AttentionBackend, GroupedAttentionConfig
from ava_exp.config.model import Activation, DispatchBackend, Overflow, SharedProjection
from ava_exp.config.router import (
    DeepSeekRouterConfig,
    DynamicRouterConfig,
    ExpertChoiceRouterConfig,
    HierarchicalRouterConfig,
    RouterConfig,
    SinkhornRouterConfig,
    SoftRouterConfig,
    SwitchRouterConfig,
    TopKRouterConfig,
    TwoStageRouterConfig,
)
from ava_exp.config.store import SCHEMAS
from ava_exp.models.arithmetic import count_parameters, forward_flops_per_token, training_flops
from ava_exp.models.decoder import build_model
from ava_exp.nn.ffn import FeedForward
from ava_exp.nn.moe.capacity import expert_capacity
from ava_exp.nn.moe.layer import MoELayer
from ava_exp.nn.moe.routing import count_visits
from tests.unit.nn import routing_reference as reference
from tests.unit.nn.routing_cases import (
    ACTIVATIONS,
    ALL_CASES,
    CASES,
    DIM,
    NUM_EXPERTS,
    ROUTERS,
    backward,
    build_layer,
    case_id,
    model_config,
    moe_config,
    some_ids,
    some_input,
)


def referred(layer: MoELayer, config: RouterConfig, overflow: Overflow | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reference's output and its visits of each expert."""
    buffers = dict(layer.router.named_buffers())
    learned = reference.Learned(
        bias=buffers["bias"].tolist() if "bias" in buffers else [],
        threshold=buffers["threshold"].tolist() if "threshold" in buffers else [],
        training=layer.training,
    )
    tokens = x.flatten(0, 1).tolist()
    choices = reference.route(config, layer.router.weight.tolist(), tokens, learned)
    if overflow is None:
        visited = [choice.chosen for choice in choices]
    else:
        assert layer.capacity is not None
        capacity = expert_capacity(len(tokens), config.experts_per_token(NUM_EXPERTS), NUM_EXPERTS, 0.7)
        visited = reference.admitted(choices, x.shape[0], capacity, overflow)
    ups, downs, activation = layer.experts.up.tolist(), layer.experts.down.tolist(), layer.experts.activation
    residual = None
    if layer.residual is not None:
        network = (layer.residual.up.weight.tolist(), layer.residual.down.weight.tolist())
        residual = lambda values: reference.feed_forward(network, activation, values)  # noqa: E731
    outputs = reference.mixture(
        choices,
        visited,
        tokens,
        lambda e, values: reference.feed_forward((ups[e], downs[e]), activation, values),
        overflow,
        residual,
    )
    counts = torch.tensor([expert for experts in visited for expert in experts]).bincount(minlength=NUM_EXPERTS)
    return torch.tensor(outputs, dtype=torch.float64).view_as(x), counts


def test_every_router_is_here() -> None:
    assert {type(config) for config in ROUTERS.values()} == {SCHEMAS[name] for name in SCHEMAS if "router/" in name}


@pytest.mark.parametrize(("name", "overflow", "activation"), ALL_CASES, ids=case_id)
def test_equals_the_reference_while_training(name: str, overflow: Overflow | None, activation: Activation) -> None:
    layer, x = build_layer(name, overflow, activation), some_input()
    y, routing = layer(x)
    expected, counts = referred(layer, ROUTERS[name], overflow, x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(routing.counts, counts)
    assert torch.equal(routing.counts, count_visits(routing.expert_ids, NUM_EXPERTS))
    if overflow in (Overflow.drop, Overflow.residual):
        assert routing.counts.sum() < routing.chosen_counts.sum(), "the capacity binds"


@pytest.mark.parametrize("name", ROUTERS)
def test_equals_the_reference_at_inference(name: str) -> None:
    layer, x = build_layer(name).eval(), some_input()
    y, routing = layer(x)
    expected, counts = referred(layer, ROUTERS[name], None, x)
    torch.testing.assert_close(y, expected, rtol=1e-7, atol=1e-7)  # a threshold is fp32
    assert torch.equal(routing.counts, counts)


@pytest.mark.parametrize(("name", "overflow"), [case for case in CASES if case[1]], ids=case_id)
def test_evaluation_is_dropless_unless_asked_otherwise(name: str, overflow: Overflow) -> None:
    x = some_input()
    dropless = build_layer(name).eval()(x)[0]
    layer = build_layer(name, overflow)
    layer.load_state_dict(build_layer(name).state_dict(), strict=False)
    assert torch.equal(layer.eval()(x)[0], dropless)
    assert layer.capacity is not None
    layer.capacity.at_evaluation = True
    assert not torch.equal(layer(x)[0], dropless)


@pytest.mark.parametrize(("name", "overflow"), CASES, ids=case_id)
def test_the_grouped_back_end_computes_the_same(name: str, overflow: Overflow | None) -> None:
    """Visits that do not exist included."""
    results = []
    for dispatch in (DispatchBackend.loop, DispatchBackend.grouped):
        layer = build_layer(name, overflow, dtype=torch.float32, dispatch=dispatch)
        x = some_input(3, 12, torch.float32).requires_grad_()
        backward(layer, x)
        results.append([layer(x)[0].detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
    for loop, grouped in zip(*results, strict=True):
        assert loop is not None and grouped is not None
        assert (loop - grouped).norm() <= 1e-5 * loop.norm()


@pytest.mark.parametrize(
    ("num_tokens", "factor", "expected"), [(100, 1.0, 25), (100, 1.25, 32), (400, 1.1, 110), (3, 1.0, 1), (1, 0.1, 1)]
)
def test_capacity_is_rounded_up(num_tokens: int, factor: float, expected: int) -> None:
    assert expert_capacity(num_tokens, 2, 8, factor) == expected


@pytest.mark.parametrize(("name", "overflow", "activation"), ALL_CASES, ids=case_id)
def test_closed_form_parameters(name: str, overflow: Overflow | None, activation: Activation) -> None:
    model, sparsity = model_config(activation=activation), moe_config(name, overflow)
    breakdown = count_parameters(Architecture(model, GroupedAttentionConfig(), sparsity))
    decoder = build_model(Architecture(model, GroupedAttentionConfig(), sparsity), device="meta")
    assert breakdown.total == sum(parameter.numel() for parameter in decoder.parameters())
    (router,) = (part for part in breakdown.parts if part.name == "router")
    assert router.total == sum(layer.router.weight.numel() for layer in decoder.moe_layers())


@pytest.mark.parametrize(("name", "overflow", "activation"), ALL_CASES, ids=case_id)
def test_closed_form_flops(name: str, overflow: Overflow | None, activation: Activation) -> None:
    """By the visits that were made. torch counts all positions of attention, where ours are causal."""
    model, sparsity, length = model_config(activation=activation), moe_config(name, overflow), 12
    attention = GroupedAttentionConfig(backend=AttentionBackend.plain)
    decoder = build_model(Architecture(model, attention, sparsity))
    residual_tokens = 0

    def count_residual(module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal residual_tokens
        residual_tokens += len(inputs[0])

    for layer in decoder.moe_layers():
        if layer.residual is not None:
            layer.residual.register_forward_pre_hook(count_residual)
    with FlopCounterMode(display=False) as counter:
        output = decoder(some_ids(2, length))
        assert output.logits.isfinite().all()
    flops = training_flops(Architecture(model, attention, sparsity), length)
    visits = sum(int(routing.counts.sum()) for routing in output.routings)
    assert model.head_dim is not None
    beyond_causal = 4 * model.num_layers * model.num_heads * model.head_dim * (length - (length + 1) / 2)
    assert counter.get_total_flops() == flops.of(2 * length, visits + residual_tokens) / 3 + beyond_causal * 2 * length
    assert (residual_tokens > 0) == (overflow is Overflow.residual)


VARIANTS: list[dict[str, Any]] = [
    {"num_shared_experts": 2},
    {"first_k_dense": 1},
    {"share_projection": SharedProjection.up, "expert_norm": True},
    {"share_projection": SharedProjection.down},
    {"intermediate_size": 24, "num_shared_experts": 1, "first_k_dense": 1},
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("changes", VARIANTS, ids="-".join)
def test_closed_forms_of_variants(changes: dict[str, Any], activation: Activation) -> None:
    model, sparsity, length = model_config(activation=activation), moe_config("deepseek", **changes), 12
    attention = GroupedAttentionConfig(backend=AttentionBackend.plain)
    decoder = build_model(Architecture(model, attention, sparsity))
    assert count_parameters(Architecture(model, attention, sparsity)).total == sum(
        p.numel() for p in decoder.parameters()
    )
    with FlopCounterMode(display=False) as counter:
        assert decoder(some_ids(1, length)).logits.isfinite().all()
    assert model.head_dim is not None
    beyond_causal = 4 * model.num_layers * model.num_heads * model.head_dim * (length - (length + 1) / 2)
    expected = forward_flops_per_token(Architecture(model, attention, sparsity), length) + beyond_causal
    assert counter.get_total_flops() == expected * length


@pytest.mark.parametrize("name", ROUTERS)
def test_visits_are_as_many_as_the_configuration_says(name: str) -> None:
    _, routing = build_layer(name)(some_input(4, 16))
    per_token, exact = ROUTERS[name].experts_per_token(NUM_EXPERTS), not name.startswith("dynamic")
    visits = routing.counts.sum().item() / 64
    assert visits == per_token if exact else 1 <= visits < per_token


ONE_EXPERT: dict[str, RouterConfig] = {
    "topk": TopKRouterConfig(moe_top_k=1),
    "topk_plain": TopKRouterConfig(moe_top_k=1, renormalize=False),
    "switch": SwitchRouterConfig(jitter=0.0),
    "soft": SoftRouterConfig(),
    "sinkhorn": SinkhornRouterConfig(moe_top_k=1),
    "deepseek": DeepSeekRouterConfig(moe_top_k=1),
    "two_stage": TwoStageRouterConfig(moe_top_k=1),
    "dynamic": DynamicRouterConfig(),
    "hierarchical": HierarchicalRouterConfig(choices=[1, 1]),
    "expert_choice": ExpertChoiceRouterConfig(),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ONE_EXPERT)
def test_one_expert_is_the_dense_network(name: str, training: bool, activation: Activation) -> None:
    layer = build_layer(ONE_EXPERT[name], None, activation, num_experts=1).train(training)
    for buffer in layer.router.buffers():
        buffer.zero_()
    dense = FeedForward(DIM, layer.experts.down.shape[-1], activation).to(torch.float64)
    dense.up.weight.data.copy_(layer.experts.up[0])
    dense.down.weight.data.copy_(layer.experts.down[0])
    x = some_input()
    torch.testing.assert_close(layer(x)[0], dense(x), rtol=1e-12, atol=1e-12)


PAIRS: dict[str, tuple[RouterConfig, RouterConfig]] = {
    "topk with all experts is soft": (TopKRouterConfig(moe_top_k=8), SoftRouterConfig()),
    "topk with all experts is soft, renormalised or not": (
        TopKRouterConfig(moe_top_k=8, renormalize=False),
        SoftRouterConfig(),
    ),
    "switch is the plain top-1": (
        SwitchRouterConfig(jitter=0.0),
        TopKRouterConfig(moe_top_k=1, renormalize=False),
    ),
    "one level is topk": (
        HierarchicalRouterConfig(branching=[8], choices=[2], renormalize=True),
        TopKRouterConfig(),
    ),
    "one group is topk": (TwoStageRouterConfig(num_groups=1), TopKRouterConfig()),
    "all groups are topk": (TwoStageRouterConfig(num_groups=4, groups_per_token=4), TopKRouterConfig()),
    "all of deepseek's groups are no groups": (
        DeepSeekRouterConfig(num_groups=4, groups_per_token=4),
        DeepSeekRouterConfig(),
    ),
    "a threshold of 1 is soft": (DynamicRouterConfig(threshold=1.0, max_experts=8), SoftRouterConfig()),
    "a small threshold is top-1": (DynamicRouterConfig(threshold=1e-6), SwitchRouterConfig(jitter=0.0)),
    "a large threshold is topk": (
        DynamicRouterConfig(threshold=1.0, max_experts=2, renormalize=True),
        TopKRouterConfig(),
    ),
    "sinkhorn without iterations is topk": (SinkhornRouterConfig(num_iterations=0), TopKRouterConfig()),
    "taking all tokens is soft": (ExpertChoiceRouterConfig(average_experts=8), SoftRouterConfig()),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_special_case_is_another_router(pair: str) -> None:
    x = some_input()
    first, second = (build_layer(config) for config in PAIRS[pair])
    torch.testing.assert_close(first(x)[0], second(x)[0], rtol=1e-12, atol=1e-12)


def test_sinkhorn_at_inference_is_topk() -> None:
    x = some_input()
    balanced, plain = build_layer(SinkhornRouterConfig()), build_layer(TopKRouterConfig())
    assert not torch.equal(balanced(x)[1].expert_ids, plain(x)[1].expert_ids)
    assert torch.equal(balanced.eval()(x)[0], plain.eval()(x)[0])


def test_two_levels_of_softmax_are_a_product() -> None:
    """A tree whose nodes below the root are indifferent gives every expert its group's share, evenly."""
    config = HierarchicalRouterConfig(branching=[2, 4], choices=[2, 4])
    layer, x = build_layer(config), some_input()
    layer.router.weight.data[2:] = 0
    groups = (x.flatten(0, 1) @ layer.router.weight[:2].t()).softmax(dim=-1)
    torch.testing.assert_close(layer(x)[1].affinities, groups.repeat_interleave(4, dim=1) / 4)


@pytest.mark.parametrize(
    "config", [TopKRouterConfig(moe_top_k=8), SoftRouterConfig(), DeepSeekRouterConfig(moe_top_k=8)]
)
def test_equal_gates_are_the_average(config: RouterConfig) -> None:
    layer, x = build_layer(config), some_input()
    layer.router.weight.data.zero_()
    single = TopKRouterConfig(moe_top_k=1)
    outputs = []
    for expert in range(NUM_EXPERTS):
        one = build_layer(single, num_experts=1)
        one.experts.up.data.copy_(layer.experts.up[expert : expert + 1])
        one.experts.down.data.copy_(layer.experts.down[expert : expert + 1])
        outputs.append(one(x)[0])
    torch.testing.assert_close(layer(x)[0], torch.stack(outputs).mean(dim=0), rtol=1e-12, atol=1e-12)
