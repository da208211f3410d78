"""Training tokens/s of this package and of transformers' Mixtral: same shapes, weights, batches and optimizer.

    python benchmarks/training_throughput.py [--rounds 2] [--steps 24]

Every measurement is a process of its own, in the order A B A B. Both sides start from the same weights, see the same
batches of the embedded text, and use torch's fused AdamW, gradient clipping at 1 and a balance loss of weight 0.01.
Each runs in its fastest setting of those listed; the table says which formats that means. Model FLOPs utilisation is
against a matrix product measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import GroupedAttentionConfig
from ava_exp.config.data import BPEConfig, StdlibConfig
from ava_exp.config.model import ModelConfig, MoEConfig
from ava_exp.config.router import TopKRouterConfig
from ava_exp.config.training import AdamWConfig
from ava_exp.data.loader import BatchLoader
from ava_exp.data.prepare import prepare_data
from ava_exp.losses.terms import build_losses
from ava_exp.models.arithmetic import training_flops_per_token
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.optim.update import Updater
from ava_exp.runtime import keep_freed_memory, times_of
from ava_exp.training.step import train_step

BATCH, LENGTH = 8, 256
MODEL = ModelConfig(
    vocab_size=8192,
    hidden_size=384,
    num_layers=6,
    num_heads=6,
    intermediate_size=1024,
    max_position_embeddings=512,
    tie_embeddings=False,
)
ATTENTION = GroupedAttentionConfig()
SPARSITY = MoEConfig(router=TopKRouterConfig(router_z_loss_weight=0.0, load_balancing_weight=0.02), num_experts=8)
"""Mixtral's balance loss is twice ours, for it counts both choices of a token: 0.02 here is its 0.01."""
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
LEARNING_RATE = 1e-3

COLUMNS = ("weights", "compute", "optimizer states", "allocator")
SIDES = {
    "ours bf16": ("bf16", "bf16", "bf16", "keeps buffers"),
    "ours mixed_bf16": ("bf16 + fp32 master", "bf16", "fp32", "keeps buffers"),
    "transformers grouped_mm bf16": ("bf16", "bf16", "bf16", "glibc default"),
    "transformers grouped_mm bf16 kept": ("bf16", "bf16", "bf16", "keeps buffers"),
    "transformers eager autocast": ("fp32", "bf16 autocast", "fp32", "glibc default"),
}


def batches(steps: int) -> list[Any]:
    data = prepare_data(StdlibConfig(), BPEConfig(vocab_size=8192), Path("outputs/cache"), lambda line: None)
    loader = BatchLoader(data.train, LENGTH, BATCH, 1, seed=0)
    return [loader.micro_batches(step) for step in range(steps)]


def run_ours(side: str, steps: int) -> tuple[list[float], list[float]]:
    keep_freed_memory()
    model = build_model(Architecture(MODEL, ATTENTION, SPARSITY), dtype=torch.bfloat16)
    updater = Updater(
        model,
        lambda groups: AdamWConfig(learning_rate=LEARNING_RATE).build(groups=groups),
        weight_decay=0.01,
        master_weights="mixed" in side,
    )
    terms = build_losses(SPARSITY)
    losses, seconds = [], []
    for micro_batches in batches(steps):
        started = time.perf_counter()
        metrics = train_step(
            model,
            updater,
            micro_batches,
            terms,
            learning_rate=LEARNING_RATE,
            max_norm=1.0,
            device=torch.device("cpu"),
            backward=torch.Tensor.backward,
        )
        seconds.append(time.perf_counter() - started)
        losses.append(metrics.losses["loss"])
    return losses, seconds


def run_transformers(side: str, steps: int) -> tuple[list[float], list[float]]:
    model = mixtral(grouped="grouped" in side).to(torch.bfloat16 if "bf16" in side else torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    losses, seconds = [], []
    for (batch,) in batches(steps):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in side):
            output = model(input_ids=batch.input_ids, output_router_logits=True)
            loss = F.cross_entropy(output.logits.float().flatten(0, 1), batch.labels.flatten())
        (loss + 0.01 * output.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return losses, seconds


def mixtral(grouped: bool) -> Any:
    """Return transformers' Mixtral with the weights that our model starts from."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.intermediate_size,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_heads,
        num_key_value_heads=MODEL.num_heads,
        num_local_experts=SPARSITY.num_experts,
        num_experts_per_tok=2,
        max_position_embeddings=MODEL.max_position_embeddings,
        rms_norm_eps=MODEL.norm_epsilon,
        use_cache=False,
        experts_implementation="grouped_mm" if grouped else "eager",
    )
    theirs = MixtralForCausalLM(config)
    ours = build_model(Architecture(MODEL, ATTENTION, SPARSITY))
    theirs.load_state_dict(to_mixtral(ours), strict=True)
    return theirs


def to_mixtral(model: Decoder) -> dict[str, torch.Tensor]:
    """Rename our weights to Mixtral's."""
    state = dict(model.named_parameters())
    renamed = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["final_norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    for layer in range(MODEL.num_layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        projections = state[ours + "attention.query_key_value.weight"].chunk(3)
        renamed |= {f"{theirs}self_attn.{n}_proj.weight": w for n, w in zip("qkv", projections, strict=True)}
        renamed |= {
            theirs + "self_attn.o_proj.weight": state[ours + "attention.output.weight"],
            theirs + "input_layernorm.weight": state[ours + "attention_norm.weight"],
            theirs + "post_attention_layernorm.weight": state[ours + "feed_forward_norm.weight"],
            theirs + "mlp.gate.weight": state[ours + "feed_forward.router.weight"],
            theirs + "mlp.experts.gate_up_proj": state[ours + "feed_forward.experts.up"],
            theirs + "mlp.experts.down_proj": state[ours + "feed_forward.experts.down"],
        }
    return renamed


def gemm_peak() -> float:
    """Return FLOP/s of a bf16 product of the size of the experts' first projection."""
    a, b = torch.ones(4096, 1024, dtype=torch.bfloat16), torch.ones(1024, 2048, dtype=torch.bfloat16)
    return 2 * 4096 * 1024 * 2048 / min(times_of(lambda: a @ b, torch.device("cpu"), 15))


def child(side: str, steps: int) -> None:
    peak = gemm_peak()
    losses, seconds = (run_ours if side.startswith("ours") else run_transformers)(side, steps)
    rates = [BATCH * LENGTH / s for s in seconds[4:]]
    print(json.dumps({"tokens_per_s": statistics.median(rates), "first": losses[0], "last": losses[-1], "peak": peak}))


def measure(side: str, steps: int) -> dict[str, float]:
    environment = {**os.environ, **(KEPT if "kept" in side else {})}
    command = [sys.executable, __file__, "--side", side, "--steps", str(steps)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {side}: {result['tokens_per_s']:.0f} tokens/s, loss {result['last']:.3f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--side", choices=SIDES)
    arguments = parser.parse_args()
    if arguments.side:
        child(arguments.side, arguments.steps)
        return
    results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side in SIDES:
            results[side].append(measure(side, arguments.steps))
    flops = training_flops_per_token(Architecture(MODEL, ATTENTION, SPARSITY), LENGTH)
    medians = {side: statistics.median(r["tokens_per_s"] for r in runs) for side, runs in results.items()}
    peak = statistics.median(r["peak"] for runs in results.values() for r in runs)
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, bf16 product {peak / 1e9:.0f} GFLOP/s")
    print(f"| side | {' | '.join(COLUMNS)} | tokens/s | MFU | loss first → last |")
    print("|---|---|---|---|---|---|---|---|")
    for side, setting in SIDES.items():
        loss = f"{results[side][0]['first']:.3f} → {results[side][0]['last']:.3f}"
        share = medians[side] * flops / peak
        print(f"| {side} | {' | '.join(setting)} | {medians[side]:.0f} | {share:.1%} | {loss} |")
    for best in ("transformers grouped_mm bf16", "transformers grouped_mm bf16 kept", "transformers eager autocast"):
        print(f"ours bf16 ÷ {best}: {medians['ours bf16'] / medians[best]:.2f}", end=";  ")
        print(f"ours mixed_bf16 ÷ {best}: {medians['ours mixed_bf16'] / medians[best]:.2f}")


if __name__ == "__main__":
    main()
