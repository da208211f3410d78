"""Self-speculative decoding: the prediction heads draft, one forward pass of the decoder checks all drafts at once.

A round starts with a token x that is decided but not read yet, and the hidden state h that it was predicted from. The
heads go on from (h, x): head j drafts the j-th token after x, as long as the heads are confident. The decoder then
reads x and the k drafts in one pass with its cache, which gives its own prediction after x and after every draft. A
prefix of a ≤ k drafts is accepted, one token more is taken from the decoder's own prediction after that prefix, and the
cache forgets the rest: a + 1 tokens for one pass [stern2018blockwise] §3, [leviathan2023speculative] §2.

**Greedy decoding gives the output of plain greedy decoding.** By induction over the tokens: let what is decided agree
so far. A causal decoder's prediction after a prefix depends on that prefix alone, in one pass or in several. A draft is
accepted only if it is the best token of the prediction after the accepted text before it, which is what plain decoding
takes there; the token that ends the round is the best token of such a prediction, too. Rejected tokens leave no trace:
the predictions used are of positions before them, and the cache is cut back to the accepted text. So every token is the
one that plain decoding takes. The drafts decide how many passes it takes, and nothing else.

**Sampling gives the distribution of plain sampling.** A draft d is drawn from the head's distribution q and accepted
with probability min(1, p(d) / q(d)), p being the decoder's, both after the same temperature and filters; if it is not,
the token is drawn from the residual max(0, p - q) / Σ max(0, p - q). Then P(token = x) = min(p(x), q(x)) +
(1 - Σ min(p, q)) · max(0, p(x) - q(x)) / Σ max(0, p - q) = p(x) [leviathan2023speculative] app. A.1. Whether there is
a draft at all is decided by what came before it, so it does not tell of the token. The same seed draws other numbers
than in plain sampling: the distribution is the same, not the sample.

Both hold for exact arithmetic, and for a decoder whose prediction does not depend on how many tokens are read at once;
an expert capacity at evaluation is the exception. In floating point, products of one row and of several are added up in
another order. Where the best two logits are nearer to one another than that rounding, plain and speculative decoding
may take either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ava_exp.errors import UserError
from ava_exp.generation.batch import check_prompts, prepared
from ava_exp.generation.sampling import filter_logits
from ava_exp.models.decoder import Decoder
from ava_exp.nn.attention.cache import KeyValueCache

WORTHWHILE = 0.1
"""A head drafts while this share of its drafts was accepted of late. A draft and its row took about a tenth of a pass,
with 30 M parameters in bf16 on a CPU; an accepted one saves a whole pass."""
MEMORY = 0.1
"""Weight of the newest draft in a head's rate of acceptance."""
ROUNDS_TO_TRY_AGAIN = 16


@dataclass(slots=True)
class SpeculationStatistics:
    """What a generation took. `drafted` and `accepted` count by head, the first one first."""

    num_forwards: int = 0
    """Passes of the decoder, without the one that reads the prompt."""
    num_tokens: int = 0
    """Tokens that these passes gave."""
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def tokens_per_forward(self) -> float:
        """Plain decoding has 1."""
        return self.num_tokens / max(1, self.num_forwards)

    @property
    def acceptance_rate(self) -> float:
        """Share of all drafts that were accepted."""
        return sum(self.accepted) / max(1, sum(self.drafted))

    @property
    def acceptance_by_head(self) -> list[float]:
        """Share of a head's drafts that were accepted: drafts behind a rejected one are rejected with it."""
        return [accepted / max(1, drafted) for accepted, drafted in zip(self.accepted, self.drafted, strict=True)]

    def reset(self, num_heads: int) -> None:
        """Begin to count, for so many heads."""
        self.num_forwards = self.num_tokens = 0
        self.drafted, self.accepted = [0] * num_heads, [0] * num_heads

    def add(self, num_drafted: int, num_accepted: int) -> None:
        """Count one round: the accepted drafts and one token more."""
        self.num_forwards += 1
        self.num_tokens += num_accepted + 1
        for counts, number in ((self.drafted, num_drafted), (self.accepted, num_accepted)):
            for head in range(number):
                counts[head] += 1

    def __str__(self) -> str:
        heads = ", ".join(f"{rate:.0%}" for rate in self.acceptance_by_head)
        return (
            f"{self.num_tokens} tokens in {self.num_forwards} passes of the decoder, {self.tokens_per_forward:.2f} "
            f"each; {self.acceptance_rate:.0%} of {sum(self.drafted)} drafts accepted (by head: {heads})"
        )


class Choices(Protocol):
    """How a distribution becomes a token, and a probability a decision."""

    def distribution(self, logits_NV: Tensor) -> Tensor:
        """Return the probabilities (N, V) that tokens are drawn from."""

    def token(self, probabilities_V: Tensor) -> int:
        """Draw a token."""

    def accepts(self, probability: float) -> bool:
        """Say yes with this probability."""


@dataclass(slots=True)
class RandomChoices:
    """Draws with temperature, top-k and top-p from one generator on the model's device."""

    temperature: float
    top_k: int
    top_p: float
    generator: torch.Generator

    def distribution(self, logits_NV: Tensor) -> Tensor:
        """Return the probabilities (N, V) after temperature and filters, in fp32 or wider."""
        logits_NV = logits_NV.to(wide_format(logits_NV))
        return filter_logits(logits_NV, self.temperature, self.top_k, self.top_p).softmax(dim=-1)

    def token(self, probabilities_V: Tensor) -> int:
        """Draw a token."""
        return int(torch.multinomial(probabilities_V, 1, generator=self.generator))

    def accepts(self, probability: float) -> bool:
        """Say yes with this probability."""
        if probability >= 1:
            return True
        device = self.generator.device
        return float(torch.rand((), dtype=torch.float64, device=device, generator=self.generator)) < probability


def wide_format(logits: Tensor) -> torch.dtype:
    """Return the format that probabilities are computed in: fp32, or that of the logits if it is wider."""
    return torch.promote_types(logits.dtype, torch.float32)


@dataclass(slots=True)
class Round:
    """What one pass decided: tokens, all but the last of them drafts, and the state that the last is predicted from."""

    tokens: list[int]
    num_drafted: int
    hidden: Tensor


class Speculator:
    """Drafts with a decoder's prediction heads and checks with the decoder. Batch size 1.

    `choices` None is greedy. Drafting goes on as long as a head's best token has at least `confidence_threshold`, in
    the distribution that tokens are drawn from (in greedy decoding, in that of the logits as they are), and as long as
    the head's drafts have been worth their time: one that was hardly ever right is tried again now and then only.
    """

    def __init__(
        self,
        model: Decoder,
        to_logits: Callable[[Tensor], Tensor],
        confidence_threshold: float,
        choices: Choices | None,
    ) -> None:
        """`to_logits` maps hidden states (…, D) to logits (…, V)."""
        self.model, self.to_logits = model, to_logits
        self.confidence_threshold, self.choices = confidence_threshold, choices
        self.heads = list(model.prediction_heads)
        self.rates, self.num_rounds = [1.0] * len(self.heads), 0

    def start(self, prompt_ids: list[int], cache: KeyValueCache) -> tuple[int, Tensor]:
        """Read the prompt; return the token after it and the state (1, 1, D) that it is predicted from."""
        output = self.model(self._ids(prompt_ids), cache)
        return self._decide([], [], self.to_logits(output.hidden[:, -1]))[0], output.hidden[:, -1:]

    def round(self, token: int, hidden_BTD: Tensor, cache: KeyValueCache, max_drafts: int) -> Round:
        """Decide at most `max_drafts` + 1 tokens after `token`, the newest, which the cache does not hold yet.

        `hidden_BTD` (1, 1, D) is the state that `token` was predicted from.
        """
        drafts, distributions = self._draft(token, hidden_BTD, min(max_drafts, self._num_worthwhile()))
        start = cache.lengths
        output = self.model(self._ids([token, *drafts]), cache)
        tokens = self._decide(drafts, distributions, self.to_logits(output.hidden[0]))
        if len(tokens) <= len(drafts):
            cache.truncate(start + len(tokens))
        self._remember(len(drafts), len(tokens) - 1)
        return Round(tokens, len(drafts), output.hidden[:, len(tokens) - 1 : len(tokens)])

    def _num_worthwhile(self) -> int:
        """Return how many heads may draft now."""
        if self.num_rounds % ROUNDS_TO_TRY_AGAIN == 0:
            return len(self.heads)
        return next((head for head, rate in enumerate(self.rates) if rate < WORTHWHILE), len(self.heads))

    def _remember(self, num_drafted: int, num_accepted: int) -> None:
        self.num_rounds += 1
        for head in range(num_drafted):
            self.rates[head] += MEMORY * ((head < num_accepted) - self.rates[head])

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.model.embedding.weight.device)

    def _draft(self, token: int, hidden_BTD: Tensor, max_drafts: int) -> tuple[list[int], list[Tensor]]:
        """Return the drafts and, when sampling, the distributions (V,) that they were drawn from."""
        drafts: list[int] = []
        distributions: list[Tensor] = []
        for head in self.heads[:max_drafts]:
            hidden_BTD = head(hidden_BTD, self.model.embedding(self._ids([token])))
            logits_1V = self.to_logits(hidden_BTD[0])
            if self.choices is None:
                confidence, best = logits_1V.softmax(dim=-1, dtype=wide_format(logits_1V))[0].max(dim=0)
                if confidence < self.confidence_threshold:
                    break
                token = int(best)
            else:
                probabilities_V = self.choices.distribution(logits_1V)[0]
                if probabilities_V.max() < self.confidence_threshold:
                    break
                token = self.choices.token(probabilities_V)
                distributions.append(probabilities_V)
            drafts.append(token)
        return drafts, distributions

    def _decide(self, drafts: list[int], distributions: list[Tensor], logits_NV: Tensor) -> list[int]:
        """Return the accepted drafts and one token more. Row i of the logits predicts what follows i drafts."""
        if self.choices is None:
            best = logits_NV.argmax(dim=-1).tolist()
            num_accepted = next((i for i, draft in enumerate(drafts) if draft != best[i]), len(drafts))
            return best[: num_accepted + 1]
        own_NV = self.choices.distribution(logits_NV)
        for i, (draft, drafted_V) in enumerate(zip(drafts, distributions, strict=True)):
            if not self.choices.accepts(float(own_NV[i, draft] / drafted_V[draft])):
                residual_V = (own_NV[i] - drafted_V).clamp_(min=0)
                total = residual_V.sum()
                # Nothing is left over only where rounding made the two differ.
                return [*drafts[:i], self.choices.token(residual_V / total if total > 0 else own_NV[i])]
        return [*drafts, self.choices.token(own_NV[len(drafts)])]


@torch.inference_mode()
def speculate_tokens(
    model: Decoder,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    confidence_threshold: float = 0.05,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_id: int | None = None,
    statistics: SpeculationStatistics | None = None,
) -> Iterator[int]:
    """Yield new token ids until `stop_id`, `max_new_tokens` or the model's last position, several for one pass.

    Temperature 0 is greedy and yields what `sample_tokens` does; sampling draws from the same distribution. The drafts
    are made by the model's prediction heads, and `statistics` are filled with what becomes of them.
    Raises UserError for an empty or too long prompt, and for a model without prediction heads.
    """
    check_prompts(model, [prompt_ids])
    if not len(model.prediction_heads):
        raise UserError("the model has no prediction heads to draft with: train one with `prediction=multi_token`.")
    statistics = SpeculationStatistics() if statistics is None else statistics
    statistics.reset(len(model.prediction_heads))
    generator = torch.Generator(device=model.embedding.weight.device).manual_seed(seed)
    choices = None if temperature == 0 else RandomChoices(temperature, top_k, top_p, generator)
    num_wanted = min(max_new_tokens, model.config.max_position_embeddings - len(prompt_ids))
    with prepared(model, max_new_tokens) as to_logits:
        speculator = Speculator(model, to_logits, confidence_threshold, choices)
        yield from _stream(speculator, prompt_ids, num_wanted, stop_id, statistics)


def _stream(
    speculator: Speculator,
    prompt_ids: list[int],
    num_wanted: int,
    stop_id: int | None,
    statistics: SpeculationStatistics,
) -> Iterator[int]:
    """Yield at most `num_wanted` tokens, of the prompt's pass and then of every round."""
    cache = speculator.model.new_cache(batch_size=1, capacity=len(prompt_ids) + num_wanted)
    token, hidden_BTD = speculator.start(prompt_ids, cache)
    tokens = [token]
    while num_wanted > 0:
        for token in tokens:
            if token == stop_id:
                return
            yield token
        num_wanted -= len(tokens)
        if num_wanted > 0:
            decided = speculator.round(token, hidden_BTD, cache, max_drafts=num_wanted - 1)
            tokens, hidden_BTD = decided.tokens, decided.hidden
            statistics.add(decided.num_drafted, len(tokens) - 1)
