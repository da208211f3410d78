"""Top-k routing [shazeer2017moe] §2.1, without its noise, on softmax probabilities."""

from __future__ import annotations

from typing import Any

from ava_exp.nn.moe.router import TokenChoiceRouter


class TopKRouter(TokenChoiceRouter):
    """Every token goes to the `moe_top_k` experts with the highest probability.

    With `renormalize` its weights are these probabilities over their sum, as in the Ava text and [jiang2024mixtral]
    §2.1; without it they are the probabilities. A renormalised top-1 weighs 1 always: its router learns from the
    balance losses alone.
    """

    def __init__(self, moe_top_k: int, renormalize: bool, **common: Any) -> None:
        super().__init__(**common)
        self.moe_top_k, self.renormalize = moe_top_k, renormalize
