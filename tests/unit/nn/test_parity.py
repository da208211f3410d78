"""Our weights in the layers of transformers, which others wrote: the same outputs, in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM, MixtralSparseMoeBlock
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import GroupedAttentionConfig
from ava_exp.config.model import DispatchBackend, RopeScaling
from ava_exp.config.router import DeepSeekRouterConfig, RouterConfig, TopKRouterConfig
from ava_exp.models.decoder import build_model
from ava_exp.nn.moe.layer import MoELayer
from tests.unit.nn.routing_cases import DIM, NUM_EXPERTS, WIDTH, build_layer, model_config, moe_config, some_ids

BACK_ENDS = [DispatchBackend.loop, DispatchBackend.grouped]


def ours(router: RouterConfig, **changes: Any) -> MoELayer:
    return build_layer(router, dtype=torch.float32, **changes).eval()


def copy_experts(theirs: nn.Module, layer: MoELayer) -> None:
    """Fill their fused experts and their gate; strict, so that nothing of theirs stays as it was."""
    experts, gate = theirs.get_submodule("experts"), theirs.get_submodule("gate")
    experts.load_state_dict({"gate_up_proj": layer.experts.up, "down_proj": layer.experts.down})
    weights = {"weight": layer.router.weight}
    if isinstance(layer.router.state_dict().get("bias"), Tensor):
        weights["e_score_correction_bias"] = layer.router.get_buffer("bias")
    gate.load_state_dict(weights)


def assert_equal(theirs: nn.Module, layer: MoELayer) -> None:
    x = torch.randn(2, 50, DIM, generator=torch.Generator().manual_seed(8)) * 2
    with torch.no_grad():
        expected = theirs.eval()(x)
        y = layer(x)[0]
    assert y.abs().mean() > 0.1
    torch.testing.assert_close(y, expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("dispatch", BACK_ENDS)
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_mixtral(top_k: int, dispatch: DispatchBackend) -> None:
    layer = ours(TopKRouterConfig(moe_top_k=top_k), dispatch=dispatch)
    config = MixtralConfig(
        hidden_size=DIM, intermediate_size=WIDTH, num_local_experts=NUM_EXPERTS, num_experts_per_tok=top_k
    )
    theirs = MixtralSparseMoeBlock(config)
    copy_experts(theirs, layer)
    assert_equal(theirs, layer)


@pytest.mark.parametrize("dispatch", BACK_ENDS)
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_qwen3_moe(norm_topk_prob: bool, dispatch: DispatchBackend) -> None:
    layer = ours(TopKRouterConfig(moe_top_k=3, renormalize=norm_topk_prob), dispatch=dispatch)
    config = Qwen3MoeConfig(
        hidden_size=DIM,
        moe_intermediate_size=WIDTH,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=3,
        norm_topk_prob=norm_topk_prob,
    )
    theirs = Qwen3MoeSparseMoeBlock(config)
    copy_experts(theirs, layer)
    assert_equal(theirs, layer)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_olmoe(norm_topk_prob: bool) -> None:
    layer = ours(TopKRouterConfig(moe_top_k=4, renormalize=norm_topk_prob))
    config = OlmoeConfig(
        hidden_size=DIM,
        intermediate_size=WIDTH,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=4,
        norm_topk_prob=norm_topk_prob,
    )
    theirs = OlmoeSparseMoeBlock(config)
    copy_experts(theirs, layer)
    assert_equal(theirs, layer)


@pytest.mark.parametrize("dispatch", BACK_ENDS)
@pytest.mark.parametrize("num_shared_experts", [1, 2])
@pytest.mark.parametrize(
    ("num_groups", "groups_per_token", "top_k", "renormalize", "scale"),
    [(1, 1, 2, True, 1.0), (4, 2, 3, True, 2.5), (2, 1, 3, False, 1.5), (4, 4, 2, True, 1.0)],
)
def test_deepseek_v3(
    num_groups: int,
    groups_per_token: int,
    top_k: int,
    renormalize: bool,
    scale: float,
    num_shared_experts: int,
    dispatch: DispatchBackend,
) -> None:
    router = DeepSeekRouterConfig(
        moe_top_k=top_k,
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        renormalize=renormalize,
        routed_scaling_factor=scale,
    )
    layer = ours(router, num_shared_experts=num_shared_experts, dispatch=dispatch)
    config = DeepseekV3Config(
        hidden_size=DIM,
        moe_intermediate_size=WIDTH,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=top_k,
        n_shared_experts=num_shared_experts,
        n_group=num_groups,
        topk_group=groups_per_token,
        norm_topk_prob=renormalize,
        routed_scaling_factor=scale,
    )
    theirs = DeepseekV3MoE(config)
    copy_experts(theirs, layer)
    assert layer.shared is not None
    gate, up = layer.shared.up.weight.chunk(2)
    theirs.shared_experts.load_state_dict(
        {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": layer.shared.down.weight}
    )
    assert layer.router.get_buffer("bias").abs().min() > 0
    assert_equal(theirs, layer)


def test_the_whole_of_mixtral() -> None:
    model = model_config(num_heads=4, num_kv_heads=2, hidden_size=16, initializer_range=0.3, tie_embeddings=False)
    decoder = build_model(Architecture(model, GroupedAttentionConfig(), moe_config(TopKRouterConfig()))).eval()
    config = MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=WIDTH,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        max_position_embeddings=model.max_position_embeddings,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=False,
        sliding_window=None,
    )
    theirs = MixtralForCausalLM(config).eval()
    assert decoder.head is not None
    weights = {
        "model.embed_tokens.weight": decoder.embedding.weight,
        "model.norm.weight": decoder.final_norm.weight,
        "lm_head.weight": decoder.head.weight,
    }
    for index, block in enumerate(decoder.blocks):
        prefix, state = f"model.layers.{index}.", block.state_dict()
        q, k, v = state["attention.query_key_value.weight"].split([16, 8, 8])
        weights |= {
            f"{prefix}input_layernorm.weight": state["attention_norm.weight"],
            f"{prefix}post_attention_layernorm.weight": state["feed_forward_norm.weight"],
            f"{prefix}self_attn.q_proj.weight": q,
            f"{prefix}self_attn.k_proj.weight": k,
            f"{prefix}self_attn.v_proj.weight": v,
            f"{prefix}self_attn.o_proj.weight": state["attention.output.weight"],
            f"{prefix}mlp.gate.weight": state["feed_forward.router.weight"],
            f"{prefix}mlp.experts.gate_up_proj": state["feed_forward.experts.up"],
            f"{prefix}mlp.experts.down_proj": state["feed_forward.experts.down"],
        }
    theirs.load_state_dict(weights)
    with torch.no_grad():
        expected, logits = theirs(some_ids(2, 20)).logits, decoder(some_ids(2, 20)).logits
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("scaling", [RopeScaling.none, RopeScaling.linear, RopeScaling.yarn])
def test_the_whole_of_llama_beyond_its_original_length(scaling: RopeScaling) -> None:
    scaled = (
        {"rope_scaling": scaling, "original_max_position_embeddings": 32} if scaling is not RopeScaling.none else {}
    )
    model = model_config(
        num_heads=4,
        num_kv_heads=2,
        hidden_size=32,
        initializer_range=0.3,
        tie_embeddings=False,
        max_position_embeddings=128,
        **scaled,
    )
    decoder = build_model(Architecture(model)).eval()
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaled:
        rope = {"rope_type": scaling.value, "factor": 4.0, "original_max_position_embeddings": 32}
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={**rope, "rope_theta": model.rope_theta},
        tie_word_embeddings=False,
    )
    theirs = LlamaForCausalLM(config).eval()
    assert decoder.head is not None
    weights = {
        "model.embed_tokens.weight": decoder.embedding.weight,
        "model.norm.weight": decoder.final_norm.weight,
        "lm_head.weight": decoder.head.weight,
    }
    for index, block in enumerate(decoder.blocks):
        prefix, state = f"model.layers.{index}.", block.state_dict()
        q, k, v = state["attention.query_key_value.weight"].split([32, 16, 16])
        gate, up = state["feed_forward.up.weight"].chunk(2)
        weights |= {
            f"{prefix}input_layernorm.weight": state["attention_norm.weight"],
            f"{prefix}post_attention_layernorm.weight": state["feed_forward_norm.weight"],
            f"{prefix}self_attn.q_proj.weight": q,
            f"{prefix}self_attn.k_proj.weight": k,
            f"{prefix}self_attn.v_proj.weight": v,
            f"{prefix}self_attn.o_proj.weight": state["attention.output.weight"],
            f"{prefix}mlp.gate_proj.weight": gate,
            f"{prefix}mlp.up_proj.weight": up,
            f"{prefix}mlp.down_proj.weight": state["feed_forward.down.weight"],
        }
    theirs.load_state_dict(weights)
    ids = some_ids(2, 120)
    with torch.no_grad():
        expected, logits = theirs(ids).logits, decoder(ids).logits
        cache = decoder.new_cache(2, 120)
        decoded = torch.cat([decoder(ids[:, t : t + 1], cache).logits for t in range(120)], dim=1)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0.0, atol=2e-5)
    torch.testing.assert_close(decoded, expected, rtol=0.0, atol=2e-5)
