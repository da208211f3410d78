"""Time saved against FLOPs saved by a Mixture of Depths: a training step, reading a prompt, and writing token by token.

    python benchmarks/mod.py
    python benchmarks/mod.py --hidden-size 128 --num-layers 2 --batch-size 2 --length 128 --rounds 2 --new-tokens 8

Every case is compared with the same model without a Mixture of Depths. Cases take turns, so that whatever else the
machine does strikes all of them; times are medians, and the ratio is (1 - time / time without) divided by
(1 - FLOPs / FLOPs without). FLOPs are those of what was really processed: of attention's scores the pairs, of predictor
and router all. The vocabulary is small, which keeps the models to their blocks.

Two ratios cannot reach 1: with `feed_forward` attention stays, which takes more time for a FLOP than the network that
is skipped; and where a batch is written token by token, the weights of a layer are read if any sequence needs them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ava_exp.config.architecture import Architecture
from ava_exp.config.mod import (
    DepthConfig,
    DepthLayers,
    DepthPart,
    LearnedModConfig,
    ModConfig,
    NoModConfig,
    RandomModConfig,
    StaticModConfig,
)
from ava_exp.config.model import ModelConfig
from ava_exp.generation.batch import prepared
from ava_exp.losses.terms import StepContext, build_losses
from ava_exp.models.arithmetic import training_flops
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.nn.mod.learned import LearnedDepth
from ava_exp.nn.output import ModelOutput
from ava_exp.runtime import keep_freed_memory

VOCABULARY = 512


@dataclass(slots=True, kw_only=True)
class Case:
    """A model, and what each of its phases took: seconds by round, and FLOPs of one round."""

    name: str
    architecture: Architecture
    model: Decoder
    seconds: dict[str, list[float]]
    flops: dict[str, float]


def build_case(name: str, mod: ModConfig, options: argparse.Namespace) -> Case:
    """Build one model; predictors are set to process the configured share, as trained ones nearly do."""
    model = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        num_heads=max(1, options.hidden_size // 64),
        max_position_embeddings=options.length + options.new_tokens,
    )
    architecture = Architecture(model, mod=mod)
    built = build_model(architecture, dtype=getattr(torch, options.dtype))
    return Case(name=name, architecture=architecture, model=built, seconds={}, flops={})


def calibrate(model: Decoder, ids: Tensor) -> None:
    """Shift every predictor so that it says yes to the configured share of the tokens of `ids`, layer after layer."""
    model.eval()
    for layer, router in model.mod_layers().items():
        if not isinstance(router, LearnedDepth):
            continue
        seen: list[Tensor] = []
        hook = router.predictor.score.register_forward_hook(lambda _, __, logits, into=seen: into.append(logits))
        with torch.inference_mode():
            model(ids)
        hook.remove()
        threshold = seen[0].float().flatten().quantile(1 - router.capacity)
        assert router.predictor.score.bias is not None, layer
        router.predictor.score.bias.data.sub_(threshold)


def flops_of(case: Case, outputs: list[ModelOutput], num_tokens: int, num_pairs_whole: int) -> float:
    """Return the forward FLOPs of what was processed; `num_pairs_whole` are the pairs of a layer without skips."""
    length = case.model.config.max_position_embeddings
    flops = training_flops(case.architecture, length)
    config = case.model.config
    per_pair = 3 * pair_flops(case)
    skippable = len(case.model.mod_layers()) if skips_attention(case) else 0
    # `per_token` has attention of whole sequences of `length`: put the pairs that there were in its place.
    whole_layers = config.num_layers - skippable
    per_token = flops.per_token - whole_layers * per_pair * (length + 1) / 2
    total = num_tokens * per_token + whole_layers * num_pairs_whole * per_pair
    for place, processed_flops in enumerate(flops.per_processed):
        total += processed_flops * sum(output.depths[place].num_processed for output in outputs)
    return total / 3


def training_step(case: Case, ids: Tensor) -> tuple[float, float]:
    """Return the seconds of forward and backward, and their FLOPs."""
    model = case.model.train()
    labels = ids.roll(-1, dims=1)
    context = StepContext(num_tokens=ids.numel())
    terms = build_losses(case.architecture.sparsity, mod=case.architecture.mod)
    started = time.perf_counter()
    output = model(ids)
    torch.autograd.backward(torch.stack([term(output, labels, context) for term in terms]).sum())
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    flops = training_flops(case.architecture, ids.shape[1])
    processed = [depth.num_processed for depth in output.depths]
    return seconds, flops.of(ids.numel(), 0, processed, ids.shape[0])


@torch.inference_mode()
def prefill(case: Case, ids: Tensor) -> tuple[float, float]:
    """Return the seconds of reading a prompt into a cache, and its FLOPs."""
    model = case.model.eval()
    batch, length = ids.shape
    cache = model.new_cache(batch, length)
    with prepared(model, length):
        started = time.perf_counter()
        output = model(ids, cache)
        seconds = time.perf_counter() - started
    flops = flops_of(case, [output], batch * length, batch * length * (length + 1) // 2)
    return seconds, flops + pair_flops(case) * sum(depth.num_pairs for depth in output.depths)


def skips_attention(case: Case) -> bool:
    """Whether a token that skips a layer skips attention there."""
    mod = case.architecture.mod
    return isinstance(mod, DepthConfig) and mod.part is DepthPart.block


def pair_flops(case: Case) -> float:
    """Return the forward FLOPs of a query and a key that it sees, in one layer."""
    config = case.model.config
    assert config.head_dim is not None
    return 4 * config.num_heads * config.head_dim


@torch.inference_mode()
def decode(case: Case, ids: Tensor, num_tokens: int) -> tuple[float, float]:
    """Return the seconds of `num_tokens` steps after a prompt, and their FLOPs. Tokens are given, not sampled."""
    model = case.model.eval()
    batch, length = ids.shape
    cache = model.new_cache(batch, length + num_tokens)
    outputs, seconds, pairs, whole = [], 0.0, 0, 0
    with prepared(model, num_tokens):
        model(ids[:, :-1], cache)
        generator = torch.Generator().manual_seed(0)
        for step in range(num_tokens):
            token = torch.randint(VOCABULARY, (batch, 1), generator=generator)
            held = [layer.ragged_lengths().clone() for layer in cache.layers]
            started = time.perf_counter()
            output = model(token, cache)
            seconds += time.perf_counter() - started
            outputs.append(output)
            whole += batch * (length + step)
            for layer in model.mod_layers() if skips_attention(case) else ():
                after = cache.layers[layer].ragged_lengths()
                pairs += int(after[after > held[layer]].sum())
    return seconds, flops_of(case, outputs, batch * num_tokens, whole) + pair_flops(case) * pairs


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Return the model without a Mixture of Depths, and with each of those that are compared."""
    capacity, cases = options.capacity, [build_case("none", NoModConfig(), options)]
    kinds: list[type[DepthConfig]] = [LearnedModConfig]
    if options.everything:
        kinds += [StaticModConfig, RandomModConfig]
    for kind, part, layers in itertools.product(kinds, DepthPart, (DepthLayers.all, DepthLayers.alternating)):
        name = f"{kind.__name__.removesuffix('ModConfig').lower()} {part.value} {layers.value}"
        cases.append(build_case(name, kind(capacity_factor=capacity, part=part, layers=layers), options))
    return cases


def main() -> None:
    """Measure all cases by turns and print the table."""
    options = parse()
    torch.set_num_threads(options.num_threads)
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (options.batch_size, options.length), generator=generator)
    cases = cases_of(options)
    for case in cases:
        calibrate(case.model, ids)
    phases: dict[str, Callable[[Case], tuple[float, float]]] = {
        "training": lambda case: training_step(case, ids),
        "prefill": lambda case: prefill(case, ids),
        "decode": lambda case: decode(case, ids[:, : options.length // 2], options.new_tokens),
        "decode, batch 1": lambda case: decode(case, ids[:1, : options.length // 2], options.new_tokens),
    }
    for name, phase in phases.items():
        for measured in range(options.rounds + 1):
            for case in cases:
                seconds, case.flops[name] = phase(case)
                if measured:  # the first round warms up
                    case.seconds.setdefault(name, []).append(seconds)
    print_table(cases, list(phases))


def print_table(cases: list[Case], phases: list[str]) -> None:
    """Print time and FLOPs of every case beside those of the first."""
    print(f"| {'case':34} | {'phase':16} | {'ms':>9} | {'time saved':>10} | {'FLOPs saved':>11} | {'ratio':>5} |")
    print(f"|{'-' * 36}|{'-' * 18}|{'-' * 10}:|{'-' * 11}:|{'-' * 12}:|{'-' * 6}:|")
    for phase in phases:
        seconds, flops = statistics.median(cases[0].seconds[phase]), cases[0].flops[phase]
        for case in cases:
            own = statistics.median(case.seconds[phase])
            saved, spared = 1 - own / seconds, 1 - case.flops[phase] / flops
            ratio = f"{saved / spared:5.2f}" if spared > 0 else "    –"
            print(f"| {case.name:34} | {phase:16} | {own * 1e3:9.1f} | {saved:10.1%} | {spared:11.1%} | {ratio} |")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (
        ("hidden-size", 512),
        ("num-layers", 8),
        ("batch-size", 8),
        ("length", 512),
        ("new-tokens", 64),
        ("rounds", 7),
        ("num-threads", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--capacity", type=float, default=0.5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--everything", action="store_true", help="static and random as well")
    return parser.parse_args()


if __name__ == "__main__":
    main()
