"""Sampling: filters against definitions, and determinism."""

from __future__ import annotations

import pytest
import torch

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import GroupedAttentionConfig
from ava_exp.config.model import ModelConfig, MoEConfig
from ava_exp.config.router import TopKRouterConfig
from ava_exp.errors import UserError
from ava_exp.generation.sampling import filter_logits, sample_tokens
from ava_exp.models.decoder import Decoder, build_model

LOGITS = torch.tensor([[2.0, 0.0, 1.0, -1.0]])


def model() -> Decoder:
    config = ModelConfig(vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, max_position_embeddings=24)
    return build_model(
        Architecture(config, GroupedAttentionConfig(), MoEConfig(router=TopKRouterConfig(), num_experts=4)), seed=1
    )


def kept(**settings: float) -> list[int]:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    return filter_logits(LOGITS, **values).isfinite()[0].nonzero().flatten().tolist()  # type: ignore[arg-type]


def test_top_k_keeps_the_best() -> None:
    assert kept(top_k=2) == [0, 2]
    assert kept(top_k=0) == kept(top_k=9) == [0, 1, 2, 3]


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probabilities = LOGITS.softmax(dim=-1)[0]
    assert kept(top_p=probabilities[0].item() - 0.01) == [0]
    assert kept(top_p=probabilities[0].item() + 0.01) == [0, 2]
    assert kept(top_p=1e-9) == [0]


def test_temperature_sharpens() -> None:
    sharp = filter_logits(LOGITS, 0.5, 0, 1.0)
    assert torch.equal(sharp, LOGITS * 2)


def test_greedy_equals_repeated_full_forwards() -> None:
    decoder, ids = model().eval(), [3, 1, 4]
    expected = list(ids)
    for _ in range(8):
        expected.append(int(decoder(torch.tensor([expected])).logits[0, -1].argmax()))
    assert list(sample_tokens(decoder, ids, max_new_tokens=8, temperature=0)) == expected[3:]


def test_the_seed_decides() -> None:
    first, second, other = (list(sample_tokens(model(), [1], max_new_tokens=20, seed=s)) for s in (1, 1, 2))
    assert first == second != other


def test_it_stops_at_the_stop_token_and_at_the_last_position() -> None:
    decoder = model()
    greedy = list(sample_tokens(decoder, [3, 1, 4], max_new_tokens=8, temperature=0))
    stopped = list(sample_tokens(decoder, [3, 1, 4], max_new_tokens=8, temperature=0, stop_id=greedy[3]))
    assert stopped == greedy[: greedy.index(greedy[3])]
    assert len(list(sample_tokens(decoder, [1, 2], max_new_tokens=100))) == 22


@pytest.mark.parametrize("prompt", [[], [1] * 24])
def test_prompts_that_cannot_be_continued_are_refused(prompt: list[int]) -> None:
    with pytest.raises(UserError, match="between 1 and 23 tokens"):
        list(sample_tokens(model(), prompt, max_new_tokens=1))


def test_no_tokens_may_be_asked_for() -> None:
    assert list(sample_tokens(model(), [1], max_new_tokens=0)) == []
