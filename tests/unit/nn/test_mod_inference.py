"""Tokens skip layers at inference: no later one matters, decoding equals one pass, caches hold what was processed."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ava_exp.config.mod import DepthLayers, DepthPart
from ava_exp.generation.sampling import sample_tokens
from ava_exp.models.decoder import Decoder
from ava_exp.nn.attention.cache import LayerCache
from tests.unit.nn.mod_cases import CASES, MODS, Case, build, some_ids

BLOCK, ALL = DepthPart.block, DepthLayers.all
SIMPLE: list[Case] = [(mod, part, "topk", ALL) for mod in MODS for part in DepthPart]
AT_INFERENCE = [case for case in CASES if case[2] != "capacity"]


def close(ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", AT_INFERENCE, ids=str)
def test_changing_a_token_moves_no_earlier_logit(case: Case) -> None:
    model, ids = build(case).eval(), some_ids()
    before = model(ids)
    changed = ids.clone()
    changed[:, 12:] = changed[:, 12:].flip(1).add(1) % 40
    after = model(changed)
    close(after.logits[:, :12], before.logits[:, :12])
    assert (after.logits[:, 12:] != before.logits[:, 12:]).any(dim=-1).all()
    for one, other in zip(before.depths, after.depths, strict=True):
        early, still = ({t for t in depth.token_ids.tolist() if t % 20 < 12} for depth in (one, other))
        assert early == still


def test_the_choice_of_training_does_look_ahead() -> None:
    model, ids = build(("learned", BLOCK, "dense", ALL)).train(), some_ids()
    changed = ids.clone()
    changed[:, 12:] = changed[:, 12:].add(7) % 40
    before, after = model(ids).logits, model(changed).logits
    assert not torch.equal(before[:, :12], after[:, :12])
    model.eval()
    with model.looking_ahead():
        close(model(ids).logits, before)
    assert not torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("case", AT_INFERENCE, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_equals_one_pass(case: Case, batch: int) -> None:
    model, ids = build(case).eval(), some_ids(batch)
    wanted = model(ids).logits
    for cuts in (range(21), (0, 7, 8, 9, 20), (0, 20)):
        cache = model.new_cache(batch, 20)
        steps = itertools.pairwise(cuts)
        close(torch.cat([model(ids[:, a:b], cache).logits for a, b in steps], dim=1), wanted)
        assert cache.lengths == 20


@pytest.mark.parametrize("case", AT_INFERENCE, ids=str)
def test_prompts_of_different_lengths_go_on_together(case: Case) -> None:
    model, ids = build(case).eval(), some_ids(4)
    lengths = torch.tensor([5, 1, 8, 3])
    wanted = [model(ids[row : row + 1]).logits[0] for row in range(4)]
    prompt = ids[:, :8].clone()
    prompt[torch.arange(8) >= lengths[:, None]] = 0
    cache = model.new_cache(4, 20)
    output = model(prompt, cache, counts_B=lengths)
    for row, length in enumerate(lengths.tolist()):
        close(output.logits[row, :length], wanted[row][:length])
    for step in range(6):
        positions = lengths + step
        logits = model(ids.gather(1, positions[:, None]), cache).logits
        for row, position in enumerate(positions.tolist()):
            close(logits[row, 0], wanted[row][position])
    cache.select(torch.tensor([2, 0, 2]))
    rows, positions = torch.tensor([2, 0, 2]), torch.tensor([14, 11, 14])
    logits = model(ids[rows, positions][:, None], cache).logits
    for place, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        close(logits[place, 0], wanted[row][position])


@pytest.mark.parametrize("case", SIMPLE, ids=str)
def test_padding_of_a_prompt_is_neither_processed_nor_counted(case: Case) -> None:
    model, ids = build(case).eval(), some_ids(3, 10)
    lengths = torch.tensor([10, 2, 6])
    output = model(ids, model.new_cache(3, 20), counts_B=lengths)
    for depth, routing in zip(output.depths, output.routings, strict=True):
        assert depth.num_tokens == 18
        assert all(token % 10 < lengths[token // 10] for token in depth.token_ids.tolist())
        assert routing.expert_ids.shape[0] == depth.num_processed
        assert int(routing.counts.sum()) == 2 * depth.num_processed


@pytest.mark.parametrize("case", SIMPLE, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_cut_off_is_forgotten(case: Case, batch: int) -> None:
    model, ids, other = build(case).eval(), some_ids(batch), some_ids(batch, seed=5)
    wanted = model(torch.cat([ids[:, :9], other[:, :8]], dim=1)).logits
    cache = model.new_cache(batch, 20)
    model(ids[:, :15], cache)
    cache.truncate(9)
    parts = [model(part, cache).logits for part in (other[:, :3], other[:, 3:4], other[:, 4:8])]
    close(torch.cat(parts, dim=1), wanted[:, 9:])
    if batch > 1:
        lengths = torch.tensor([4, 11, 0])
        cache.truncate(lengths)
        texts = torch.cat([ids[:, :9], other[:, :8]], dim=1)
        logits = model(texts.gather(1, lengths[:, None]), cache).logits
        for row, length in enumerate(lengths.tolist()):
            close(logits[row, 0], model(texts[row : row + 1]).logits[0, length])


def entries(layer: LayerCache) -> list[int]:
    return [int(n) for n in layer.ragged_lengths()]


@pytest.mark.parametrize("case", SIMPLE, ids=str)
def test_the_cache_holds_what_was_processed_and_no_more(case: Case) -> None:
    model, ids = build(case).eval(), some_ids()
    depths = model(ids).depths
    cache = model.new_cache(3, 20)
    for token in range(20):
        model(ids[:, token : token + 1], cache)
    for layer, depth in zip(cache.layers, depths, strict=True):
        processed = torch.bincount(depth.token_ids // 20, minlength=3).tolist()
        assert entries(layer) == (processed if case[1] is BLOCK else [20] * 3)


def test_the_cache_of_a_long_text_takes_half_of_the_bytes() -> None:
    sizes = []
    for case in (("static", BLOCK, "dense", ALL), ("static", DepthPart.feed_forward, "dense", ALL)):
        model = build(case, capacity_factor=0.5).eval()  # type: ignore[arg-type]
        model.config.max_position_embeddings = 512
        model.refresh_rope()
        cache = model.new_cache(1, 512)
        model(torch.zeros(1, 512, dtype=torch.int64), cache)
        sizes.append(cache.num_bytes)
    assert sizes[0] == sizes[1] / 2


def test_a_layer_that_nobody_enters_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build(("learned", BLOCK, "topk", ALL)).eval(), some_ids()
    set_predictors(model, -1e4)
    for block in model.blocks:
        monkeypatch.setattr(block, "_attend", refuse)
        monkeypatch.setattr(block, "_feed", refuse)
    cache = model.new_cache(3, 20)
    output = model(ids, cache)
    assert [depth.num_processed for depth in output.depths] == [0] * 4
    assert [int(routing.counts.sum()) for routing in output.routings] == [0] * 4
    assert cache.num_bytes == 0 and cache.lengths == 20
    assert torch.equal(output.hidden, model.final_norm(model.embedding(ids)))


def refuse(*arguments: object) -> None:
    raise AssertionError(arguments)


def set_predictors(model: Decoder, bias: float) -> None:
    for router in model.mod_layers().values():
        router.predictor.score.weight.data.zero_()  # type: ignore[union-attr]
        router.predictor.score.bias.data.fill_(bias)  # type: ignore[union-attr]


@pytest.mark.parametrize("case", SIMPLE, ids=str)
def test_text_is_sampled_as_without_a_cache(case: Case) -> None:
    model = build(case).eval()
    prompt = some_ids(1, 6)[0].tolist()
    written = list(sample_tokens(model, prompt, max_new_tokens=15, temperature=0))
    text = list(prompt)
    for _ in range(15):
        text.append(int(model(torch.tensor([text])).last_logits.argmax()))
    assert written == text[6:]


@pytest.mark.parametrize("case", SIMPLE, ids=str)
def test_a_token_that_skips_costs_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and the feed-forward network get as many rows as there are tokens for them, and padding at most to
    the longest of the sequences."""
    model, ids = build(case).eval(), some_ids(1)
    fed: list[int] = []
    for block in model.blocks:
        original = block._feed
        monkeypatch.setattr(block, "_feed", lambda x, f=original: (fed.append(x.shape[0] * x.shape[1]), f(x))[1])
    assert fed == [depth.num_processed for depth in model(ids).depths]
