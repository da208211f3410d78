"""`generate` against transformers' on the same weights: the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ava_exp.config.generation import GenerationSettings
from ava_exp.generation.generate import generate
from tests.unit.generation.peers import STOP, VOCABULARY, ours, theirs

NEW = 24
SEEDS = range(3)
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, repetition penalty": {"repetition_penalty": 1.5},
    "greedy, repetition reward": {"repetition_penalty": 0.8},
    "greedy, no bigram twice": {"no_repeat_ngram_size": 2},
    "greedy, no token twice": {"no_repeat_ngram_size": 1},
    "greedy, both": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "2 beams": {"num_beams": 2},
    "3 beams": {"num_beams": 3},
    "4 beams": {"num_beams": 4},
    "4 beams, long": {"num_beams": 4, "length_penalty": 2.0},
    "4 beams, short": {"num_beams": 4, "length_penalty": 0.0},
    "3 beams, early": {"num_beams": 3, "early_stopping": True},
    "3 beams, early, long": {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    "4 beams, no trigram twice": {"num_beams": 4, "no_repeat_ngram_size": 3},
    "4 beams, both": {"num_beams": 4, "no_repeat_ngram_size": 2, "repetition_penalty": 1.4},
}


def prompts(seed: int, number: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (number,), generator=generator).tolist()
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def expected(peer: Any, prompt: list[int], settings: dict[str, Any], returned: int = 1) -> tuple[list[list[int]], Any]:
    output = peer.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=NEW,
        do_sample=False,
        num_return_sequences=returned,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    rows = [row[len(prompt) :] for row in output.sequences.tolist()]
    cut = [row[: row.index(STOP)] if STOP in row else row for row in rows]
    return cut, getattr(output, "sequences_scores", None)


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_tokens(case: str, experts: bool) -> None:
    for seed in SEEDS:
        model = ours(experts=experts, seed=seed)
        peer, batch = theirs(model), prompts(seed)
        settings = GenerationSettings(max_new_tokens=NEW, temperature=0, **CASES[case])
        written = generate(model, batch, settings, stop_id=STOP)
        assert [w[0].ids for w in written] == [expected(peer, prompt, CASES[case])[0][0] for prompt in batch]


def test_cases_differ_and_some_end_early() -> None:
    """Otherwise the test above would say little."""
    batch = [prompt for seed in SEEDS for prompt in prompts(seed)]
    texts = {}
    for case, changes in CASES.items():
        settings = GenerationSettings(max_new_tokens=NEW, temperature=0, **changes)
        texts[case] = [w[0].ids for w in generate(ours(experts=False), batch, settings, stop_id=STOP)]
    assert len({str(ids) for ids in texts.values()}) >= len(CASES) - 2
    assert any(len(ids) < NEW for ids in texts["4 beams, short"]) and any(len(ids) == NEW for ids in texts["greedy"])


def test_all_beams_and_their_scores() -> None:
    model = ours(experts=False)
    peer, batch = theirs(model), prompts(5)
    settings = GenerationSettings(max_new_tokens=NEW, temperature=0, num_beams=4, num_samples=4)
    for prompt, beams in zip(batch, generate(model, batch, settings, stop_id=STOP), strict=True):
        ids, scores = expected(peer, prompt, {"num_beams": 4}, returned=4)
        assert [beam.ids for beam in beams] == ids
        torch.testing.assert_close(torch.tensor([beam.score for beam in beams]), scores, rtol=1e-4, atol=1e-4)
