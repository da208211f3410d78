"""Caches of sequences of different lengths: each holds what it would hold alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import AttentionBackend, GroupedAttentionConfig
from ava_exp.config.model import DenseConfig, ModelConfig, MoEConfig, SparsityConfig
from ava_exp.config.router import TopKRouterConfig
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.nn.attention.cache import SMALLEST_CAPACITY, AttentionContext, Held, KeyValueCache, LayerCache, visible
from ava_exp.nn.attention.softmax import plain_attention, single_query_attention

LENGTHS = [5, 1, 9, 3]
CPU = torch.device("cpu")


def model(sparsity: SparsityConfig | None = None, attention: GroupedAttentionConfig | None = None) -> Decoder:
    config = ModelConfig(
        vocab_size=50,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        intermediate_size=32,
        max_position_embeddings=96,
        initializer_range=0.3,
        dropout=0.0,
    )
    architecture = Architecture(config, attention or GroupedAttentionConfig(), sparsity or DenseConfig())
    return build_model(architecture, seed=1, dtype=torch.float64).eval()


def texts(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (length,), generator=generator) for length in lengths]


def batched(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad at the right, and count what is real."""
    longest = max(len(row) for row in rows)
    padded = torch.stack([torch.cat([row, row.new_full((longest - len(row),), 7)]) for row in rows])
    return padded, torch.tensor([len(row) for row in rows])


@torch.no_grad()
def read(decoder: Decoder, cache: KeyValueCache, parts: list[Tensor]) -> list[Tensor]:
    """Feed each sequence its part, and return its logits at the part's positions."""
    ids, counts = batched(parts)
    logits = decoder(ids, cache, counts_B=counts).logits
    return [row[: len(part)] for row, part in zip(logits, parts, strict=True)]


@torch.no_grad()
def alone(decoder: Decoder, text: Tensor) -> Tensor:
    return decoder(text[None]).logits[0]  # type: ignore[no-any-return]


def assert_close(logits: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


DECODERS: dict[str, Callable[[], Decoder]] = {
    "dense": model,
    "experts": lambda: model(MoEConfig(router=TopKRouterConfig(), num_experts=4)),
    "qk_norm": lambda: model(attention=GroupedAttentionConfig(qk_norm=True)),
    "sdpa": lambda: model(attention=GroupedAttentionConfig(backend=AttentionBackend.sdpa)),
    "plain": lambda: model(attention=GroupedAttentionConfig(backend=AttentionBackend.plain)),
}


@pytest.mark.parametrize("kind", DECODERS)
def test_padded_prompts_and_what_follows_are_as_alone(kind: str) -> None:
    decoder, whole = DECODERS[kind](), texts([length + 7 for length in LENGTHS])
    cache = decoder.new_cache(len(LENGTHS), 96)
    parts = [text[:length] for text, length in zip(whole, LENGTHS, strict=True)]
    for row, (text, logits) in enumerate(zip(whole, read(decoder, cache, parts), strict=True)):
        assert_close(logits, alone(decoder, text[: LENGTHS[row]]))
    for step in range(7):  # one token each, without counts
        with torch.no_grad():
            ids = torch.stack([text[length + step] for text, length in zip(whole, LENGTHS, strict=True)])
            logits = decoder(ids[:, None], cache).logits[:, 0]
        for row, text in enumerate(whole):
            assert_close(logits[row], alone(decoder, text)[LENGTHS[row] + step])
    assert cache.lengths.tolist() == [length + 7 for length in LENGTHS]  # type: ignore[union-attr]


def test_parts_of_different_lengths_one_after_the_other() -> None:
    """Room grows meanwhile: what is behind the entries is no number at first, and padding later."""
    decoder, whole = model(), texts([90, 70, 81])
    cache = decoder.new_cache(3, 96)
    starts, generator = [0, 0, 0], torch.Generator().manual_seed(1)
    while any(start < len(text) for start, text in zip(starts, whole, strict=True)):
        takes = torch.randint(0, 12, (3,), generator=generator).tolist()
        takes[0] = max(1, takes[0])
        parts = [text[start : start + take] for text, start, take in zip(whole, starts, takes, strict=True)]
        if max(len(part) for part in parts) == 0:
            continue
        for row, logits in enumerate(read(decoder, cache, parts)):
            expected = alone(decoder, whole[row])[starts[row] : starts[row] + len(parts[row])]
            assert_close(logits, expected)
        starts = [start + len(part) for start, part in zip(starts, parts, strict=True)]
    assert cache.layers[0].keys.shape[2] > SMALLEST_CAPACITY


def test_what_lies_behind_the_entries_is_never_looked_at() -> None:
    decoder, whole = model(), texts(LENGTHS)
    cache = decoder.new_cache(len(LENGTHS), 96)
    read(decoder, cache, whole)
    for layer in cache.layers:
        for row, length in enumerate(LENGTHS):
            layer.keys[row, :, length:] = 1e6
            layer.values[row, :, length:] = 1e6
    following = texts([1] * len(LENGTHS), seed=2)
    for row, logits in enumerate(read(decoder, cache, following)):
        assert_close(logits[0], alone(decoder, torch.cat([whole[row], following[row]]))[-1])


@pytest.mark.parametrize("ragged", [False, True])
def test_truncated_caches_go_on_from_there(ragged: bool) -> None:
    decoder = model()
    whole = texts(LENGTHS if ragged else [9, 9, 9, 9])
    cache = decoder.new_cache(4, 96)
    if ragged:
        read(decoder, cache, whole)
    else:
        with torch.no_grad():
            decoder(torch.stack(whole), cache)
    kept = torch.tensor([3, 1, 4, 2]) if ragged else 4
    cache.truncate(kept)
    kept_B = [3, 1, 4, 2] if ragged else [4] * 4
    following = texts([6, 2, 1, 4], seed=3)
    for row, logits in enumerate(read(decoder, cache, following)):
        expected = alone(decoder, torch.cat([whole[row][: kept_B[row]], following[row]]))[kept_B[row] :]
        assert_close(logits, expected)


def test_truncating_a_shared_length_by_rows_makes_it_ragged() -> None:
    decoder, whole = model(), texts([8, 8])
    cache = decoder.new_cache(2, 96)
    with torch.no_grad():
        decoder(torch.stack(whole), cache)
    cache.truncate(torch.tensor([2, 8]))
    following = texts([1, 1], seed=4)
    for row, logits in enumerate(read(decoder, cache, following)):
        assert_close(logits[0], alone(decoder, torch.cat([whole[row][: [2, 8][row]], following[row]]))[-1])


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("lengths", [6, 100, torch.tensor([6, 6]), torch.tensor([100, 3])], ids=str)
def test_truncating_never_adds(ragged: bool, lengths: int | Tensor) -> None:
    decoder, whole = model(), texts([8, 5] if ragged else [8, 8])
    cache = decoder.new_cache(2, 96)
    if ragged:
        read(decoder, cache, whole)
    else:
        with torch.no_grad():
            decoder(torch.stack(whole), cache)
    cache.truncate(lengths)
    before = torch.tensor([len(text) for text in whole])
    expected = torch.minimum(before, torch.as_tensor(lengths)).tolist()
    assert torch.as_tensor(cache.lengths).expand(2).tolist() == expected
    assert all(torch.as_tensor(layer.lengths).expand(2).tolist() == expected for layer in cache.layers)


@pytest.mark.parametrize("ragged", [False, True])
def test_selected_sequences_go_on_in_their_new_places(ragged: bool) -> None:
    decoder = model()
    whole = texts(LENGTHS if ragged else [6, 6, 6, 6])
    cache = decoder.new_cache(4, 96)
    if ragged:
        read(decoder, cache, whole)
    else:
        with torch.no_grad():
            decoder(torch.stack(whole), cache)
    rows = [2, 0, 2]
    cache.select(torch.tensor(rows))
    following = texts([2, 3, 1], seed=5)
    for place, logits in enumerate(read(decoder, cache, following)):
        text = whole[rows[place]]
        assert_close(logits, alone(decoder, torch.cat([text, following[place]]))[len(text) :])


def test_counts_that_are_all_the_same_equal_none() -> None:
    decoder, whole = model(), texts([6, 6, 6])
    ragged, plain = decoder.new_cache(3, 96), decoder.new_cache(3, 96)
    with torch.no_grad():
        expected = decoder(torch.stack(whole), plain).logits
        assert_close(torch.stack(read(decoder, ragged, whole)), expected)
        step = torch.tensor([[1], [2], [3]])
        assert_close(decoder(step, ragged).logits, decoder(step, plain).logits)


def test_more_than_fits_is_refused_but_padding_may_stand_beyond() -> None:
    cache = LayerCache(2, 1, capacity=4, head_dim=2, dtype=torch.float32, device=CPU)
    entries = torch.randn(2, 1, 6, 2)
    cache.extend(entries, entries, counts=torch.tensor([4, 1]))
    assert cache.ragged_lengths().tolist() == [4, 1]
    with pytest.raises(ValueError, match="holds 4 positions, but 5"):
        cache.extend(entries[:, :, :1], entries[:, :, :1])


def test_rows_that_skip_a_layer_hold_what_they_processed() -> None:
    """Against lists: entries with positions, added to some rows at a time."""
    cache = LayerCache(3, 1, capacity=40, head_dim=2, dtype=torch.float64, device=CPU)
    generator = torch.Generator().manual_seed(0)
    expected: list[list[tuple[int, Tensor]]] = [[], [], []]
    for start in range(0, 30, 5):
        rows = torch.randperm(3, generator=generator)[:2]
        counts = torch.randint(0, 6, (2,), generator=generator)
        k = torch.randn(2, 1, 5, 2, generator=generator, dtype=torch.float64)
        positions = start + torch.arange(5).repeat(2, 1)
        held = cache.extend(k, -k, rows=rows, counts=counts, positions=positions)
        for place, row in enumerate(rows.tolist()):
            before = len(expected[row])
            expected[row] += [(start + i, k[place, 0, i]) for i in range(int(counts[place]))]
            assert int(torch.as_tensor(held.starts).expand(2)[place]) == before
            for entry, (_, key) in enumerate(expected[row]):
                assert torch.equal(held.keys[place, 0, entry], key)
                assert torch.equal(held.values[place, 0, entry], -key)
    cache.truncate(17)
    cache.select(torch.tensor([1, 2, 0]))
    assert cache.positions is not None
    for place, row in enumerate([1, 2, 0]):
        kept = [position for position, _ in expected[row] if position < 17]
        assert int(cache.ragged_lengths()[place]) == len(kept)
        assert cache.positions[place, : len(kept)].tolist() == kept


def test_the_context_of_some_tokens_has_their_angles_and_positions() -> None:
    decoder = model()
    cache = decoder.new_cache(3, 96)
    read(decoder, cache, texts([4, 2, 7]))
    context = decoder._context(torch.zeros(3, 5, dtype=torch.int64), cache, None, None)
    part = context.of(torch.tensor([[0, 4], [1, 2]]), rows=torch.tensor([2, 0]), counts=torch.tensor([2, 2]))
    assert part.positions is not None and part.positions.tolist() == [[7, 11], [5, 6]]
    assert torch.equal(part.cos[:, 0], decoder.cos[part.positions].double())
    nested = part.of(torch.tensor([[1]]), rows=torch.tensor([1]))
    assert nested.positions is not None and nested.positions.tolist() == [[6]]
    assert nested.rows is not None and nested.rows.tolist() == [0]
    assert isinstance(part, AttentionContext)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("starts", [0, 4, torch.tensor([0, 2, 5])], ids=str)
@pytest.mark.parametrize("length", [1, 4])
def test_what_is_visible(starts: int | Tensor, length: int, window: int | None) -> None:
    rows = torch.as_tensor(starts).reshape(-1).tolist()
    num_keys = max(rows) + length
    keys = torch.empty(len(rows), 1, num_keys, 2)
    mask = visible(Held(keys, keys, starts), length, window)
    for row, start in enumerate(rows):
        for new in range(length):
            for key in range(num_keys):
                sees = key <= start + new and (window is None or key > start + new - window)
                if mask is None:
                    assert sees
                else:
                    assert bool((mask if mask.ndim == 2 else mask[row, 0])[new, key]) == sees


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_a_single_query_attends_as_many_do(groups: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 2 * groups, 1, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(4, 2, 20, 8, generator=generator, dtype=torch.float64)[:, :, :11] for _ in range(2))
    mask = (torch.arange(11) < torch.tensor([11, 1, 4, 9])[:, None])[:, None, None] if masked else None
    expected = plain_attention(q, k, v, mask)
    torch.testing.assert_close(single_query_attention(q, k, v, mask), expected, rtol=0, atol=1e-12)


def test_one_new_token_takes_the_short_ways_to_the_same_result() -> None:
    """In inference mode one token takes ways of its own through norm, rotation, attention and activation."""
    for kind in ("dense", "qk_norm", "experts"):
        decoder, (text,) = DECODERS[kind](), texts([12])
        cache = decoder.new_cache(1, 96)
        with torch.inference_mode():
            logits = torch.cat([decoder(text[None, t : t + 1], cache).logits[:, 0] for t in range(12)])
        assert_close(logits, alone(decoder, text))
