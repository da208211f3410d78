"""Every router with both activations and every overflow: reference, closed forms, identities, causality, gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ava_exp.config.model import (
    Activation,
    AttentionBackend,
    DispatchBackend,
    GroupedAttentionConfig,
    Overflow,
)
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
from ava_exp.losses.balance import absolute_deviation_loss
from ava_exp.models.arithmetic import count_parameters, training_flops
from ava_exp.models.decoder import build_model
from ava_exp.nn.ffn import FeedForward
from ava_exp.nn.moe.capacity import expert_capacity
from ava_exp.nn.moe.expert_choice import ExpertChoiceRouter
from ava_exp.nn.moe.layer import MoELayer
from ava_exp.nn.moe.router import Router
from ava_exp.nn.moe.routing import Routing, count_visits
from ava_exp.nn.moe.sinkhorn import sinkhorn
from ava_exp.training.tally import ExpertTally
from tests.unit.nn import routing_reference as reference
from tests.unit.nn.routing_cases import (
    CASES,
    DIM,
    NOT_CAUSAL_WHILE_TRAINING,
    NUM_EXPERTS,
    ROUTERS,
    build_decoder,
    build_layer,
    model_config,
    moe_config,
    some_ids,
    some_input,
)

ACTIVATIONS = list(Activation)
ALL_CASES = [(name, overflow, activation) for name, overflow in CASES for activation in ACTIVATIONS]
CAUSAL_CASES = [(name, overflow) for name, overflow in CASES if name not in NOT_CAUSAL_WHILE_TRAINING]


def case_id(value: object) -> str:
    return getattr(value, "name", "dropless" if value is None else str(value))


# --- against the reference -------------------------------------------------------------------------------------------


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


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "overflow", "activation"), ALL_CASES, ids=case_id)
def test_closed_form_parameters(name: str, overflow: Overflow | None, activation: Activation) -> None:
    model, sparsity = model_config(activation=activation), moe_config(name, overflow)
    breakdown = count_parameters(model, GroupedAttentionConfig(), sparsity)
    decoder = build_model(model, GroupedAttentionConfig(), sparsity, device="meta")
    assert breakdown.total == sum(parameter.numel() for parameter in decoder.parameters())
    (router,) = (part for part in breakdown.parts if part.name == "router")
    assert router.total == sum(layer.router.weight.numel() for layer in decoder.moe_layers())


@pytest.mark.parametrize(("name", "overflow", "activation"), ALL_CASES, ids=case_id)
def test_closed_form_flops(name: str, overflow: Overflow | None, activation: Activation) -> None:
    """By the visits that were made. torch counts all positions of attention, where ours are causal."""
    model, sparsity, length = model_config(activation=activation), moe_config(name, overflow), 12
    attention = GroupedAttentionConfig(backend=AttentionBackend.plain)
    decoder = build_model(model, attention, sparsity)
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
    flops = training_flops(model, attention, sparsity, length)
    visits = sum(int(routing.counts.sum()) for routing in output.routings)
    assert model.head_dim is not None
    beyond_causal = 4 * model.num_layers * model.num_heads * model.head_dim * (length - (length + 1) / 2)
    assert counter.get_total_flops() == flops.of(2 * length, visits + residual_tokens) / 3 + beyond_causal * 2 * length
    assert (residual_tokens > 0) == (overflow is Overflow.residual)


@pytest.mark.parametrize("name", ROUTERS)
def test_visits_are_as_many_as_the_configuration_says(name: str) -> None:
    _, routing = build_layer(name)(some_input(4, 16))
    per_token, exact = ROUTERS[name].experts_per_token(NUM_EXPERTS), not name.startswith("dynamic")
    visits = routing.counts.sum().item() / 64
    assert visits == per_token if exact else 1 <= visits < per_token


# --- degenerate cases ------------------------------------------------------------------------------------------------

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


# --- causality -------------------------------------------------------------------------------------------------------


def visits_of(routing: Routing) -> Tensor:
    """Return (N, E): what a token's visits weigh."""
    weights = torch.zeros(routing.affinities.shape[0], NUM_EXPERTS + 1, dtype=routing.weights.dtype)
    return weights.scatter_add(1, routing.expert_ids % (NUM_EXPERTS + 1), routing.weights)[:, :NUM_EXPERTS]


def changed_after(x: Tensor, sequence: int, position: int) -> Tensor:
    changed = x.clone()
    changed[sequence, position:] = some_input(1, x.shape[1] - position, seed=77)[0] * 2
    return changed


def moved(layer: MoELayer, sequence: int, position: int) -> Tensor:
    """Return which tokens (B, T) a change of one sequence from a position on moves."""
    x = some_input(3, 10)
    before, first = layer(x)
    after, second = layer(changed_after(x, sequence, position))
    visits_moved = (visits_of(first) != visits_of(second)).any(dim=1).view(3, 10)
    return visits_moved | ((before - after).abs().amax(dim=-1) > 1e-10)


@pytest.mark.parametrize("position", [1, 5, 9])
@pytest.mark.parametrize("sequence", [0, 1, 2])
@pytest.mark.parametrize(("name", "overflow"), CAUSAL_CASES, ids=case_id)
def test_no_token_depends_on_a_later_one(name: str, overflow: Overflow | None, sequence: int, position: int) -> None:
    """Nor on one at the same position of a sequence that comes after its own."""
    tokens = moved(build_layer(name, overflow), sequence, position)
    assert not tokens[:, :position].any()
    assert not tokens[:sequence, position].any()
    assert tokens[sequence, position:].all() or overflow, "a token that is dropped both times does not move"


@pytest.mark.parametrize("overflow", list(Overflow), ids=case_id)
def test_a_capacity_makes_tokens_depend_on_earlier_ones_of_other_sequences(overflow: Overflow) -> None:
    """The named exception: experts fill up with the tokens of the whole micro-batch."""
    tokens = moved(build_layer("topk", overflow), sequence=0, position=1)
    assert tokens[1:, 1:].any()
    assert not moved(build_layer("topk"), sequence=0, position=1)[1:].any()


@pytest.mark.parametrize("name", sorted(NOT_CAUSAL_WHILE_TRAINING))
def test_what_balances_the_batch_sees_the_future_while_training_and_not_at_inference(name: str) -> None:
    layer = build_layer(name)
    assert moved(layer, sequence=1, position=5)[:, :5].any()
    tokens = moved(layer.eval(), sequence=1, position=5)
    assert not tokens[:, :5].any() and not tokens[[0, 2]].any()


@pytest.mark.parametrize("name", ROUTERS)
def test_decoding_step_by_step_equals_the_full_forward(name: str) -> None:
    decoder, ids = build_decoder(name), some_ids()
    cache = decoder.new_cache(batch_size=2, capacity=ids.shape[1])
    steps = [decoder(ids[:, position : position + 1], cache).logits for position in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, dim=1), decoder(ids).logits, rtol=1e-5, atol=1e-5)


def test_decoding_with_a_capacity_is_an_exception() -> None:
    """Asked for a capacity at evaluation, a token by itself has another one than as part of a text."""
    decoder, ids = build_decoder("topk", Overflow.drop), some_ids()
    for layer in decoder.moe_layers():
        assert layer.capacity is not None
        layer.capacity.at_evaluation = True
    cache = decoder.new_cache(batch_size=2, capacity=ids.shape[1])
    steps = [decoder(ids[:, position : position + 1], cache).logits for position in range(ids.shape[1])]
    assert not torch.allclose(torch.cat(steps, dim=1), decoder(ids).logits, rtol=1e-3, atol=1e-3)


# --- gradients -------------------------------------------------------------------------------------------------------

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


def backward(layer: MoELayer, x: Tensor) -> Routing:
    y, routing = layer(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    (y * direction).sum().backward()
    return routing  # type: ignore[no-any-return]


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


# --- state, formats, recomputation -----------------------------------------------------------------------------------

WITH_STATE = ("deepseek", "expert_choice")


@pytest.mark.parametrize(("name", "overflow"), CASES, ids=case_id)
def test_save_and_load(name: str, overflow: Overflow | None, tmp_path: Path) -> None:
    layer, fresh, x = build_layer(name, overflow), build_layer(name, overflow), some_input()
    with torch.no_grad():
        for value in (*fresh.parameters(), *fresh.buffers()):
            value.zero_()
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    fresh.load_state_dict(safetensors.torch.load_file(tmp_path / "layer.safetensors"))
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x)[0], fresh.train(mode)(x)[0])
    learned = {key.removeprefix("router.") for key in layer.state_dict() if key.startswith("router.")} - {"weight"}
    assert learned == {"deepseek": {"bias"}, "expert": {"threshold", "num_updates"}}.get(name.partition("_")[0], set())


@pytest.mark.parametrize(("name", "overflow", "activation"), ALL_CASES, ids=case_id)
def test_bf16_is_close_to_fp32(name: str, overflow: Overflow | None, activation: Activation) -> None:
    layer, x = build_layer(name, overflow, activation, torch.bfloat16), some_input(dtype=torch.bfloat16)
    wide = copy.deepcopy(layer).float()
    rounded, exact = layer(x), wide(x.float())
    assert rounded[0].dtype == torch.bfloat16
    assert rounded[1].weights.dtype == rounded[1].probabilities.dtype == torch.float32
    assert torch.equal(rounded[1].expert_ids, exact[1].expert_ids), "routers compute in fp32 in both"
    assert (rounded[0].float() - exact[0]).norm() < 0.02 * exact[0].norm()


@pytest.mark.parametrize("name", WITH_STATE)
def test_what_a_router_learned_keeps_its_format(name: str) -> None:
    """Steps of 0.001 would vanish in bf16."""
    sparsity, arguments = moe_config(name), (model_config(), GroupedAttentionConfig())
    built = build_model(*arguments, sparsity, dtype=torch.bfloat16)  # by way of `meta`, `to` and `to_empty`
    copied = copy.deepcopy(build_decoder(name)).to(torch.bfloat16)
    for model in (built, copied, copied.half(), build_decoder(name).to(device="cpu", dtype=torch.bfloat16)):
        assert next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
        formats = {n: b.dtype for n, b in model.named_buffers() if ".router." in n}
        assert len(formats) == 2 * (1 if name == "deepseek" else 2)
        assert {t for n, t in formats.items() if not n.endswith("num_updates")} == {torch.float32}
    assert all(not b.any() for n, b in built.named_buffers() if ".router." in n), "nothing is learned at the start"
    for (n, before), (_, after) in zip(build_decoder(name).named_buffers(), copied.named_buffers(), strict=True):
        assert ".router." not in n or torch.equal(before, after)


@pytest.mark.parametrize(("name", "overflow"), CASES, ids=case_id)
def test_recomputation_changes_no_gradient_and_counts_nothing_twice(name: str, overflow: Overflow | None) -> None:
    router = copy.copy(ROUTERS[name])
    router.whole_expert_dropout = 0.3
    if hasattr(router, "jitter"):
        router.jitter = 0.1
    results, x = [], some_input()
    for recompute in (False, True):
        layer = build_layer(router, overflow, expert_dropout=0.2)
        before = {key: value.clone() for key, value in layer.named_buffers()}
        torch.manual_seed(11)
        y, routing = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        tally = ExpertTally()
        tally.add([routing])
        y.square().sum().backward()
        assert all(torch.equal(before[key], value) for key, value in layer.named_buffers())
        gradients = [parameter.grad for parameter in layer.parameters()]
        results.append([y.detach(), torch.tensor(tally.visits()), *gradients])
    for plain, recomputed in zip(*results, strict=True):
        assert plain is not None and torch.equal(plain, recomputed)


# --- noise -----------------------------------------------------------------------------------------------------------

TOKEN_CHOICE = [name for name in ROUTERS if name != "expert_choice"]


@pytest.mark.parametrize("name", ROUTERS)
def test_dropped_experts_are_not_visited_and_never_all(name: str) -> None:
    config = copy.copy(ROUTERS[name])
    config.whole_expert_dropout = 0.9
    layer, x = build_layer(config), some_input()
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        absent = layer.router.absent_experts()
        torch.manual_seed(seed)
        _, routing = layer(x)
        assert absent is not None and not absent.all()
        assert routing.counts[absent].sum() == 0 and routing.counts.sum() > 0
        torch.manual_seed(seed)
        assert torch.equal(routing.expert_ids, layer(x)[1].expert_ids)
        seen.add(int(absent.sum()))
    assert len(seen) > 1 and max(seen) == NUM_EXPERTS - 1
    assert layer.eval().router.absent_experts() is None
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("num_absent", [1, 4, 6, 7])
@pytest.mark.parametrize("name", ["topk", "topk_3_plain", "switch", "sinkhorn", "deepseek"])
def test_a_token_keeps_its_visits_while_experts_are_left(
    name: str, num_absent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = build_layer(name, Overflow.next_best), some_input()
    layer.router.weight.data.mul_(500)  # probabilities of 0 for experts that are present, too
    absent = torch.arange(NUM_EXPERTS) < num_absent
    monkeypatch.setattr(layer.router, "absent_experts", lambda: absent)
    routing = layer.router(x)
    wanted = min(int(ROUTERS[name].experts_per_token(NUM_EXPERTS)), NUM_EXPERTS - num_absent)
    assert ((routing.expert_ids >= 0).sum(dim=1) == wanted).all()
    assert (routing.expert_ids[routing.expert_ids >= 0] >= num_absent).all()
    assert layer(x)[1].counts[:num_absent].sum() == 0, "nor where visits overflow to"


def test_a_group_is_reached_while_one_of_its_experts_is_present(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = build_layer("deepseek_groups"), some_input()
    absent = torch.arange(NUM_EXPERTS) % 2 == 0
    monkeypatch.setattr(layer.router, "absent_experts", lambda: absent)
    chosen = layer.router(x).expert_ids
    assert ((chosen >= 0).sum(dim=1) == 2).all()
    groups = chosen[chosen >= 0].view(-1, 2) // 2
    scores = layer.router(x).affinities + layer.router.get_buffer("bias")
    best = scores.masked_fill(absent, -1).view(-1, 4, 2).amax(dim=-1).topk(2, dim=-1).indices
    assert torch.equal(groups.sort(dim=1).values, best.sort(dim=1).values)


@pytest.mark.parametrize("name", TOKEN_CHOICE)
def test_jitter_acts_while_training_only(name: str) -> None:
    config = copy.copy(ROUTERS[name])
    config.jitter = 0.3  # type: ignore[attr-defined]
    layer, x = build_layer(config), some_input()
    first, second = layer(x)[1].affinities, layer(x)[1].affinities
    assert not torch.equal(first, second)
    plain = build_layer(ROUTERS[name])(x)[1].affinities
    assert 0 < (first - plain).abs().max() < 0.5
    assert torch.equal(layer.eval()(x)[1].affinities, layer(x)[1].affinities)


@pytest.mark.parametrize("name", ["topk", "switch", "two_stage", "deepseek", "hierarchical"])
def test_temperature_changes_weights_and_not_the_choice(name: str) -> None:
    """A hierarchical router chooses node by node, where the order is the same at any temperature."""
    config, hot = copy.copy(ROUTERS[name]), copy.copy(ROUTERS[name])
    hot.routing_temperature = 3.0  # type: ignore[attr-defined]
    x = some_input()
    cold, warm = (build_layer(router) for router in (config, hot))
    for layer in (cold, warm):
        for buffer in layer.router.buffers():
            buffer.zero_()
    first, second = cold(x)[1], warm(x)[1]
    assert torch.equal(first.counts, second.counts)
    assert torch.equal(first.expert_ids.sort(dim=1).values, second.expert_ids.sort(dim=1).values)
    assert first.probabilities.amax(dim=1).mean() > second.probabilities.amax(dim=1).mean()


# --- balance ---------------------------------------------------------------------------------------------------------


def skewed_input(num_tokens: int, seed: int = 0) -> Tensor:
    """Tokens with much in common: routers send most of them to the same experts."""
    x = torch.randn(1, num_tokens, DIM, generator=torch.Generator().manual_seed(seed))
    return x + torch.linspace(-1.5, 1.5, DIM)


def imbalance(routing: Routing) -> float:
    return float(routing.chosen_counts.max() / routing.chosen_counts.float().mean())


def test_the_bias_moves_by_its_rate_against_the_load() -> None:
    router = build_layer(DeepSeekRouterConfig(bias_update_rate=0.01)).router
    router.get_buffer("bias").zero_()
    router.adapt(torch.tensor([5, 0, 2, 2, 3, 1, 2, 1]), None)  # mean 2
    expected = [-0.01, 0.01, 0, 0, -0.01, 0.01, 0, 0.01]
    torch.testing.assert_close(router.get_buffer("bias"), torch.tensor(expected))


def test_the_bias_balances_a_skewed_router_and_leaves_its_scores_alone() -> None:
    layer = build_layer(DeepSeekRouterConfig(bias_update_rate=0.01), dtype=torch.float32)
    router, x = layer.router, skewed_input(256)
    router.get_buffer("bias").zero_()
    before = router(x)
    assert imbalance(before) > 2
    for step in range(150):
        router.adapt(router(skewed_input(256, seed=step)).chosen_counts, None)
    after = router(x)
    assert imbalance(after) < 1.35
    assert torch.equal(before.affinities, after.affinities)


def test_sinkhorn_makes_rows_1_and_columns_even() -> None:
    logits = torch.randn(64, NUM_EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    scores = sinkhorn(logits + torch.arange(NUM_EXPERTS), num_iterations=200).exp()
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(64, dtype=torch.float64))
    torch.testing.assert_close(
        scores.sum(dim=0), torch.full((NUM_EXPERTS,), 8.0, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )
    logits[:, 2] = -torch.inf
    present = sinkhorn(logits, num_iterations=200).exp().sum(dim=0)
    assert present[2] == 0 and torch.allclose(present[present > 0], torch.tensor(64 / 7, dtype=torch.float64))


def test_sinkhorn_balances_a_skewed_router_while_training() -> None:
    layer, x = build_layer("sinkhorn", dtype=torch.float32), skewed_input(256)
    assert imbalance(layer(x)[1]) < 1.2
    assert imbalance(layer.eval()(x)[1]) > 2


def test_experts_choose_equally_many_tokens() -> None:
    _, routing = build_layer("expert_choice", dtype=torch.float32)(skewed_input(256))
    assert routing.counts.tolist() == [48] * NUM_EXPERTS


def test_thresholds_are_a_mean_of_what_steps_observed() -> None:
    router = build_layer(ExpertChoiceRouterConfig(threshold_momentum=0.5)).router
    assert isinstance(router, ExpertChoiceRouter)
    for buffer in router.buffers():
        buffer.zero_()
    for value, expected in ((0.4, 0.4), (0.2, 0.3), (0.5, 0.4)):
        router.adapt(torch.zeros(NUM_EXPERTS), torch.full((NUM_EXPERTS,), value))
        torch.testing.assert_close(router.threshold, torch.full((NUM_EXPERTS,), expected))


def test_thresholds_reproduce_the_training_load_at_inference() -> None:
    layer = build_layer("expert_choice", dtype=torch.float32)
    router = layer.router
    for buffer in router.buffers():
        buffer.zero_()
    untrained = router.eval()(skewed_input(512, seed=1000))
    assert untrained.counts.sum() == 512 * 2, "the best experts, while there are no thresholds"
    assert imbalance(untrained) > 2
    router.train()
    for step in range(60):
        routing = router(skewed_input(512, seed=step))
        assert routing.observed is not None
        router.adapt(routing.chosen_counts, routing.observed)
    loads = router.eval()(skewed_input(8192, seed=1000)).counts / 8192
    torch.testing.assert_close(loads, torch.full((NUM_EXPERTS,), 1.5 / NUM_EXPERTS), rtol=0.1, atol=0.0)


def test_a_router_that_does_not_learn_beside_gradients_does_not_adapt() -> None:
    router: Router = build_layer("topk").router
    before = router.weight.clone()
    router.adapt(torch.arange(NUM_EXPERTS), None)
    assert torch.equal(router.weight, before) and not list(router.buffers())
