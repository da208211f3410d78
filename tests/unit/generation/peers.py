"""The same model twice: ours, and transformers' with our weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import GroupedAttentionConfig
from ava_exp.config.model import DenseConfig, ModelConfig, MoEConfig
from ava_exp.config.router import TopKRouterConfig
from ava_exp.models.decoder import Decoder, build_model

VOCABULARY = 40
STOP = 7


def ours(*, experts: bool, dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    """A small decoder whose predictions are neither flat nor certain."""
    model = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=96,
        initializer_range=0.25,
        tie_embeddings=False,
        dropout=0.0,
    )
    sparsity = MoEConfig(router=TopKRouterConfig(), num_experts=4) if experts else DenseConfig()
    return build_model(Architecture(model, GroupedAttentionConfig(), sparsity), seed=seed, dtype=dtype).eval()


def theirs(model: Decoder) -> Any:
    """Llama, or Mixtral where there are experts, with the weights of `model`."""
    config = model.config
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "pad_token_id": STOP,
        "eos_token_id": STOP,
    }
    peer: Any
    if model.moe_layers():
        number = model.moe_layers()[0].experts.num_experts
        peer = MixtralForCausalLM(MixtralConfig(num_local_experts=number, num_experts_per_tok=2, **common))
    else:
        peer = LlamaForCausalLM(LlamaConfig(**common))
    peer.load_state_dict(renamed(model))
    return peer.to(model.embedding.weight.dtype).eval()


def renamed(model: Decoder) -> dict[str, torch.Tensor]:
    """Our weights under their names."""
    state, config = model.state_dict(), model.config
    assert config.num_kv_heads is not None and config.head_dim is not None
    rows = [number * config.head_dim for number in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    weights = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["final_norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    for layer in range(config.num_layers):
        prefix, own = (
            f"model.layers.{layer}.",
            {name.removeprefix(f"blocks.{layer}."): value for name, value in state.items()},
        )
        q, k, v = own["attention.query_key_value.weight"].split(rows)
        weights |= {
            f"{prefix}input_layernorm.weight": own["attention_norm.weight"],
            f"{prefix}post_attention_layernorm.weight": own["feed_forward_norm.weight"],
            f"{prefix}self_attn.q_proj.weight": q,
            f"{prefix}self_attn.k_proj.weight": k,
            f"{prefix}self_attn.v_proj.weight": v,
            f"{prefix}self_attn.o_proj.weight": own["attention.output.weight"],
        }
        if "feed_forward.router.weight" in own:
            weights |= {
                f"{prefix}mlp.gate.weight": own["feed_forward.router.weight"],
                f"{prefix}mlp.experts.gate_up_proj": own["feed_forward.experts.up"],
                f"{prefix}mlp.experts.down_proj": own["feed_forward.experts.down"],
            }
            continue
        gate, up = own["feed_forward.up.weight"].chunk(2)
        weights |= {
            f"{prefix}mlp.gate_proj.weight": gate,
            f"{prefix}mlp.up_proj.weight": up,
            f"{prefix}mlp.down_proj.weight": own["feed_forward.down.weight"],
        }
    return weights
