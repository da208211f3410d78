"""The memory model against what autograd keeps, and against the constants of the code that it describes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ava_exp.losses.cross_entropy
import ava_exp.nn.attention.band
import ava_exp.nn.attention.mixture_of_heads
import ava_exp.nn.attention.softmax
import ava_exp.nn.moe.dispatch
from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import (
    AttentionBackend,
    GroupedAttentionConfig,
    MixtureOfHeadsConfig,
    MultiLevelAttentionConfig,
)
from ava_exp.config.machine import Precision
from ava_exp.config.model import Activation, DenseConfig, ModelConfig, MoEConfig, Norm
from ava_exp.config.router import TopKRouterConfig
from ava_exp.config.training import Recompute
from ava_exp.models import attention as attention_forms
from ava_exp.models import memory
from ava_exp.models.arithmetic import count_parameters
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.models.memory import MemoryEstimate, estimate_memory
from ava_exp.optim.update import Updater

MOE = MoEConfig(router=TopKRouterConfig(), num_experts=8)
SDPA = AttentionBackend.sdpa


def config(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 500, "hidden_size": 256, "num_layers": 3, "num_heads": 4, "intermediate_size": 512}
    return ModelConfig(**sizes | {"max_position_embeddings": 256} | changes)


COMPOSITIONS = [
    (config(), GroupedAttentionConfig(), MOE),
    (config(num_kv_heads=2), GroupedAttentionConfig(backend=SDPA), DenseConfig()),
    (config(activation=Activation.gelu, norm=Norm.layer), GroupedAttentionConfig(), MOE),
    (config(activation=Activation.gelu, norm=Norm.layer), GroupedAttentionConfig(), DenseConfig()),
    (config(num_kv_heads=2), GroupedAttentionConfig(qk_norm=True), MOE),
    (config(), GroupedAttentionConfig(sliding_window=64), DenseConfig()),
    (config(num_kv_heads=2), GroupedAttentionConfig(sliding_window=64, backend=SDPA), DenseConfig()),
    (config(), MultiLevelAttentionConfig(), DenseConfig()),
    (config(num_kv_heads=2), MultiLevelAttentionConfig(sliding_window=32, backend=SDPA), DenseConfig()),
    (config(), MultiLevelAttentionConfig(sliding_window=64, progressive_sparsity=0.5, qk_norm=True), DenseConfig()),
    (config(num_heads=8, num_kv_heads=4), MixtureOfHeadsConfig(num_shared_heads=2, heads_per_token=2), DenseConfig()),
    (config(num_heads=8), MixtureOfHeadsConfig(num_shared_heads=0, backend=SDPA, qk_norm=True), DenseConfig()),
    (config(activation=Activation.mixture), GroupedAttentionConfig(), MOE),
    (config(activation=Activation.mixture), GroupedAttentionConfig(), DenseConfig()),
    (config(activation=Activation.hard_mixture), GroupedAttentionConfig(), DenseConfig()),
]


def kept_bytes(model: Decoder, ids: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, without parameters and rotary tables."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), model.cos, model.sin)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
@pytest.mark.parametrize("index", range(len(COMPOSITIONS)))
def test_activations_are_what_autograd_keeps(index: int, precision: Precision) -> None:
    model, attention, sparsity = COMPOSITIONS[index]
    dtype = torch.float32 if precision is Precision.fp32 else torch.bfloat16
    built = build_model(Architecture(model, attention, sparsity), dtype=dtype).train()
    ids = torch.randint(0, 500, (4, 256), generator=torch.Generator().manual_seed(0))
    estimate = estimate_memory(
        Architecture(model, attention, sparsity), precision=precision, batch_size=4, sequence_length=256
    )
    of_one_block = 1 + 1 / model.num_layers  # the gradients that the backward pass works with
    assert estimate.activations == pytest.approx(kept_bytes(built, ids) * of_one_block, rel=0.1)


def estimate_of(precision: Precision = Precision.fp32, **settings: Any) -> MemoryEstimate:
    sizes = {"batch_size": 4, "sequence_length": 256}
    return estimate_memory(Architecture(*COMPOSITIONS[0]), precision=precision, **sizes | settings)


@pytest.mark.parametrize(
    ("precision", "masters", "wide_states"),
    [
        (Precision.fp32, False, False),
        (Precision.bf16, False, False),
        (Precision.mixed_bf16, True, False),
        (Precision.fp16, False, True),
    ],
)
def test_weights_and_states_are_exact(precision: Precision, masters: bool, wide_states: bool) -> None:
    model, attention, sparsity = COMPOSITIONS[0]
    dtype = {Precision.fp32: torch.float32, Precision.fp16: torch.float16}.get(precision, torch.bfloat16)
    built = build_model(Architecture(model, attention, sparsity), dtype=dtype)
    updater = Updater(
        built,
        lambda groups: torch.optim.AdamW(groups, fused=True),
        weight_decay=0.0,
        master_weights=masters,
        wide_states=wide_states,
    )
    for parameter in built.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = size_of([p.grad for p in built.parameters()])
    updater.collect_gradients()
    if updater.wide:
        gradients += size_of([weight.grad for weight in updater.weights.values()])
    updater.apply(1e-3, 1.0)
    estimate = estimate_of(precision)
    assert estimate.weights == size_of(built.parameters())
    assert estimate.master_weights == (size_of(updater.weights.values()) if updater.wide else 0)
    assert estimate.gradients == gradients
    states = updater.optimizer_state()[0]
    assert estimate.optimizer == size_of(state for state in states.values() if state.ndim)
    saved = size_of([*updater.weights.values(), *(state for state in states.values() if state.ndim)])
    assert estimate_of(precision, copies_state=True).snapshot == saved


def size_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_recomputation_keeps_less_and_less() -> None:
    none, selective, full = (estimate_of(recompute=setting).activations for setting in Recompute)
    assert full < selective < none
    deep = [
        estimate_memory(
            Architecture(config(num_layers=n), *COMPOSITIONS[0][1:]),
            precision=Precision.fp32,
            batch_size=4,
            sequence_length=256,
            recompute=Recompute.full,
        ).activations
        for n in (10, 11)
    ]
    assert deep[1] - deep[0] == 4 * 256 * 256 * 4, "the input of one block"


def test_logits_are_those_of_one_slice() -> None:
    large = config(vocab_size=2**16)
    sizes = {"precision": Precision.fp32, "sequence_length": 256}
    few, many = (estimate_memory(Architecture(large, *COMPOSITIONS[0][1:]), batch_size=b, **sizes) for b in (1, 64))  # type: ignore[arg-type]
    assert few.logits == many.logits == 4 * (2**24 + 2**16 * 256)


def test_all_parts_are_added_up() -> None:
    estimate = estimate_of(Precision.mixed_bf16, copies_state=True)
    parts = {name: getattr(estimate, name) for name in MemoryEstimate.__slots__}
    assert all(parts.values()) and estimate.total == sum(parts.values())
    assert estimate_of(on_cpu=False).process == 0
    assert estimate.weights == 2 * count_parameters(Architecture(*COMPOSITIONS[0])).total


def test_its_constants_are_those_of_the_code() -> None:
    assert memory.SLICE_VALUES == ava_exp.losses.cross_entropy.SLICE_VALUES
    for module in (ava_exp.nn.attention.softmax, ava_exp.nn.attention.band, ava_exp.nn.attention.mixture_of_heads):
        names = {"PLAIN_LENGTH", "SMALLEST_CHUNK", "CHUNKS_A_WINDOW", "MOST_GATHERED"} & {*vars(module)}
        assert names and all(getattr(module, name) == getattr(attention_forms, name) for name in names)
