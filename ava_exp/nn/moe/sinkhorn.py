"""Sinkhorn routing: a balanced selection while training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ava_exp.nn.moe.router import TokenChoiceRouter


class SinkhornRouter(TokenChoiceRouter):
    """Top-k of scores that Sinkhorn's iteration has balanced over the micro-batch [clark2022unified] §3.1, S-BASE.

    Balancing decides the selection only; weights are the softmax probabilities of the unbalanced logits. It looks at
    all tokens of the micro-batch, later ones too: training is not causal. At inference a token's own probabilities
    decide, as in `topk`. The Ava text normalises over every sequence by itself and towards equal sums of rows and
    columns; here rows sum to 1 and columns to N / E, over all N tokens, in log space.
    """

    def __init__(self, moe_top_k: int, renormalize: bool, num_iterations: int, **common: Any) -> None:
        super().__init__(**common)
        self.moe_top_k, self.renormalize, self.num_iterations = moe_top_k, renormalize, num_iterations

    def preferences(self, logits: Tensor, affinities_NE: Tensor) -> Tensor:
        return sinkhorn(logits, self.num_iterations) if self.training else affinities_NE


def sinkhorn(logits_NE: Tensor, num_iterations: int) -> Tensor:
    """Return log-scores whose rows sum to 1 and whose columns sum to nearly N / E [cuturi2013sinkhorn] alg. 1.

    Columns that are minus infinity throughout take no part.
    """
    present = (logits_NE > -torch.inf).any(dim=0)
    log_share = math.log(logits_NE.shape[0]) - present.sum().log()
    scores = logits_NE.log_softmax(dim=1)
    for _ in range(num_iterations):
        columns = scores.logsumexp(dim=0) - log_share
        scores = (scores - columns.where(present, 0.0)).log_softmax(dim=1)
    return scores
