"""What has been written, and what must therefore not be written again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ava_exp.config.generation import GenerationSettings

NONE = -1
"""Stands before the first token of a sequence that is shorter than others."""


class History:
    """The tokens of R sequences, prompts included, aligned at the right; kept as far as the settings look at them."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], vocab_size: int, settings: GenerationSettings, device: torch.device
    ) -> None:
        self.penalty, self.ngram_size = settings.repetition_penalty, settings.no_repeat_ngram_size
        self.length = longest = max(len(prompt) for prompt in prompts)
        rows = [[NONE] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        read_RT = torch.tensor(rows, device=device)
        room = settings.max_new_tokens if self.ngram_size else 0
        self.tokens_RL = torch.cat([read_RT, read_RT.new_full((len(prompts), room), NONE)], dim=1)
        self.seen_RV: Tensor | None = None
        if self.penalty != 1:
            self.seen_RV = _marked(read_RT, vocab_size)

    def append(self, tokens_R: Tensor) -> None:
        """Add a token to every sequence."""
        if self.ngram_size:
            self.tokens_RL[:, self.length] = tokens_R
            self.length += 1
        if self.seen_RV is not None:
            self.seen_RV.scatter_(1, tokens_R[:, None], True)

    def select(self, rows: Tensor) -> None:
        """Keep the sequences `rows`, in that order; one may occur several times."""
        self.tokens_RL = self.tokens_RL[rows]
        if self.seen_RV is not None:
            self.seen_RV = self.seen_RV[rows]

    def penalize(self, scores_RV: Tensor) -> Tensor:
        """Return the scores of next tokens, made smaller for those that were written.

        The repetition penalty θ divides a positive score by θ and multiplies a negative one [keskar2019ctrl] §4.1,
        there a division for both. A token that would complete an n-gram a second time is ruled out with -inf, unless
        all tokens would.
        """
        if self.seen_RV is not None:
            lowered = torch.where(scores_RV < 0, scores_RV * self.penalty, scores_RV / self.penalty)
            scores_RV = torch.where(self.seen_RV, lowered, scores_RV)
        if 0 < self.ngram_size <= self.length:
            banned_RV = self._completing(scores_RV.shape[1])
            banned_RV &= ~banned_RV.all(dim=1, keepdim=True)
            scores_RV = scores_RV.masked_fill(banned_RV, float("-inf"))
        return scores_RV

    def _completing(self, vocab_size: int) -> Tensor:
        """Return the tokens, (R, V) bool, that followed the last n - 1 tokens before."""
        windows_RWn = self.tokens_RL[:, : self.length].unfold(1, self.ngram_size, 1)
        end_Rm = self.tokens_RL[:, self.length - self.ngram_size + 1 : self.length]
        same_RW = (windows_RWn[:, :, :-1] == end_Rm[:, None]).all(dim=2)
        return _marked(windows_RWn[:, :, -1].where(same_RW, NONE), vocab_size)


def _marked(tokens_RL: Tensor, vocab_size: int) -> Tensor:
    """Return which tokens occur in each row, (R, V) bool; `NONE` does not count."""
    marks = torch.zeros(tokens_RL.shape[0], vocab_size + 1, dtype=torch.bool, device=tokens_RL.device)
    return marks.scatter_(1, tokens_RL.where(tokens_RL >= 0, vocab_size), True)[:, :vocab_size]
