"""Learned activations: the definition, degenerate mixtures, choices, and the closed forms of models that have them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ava_exp.config.architecture import Architecture
from ava_exp.config.model import (
    Activation,
    DenseConfig,
    DispatchBackend,
    MixedActivation,
    MoEConfig,
    Overflow,
    SharedProjection,
    SparsityConfig,
)
from ava_exp.config.router import TopKRouterConfig
from ava_exp.config.training import Recompute
from ava_exp.models.arithmetic import count_parameters, forward_flops_per_token
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.models.stacks import stack_names
from ava_exp.models.surgery import count_parameters_of
from ava_exp.nn.activation import BLOCK_ROWS, ActivationMixture, activation_weights
from ava_exp.nn.ffn import FeedForward
from ava_exp.nn.moe.experts import Experts
from tests.unit.nn.routing_cases import model_config, moe_config, some_ids

ALL = list(MixedActivation)
LEARNED = (Activation.mixture, Activation.hard_mixture)
DEFINITIONS: dict[MixedActivation, Any] = {
    MixedActivation.gelu: lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5)),
    MixedActivation.silu: lambda h: h / (1 + (-h).exp()),
    MixedActivation.relu: lambda h: h.where(h > 0, 0),
    MixedActivation.tanh: lambda h: (h.exp() - (-h).exp()) / (h.exp() + (-h).exp()),
    MixedActivation.identity: lambda h: h,
}


def some(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mixture_of(
    *functions: MixedActivation, hard: bool = False, dtype: torch.dtype = torch.float64
) -> ActivationMixture:
    mixture = ActivationMixture(functions, hard).to(dtype)
    mixture.logits.data.copy_(some(len(functions), seed=7))
    return mixture


def definition(mixture: ActivationMixture, h: Tensor, weights_A: Tensor | None = None) -> Tensor:
    weights_A = mixture.logits.exp() / mixture.logits.exp().sum() if weights_A is None else weights_A
    return torch.stack([w * DEFINITIONS[f](h) for w, f in zip(weights_A, mixture.functions, strict=True)]).sum(dim=0)


def gradients(y: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * some(*y.shape, seed=5, dtype=y.dtype)).sum(), of)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (2 * BLOCK_ROWS + 7, 3), (0, 4)])
def test_a_mixture_is_what_the_definition_says(shape: tuple[int, ...]) -> None:
    mixture, h = mixture_of(*ALL), some(*shape).requires_grad_()
    ours, wanted = mixture.draw()(h), definition(mixture, h)
    torch.testing.assert_close(ours, wanted)
    inputs = (h, mixture.logits)
    torch.testing.assert_close(gradients(ours, *inputs), gradients(wanted, *inputs))


@pytest.mark.parametrize("function", ALL)
def test_each_function_passes_gradcheck(function: MixedActivation) -> None:
    mixture, h = mixture_of(function, MixedActivation.gelu), some(4, 3).requires_grad_()

    def value(h: Tensor, logits: Tensor) -> Tensor:
        module = copy.copy(mixture)
        module._parameters = {"logits": logits}  # type: ignore[assignment]
        return module.draw()(h)

    assert torch.autograd.gradcheck(value, (h, mixture.logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("function", ALL)
def test_a_mixture_of_one_is_that_activation_bit_for_bit(
    function: MixedActivation, hard: bool, dtype: torch.dtype
) -> None:
    mixture, h = mixture_of(function, hard=hard, dtype=dtype), some(300, 8, dtype=dtype).requires_grad_()
    functions = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda x: x}
    plain = functions[function.value]
    for training in (True, False):
        y = mixture.train(training).draw()(h)
        assert torch.equal(y, plain(h))
        assert torch.equal(*gradients(y, h), *gradients(plain(h), h))


def test_equal_logits_are_the_average() -> None:
    mixture, h = mixture_of(*ALL), some(6, 5)
    mixture.logits.data.fill_(0.3)
    expected = torch.stack([DEFINITIONS[function](h) for function in ALL]).mean(dim=0)
    torch.testing.assert_close(mixture.draw()(h), expected)


def test_a_certain_choice_is_the_mixture_and_the_activation() -> None:
    h = some(6, 5)
    for hard in (False, True):
        mixture = mixture_of(*ALL, hard=hard)
        mixture.logits.data.copy_(torch.tensor([0.0, 0.0, 2000.0, 0.0, 0.0]))
        assert torch.equal(mixture.draw()(h), F.relu(h))


def test_bf16_is_near_fp64() -> None:
    rounded, h = mixture_of(*ALL, dtype=torch.bfloat16), some(500, 16, dtype=torch.bfloat16).requires_grad_()
    exact, wide = mixture_of(*ALL), h.detach().double().requires_grad_()
    exact.logits.data.copy_(rounded.logits)
    ours, wanted = rounded.draw()(h), exact.draw()(wide)
    assert ours.dtype == torch.bfloat16
    assert (ours - wanted).norm() < 0.01 * wanted.norm()
    pairs = zip(gradients(ours, h, rounded.logits), gradients(wanted, wide, exact.logits), strict=True)
    for found, expected in pairs:
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_choice_is_drawn_with_its_probabilities_and_taken_whole() -> None:
    mixture, h = mixture_of(*ALL, hard=True), some(1, 4)
    outputs = torch.stack([DEFINITIONS[function](h) for function in ALL])
    torch.manual_seed(0)
    counts = torch.zeros(len(ALL))
    for _ in range(4000):
        (index,) = (outputs - mixture.draw()(h)).abs().amax(dim=(1, 2)).lt(1e-12).nonzero()
        counts[index] += 1
    torch.testing.assert_close(counts / 4000, torch.tensor([*mixture.weights().values()]), rtol=0, atol=0.03)


def test_the_gradient_of_a_choice_is_straight_through() -> None:
    mixture, h = mixture_of(*ALL, hard=True), some(6, 5).requires_grad_()
    torch.manual_seed(3)
    ours = mixture.draw()(h)
    torch.manual_seed(3)
    wanted = definition(mixture, h, F.gumbel_softmax(mixture.logits, hard=True))
    torch.testing.assert_close(ours, wanted)
    inputs = (h, mixture.logits)
    torch.testing.assert_close(gradients(ours, *inputs), gradients(wanted, *inputs))


class Operations(TorchDispatchMode):
    """Counts activations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        names = ("aten::gelu", "aten::silu", "aten::relu", "aten::tanh")
        self.count += function.overloadpacket._qualified_op_name in names
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("hard", "training", "count"), [(False, False, 4), (True, True, 1), (True, False, 1)])
def test_a_choice_costs_one_activation(hard: bool, training: bool, count: int) -> None:
    mixture = mixture_of(*ALL, hard=hard).train(training)
    mixture.logits.data[0] = 50.0
    with Operations() as operations:
        mixture.draw()(some(4, 3))
    assert operations.count == count


def test_the_backward_pass_keeps_the_input_only() -> None:
    kept: list[Tensor] = []
    h = some(40, 8).requires_grad_()
    activation = mixture_of(*ALL).draw()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        activation(h)
    assert [tensor.numel() for tensor in kept] == [h.numel(), len(ALL)]


@pytest.mark.parametrize("dispatch", [DispatchBackend.loop, DispatchBackend.grouped])
@pytest.mark.parametrize("share", list(SharedProjection))
@pytest.mark.parametrize("name", ["two", "all"])
def test_all_experts_of_a_layer_make_the_same_choice(
    name: str, share: SharedProjection, dispatch: DispatchBackend
) -> None:
    """With tanh and nothing: every expert's hidden activation is bounded by 1, or none is."""
    functions = [MixedActivation.tanh, MixedActivation.identity]
    experts = Experts(4, 8, 8, Activation.hard_mixture, dispatch, share, mixed_activations=functions)
    for parameter in experts.parameters():
        parameter.data.copy_(some(*parameter.shape, dtype=torch.float32))
    ids = torch.arange(4).expand(6, 4)[:, : 4 if name == "all" else 2]
    x, weights = some(6, 8, dtype=torch.float32), torch.ones(ids.shape)
    torch.manual_seed(0)
    drawn = [experts(x, ids, weights) for _ in range(30)]
    outputs = []
    for logits in ([50.0, 0.0], [0.0, 50.0]):
        experts.mixture.logits.data.copy_(torch.tensor(logits))  # type: ignore[union-attr]
        outputs.append(experts.eval()(x, ids, weights))
    found = [[torch.allclose(y, wanted, rtol=1e-4, atol=1e-4) for wanted in outputs] for y in drawn]
    assert {tuple(match) for match in found} == {(True, False), (False, True)}


SPARSITIES: dict[str, SparsityConfig] = {
    "dense": DenseConfig(),
    "experts": moe_config("topk"),
    "grouped": moe_config("topk", dispatch=DispatchBackend.grouped),
    "shared": moe_config("deepseek", num_shared_experts=2, first_k_dense=1),
    "residual": moe_config("topk", Overflow.residual),
    "one down": moe_config("topk", share_projection=SharedProjection.down),
}
NUM_MIXTURES = {"dense": 2, "experts": 2, "grouped": 2, "shared": 3, "residual": 4, "one down": 2}


def architecture(name: str, activation: Activation = Activation.mixture, **changes: Any) -> Architecture:
    return Architecture(model_config(activation=activation, **changes), sparsity=SPARSITIES[name])


def built(name: str, activation: Activation = Activation.mixture, **changes: Any) -> Decoder:
    changes = {"initializer_range": 0.3} | changes
    return build_model(architecture(name, activation, **changes), seed=1)


@pytest.mark.parametrize("activation", LEARNED)
@pytest.mark.parametrize("name", SPARSITIES)
def test_closed_forms(name: str, activation: Activation) -> None:
    config, model = architecture(name, activation), built(name, activation)
    mixtures = [part for part in model.modules() if isinstance(part, ActivationMixture)]
    plain = architecture(name, Activation.gelu)
    assert len(mixtures) == NUM_MIXTURES[name]
    assert count_parameters(config).total == sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(config).total == count_parameters(plain).total + 4 * len(mixtures)
    assert count_parameters_of(model).total == count_parameters(config).total
    assert count_parameters_of(model).active == count_parameters(config).active
    assert forward_flops_per_token(config, 12) == forward_flops_per_token(plain, 12)


def test_products_are_those_of_a_given_activation() -> None:
    counts = []
    for activation in (Activation.gelu, *LEARNED):
        with FlopCounterMode(display=False) as counter:
            built("dense", activation)(some_ids(2, 12))
        counts.append(counter.get_total_flops())
    assert len(set(counts)) == 1


@pytest.mark.parametrize("activation", LEARNED)
@pytest.mark.parametrize("name", SPARSITIES)
def test_mixtures_begin_even_and_learn(name: str, activation: Activation) -> None:
    model = built(name, activation).train()
    shares = activation_weights(model)
    assert len(shares) == NUM_MIXTURES[name]
    assert all(weight == 0.25 for weights in shares.values() for weight in weights.values())
    model(some_ids(4, 12)).logits.square().mean().backward()
    for path, parameter in model.named_parameters():
        if path.endswith("mixture.logits"):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, path


def test_weights_are_named_by_where_they_are() -> None:
    assert [*activation_weights(built("shared"))] == ["layer_0", "layer_1", "layer_1_shared"]
    assert [*activation_weights(built("residual"))] == ["layer_0", "layer_0_residual", "layer_1", "layer_1_residual"]
    assert activation_weights(built("dense", Activation.gelu)) == {}
    model = built("dense", mixed_activations=[MixedActivation.tanh, MixedActivation.relu])
    model.blocks[1].feed_forward.mixture.logits.data.copy_(torch.tensor([3.0, 1.0]).log())  # type: ignore[union-attr]
    assert activation_weights(model)["layer_1"] == pytest.approx({"tanh": 0.75, "relu": 0.25})


def test_a_mixture_of_gelu_alone_is_the_model_with_gelu() -> None:
    ids = some_ids(2, 12)
    for name in SPARSITIES:
        alone = built(name, mixed_activations=[MixedActivation.gelu]).eval()
        assert torch.equal(alone(ids).logits, built(name, Activation.gelu).eval()(ids).logits)


@pytest.mark.parametrize("activation", LEARNED)
def test_causality_and_decoding(activation: Activation) -> None:
    model, ids = built("shared", activation).eval().double(), some_ids(2, 12)
    for mixture in (part for part in model.modules() if isinstance(part, ActivationMixture)):
        mixture.logits.data.copy_(some(4, seed=2))
    whole = model(ids).logits
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 40
    torch.testing.assert_close(model(changed).logits[:, :7], whole[:, :7])
    cache = model.new_cache(2, 12)
    steps = [model(ids[:, t : t + 1], cache).logits for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)


@pytest.mark.parametrize("activation", LEARNED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dense", "experts", "shared"])
@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
def test_recomputation_gives_the_same_bits(
    recompute: Recompute, name: str, dtype: torch.dtype, activation: Activation
) -> None:
    found = []
    for setting in (Recompute.none, recompute):
        model = built(name, activation).to(dtype).train()
        model.recompute = setting
        torch.manual_seed(11)
        model(some_ids(2, 12)).logits.float().square().mean().backward()
        found.append({path: parameter.grad for path, parameter in model.named_parameters()})
    assert all(torch.equal(found[0][path], found[1][path]) for path in found[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("share", list(SharedProjection))
def test_a_mixture_is_no_stack_of_experts(share: SharedProjection) -> None:
    """Not even with as many activations as experts."""
    sparsity = MoEConfig(router=TopKRouterConfig(), num_experts=4, share_projection=share)
    (layer, _) = build_model(Architecture(model_config(activation=Activation.mixture), sparsity=sparsity)).moe_layers()
    assert layer.experts.mixture is not None and len(layer.experts.mixture.logits) == 4
    assert not [name for name in stack_names(layer) if "mixture" in name]


def test_a_network_without_a_mixture_has_no_further_parameter() -> None:
    assert [*FeedForward(4, 8, Activation.gelu).state_dict()] == ["up.weight", "down.weight"]
