"""Selection of experts within the best groups of experts."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_best_groups(scores_NE: Tensor, num_groups: int, groups_per_token: int, experts_per_group: int) -> Tensor:
    """Return the scores with minus infinity outside each token's best groups.

    Groups are runs of E / `num_groups` neighbouring experts. A group is as good as the sum of its
    `experts_per_group` best scores; a score of minus infinity, an expert out of reach, adds nothing to it.
    """
    grouped = torch.unflatten(scores_NE, 1, (num_groups, -1))
    best = grouped.topk(experts_per_group, dim=-1).values
    best_NG = best.where(best > -torch.inf, 0.0).sum(dim=-1).where(best[..., 0] > -torch.inf, -torch.inf)
    kept = torch.zeros_like(best_NG, dtype=torch.bool)
    kept.scatter_(1, best_NG.topk(groups_per_token, dim=-1).indices, True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
