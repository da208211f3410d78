"""Every kind of attention as loops over sequences, heads and positions, and the layers that they are compared with."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ava_exp.config.attention import (
    AttentionBackend,
    GroupedAttentionConfig,
    MixtureOfHeadsConfig,
    MultiLevelAttentionConfig,
)
from ava_exp.nn.attention.cache import AttentionContext, KeyValueCache
from ava_exp.nn.attention.grouped import GroupedAttention
from ava_exp.nn.attention.mixture_of_heads import MixtureOfHeads
from ava_exp.nn.attention.multi_level import MultiLevelAttention

DIM, HEADS, HEAD_DIM = 24, 4, 8

GROUPED, LEVELS, MIXTURE = GroupedAttentionConfig, MultiLevelAttentionConfig, MixtureOfHeadsConfig
CASES: dict[str, GroupedAttentionConfig] = {
    "grouped": GROUPED(),
    "window": GROUPED(sliding_window=5, qk_norm=True),
    "window of one": GROUPED(sliding_window=1),
    "levels": LEVELS(),
    "levels with windows": LEVELS(sliding_window=6, progressive_sparsity=0.5, qk_norm=True),
    "four levels": LEVELS(num_levels=4, sliding_window=3),
    "heads": MIXTURE(),
    "heads without shared ones": MIXTURE(num_shared_heads=0, heads_per_token=1, qk_norm=True),
    "all heads but one": MIXTURE(num_shared_heads=1, heads_per_token=2, sliding_window=5),
}


def build(
    config: GroupedAttentionConfig, num_kv_heads: int = 2, dtype: torch.dtype = torch.float64
) -> GroupedAttention:
    layer: GroupedAttention = config.build(
        dim=DIM, num_heads=HEADS, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM, layer=0
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).mul(0.5).to(dtype)
    return layer


def context(length: int, start: int = 0, cache: KeyValueCache | None = None, **more: Any) -> AttentionContext:
    angles = torch.arange(512).double().outer(10_000.0 ** -(torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM))
    cos, sin = angles.cos(), angles.sin()  # as `rope_tables`, which is fp32
    return AttentionContext(cos=cos[start : start + length], sin=sin[start : start + length], cache=cache, **more)


def run(layer: GroupedAttention, x_BTD: Tensor, of: AttentionContext | None = None) -> Tensor:
    y = layer(x_BTD, of or context(x_BTD.shape[1]))
    return y[0] if isinstance(y, tuple) else y


def some_input(batch: int = 2, length: int = 21, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def reference(layer: GroupedAttention, x_BTD: Tensor, documents_BT: Tensor | None = None) -> Tensor:
    """Return what `layer` should, (B, T, D)."""
    q, k, v = layer.project(x_BTD, context(x_BTD.shape[1]))
    group = layer.num_heads // layer.num_kv_heads
    rows = []
    for b in range(x_BTD.shape[0]):
        documents = [0] * x_BTD.shape[1] if documents_BT is None else documents_BT[b].tolist()
        heads = [
            _one_head(layer, x_BTD[b], q[b, h], k[b, h // group], v[b, h // group], documents) for h in range(HEADS)
        ]
        if isinstance(layer, MixtureOfHeads):
            weights = torch.stack([head_weights(layer, x) for x in x_BTD[b]])
            heads = [head * weights[:, h, None] for h, head in enumerate(heads)]
        rows.append(layer.output(torch.cat(heads, dim=-1)))
    return torch.stack(rows)


def _one_head(layer: GroupedAttention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: list[int]) -> Tensor:
    if not isinstance(layer, MultiLevelAttention):
        return torch.stack([_read(q, k, v, documents, t, layer.sliding_window) for t in range(len(q))])
    outputs = []
    for t in range(len(q)):
        read, served = [], []
        for level, window in enumerate(layer.windows):
            size = 2**level
            j = (t + 1) // size - 1
            members = [slice(size * i, size * (i + 1)) for i in range(j + 1)]
            own = [set(documents[m]) for m in members]
            serves = j >= 0 and own[j] == {documents[t]}
            served.append(level if serves else None)
            if not serves:
                continue
            means = [torch.stack([part[m].mean(dim=0) for m in members]) for part in (q, k, v)]
            labels = [min(documents_of) if len(documents_of) == 1 else -1 for documents_of in own]
            read.append(_read(*means, labels, j, window))
        logits = (
            layer.fusion(x[t])[[level for level in served if level is not None]] if layer.fusion else x.new_zeros(1)
        )
        outputs.append(sum(weight * y for weight, y in zip(logits.softmax(dim=0), read, strict=True)))
    return torch.stack(outputs)  # type: ignore[arg-type]


def _read(q: Tensor, k: Tensor, v: Tensor, documents: list[int], t: int, window: int | None) -> Tensor:
    seen = [s for s in range(t + 1) if documents[s] == documents[t] and (window is None or s > t - window)]
    scores = torch.stack([q[t] @ k[s] for s in seen]) / math.sqrt(q.shape[1])
    return sum(weight * v[s] for weight, s in zip(scores.softmax(dim=0), seen, strict=True))  # type: ignore[return-value]


def head_weights(layer: MixtureOfHeads, x: Tensor) -> Tensor:
    shared = layer.num_shared_heads
    logits = F.linear(x, layer.head_router.weight)
    probabilities = logits[shared:HEADS].softmax(dim=0)
    chosen = sorted(range(HEADS - shared), key=lambda head: -probabilities[head].item())[: layer.heads_per_token]
    weights = [x.new_zeros(())] * HEADS
    balance = 2 * logits[HEADS:].softmax(dim=0) if shared else None
    for head in chosen:
        weight = (HEADS - shared) * probabilities[head]
        weights[shared + head] = weight if balance is None else weight * balance[1]
    for head in range(shared):
        assert balance is not None
        weights[head] = shared * logits[:shared].softmax(dim=0)[head] * balance[0]
    return torch.stack(weights)


def new_cache(layer: GroupedAttention, batch: int, capacity: int, dtype: torch.dtype = torch.float64) -> KeyValueCache:
    return KeyValueCache([layer.new_cache(batch, capacity, dtype, torch.device("cpu"))])


BACKENDS = [AttentionBackend.plain, AttentionBackend.sdpa, AttentionBackend.math, AttentionBackend.flash]
