"""The whole decoder: causality, decoding, closed forms, initialisation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import AttentionBackend, GroupedAttentionConfig
from ava_exp.config.model import Activation, DenseConfig, DispatchBackend, ModelConfig, MoEConfig, Norm, SparsityConfig
from ava_exp.config.router import TopKRouterConfig
from ava_exp.errors import ConfigError
from ava_exp.models.arithmetic import count_parameters, forward_flops_per_token
from ava_exp.models.decoder import Decoder, build_model


def model_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**values | changes)


def moe(**changes: Any) -> MoEConfig:
    return MoEConfig(**{"router": TopKRouterConfig(), "num_experts": 4} | changes)


COMPOSITIONS: list[tuple[dict[str, Any], SparsityConfig, GroupedAttentionConfig]] = [
    ({}, moe(), GroupedAttentionConfig()),
    ({}, DenseConfig(), GroupedAttentionConfig()),
    ({"activation": Activation.gelu, "norm": Norm.layer}, moe(num_experts=3), GroupedAttentionConfig(qk_norm=True)),
    ({"tie_embeddings": False, "bias": True}, DenseConfig(), GroupedAttentionConfig()),
    ({"num_kv_heads": 4, "tie_embeddings": False}, moe(intermediate_size=24), GroupedAttentionConfig()),
    (
        {"head_dim": 16, "activation": Activation.gelu, "bias": True},
        DenseConfig(),
        GroupedAttentionConfig(qk_norm=True),
    ),
]


def build(index: int, **kwargs: Any) -> Decoder:
    changes, sparsity, attention = COMPOSITIONS[index]
    return build_model(Architecture(model_config(**changes), attention, sparsity), **kwargs).eval()


def some_ids(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("index", range(len(COMPOSITIONS)))
def test_changing_a_token_moves_no_earlier_logit(index: int) -> None:
    model, ids = build(index), some_ids()
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 96
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :12], after[:, :12])
    assert (before[:, 12:] != after[:, 12:]).any(dim=-1).all()


@pytest.mark.parametrize("index", range(len(COMPOSITIONS)))
def test_decoding_with_a_cache_equals_the_full_forward(index: int) -> None:
    model, ids = build(index), some_ids()
    cache = model.new_cache(batch_size=2, capacity=20)
    parts = [model(ids[:, start:stop], cache).logits for start, stop in ((0, 7), (7, 8), (8, 9), (9, 20))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", range(len(COMPOSITIONS)))
def test_closed_form_parameters(index: int) -> None:
    changes, sparsity, attention = COMPOSITIONS[index]
    breakdown = count_parameters(Architecture(model_config(**changes), attention, sparsity))
    model = build(index, device="meta")
    assert breakdown.total == sum(p.numel() for p in model.parameters())
    by_part = {part.name: part.total for part in breakdown.parts}
    names = {"experts": ("experts.up", "experts.down"), "router": ("router.weight",)}
    for part, endings in names.items():
        if part in by_part:
            assert by_part[part] == sum(p.numel() for n, p in model.named_parameters() if n.endswith(endings))


@pytest.mark.parametrize("index", range(len(COMPOSITIONS)))
def test_closed_form_flops(index: int) -> None:
    """torch's counter sees plain products; attention's are counted over all positions there, causally in ours."""
    changes, sparsity, attention = copy.deepcopy(COMPOSITIONS[index])
    config, length = model_config(**changes), 16
    if isinstance(sparsity, MoEConfig):
        sparsity.dispatch = DispatchBackend.loop
    attention.backend = AttentionBackend.plain
    model = build_model(Architecture(config, attention, sparsity)).eval()
    with FlopCounterMode(display=False) as counter:
        assert model(some_ids(2, length)).logits.shape == (2, length, 96)
    assert config.head_dim is not None
    beyond_causal = 4 * config.num_layers * config.num_heads * config.head_dim * (length - (length + 1) / 2)
    ours = forward_flops_per_token(Architecture(config, attention, sparsity), length) + beyond_causal
    assert counter.get_total_flops() == ours * 2 * length


def test_active_parameters_count_the_chosen_experts_only() -> None:
    config, attention = model_config(), GroupedAttentionConfig()
    one, two = (
        count_parameters(Architecture(config, attention, moe(router=TopKRouterConfig(moe_top_k=k)))) for k in (1, 2)
    )
    assert two.total == one.total
    assert two.active - one.active == 3 * 3 * 32 * 40


def test_the_same_seed_gives_the_same_start_and_sparsity_leaves_the_rest_alone() -> None:
    dense, sparse, other = build(1, seed=5), build(0, seed=5), build(0, seed=6)
    assert torch.equal(dense.embedding.weight, sparse.embedding.weight)
    name = "blocks.1.attention.query_key_value.weight"
    assert torch.equal(dense.get_parameter(name), sparse.get_parameter(name))
    assert not torch.equal(sparse.get_parameter(name), other.get_parameter(name))


def test_residual_outputs_start_smaller() -> None:
    model = build_model(
        Architecture(model_config(hidden_size=128, intermediate_size=512, head_dim=32), GroupedAttentionConfig(), moe())
    )
    experts = model.get_submodule("blocks.0.feed_forward.experts")
    ratio = experts.get_parameter("down").std() / experts.get_parameter("up").std()
    assert ratio.item() == pytest.approx(1 / 6**0.5, rel=0.02)


def test_a_sequence_beyond_the_last_position_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 64 tokens, but has 65"):
        build(0)(some_ids(1, 65))


def test_bf16_stays_near_fp32() -> None:
    ids = some_ids()
    exact, rounded = build(0)(ids).logits, build(0, dtype=torch.bfloat16)(ids).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_meta_allocates_nothing_and_rope_tables_are_rebuilt_on_the_device() -> None:
    assert all(p.is_meta for p in build(0, device="meta").parameters())
    model = build(0)
    assert model.cos[0].eq(1).all()
    assert "cos" not in model.state_dict()
