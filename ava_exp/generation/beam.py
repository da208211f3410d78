"""Beam search: the likeliest continuation among those that are never far from the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ava_exp.config.generation import GenerationSettings
from ava_exp.generation.batch import check_prompts, check_settings, prepared, read_prompts, room_for
from ava_exp.generation.history import History
from ava_exp.models.decoder import Decoder

OUT_OF_REACH = -1e9


@dataclass(slots=True)
class Hypothesis:
    """A finished continuation: its tokens, the stop token left out, and its score."""

    ids: list[int]
    score: float


@dataclass(slots=True)
class _Search:
    """The beams of one prompt: what each has written, and the best B that ended, best first."""

    sequence: int
    room: int
    beams: list[list[int]]
    ended: list[Hypothesis] = field(default_factory=list)

    def end(self, hypotheses: list[Hypothesis]) -> None:
        """Keep the best of those that ended before and now."""
        self.ended = sorted(self.ended + hypotheses, key=lambda hypothesis: -hypothesis.score)[: len(self.beams)]

    def is_over(self, best_running: float, length: int, settings: GenerationSettings) -> bool:
        """Whether B have ended and no beam, at its present length, scores above the worst of them."""
        if length == self.room:
            return True
        if len(self.ended) < len(self.beams):
            return False
        return settings.early_stopping or best_running / length**settings.length_penalty <= self.ended[-1].score


@torch.inference_mode()
def beam_search(
    model: Decoder, prompts: Sequence[Sequence[int]], settings: GenerationSettings, stop_id: int | None = None
) -> list[list[Hypothesis]]:
    """Return up to `num_beams` continuations of each prompt, best first [wu2016gnmt] §7.

    Defined as transformers does: a score is the sum of log-probabilities, after the penalties, over the number of new
    tokens (the stop token counts) to the power `length_penalty`; the paper's differs. A search ends when B
    continuations have ended and none that runs scores above the worst of them, or at once with `early_stopping`.
    """
    check_settings(settings)
    check_prompts(model, prompts)
    device, num_beams = model.embedding.weight.device, settings.num_beams
    with prepared(model, settings.max_new_tokens) as head:
        searches = [
            _Search(index, room_for(model, prompt, settings), [[] for _ in range(num_beams)])
            for index, prompt in enumerate(prompts)
        ]
        found = list(searches)
        capacity = max(len(prompt) + search.room for prompt, search in zip(prompts, searches, strict=True))
        last_PD, cache = read_prompts(model, prompts, capacity)
        logits_PV = head(last_PD)
        history = History(prompts, logits_PV.shape[1], settings, device)
        every = torch.arange(len(prompts), device=device).repeat_interleave(num_beams)
        logits_RV = logits_PV[every]
        cache.select(every)
        history.select(every)
        scores_PB = torch.full((len(prompts), num_beams), OUT_OF_REACH, device=device)
        scores_PB[:, 0] = 0  # all beams are the same at first: one is enough
        length = 0
        while True:
            length += 1
            steps_RV = history.penalize(logits_RV.log_softmax(dim=-1))
            totals_PBV = scores_PB[:, :, None] + steps_RV.view(len(searches), num_beams, -1)
            # Twice as many as beams: at most half of them end.
            best = totals_PBV.flatten(1).topk(2 * num_beams, dim=1)
            parents_PK, tokens_PK = best.indices // steps_RV.shape[1], best.indices % steps_RV.shape[1]
            kept, rows, tokens, scores = _advance(
                searches, best.values, parents_PK, tokens_PK, length, settings, stop_id
            )
            if not kept:
                return [search.ended for search in found]
            searches = kept
            scores_PB = torch.tensor(scores, device=device).view(len(searches), num_beams)
            rows_R, tokens_R = torch.tensor(rows, device=device), torch.tensor(tokens, device=device)
            cache.select(rows_R)
            history.select(rows_R)
            history.append(tokens_R)
            logits_RV = head(model(tokens_R[:, None], cache).hidden[:, -1])


def _advance(
    searches: list[_Search],
    scores_PK: Tensor,
    parents_PK: Tensor,
    tokens_PK: Tensor,
    length: int,
    settings: GenerationSettings,
    stop_id: int | None,
) -> tuple[list[_Search], list[int], list[int], list[float]]:
    """Give every search the best candidates, best first. Return the searches that go on and, for their beams one after
    the other, the row that each continues, its token and its score."""
    num_beams = settings.num_beams
    kept: list[_Search] = []
    rows: list[int] = []
    tokens: list[int] = []
    scores: list[float] = []
    columns = zip(searches, scores_PK.tolist(), parents_PK.tolist(), tokens_PK.tolist(), strict=True)
    for place, (search, own_scores, parents, own_tokens) in enumerate(columns):
        candidates = list(zip(own_scores, parents, own_tokens, strict=True))
        at_end = length == search.room
        ending = [c for c in candidates[:num_beams] if at_end or c[2] == stop_id]
        search.end(
            [
                Hypothesis(
                    search.beams[parent] + ([] if token == stop_id else [token]),
                    score / length**settings.length_penalty,
                )
                for score, parent, token in ending
            ]
        )
        running = [c for c in candidates if c[2] != stop_id][:num_beams]
        if search.is_over(running[0][0], length, settings):
            continue
        search.beams = [[*search.beams[parent], token] for _, parent, token in running]
        kept.append(search)
        rows += [place * num_beams + parent for _, parent, _ in running]
        tokens += [token for _, _, token in running]
        scores += [score for score, _, _ in running]
    return kept, rows, tokens, scores
