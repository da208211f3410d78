"""Self-speculative decoding: the same text as plain decoding, and the same distribution, exactly."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ava_exp.config.architecture import Architecture
from ava_exp.config.attention import AttentionBackend, GroupedAttentionConfig
from ava_exp.config.model import DenseConfig, ModelConfig, MoEConfig, SparsityConfig
from ava_exp.config.prediction import MultiTokenConfig, NextTokenConfig
from ava_exp.config.router import DeepSeekRouterConfig, TopKRouterConfig
from ava_exp.errors import UserError
from ava_exp.generation import speculative
from ava_exp.generation.sampling import filter_logits, sample_tokens
from ava_exp.generation.speculative import SpeculationStatistics, Speculator, speculate_tokens
from ava_exp.losses.terms import StepContext, build_losses
from ava_exp.models.decoder import Decoder, build_model
from tests.unit.nn.routing_cases import ROUTERS, moe_config

SPARSITIES: dict[str, SparsityConfig] = {
    "dense": DenseConfig(),
    "topk": MoEConfig(router=TopKRouterConfig(), num_experts=4),
    "deepseek": MoEConfig(router=DeepSeekRouterConfig(), num_experts=4, num_shared_experts=1),
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


def build(
    sparsity: str = "dense",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    num_heads: int = 3,
    attention: GroupedAttentionConfig | None = None,
    **changes: Any,
) -> Decoder:
    sizes = {"vocab_size": 12, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    model = ModelConfig(**sizes | {"intermediate_size": 24, "initializer_range": 0.4} | changes)
    prediction = MultiTokenConfig(num_prediction_heads=num_heads) if num_heads else NextTokenConfig()
    experts = SPARSITIES[sparsity] if sparsity in SPARSITIES else moe_config(sparsity)
    architecture = Architecture(model, attention or GroupedAttentionConfig(), experts, prediction=prediction)
    return build_model(architecture, seed=seed, dtype=dtype).eval()


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(0, 12, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_greedy_output_is_that_of_plain_decoding(sparsity: str, dtype: str, threshold: float) -> None:
    accepted, rejected = [0, 0, 0], 0
    for seed in range(8):
        model, ids = build(sparsity, seed, DTYPES[dtype]), prompt(seed, 1 + seed)
        statistics = SpeculationStatistics()
        plain = list(sample_tokens(model, ids, max_new_tokens=25, temperature=0))
        ours = speculate_tokens(
            model, ids, max_new_tokens=25, temperature=0, confidence_threshold=threshold, statistics=statistics
        )
        assert list(ours) == plain
        assert statistics.num_tokens == 24, "the first token comes with the prompt"
        accepted = [a + b for a, b in zip(accepted, statistics.accepted, strict=True)]
        rejected += sum(statistics.drafted) - sum(statistics.accepted)
    assert accepted[0] > 0 and rejected > 0


def logits_of(model: Decoder) -> Callable[[Tensor], Tensor]:
    """Return the plain product with the vocabulary."""
    return partial(F.linear, weight=model.embedding.weight if model.head is None else model.head.weight)


class Corrupted(Speculator):
    """Drafts the plain continuation with errors here and there: any pattern of acceptance is met."""

    def __init__(self, model: Decoder, continuation: list[int], generator: torch.Generator) -> None:
        super().__init__(model, logits_of(model), 0.0, None)
        self.continuation, self.generator, self.position = continuation, generator, 0

    def _draft(self, token: int, hidden_BTD: Tensor, max_drafts: int) -> tuple[list[int], list[Tensor]]:
        assert self.continuation[self.position] == token
        truth = self.continuation[self.position + 1 : self.position + 1 + min(max_drafts, 3)]
        length = int(torch.randint(0, len(truth) + 1, (), generator=self.generator))
        is_wrong = torch.rand(length, generator=self.generator) < 0.3
        return [(t + int(w)) % 12 for t, w in zip(truth[:length], is_wrong, strict=True)], []


@pytest.mark.parametrize("sparsity", [*SPARSITIES, *ROUTERS])
@pytest.mark.parametrize("backend", [AttentionBackend.plain, AttentionBackend.sdpa])
def test_any_drafts_give_the_same_text(sparsity: str, backend: AttentionBackend) -> None:
    model, ids, num_wanted = build(sparsity, attention=GroupedAttentionConfig(backend=backend)), prompt(0, 5), 90
    plain = list(sample_tokens(model, ids, max_new_tokens=num_wanted, temperature=0))
    seen = set()
    speculator = Corrupted(model, plain, torch.Generator().manual_seed(0))
    cache = model.new_cache(batch_size=1, capacity=len(ids) + num_wanted)
    with torch.inference_mode():
        token, hidden = speculator.start(ids, cache)
        tokens = [token]
        while len(tokens) < num_wanted:
            speculator.position = len(tokens) - 1
            decided = speculator.round(tokens[-1], hidden, cache, num_wanted - len(tokens) - 1)
            tokens, hidden = tokens + decided.tokens, decided.hidden
            seen.add((decided.num_drafted, len(decided.tokens) - 1))
            assert cache.lengths == len(ids) + len(tokens) - 1, "all but the newest token"
            whole = model(torch.tensor([ids + tokens[:-1]])).hidden[:, -1:]
            torch.testing.assert_close(hidden, whole, rtol=1e-9, atol=1e-9)
    assert tokens == plain
    assert seen >= {(drafted, accepted) for drafted in range(4) for accepted in range(drafted + 1)}


def test_it_stops_where_plain_decoding_does() -> None:
    model, ids = build(max_position_embeddings=24), [3, 1, 4]
    greedy = list(sample_tokens(model, ids, max_new_tokens=100, temperature=0))
    assert len(greedy) == 21
    settings: dict[str, Any] = {"temperature": 0, "confidence_threshold": 0.0}
    assert list(speculate_tokens(model, ids, max_new_tokens=100, **settings)) == greedy
    for stop in set(greedy):
        expected = greedy[: greedy.index(stop)]
        assert list(speculate_tokens(model, ids, max_new_tokens=100, stop_id=stop, **settings)) == expected
    for wanted in range(1, 6):
        assert list(speculate_tokens(model, ids, max_new_tokens=wanted, **settings)) == greedy[:wanted]


def test_trained_heads_draft_what_the_decoder_says() -> None:
    """A text in which every token follows from the one before is learned soon: all drafts of all heads are right."""
    model = build(dtype=torch.float32, initializer_range=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    terms = build_losses(DenseConfig(), prediction=MultiTokenConfig())
    texts = (5 * torch.arange(17) + torch.arange(12)[:, None]) % 12
    for _ in range(120):
        output, context = model(texts[:, :-1]), StepContext(num_tokens=12 * 16)
        loss, mtp_loss = (term(output, texts[:, 1:], context) for term in terms)
        optimizer.zero_grad()
        (loss + 0.1 * mtp_loss).backward()
        optimizer.step()
    statistics = SpeculationStatistics()
    settings: dict[str, Any] = {"max_new_tokens": 13, "temperature": 0, "statistics": statistics}
    assert list(speculate_tokens(model, [0, 5], confidence_threshold=0.5, **settings)) == [
        5 * n % 12 for n in range(2, 15)
    ]
    assert statistics.accepted == statistics.drafted == [3, 3, 3]


def test_the_threshold_decides_how_much_is_drafted() -> None:
    drafted = []
    for threshold in (0.0, 0.3, 0.5, 1.0):
        statistics = SpeculationStatistics()
        model = build()
        list(
            speculate_tokens(
                model, [1, 2], max_new_tokens=40, temperature=0, confidence_threshold=threshold, statistics=statistics
            )
        )
        drafted.append(sum(statistics.drafted))
    assert drafted[0] > drafted[1] > drafted[2] > drafted[3] == 0


class AlwaysWrong(Speculator):
    """Drafts a token that the decoder never takes."""

    def _draft(self, token: int, hidden_BTD: Tensor, max_drafts: int) -> tuple[list[int], list[Tensor]]:
        return [11] * min(max_drafts, 3), []


@torch.inference_mode()
def test_heads_that_are_never_right_are_hardly_asked_again() -> None:
    model = build()
    model.embedding.weight[11] = 0.0  # its logit is 0, and the largest is above
    speculator, cache = AlwaysWrong(model, logits_of(model), 0.0, None), model.new_cache(batch_size=1, capacity=200)
    token, hidden = speculator.start([1, 2], cache)
    drafted = []
    for _ in range(80):
        decided = speculator.round(token, hidden, cache, max_drafts=3)
        assert len(decided.tokens) == 1
        token, hidden = decided.tokens[-1], decided.hidden
        drafted.append(decided.num_drafted)
    assert drafted[:20] == [3] * 20
    later = drafted[32:]
    assert [number for number, drafts in enumerate(later) if drafts] == [0, 16, 32]


def test_the_statistics() -> None:
    statistics = SpeculationStatistics()
    statistics.reset(3)
    for drafted, accepted in ((3, 2), (3, 0), (1, 1), (0, 0)):
        statistics.add(drafted, accepted)
    assert (statistics.num_forwards, statistics.num_tokens) == (4, 7)
    assert (statistics.drafted, statistics.accepted) == ([3, 2, 2], [2, 1, 0])
    assert statistics.tokens_per_forward == 7 / 4
    assert statistics.acceptance_rate == 3 / 7
    assert str(statistics) == (
        "7 tokens in 4 passes of the decoder, 1.75 each; 43% of 7 drafts accepted (by head: 67%, 50%, 0%)"
    )


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="no prediction heads"):
        list(speculate_tokens(build(num_heads=0), [1], max_new_tokens=1))
    for ids in ([], [1] * 24):
        with pytest.raises(UserError, match="between 1 and 23 tokens"):
            list(speculate_tokens(build(max_position_embeddings=24), ids, max_new_tokens=1))


def test_the_model_s_mode_is_put_back_even_when_nobody_listens_to_the_end() -> None:
    model = build().train()
    tokens = speculate_tokens(model, [1], max_new_tokens=9)
    next(tokens)
    tokens.close()  # type: ignore[attr-defined]
    assert model.training


def test_the_seed_decides() -> None:
    first, second, other = (
        list(speculate_tokens(build(), [1], max_new_tokens=30, seed=s, confidence_threshold=0.0)) for s in (1, 1, 2)
    )
    assert first == second != other


@dataclass(slots=True)
class Scripted:
    """Takes every decision as a script says, and the first possible one beyond its end; multiplies the probabilities.

    `open_ends` are the scripts that turn off from this path where it was not scripted.
    """

    temperature: float
    top_p: float
    script: list[int]
    probability: float = 1.0
    taken: list[int] = field(default_factory=list)
    open_ends: list[list[int]] = field(default_factory=list)

    def distribution(self, logits_NV: Tensor) -> Tensor:
        return filter_logits(logits_NV, self.temperature, 0, self.top_p).softmax(dim=-1)

    def token(self, probabilities_V: Tensor) -> int:
        return self._take(probabilities_V.tolist())

    def accepts(self, probability: float) -> bool:
        probability = min(1.0, probability)
        return self._take([1 - probability, probability]) == 1

    def _take(self, probabilities: list[float]) -> int:
        possible = [index for index, probability in enumerate(probabilities) if probability > 0]
        chosen = self.script[len(self.taken)] if len(self.taken) < len(self.script) else possible[0]
        if len(self.taken) >= len(self.script):
            self.open_ends += [[*self.taken, other] for other in possible[1:]]
        self.taken.append(chosen)
        self.probability *= probabilities[chosen]
        return chosen


def all_paths(model: Decoder, ids: list[int], num_tokens: int, threshold: float, **filters: float) -> Iterator[Any]:
    """Yield (tokens, probability, drafted, accepted) of every way that a speculative generation can go."""
    scripts: list[list[int]] = [[]]
    while scripts:
        choices = Scripted(**filters, script=scripts.pop())  # type: ignore[arg-type]
        speculator = Speculator(model, logits_of(model), threshold, choices)
        cache = model.new_cache(batch_size=1, capacity=len(ids) + num_tokens)
        token, hidden = speculator.start(ids, cache)
        tokens, num_drafted, num_accepted = [token], 0, 0
        while len(tokens) < num_tokens:
            decided = speculator.round(tokens[-1], hidden, cache, num_tokens - len(tokens) - 1)
            tokens, hidden = tokens + decided.tokens, decided.hidden
            num_drafted, num_accepted = num_drafted + decided.num_drafted, num_accepted + len(decided.tokens) - 1
        scripts += choices.open_ends
        yield tuple(tokens), choices.probability, num_drafted, num_accepted


@pytest.mark.parametrize(
    ("threshold", "worthwhile", "filters"),
    [
        (0.0, 0.0, {"temperature": 1.0, "top_p": 1.0}),
        (0.0, 0.0, {"temperature": 1.4, "top_p": 0.85}),
        (0.55, 0.0, {"temperature": 1.0, "top_p": 1.0}),
        (0.0, 0.95, {"temperature": 1.0, "top_p": 1.0}),
    ],
    ids=["all drafts", "filtered", "confident drafts", "no drafts after a rejected one"],
)
@torch.inference_mode()
def test_the_distribution_is_that_of_the_decoder_exactly(
    threshold: float, worthwhile: float, filters: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every path of draws is taken, with its probability: their sums are those of plain sampling, to 1e-12."""
    monkeypatch.setattr(speculative, "WORTHWHILE", worthwhile)
    model = build(seed=4, num_heads=2, vocab_size=3, num_layers=1, hidden_size=8, head_dim=4)
    ids, num_tokens = [1, 2], 4
    ours: dict[tuple[int, ...], float] = defaultdict(float)
    outcomes = set()
    for tokens, probability, num_drafted, num_accepted in all_paths(model, ids, num_tokens, threshold, **filters):
        ours[tokens] += probability
        outcomes.add((num_drafted, num_accepted))
    for tokens in itertools.product(range(3), repeat=num_tokens):
        logits = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1]
        own = filter_logits(logits, filters["temperature"], 0, filters["top_p"]).softmax(dim=-1)
        expected = own[torch.arange(num_tokens), torch.tensor(tokens)].prod().item()
        assert ours.get(tokens, 0.0) == pytest.approx(expected, abs=1e-12)
    assert sum(ours.values()) == pytest.approx(1, abs=1e-12)
    assert len(outcomes) >= 3, "drafts must have been accepted and rejected"


def test_random_draws_follow_the_distribution_too() -> None:
    """Chi-square of pairs of tokens with a fixed seed: what draws, beside how draws are used."""
    model = build(seed=4, num_heads=2, vocab_size=3, num_layers=1, hidden_size=8, head_dim=4)
    num_samples, counts = 1500, defaultdict[tuple[int, ...], int](int)
    for seed in range(num_samples):
        counts[tuple(speculate_tokens(model, [1, 2], max_new_tokens=3, seed=seed, confidence_threshold=0.0))] += 1
    statistic = 0.0
    for tokens in itertools.product(range(3), repeat=3):
        probabilities = model(torch.tensor([[1, 2, *tokens]])).logits[0, 1:-1].softmax(dim=-1)
        expected = num_samples * probabilities[torch.arange(3), torch.tensor(tokens)].prod().item()
        statistic += (counts[tokens] - expected) ** 2 / expected
    assert statistic < 54.1, "the 99.9th percentile of chi-square with 26 degrees of freedom"
