"""Recomputation and offloading change what is kept, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ava_exp.nn.recompute as module
from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import GroupedAttentionConfig
from ava_exp.config.model import DenseConfig, ModelConfig, MoEConfig
from ava_exp.config.router import TopKRouterConfig
from ava_exp.config.training import Recompute
from ava_exp.losses.terms import StepContext, build_losses
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.nn.output import ModelOutput

ROUTED = MoEConfig(router=TopKRouterConfig(jitter=0.1), num_experts=4)
RECOMPUTED = (Recompute.selective, Recompute.full)


def build(sparsity: Any = ROUTED, dtype: torch.dtype = torch.float32, **settings: Any) -> Decoder:
    config = ModelConfig(
        vocab_size=96,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        dropout=0.2,
    )
    model = build_model(
        Architecture(config, GroupedAttentionConfig(attention_dropout=0.1), sparsity), dtype=dtype
    ).train()
    for name, value in settings.items():
        setattr(model, name, value)
    return model


def one_pass(model: Decoder, sparsity: Any = ROUTED) -> tuple[Tensor, dict[str, Tensor], ModelOutput]:
    """Return loss, gradients and output: dropout and jitter draw the same numbers every time."""
    torch.manual_seed(7)
    ids = torch.randint(0, 96, (2, 21), generator=torch.Generator().manual_seed(0))
    output = model(ids[:, :-1])
    counts = [routing.chosen_counts for routing in output.routings]
    context = StepContext(num_tokens=40, chosen_counts=counts)
    loss = torch.stack([term(output, ids[:, 1:], context) for term in build_losses(sparsity)]).sum()
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, output


@pytest.mark.parametrize("sparsity", [ROUTED, DenseConfig()], ids=["routed", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("offloads", [False, True])
def test_losses_gradients_and_routings_are_the_same_bit_for_bit(
    sparsity: Any, dtype: torch.dtype, recompute: Recompute, offloads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SMALLEST_OFFLOADED_BYTES", 1)
    expected, wanted, before = one_pass(build(sparsity, dtype), sparsity)
    model = build(sparsity, dtype, recompute=recompute, offload_activations=offloads)
    loss, gradients, after = one_pass(model, sparsity)
    assert torch.equal(loss, expected)
    assert gradients.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(gradients[name], wanted[name]) for name in wanted)
    for routing, other in zip(after.routings, before.routings, strict=True):
        assert torch.equal(routing.counts, other.counts)


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_the_generator_ends_where_it_would_without(recompute: Recompute) -> None:
    states = []
    for setting in (Recompute.none, recompute):
        one_pass(build(recompute=setting))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def kept_bytes(model: Decoder) -> int:
    """What autograd keeps of the blocks, beside parameters and what selective recomputation stores itself."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.zeros(2, 20, dtype=torch.long))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_full_recomputation_keeps_each_block_s_input_only() -> None:
    usual, less = kept_bytes(build()), kept_bytes(build(recompute=Recompute.full))
    assert less < 0.2 * usual


class Products(TorchDispatchMode):
    """Counts products with weights that are really computed."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += function.overloadpacket in module.PRODUCTS
        return function(*args, **(kwargs or {}))


def test_selective_recomputation_computes_no_product_with_a_weight_twice() -> None:
    counts = []
    for setting in Recompute:
        with Products() as products:
            one_pass(build(recompute=setting))
        counts.append(products.count)
    none, selective, full = counts
    assert none == selective < full


def test_offloading_moves_activations_and_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST_OFFLOADED_BYTES", 1)
    weight = torch.ones(3, 3, requires_grad=True)
    with module.offload([weight]):
        product = torch.full((2, 3), 2.0, requires_grad=True) @ weight
        y = product.exp()
    saved = {"y": y.grad_fn._saved_result, "weight": product.grad_fn._saved_mat2}  # type: ignore[union-attr]
    assert torch.equal(saved["y"], y) and saved["y"].data_ptr() != y.data_ptr()
    assert saved["weight"].data_ptr() == weight.data_ptr()


def test_nothing_is_recomputed_or_offloaded_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError(args)

    for name in ("offload", "run_recomputed"):
        monkeypatch.setattr(f"ava_exp.models.decoder.{name}", refuse)
    model = build(recompute=Recompute.full, offload_activations=True).eval()
    with torch.inference_mode():
        model(torch.zeros(1, 4, dtype=torch.long))
