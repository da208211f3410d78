"""Models in which tokens may skip layers, for the tests, and what they must compute, token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import AttentionBackend, GroupedAttentionConfig
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
from ava_exp.config.model import DenseConfig, DispatchBackend, ModelConfig, MoEConfig, SparsityConfig
from ava_exp.config.router import DeepSeekRouterConfig, ExpertChoiceRouterConfig, TopKRouterConfig
from ava_exp.models.decoder import Block, Decoder, build_model
from ava_exp.nn.mod.learned import LearnedDepth, TokenScore
from ava_exp.nn.moe.expert_choice import ExpertChoiceRouter
from ava_exp.nn.moe.layer import MoELayer
from ava_exp.nn.output import ModelOutput
from ava_exp.nn.rope import rope_tables

MODS: dict[str, DepthConfig] = {
    "learned": LearnedModConfig(predictor_hidden_size=6),
    "learned_network": LearnedModConfig(predictor_hidden_size=6, router_hidden_size=5, capacity_factor=0.3),
    "static": StaticModConfig(capacity_factor=0.4),
    "random": RandomModConfig(capacity_factor=0.6),
}


def moe(router: Any, **changes: Any) -> MoEConfig:
    return MoEConfig(router=router, num_experts=4, dispatch=DispatchBackend.loop, **changes)


SPARSITIES: dict[str, SparsityConfig] = {
    "dense": DenseConfig(),
    "topk": moe(TopKRouterConfig()),
    "deepseek": moe(DeepSeekRouterConfig(), num_shared_experts=1, first_k_dense=1),
    "expert_choice": moe(ExpertChoiceRouterConfig(average_experts=1.5)),
    "capacity": moe(TopKRouterConfig(), capacity_factor=0.8),
}
LAYERS = list(DepthLayers)
CASES = [
    (mod, part, sparsity, LAYERS[number % 3])
    for number, (mod, part, sparsity) in enumerate(
        (mod, part, sparsity) for mod in MODS for part in DepthPart for sparsity in SPARSITIES
    )
]
Case = tuple[str, DepthPart, str, DepthLayers]


def dimensions(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2}
    return ModelConfig(**sizes | {"intermediate_size": 24, "max_position_embeddings": 48} | changes)  # type: ignore[arg-type]


def architecture_of(case: Case, **changes: Any) -> Architecture:
    """Return what a case is built of; `changes` are of its Mixture of Depths."""
    name, part, sparsity, layers = case
    mod = replace(MODS[name], part=part, layers=layers, **changes)
    attention = GroupedAttentionConfig(backend=AttentionBackend.plain)
    return Architecture(dimensions(), attention, SPARSITIES[sparsity], mod)


def build(case: Case, dtype: torch.dtype = torch.float64, **changes: Any) -> Decoder:
    """Return a model whose parts all matter, with routers that have learned something beside gradients."""
    return stirred(build_model(architecture_of(case, **changes), dtype=dtype))


def build_without(case: Case, dtype: torch.dtype = torch.float64) -> Decoder:
    """Return the same model without a Mixture of Depths."""
    return stirred(build_model(replace(architecture_of(case), mod=NoModConfig()), dtype=dtype))


@torch.no_grad()
def stirred(model: Decoder) -> Decoder:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.mul_(20 if "mod." in name else 12)
    for layer in model.moe_layers():
        if isinstance(layer.router, ExpertChoiceRouter):
            layer.router.threshold.fill_(0.27)
            layer.router.num_updates.fill_(3)
    return model


def some_ids(batch: int = 3, length: int = 20, seed: int = 0) -> Tensor:
    """No token occurs twice in a sequence: of equals that a layer skipped, rounding would decide in the next one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(40, generator=generator)[:length] for _ in range(batch)])


def mod_of(case: Case) -> ModConfig:
    return architecture_of(case).mod


def score_of(network: TokenScore, x_D: Tensor) -> Tensor:
    x_D = x_D / (x_D.square().mean() + 1e-6).sqrt()
    if network.up is not None:
        h = network.up.weight @ x_D
        h = h if network.up.bias is None else h + network.up.bias
        x_D = h * h.sigmoid()
    score = network.score.weight[0] @ x_D
    return score if network.score.bias is None else score + network.score.bias[0]


def chosen_tokens(block: Block, x_TD: Tensor, training: bool, drawn: list[int]) -> list[int]:
    """Return which tokens of a sequence a layer processes; `drawn` are those of the random one, which drew them."""
    mod, length = block.mod, len(x_TD)
    assert mod is not None
    if isinstance(mod, LearnedDepth):
        if not training:
            return [t for t in range(length) if score_of(mod.predictor, x_TD[t]) > 0]
        scores = [score_of(mod.router, x_TD[t]).item() for t in range(length)]
        best = sorted(range(length), key=lambda t: -scores[t])
        return sorted(best[: max(1, math.ceil(round(mod.capacity * length, 6)))])
    if type(mod).__name__ == "StaticDepth":
        c, shift = mod.capacity, mod.place
        return [t for t in range(length) if math.floor((t + 1 + shift) * c + 1e-3) > math.floor((t + shift) * c + 1e-3)]
    return drawn


def attention_of(block: Block, x_TD: Tensor, tokens: list[int]) -> list[Tensor]:
    """Return what attention makes of each of `tokens`, which see one another only."""
    attention = block.attention
    heads, kv_heads, size = attention.num_heads, attention.num_kv_heads, attention.head_dim
    projected = {
        t: (attention.query_key_value.weight @ block.attention_norm(x_TD[t : t + 1])[0]).view(-1, size) for t in tokens
    }
    outputs = []
    for t in tokens:
        seen, read = [s for s in tokens if s <= t], []
        for head in range(heads):
            group = heads + head // (heads // kv_heads)
            query = turned(projected[t][head], t)
            scores = torch.stack([query @ turned(projected[s][group], s) for s in seen]) / math.sqrt(size)
            weights = scores.softmax(dim=0)
            read.append(sum(w * projected[s][group + kv_heads] for w, s in zip(weights, seen, strict=True)))
        outputs.append(attention.output.weight @ torch.cat(read))  # type: ignore[arg-type]
    return outputs


def turned(x_C: Tensor, position: int) -> Tensor:
    cos, sin = (table[position].to(x_C) for table in rope_tables(48, len(x_C), 10_000.0))
    first, second = x_C.chunk(2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


def reference(model: Decoder, ids_BT: Tensor, output: ModelOutput) -> Tensor:
    """Return the logits (B, T, V); of `output` only what the random layers drew is used."""
    x: list[list[Tensor]] = [[model.embedding.weight[token] for token in row] for row in ids_BT]
    depths = iter(output.depths)
    for block in model.blocks:
        assert isinstance(block, Block)
        depth = next(depths) if block.mod is not None else None
        x = _block(block, x, list(_drawn(depth, ids_BT)), model.training)
    return torch.stack([torch.stack([output.head @ model.final_norm(x_D[None])[0] for x_D in row]) for row in x])


def _drawn(depth: Any, ids_BT: Tensor) -> Iterator[list[int]]:
    batch, length = ids_BT.shape
    for row in range(batch):
        mine = [] if depth is None else [int(token) - row * length for token in depth.token_ids]
        yield sorted(token for token in mine if 0 <= token < length)


def _block(block: Block, x: list[list[Tensor]], drawn: list[list[int]], training: bool) -> list[list[Tensor]]:
    everyone = list(range(len(x[0])))
    if block.mod is None or not block.skips_attention:
        x = [_added(row, everyone, attention_of(block, torch.stack(row), everyone)) for row in x]
    chosen = [everyone] * len(x)
    if block.mod is not None:
        chosen = [chosen_tokens(block, torch.stack(row), training, own) for row, own in zip(x, drawn, strict=True)]
    y = x
    if block.mod is not None and block.skips_attention:
        y = [
            _added(row, tokens, attention_of(block, torch.stack(row), tokens) if tokens else [])
            for row, tokens in zip(x, chosen, strict=True)
        ]
    places = [(row, token) for row, tokens in enumerate(chosen) for token in tokens]
    if training:  # as many of every sequence: capacity goes by the order in it
        fed = torch.stack([torch.stack([y[row][token] for token in tokens]) for row, tokens in enumerate(chosen)])
    else:
        fed = torch.stack([y[row][token] for row, token in places])[None] if places else torch.empty(0)
    z = [list(row) for row in x]
    if places:
        made = block.feed_forward(block.feed_forward_norm(fed))
        made = (made[0] if isinstance(block.feed_forward, MoELayer) else made).flatten(0, 1)
        for (row, token), change in zip(places, made, strict=True):
            after = y[row][token] + change
            z[row][token] = after if block.mod is None else _gated(block, x[row][token], after)
    return z


def _gated(block: Block, before: Tensor, after: Tensor) -> Tensor:
    if not isinstance(block.mod, LearnedDepth):
        return after
    return before + 2 * score_of(block.mod.router, before).sigmoid() * (after - before)


def _added(row: list[Tensor], tokens: list[int], changes: list[Tensor]) -> list[Tensor]:
    row = list(row)
    for token, change in zip(tokens, changes, strict=True):
        row[token] = row[token] + change
    return row
