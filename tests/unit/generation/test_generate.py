"""Batches: each sequence is what it would be alone, ends by itself, and the seed decides."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import GroupedAttentionConfig
from ava_exp.config.generation import GenerationSettings
from ava_exp.config.model import DenseConfig, ModelConfig, MoEConfig, SparsityConfig
from ava_exp.config.router import DeepSeekRouterConfig, ExpertChoiceRouterConfig, SoftRouterConfig, TopKRouterConfig
from ava_exp.errors import ConfigError, UserError
from ava_exp.generation.generate import generate
from ava_exp.generation.history import History
from ava_exp.generation.sampling import decode, pick, stream
from ava_exp.models.decoder import Decoder, build_model

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [7], [2, 7, 1, 8]]
SPARSITIES = {
    "dense": DenseConfig(),
    "topk": MoEConfig(router=TopKRouterConfig(), num_experts=4),
    "soft": MoEConfig(router=SoftRouterConfig(), num_experts=4),
    "deepseek": MoEConfig(router=DeepSeekRouterConfig(num_groups=1, groups_per_token=1), num_experts=4),
    "expert_choice": MoEConfig(router=ExpertChoiceRouterConfig(), num_experts=4),
}
SETTINGS = {
    "sampling": GenerationSettings(max_new_tokens=12, temperature=1.0, top_p=0.95, top_k=20),
    "varied": GenerationSettings(max_new_tokens=12, temperature=0.9, repetition_penalty=1.5, no_repeat_ngram_size=2),
    "samples": GenerationSettings(max_new_tokens=12, num_samples=3),
    "greedy": GenerationSettings(max_new_tokens=12, temperature=0),
    "beams": GenerationSettings(max_new_tokens=12, temperature=0, num_beams=3, num_samples=2),
}


def model(sparsity: SparsityConfig = SPARSITIES["dense"], *, seed: int = 1, positions: int = 24) -> Decoder:
    config = ModelConfig(
        vocab_size=50,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
        initializer_range=0.3,
    )
    return build_model(Architecture(config, GroupedAttentionConfig(), sparsity), seed=seed, dtype=torch.float64)


def ids(written: list[list[object]]) -> list[list[list[int]]]:
    return [[continuation.ids for continuation in samples] for samples in written]  # type: ignore[attr-defined]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_in_a_batch_as_alone(sparsity: str, settings: str) -> None:
    decoder = model(SPARSITIES[sparsity])
    together = generate(decoder, PROMPTS, SETTINGS[settings], stop_id=11)
    alone = [generate(decoder, [prompt], SETTINGS[settings], stop_id=11)[0] for prompt in PROMPTS]
    assert ids(together) == ids(alone)  # type: ignore[arg-type]
    assert ids(generate(decoder, PROMPTS[::-1], SETTINGS[settings], stop_id=11)) == ids(alone[::-1])  # type: ignore[arg-type]


def test_sequences_end_by_themselves() -> None:
    decoder = model()
    free = generate(decoder, PROMPTS, SETTINGS["sampling"])
    assert [len(written.ids) for (written,) in free] == [12] * len(PROMPTS)
    stop_id = free[1][0].ids[4]
    stopped = generate(decoder, PROMPTS, SETTINGS["sampling"], stop_id=stop_id)
    for (before,), (after,) in zip(free, stopped, strict=True):
        end = before.ids.index(stop_id) if stop_id in before.ids else 12
        assert after.ids == before.ids[:end]
    assert len({len(written.ids) for (written,) in stopped}) > 1


def test_a_sequence_that_ended_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, sizes = model(), []
    settings = dataclasses.replace(SETTINGS["greedy"], max_new_tokens=100)
    decoder.register_forward_pre_hook(lambda _, arguments: sizes.append(tuple(arguments[0].shape)))
    generate(decoder, [[1] * 20, [2] * 10, [3] * 22], settings)
    assert sizes == [(3, 22), (3, 1), (2, 1), (2, 1), *[(1, 1)] * 10]


def test_the_model_s_last_position_is_the_end() -> None:
    settings = dataclasses.replace(SETTINGS["sampling"], max_new_tokens=100)
    written = generate(model(), PROMPTS, settings)
    assert [len(w.ids) + len(prompt) for (w,), prompt in zip(written, PROMPTS, strict=True)] == [24] * len(PROMPTS)


def test_the_seed_decides_and_samples_differ() -> None:
    decoder = model()
    first = generate(decoder, PROMPTS, SETTINGS["samples"])
    assert first == generate(decoder, PROMPTS, SETTINGS["samples"])
    assert first != generate(decoder, PROMPTS, dataclasses.replace(SETTINGS["samples"], generation_seed=1))
    assert all(len({tuple(w.ids) for w in samples}) == 3 for samples in first)
    one = generate(decoder, PROMPTS, dataclasses.replace(SETTINGS["samples"], num_samples=1))
    assert [samples[0] for samples in first] == [samples[0] for samples in one]


def test_a_stream_is_the_only_sample() -> None:
    decoder = model()
    for name in ("sampling", "varied", "greedy"):
        assert (
            list(stream(decoder, PROMPTS[0], SETTINGS[name]))
            == generate(decoder, PROMPTS[:1], SETTINGS[name])[0][0].ids
        )


def test_a_draw_is_that_of_multinomial() -> None:
    scores = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    settings = GenerationSettings(temperature=1.0, top_p=1.0)
    ours, theirs = (torch.Generator().manual_seed(4) for _ in range(2))
    for _ in range(50):
        expected = torch.multinomial(scores.softmax(dim=-1), 1, generator=theirs)
        assert pick(scores, settings, [ours]) == expected[0]


def test_draws_follow_the_probabilities() -> None:
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    drawn = pick(scores, GenerationSettings(temperature=1.0, top_p=1.0), [generator] * 20_000)
    shares = drawn.bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.01)


def test_penalties_are_those_of_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 6, (n,), generator=generator).tolist() for n in (1, 2, 9, 15)]
    for size in (0, 1, 2, 3, 4):
        settings = GenerationSettings(max_new_tokens=6, repetition_penalty=1.7, no_repeat_ngram_size=size)
        history, texts = History(prompts, 8, settings, torch.device("cpu")), [list(prompt) for prompt in prompts]
        for _ in range(6):
            scores = torch.randn(4, 8, generator=generator)
            assert torch.equal(history.penalize(scores), reference(scores, texts, settings))
            new = torch.randint(0, 6, (4,), generator=generator)
            history.append(new)
            for text, token in zip(texts, new.tolist(), strict=True):
                text.append(token)


def reference(scores: torch.Tensor, texts: list[list[int]], settings: GenerationSettings) -> torch.Tensor:
    scores, size = scores.clone(), settings.no_repeat_ngram_size
    for row, text in zip(scores, texts, strict=True):
        for token in {*text}:
            row[token] = row[token] * 1.7 if row[token] < 0 else row[token] / 1.7
        for start in range(len(text) - size + 1) if size else ():
            if text[start : start + size - 1] == text[len(text) - size + 1 :]:
                row[text[start + size - 1]] = float("-inf")
    return scores


def test_where_everything_would_repeat_nothing_is_ruled_out() -> None:
    history = History([[0, 1, 2]], 3, GenerationSettings(no_repeat_ngram_size=1), torch.device("cpu"))
    assert torch.equal(history.penalize(torch.ones(1, 3)), torch.ones(1, 3))


def test_no_n_gram_comes_twice() -> None:
    settings = GenerationSettings(max_new_tokens=60, temperature=0.7, no_repeat_ngram_size=2)
    for prompt, (written,) in zip(PROMPTS, generate(model(positions=80), PROMPTS, settings), strict=True):
        text = prompt + written.ids
        assert len({*itertools.pairwise(text)}) == len(text) - 1


def test_the_mode_of_the_model_comes_back_however_it_ends() -> None:
    decoder = model().train()
    generate(decoder, PROMPTS, SETTINGS["greedy"])
    assert decoder.training
    steps = decode(decoder, PROMPTS, SETTINGS["greedy"], None)
    next(steps)
    assert not decoder.training
    steps.close()
    assert decoder.training


def test_nothing_from_nothing() -> None:
    assert generate(model(), []) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"temperature": -1.0}, "`temperature` must be 0 or more, but is -1.0 instead."),
        ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1, but is 0.0 instead."),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be above 0, but is 0.0 instead."),
        ({"num_beams": 0}, "`num_beams` must be at least 1, but is 0 instead."),
        ({"num_beams": 2}, "`temperature` must be 0 with 2 beams"),
        ({"num_beams": 2, "temperature": 0, "num_samples": 3}, "`num_samples` must be at most the 2 beams"),
        ({"temperature": 0, "num_samples": 2}, "`num_samples` must be 1 at temperature 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        generate(model(), PROMPTS, GenerationSettings(**changes))  # type: ignore[arg-type]
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("prompt", [[], [1] * 24, [50], [3, -1]])
@pytest.mark.parametrize("beams", [1, 2])
def test_prompts_that_cannot_be_continued_are_refused(prompt: list[int], beams: int) -> None:
    with pytest.raises(UserError, match="`prompt` must be"):
        generate(model(), [[1], prompt], GenerationSettings(temperature=0, num_beams=beams))
