"""A layer's cache whose sequences hold different numbers of entries, against plain lists."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from ava_exp.nn.attention.cache import AttentionContext, KeyValueCache, LayerCache, visible

HEADS, SIZE = 2, 3
Entry = tuple[int, float]
"""The position of a token, and what its key is filled with."""


def keys_of(numbers: list[list[float]]) -> Tensor:
    return torch.tensor(numbers)[:, None, :, None].expand(-1, HEADS, -1, SIZE).clone()


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_operations(seed: int) -> None:
    """Some sequences get some entries, padded to the longest; texts are cut off; sequences are chosen and repeated."""
    choose = random.Random(seed)
    batch, number = 4, 0.0
    cache = LayerCache(batch, HEADS, 400, SIZE, torch.float32, torch.device("cpu"))
    texts: list[list[Entry]] = [[] for _ in range(batch)]
    positions = [0] * batch
    for _ in range(25):
        action = choose.random()
        if action < 0.7:
            everyone = choose.random() < 0.3
            rows = list(range(batch)) if everyone else sorted(choose.sample(range(batch), choose.randint(1, batch)))
            counts = [choose.randint(1, 4) for _ in rows]
            longest = max(counts)
            filled, where = [], []
            for row, count in zip(rows, counts, strict=True):
                own = [number + place for place in range(count)]
                steps = [positions[row] + 2 * place for place in range(count)]
                number += count
                filled.append(own + [-1.0] * (longest - count))
                where.append(steps + [0] * (longest - count))
                starts_at = len(texts[row])
                texts[row] += list(zip(steps, own, strict=True))
                positions[row] = steps[-1] + 2
                assert len(texts[row]) == starts_at + count
            keys = keys_of(filled)
            held = cache.extend(
                keys,
                10 * keys,
                rows=None if everyone else torch.tensor(rows),
                counts=torch.tensor(counts),
                positions=torch.tensor(where),
            )
            for place, row in enumerate(rows):
                mine = [value for _, value in texts[row]]
                assert held.keys[place, 0, : len(mine), 0].tolist() == mine
                assert held.values[place, 1, : len(mine), 2].tolist() == [10 * value for value in mine]
                start = held.starts if isinstance(held.starts, int) else int(held.starts[place])
                assert start == len(mine) - counts[place]
            assert held.keys.isfinite().all() and held.values.isfinite().all()
            seen = visible(held, longest)
            seen = torch.ones(longest, held.keys.shape[2], dtype=torch.bool) if seen is None else seen
            for place, row in enumerate(rows):
                for step in range(counts[place]):
                    wanted = len(texts[row]) - counts[place] + step + 1
                    assert int(seen.expand(len(rows), 1, longest, -1)[place, 0, step].sum()) == wanted
        elif action < 0.85:
            limits = [choose.randint(0, position + 1) for position in positions]
            cache.truncate(torch.tensor(limits))
            texts = [[e for e in text if e[0] < limit] for text, limit in zip(texts, limits, strict=True)]
            positions = [min(position, limit) for position, limit in zip(positions, limits, strict=True)]
        else:
            picked = [choose.randrange(batch) for _ in range(batch)]
            cache.select(torch.tensor(picked))
            texts, positions = [list(texts[row]) for row in picked], [positions[row] for row in picked]
        assert cache.ragged_lengths().tolist() == [len(text) for text in texts]


def test_room_that_nobody_filled_is_finite() -> None:
    """A masked value is weighted with 0, which makes NaN of what is not."""
    cache = LayerCache(2, HEADS, 300, SIZE, torch.float32, torch.device("cpu"))
    keys = torch.ones(1, HEADS, 200, SIZE)
    cache.extend(keys, keys, rows=torch.tensor([1]), positions=torch.arange(200)[None])
    assert cache.keys[0].eq(0).all() and cache.values[0].eq(0).all()


@pytest.mark.parametrize("start", [0, 3, torch.tensor([5, 0, 2])])
def test_the_context_of_some_tokens(start: int | Tensor) -> None:
    """They keep their own positions, angles and documents."""
    tables = torch.arange(40.0)[:, None].expand(-1, 2)
    starts = torch.as_tensor(start).expand(3)
    positions = starts[:, None] + torch.arange(6)
    cos = tables[positions][:, None] if isinstance(start, Tensor) else tables[start : start + 6]
    cache = KeyValueCache([], start)
    context = AttentionContext(cos=cos, sin=-cos, cache=cache, documents=10 * positions)
    tokens, rows = torch.tensor([[1, 4], [0, 0]]), torch.tensor([2, 0])
    own = context.of(tokens, rows=rows, counts=torch.tensor([2, 1]))
    wanted = positions[rows[:, None], tokens]
    assert own.positions is not None and own.rows is not None and own.documents is not None
    assert own.positions.tolist() == wanted.tolist() and own.rows.tolist() == [2, 0]
    assert own.cos[:, 0, :, 0].tolist() == wanted.tolist() and own.sin.shape == (2, 1, 2, 2)
    assert own.documents.tolist() == (10 * wanted).tolist()
