"""Decoding with a cache gives what the whole text gives: token by token, in chunks, ragged, and after looking back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from ava_exp.config.attention import AttentionBackend
from ava_exp.nn.attention.cache import KeyValueCache, LayerCache
from ava_exp.nn.attention.grouped import GroupedAttention
from ava_exp.nn.attention.level_cache import LevelCache
from tests.unit.nn import attention_reference as cases
from tests.unit.nn.attention_reference import CASES, build, context, new_cache, run

LENGTH = 21
BACKENDS = [AttentionBackend.plain, AttentionBackend.sdpa, AttentionBackend.flex]


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def append(layer: GroupedAttention, x: Tensor, cache: KeyValueCache, stop: int) -> Tensor:
    """Feed the positions up to `stop` that the cache does not have."""
    assert isinstance(cache.lengths, int)
    y = run(layer, x[:, cache.lengths : stop], context(stop - cache.lengths, cache.lengths, cache))
    cache.advance(stop - cache.lengths)
    return y


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("stops", [range(1, LENGTH + 1), (4, 5, 6, 11, LENGTH), (1, 9, 20, LENGTH), (LENGTH,)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_tokens_and_chunks(case: str, backend: AttentionBackend, stops: Any) -> None:
    layer, x = build(dataclasses.replace(CASES[case], backend=backend)), cases.some_input(length=LENGTH)
    cache = new_cache(layer, 2, LENGTH)
    close(torch.cat([append(layer, x, cache, stop) for stop in stops], dim=1), run(layer, x))


@pytest.mark.parametrize("length", [0, 1, 3, 7, 8, 12])
@pytest.mark.parametrize("case", CASES)
def test_after_truncation_it_goes_on_with_other_tokens(case: str, length: int) -> None:
    layer, x = build(CASES[case]), cases.some_input(length=LENGTH)
    other = torch.cat((x[:, :length], -x[:, length:]), dim=1)
    cache = new_cache(layer, 2, LENGTH)
    append(layer, x, cache, 13)
    cache.truncate(length)
    parts = [append(layer, other, cache, stop) for stop in range(length + 1, LENGTH + 1)]
    close(torch.cat(parts, dim=1), run(layer, other)[:, length:])


@pytest.mark.parametrize("case", CASES)
def test_selected_sequences_go_on(case: str) -> None:
    layer, x = build(CASES[case]), cases.some_input(batch=3, length=LENGTH)
    rows = torch.tensor([2, 0, 0, 1])
    cache = new_cache(layer, 3, LENGTH)
    append(layer, x, cache, 6)
    cache.select(rows)
    x = torch.cat((x[rows, :6], cases.some_input(batch=4, length=LENGTH)[:, 6:]), dim=1)
    parts = [append(layer, x, cache, stop) for stop in (7, 8, 15, LENGTH)]
    close(torch.cat(parts, dim=1), run(layer, x)[:, 6:])


def feed_ragged(layer: GroupedAttention, x: Tensor, cache: KeyValueCache, counts: Tensor, width: int) -> list[Tensor]:
    """Feed `counts[r]` further tokens of every sequence, padded to `width` with what must not matter."""
    starts = torch.as_tensor(cache.lengths).expand(len(x))
    positions = starts[:, None] + torch.arange(width)
    tokens = x.gather(1, positions.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2])).clone()
    tokens[torch.arange(width) >= counts[:, None]] = 1e3
    tables = context(512)
    cos, sin = (table[positions][:, None] for table in (tables.cos, tables.sin))
    y = run(layer, tokens, dataclasses.replace(tables, cos=cos, sin=sin, cache=cache, counts=counts))
    cache.advance(counts)
    return [row[:count] for row, count in zip(y, counts.tolist(), strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_ragged_sequences(case: str, backend: AttentionBackend) -> None:
    layer, x = build(dataclasses.replace(CASES[case], backend=backend)), cases.some_input(batch=3, length=LENGTH)
    whole, cache = run(layer, x), new_cache(layer, 3, LENGTH)
    read: list[list[Tensor]] = [[], [], []]
    for counts, width in (((7, 2, 1), 7), ((1, 1, 1), 1), ((1, 0, 3), 4), ((1, 1, 1), 1), ((3, 9, 1), 9)):
        for parts, part in zip(read, feed_ragged(layer, x, cache, torch.tensor(counts), width), strict=True):
            parts.append(part)
    for row, parts in enumerate(read):
        close(torch.cat(parts), whole[row, : sum(map(len, parts))])
    assert torch.as_tensor(cache.lengths).tolist() == [13, 13, 7]


@pytest.mark.parametrize("case", CASES)
def test_ragged_sequences_after_truncation_and_selection(case: str) -> None:
    layer, x = build(CASES[case]), cases.some_input(batch=3, length=LENGTH)
    cache = new_cache(layer, 3, LENGTH)
    feed_ragged(layer, -x, cache, torch.tensor([11, 4, 8]), 12)
    cache.truncate(torch.tensor([0, 0, 0]))
    feed_ragged(layer, x, cache, torch.tensor([11, 4, 8]), 12)
    cache.truncate(torch.tensor([5, 4, 1]))
    rows = torch.tensor([2, 0, 2])
    cache.select(rows)
    parts = feed_ragged(layer, x[rows], cache, torch.tensor([9, 3, 2]), 9)
    for row, start, part in zip(rows.tolist(), (1, 5, 1), parts, strict=True):
        close(part, run(layer, x)[row, start : start + len(part)])


@pytest.mark.parametrize("case", CASES)
def test_tokens_that_skip_a_layer(case: str) -> None:
    """A layer's windows and blocks are over the entries that it processed, whatever their positions."""
    layer, x = build(CASES[case]), cases.some_input(length=LENGTH)
    kept = torch.tensor([[0, 2, 3, 7, 8, 9, 11, 15, 16, 20], [1, 2, 3, 4, 5, 6, 12, 13, 14, 18]])
    gathered = x.gather(1, kept[..., None].expand(-1, -1, cases.DIM))
    at_once = run(layer, gathered, context(LENGTH).of(kept))

    cache = new_cache(layer, 2, LENGTH)
    read: list[list[Tensor]] = [[], []]
    for start, stop in ((0, 5), (5, 6), (6, 9), (9, LENGTH)):
        inside = [[int(t) - start for t in row if start <= t < stop] for row in kept]
        rows = torch.tensor([row for row, tokens in enumerate(inside) if tokens])
        counts = torch.tensor([len(inside[row]) for row in rows])
        tokens = torch.zeros(len(rows), int(counts.max()), dtype=torch.long)
        for place, row in enumerate(rows.tolist()):
            tokens[place, : len(inside[row])] = torch.tensor(inside[row])
        part = context(stop - start, start, cache).of(tokens, rows=rows, counts=counts)
        y = run(layer, x[rows[:, None], start + tokens], part)
        cache.advance(stop - start)
        for place, row in enumerate(rows.tolist()):
            read[row].append(y[place, : counts[place]])
    for row, parts in enumerate(read):
        close(torch.cat(parts), at_once[row])
    cache.truncate(9)
    assert [int(length) for length in cache.layers[0].ragged_lengths()] == [5, 6]


def test_levels_keep_queries_and_means_beside_keys_and_values() -> None:
    layer, x = build(CASES["levels"]), cases.some_input(length=LENGTH)
    cache = new_cache(layer, 2, 64)
    append(layer, x, cache, LENGTH)
    held = cache.layers[0]
    assert isinstance(held, LevelCache)
    per_entry = 2 * (2 * 2 + 4 + 2 * 2 / 2 + 2 * 2 / 4) * cases.HEAD_DIM * 8  # 2 of K = 2, queries of H = 4
    assert cache.num_bytes == 64 * per_entry
    _, k, v = layer.project(x, context(LENGTH))
    for level in (1, 2):
        keys, values = held.blocks(level, None, LENGTH)
        close(keys, k[:, :, : LENGTH // 2**level * 2**level].reshape(2, 2, -1, 2**level, 8).mean(dim=3))
        close(values, v[:, :, : LENGTH // 2**level * 2**level].reshape(2, 2, -1, 2**level, 8).mean(dim=3))


def test_a_window_reads_its_last_entries_only(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = build(CASES["window"]), cases.some_input(length=LENGTH)
    cache, read = new_cache(layer, 2, LENGTH), []
    append(layer, x, cache, 18)
    masked = layer.attend.masked
    monkeypatch.setattr(layer.attend, "masked", lambda q, k, *more: read.append(k.shape[2]) or masked(q, k, *more))
    append(layer, x, cache, 19)
    append(layer, x, cache, LENGTH)
    assert read == [5, 6]


def test_room_that_nothing_was_written_to_is_zero() -> None:
    """What is masked takes part in products with 0, and must be a number."""
    cache = LayerCache(2, 1, 100, 4, torch.float32, torch.device("cpu"))
    new = torch.ones(1, 1, 3, 4)
    cache.extend(new, new, rows=torch.tensor([0]), positions=torch.arange(3)[None])
    held = cache.extend(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4), positions=torch.zeros(2, 1, dtype=torch.long))
    assert held.keys[1, 0, 1:].eq(0).all() and held.values[1, 0, 1:].eq(0).all()
