"""Attention back ends against a double loop, and the rotary embedding against complex rotation."""

from __future__ import annotations

import math

import pytest
import torch

from ava_exp.config.attention import AttentionBackend
from ava_exp.nn.attention.cache import AttentionContext, KeyValueCache
from ava_exp.nn.attention.grouped import GroupedAttention
from ava_exp.nn.attention.softmax import plain_attention
from ava_exp.nn.rope import apply_rope, rope_tables


def build(backend: AttentionBackend, num_kv_heads: int = 2, qk_norm: bool = False) -> GroupedAttention:
    layer = GroupedAttention(
        attention_dropout=0.0,
        qk_norm=qk_norm,
        backend=backend,
        dim=32,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        layer=0,
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3, generator=generator)
    return layer


def context(length: int, start: int = 0, cache: KeyValueCache | None = None) -> AttentionContext:
    cos, sin = rope_tables(64, 8, 10_000.0)
    return AttentionContext(cos=cos[start : start + length], sin=sin[start : start + length], cache=cache)


def test_plain_attention_equals_a_loop_over_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 6, 8, generator=generator)
    k, v = torch.randn(2, 2, 6, 8, generator=generator), torch.randn(2, 2, 6, 8, generator=generator)
    y = plain_attention(q, k, v, torch.ones(6, 6, dtype=torch.bool).tril())
    for batch in range(2):
        for head in range(4):
            for t in range(6):
                scores = k[batch, head // 2, : t + 1] @ q[batch, head, t] / math.sqrt(8)
                expected = scores.softmax(dim=0) @ v[batch, head // 2, : t + 1]
                torch.testing.assert_close(y[batch, head, t], expected)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_back_ends_agree_with_and_without_cache(num_kv_heads: int, qk_norm: bool) -> None:
    x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(2))
    outputs = []
    for backend in (AttentionBackend.sdpa, AttentionBackend.plain):
        layer = build(backend, num_kv_heads, qk_norm)
        whole = layer(x, context(10))
        cache = KeyValueCache([layer.new_cache(2, 10, torch.float32, torch.device("cpu"))])
        parts = []
        for start, stop in ((0, 4), (4, 5), (5, 10)):
            parts.append(layer(x[:, start:stop], context(stop - start, start, cache)))
            cache.advance(stop - start)
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=5e-6)
        outputs.append(whole)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=5e-6)


def test_a_full_cache_refuses_more() -> None:
    layer = build(AttentionBackend.plain)
    cache = KeyValueCache([layer.new_cache(1, 4, torch.float32, torch.device("cpu"))])
    with pytest.raises(ValueError, match="holds 4 positions, but 5"):
        layer(torch.zeros(1, 5, 32), context(5, 0, cache))


def test_rope_is_a_rotation_by_position() -> None:
    cos, sin = rope_tables(16, 8, 10_000.0)
    x = torch.randn(1, 1, 16, 8, generator=torch.Generator().manual_seed(5))
    as_complex = torch.complex(x[..., :4], x[..., 4:])
    frequencies = 10_000.0 ** -(torch.arange(4) / 4)
    rotated = as_complex * torch.polar(torch.ones(16, 4), torch.arange(16)[:, None] * frequencies)
    torch.testing.assert_close(apply_rope(x, cos, sin), torch.cat((rotated.real, rotated.imag), dim=-1))


def test_rope_products_depend_on_the_distance_only() -> None:
    cos, sin = rope_tables(40, 8, 10_000.0)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(6))
    rotate = lambda x, p: apply_rope(x.view(1, 1, 1, 8), cos[p : p + 1], sin[p : p + 1]).flatten()  # noqa: E731
    torch.testing.assert_close(rotate(q, 5) @ rotate(k, 2), rotate(q, 33) @ rotate(k, 30), rtol=1e-4, atol=1e-5)
