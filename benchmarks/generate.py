"""Generation in tokens/s: this package and transformers' `generate`, on the same weights, greedily.

    python benchmarks/generate.py [--rounds 3] [--models dense experts] [--batches 1 16] [--formats fp32 bf16]

A dense model has the shape of Llama, one with experts that of Mixtral: 8 experts, 2 for a token. Both sides run in one
process, in turn (A B A B), after a warm-up; medians count. A rate is of all new tokens over all seconds of a call,
reading the prompts included. In fp32 both must write the same tokens; in bf16 rounding may part them, and the share of
sequences that are the same is shown. Threads are `--threads`, of both sides. On a machine that others use,
`--cpu-time` measures the process's own time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import GroupedAttentionConfig
from ava_exp.config.generation import GenerationSettings
from ava_exp.config.model import DenseConfig, ModelConfig, MoEConfig
from ava_exp.config.router import TopKRouterConfig
from ava_exp.generation.generate import generate
from ava_exp.models.decoder import Decoder, build_model

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGET = 1.5


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: `experts` says whether the model is a mixture."""

    experts: bool
    batch_size: int
    dtype: torch.dtype

    def __str__(self) -> str:
        name = next(name for name, dtype in FORMATS.items() if dtype is self.dtype)
        return f"{'experts' if self.experts else 'dense'}, batch {self.batch_size}, {name}"


def build(case: Case, arguments: argparse.Namespace) -> Decoder:
    """Return our model, with weights wide enough that what it writes depends on what it read."""
    config = ModelConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        intermediate_size=arguments.intermediate,
        max_position_embeddings=arguments.prompt + arguments.new,
        initializer_range=0.06,
        tie_embeddings=False,
        dropout=0.0,
    )
    sparsity = MoEConfig(router=TopKRouterConfig(), num_experts=8) if case.experts else DenseConfig()
    return build_model(Architecture(config, GroupedAttentionConfig(), sparsity), dtype=case.dtype).eval()


def peer_of(model: Decoder) -> Any:
    """Return transformers' Llama, or Mixtral, with the weights of `model`."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    config = model.config
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "dtype": model.embedding.weight.dtype,
    }
    peer: Any
    if model.moe_layers():
        peer = MixtralForCausalLM(MixtralConfig(num_local_experts=8, num_experts_per_tok=2, **common))
    else:
        peer = LlamaForCausalLM(LlamaConfig(**common))
    peer = peer.to(model.embedding.weight.dtype)
    peer.load_state_dict(renamed(model), strict=True)
    return peer.eval()


def renamed(model: Decoder) -> dict[str, torch.Tensor]:
    """Return our weights under transformers' names."""
    state = dict(model.named_parameters())
    weights = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["final_norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    for layer in range(model.config.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        projections = state[ours + "attention.query_key_value.weight"].chunk(3)
        weights |= {f"{theirs}self_attn.{n}_proj.weight": w for n, w in zip("qkv", projections, strict=True)}
        weights |= {
            theirs + "self_attn.o_proj.weight": state[ours + "attention.output.weight"],
            theirs + "input_layernorm.weight": state[ours + "attention_norm.weight"],
            theirs + "post_attention_layernorm.weight": state[ours + "feed_forward_norm.weight"],
        }
        if ours + "feed_forward.router.weight" in state:
            weights |= {
                theirs + "mlp.gate.weight": state[ours + "feed_forward.router.weight"],
                theirs + "mlp.experts.gate_up_proj": state[ours + "feed_forward.experts.up"],
                theirs + "mlp.experts.down_proj": state[ours + "feed_forward.experts.down"],
            }
            continue
        gate, up = state[ours + "feed_forward.up.weight"].chunk(2)
        weights |= {
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": state[ours + "feed_forward.down.weight"],
        }
    return weights


def sides_of(case: Case, arguments: argparse.Namespace) -> dict[str, Callable[[], list[list[int]]]]:
    """Return what each side does once: write the new tokens of every prompt."""
    model = build(case, arguments)
    peer = peer_of(model)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, arguments.vocabulary, (case.batch_size, arguments.prompt), generator=generator)
    settings = GenerationSettings(max_new_tokens=arguments.new, temperature=0)

    def ours() -> list[list[int]]:
        return [written.ids for (written,) in generate(model, prompts.tolist(), settings)]

    def theirs() -> list[list[int]]:
        output = peer.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=arguments.new,
            min_new_tokens=arguments.new,
            do_sample=False,
        )
        return output[:, arguments.prompt :].tolist()  # type: ignore[no-any-return]

    return {"ours": ours, "transformers": theirs}


def measure(case: Case, arguments: argparse.Namespace) -> float:
    """Print one line of the table and return the ratio of the medians."""
    sides = sides_of(case, arguments)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    rates: dict[str, list[float]] = {name: [] for name in sides}
    written = {name: side() for name, side in sides.items()}  # warm-up
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            started = clock()
            side()
            rates[name].append(case.batch_size * arguments.new / (clock() - started))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    same = sum(a == b for a, b in zip(*written.values(), strict=True)) / case.batch_size
    distinct = len({token for ids in written["ours"] for token in ids})
    assert case.dtype is not torch.float32 or same == 1, f"{case}: only {same:.0%} of the texts are the same"
    ratio = medians["ours"] / medians["transformers"]
    cells = [str(case), *(f"{rate:.1f}" for rate in medians.values()), f"{ratio:.2f}", f"{same:.0%}", str(distinct)]
    print(f"| {' | '.join(cells)} |", flush=True)
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=("dense", "experts"), default=("dense", "experts"))
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 16))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=tuple(FORMATS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true")
    for name, default in (
        ("prompt", 128),
        ("new", 256),
        ("hidden", 512),
        ("layers", 8),
        ("heads", 8),
        ("intermediate", 1376),
        ("vocabulary", 8192),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.prompt} + {arguments.new} tokens")
    print("| model | ours, tokens/s | transformers, tokens/s | ratio | same texts | distinct tokens |")
    print("|---|---|---|---|---|---|")
    ratios = [
        measure(Case(name == "experts", batch_size, FORMATS[format_name]), arguments)
        for name in arguments.models
        for batch_size in arguments.batches
        for format_name in arguments.formats
    ]
    print(f"smallest ratio {min(ratios):.2f}, target {TARGET}")


if __name__ == "__main__":
    main()
