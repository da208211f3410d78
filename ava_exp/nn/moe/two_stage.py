"""Two-stage routing: the best groups of experts, then the best experts inside them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ava_exp.config.router import balanced_divisor
from ava_exp.nn.moe.groups import keep_best_groups
from ava_exp.nn.moe.router import TokenChoiceRouter


class TwoStageRouter(TokenChoiceRouter):
    """One softmax over all experts; a token's `groups_per_token` best groups, then its `moe_top_k` best experts there.

    The Vishwamai text calls its router "two-stage top-k" and shows a single top-k. This is the group-limited routing of
    [deepseek2024v2] §2.2.2 with the paper's score of a group, its best expert.
    """

    def __init__(
        self, moe_top_k: int, renormalize: bool, num_groups: int | None, groups_per_token: int, **common: Any
    ) -> None:
        super().__init__(**common)
        self.moe_top_k, self.renormalize = moe_top_k, renormalize
        self.num_groups, self.groups_per_token = num_groups or balanced_divisor(self.num_experts), groups_per_token

    def preferences(self, logits: Tensor, affinities_NE: Tensor) -> Tensor:
        return keep_best_groups(affinities_NE, self.num_groups, self.groups_per_token, experts_per_group=1)
