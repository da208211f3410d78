"""Hierarchical routing: a tree of experts with a router at every node."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, nn

from ava_exp.config.router import balanced_divisor
from ava_exp.nn.moe.router import TokenChoiceRouter
from ava_exp.nn.moe.routing import Routing, router_z_loss


class HierarchicalRouter(TokenChoiceRouter):
    """A softmax at every node of a tree; an expert's probability is the product along its path [jordan1994hme] §2.

    `branching` is the number of children at each level, `choices` how many of them a token follows: a hard version of
    the paper's tree, as in [shazeer2017moe] app. B. With `renormalize` the products of the followed paths are divided
    by their sum: a node of which a single child is followed then cancels out, and learns from the losses of the router
    alone. One level is `topk`. The MoE++ text says no more than "multi-level expert organization".
    """

    def __init__(self, branching: list[int] | None, choices: list[int], renormalize: bool, **common: Any) -> None:
        super().__init__(**common)
        num_groups = balanced_divisor(self.num_experts)
        self.branching = branching or [num_groups, self.num_experts // num_groups]
        self.choices, self.renormalize = choices, renormalize
        self.num_nodes = list(itertools.accumulate(self.branching, operator.mul))
        assert self.num_nodes[-1] == self.num_experts and len(choices) == len(self.branching), (branching, choices)
        self.weight = nn.Parameter(torch.empty(sum(self.num_nodes), self.weight.shape[1]))

    def mask(self, logits: Tensor, absent_E: Tensor) -> Tensor:
        """Put absent experts out of reach, and every node that leads to nothing else."""
        absent, levels = absent_E, []
        for num_children, level in zip(reversed(self.branching), reversed(self._levels(logits)), strict=True):
            siblings = absent.view(-1, num_children)
            empty = siblings.all(dim=1)
            levels.append(level.masked_fill((siblings & ~empty[:, None]).flatten(), -torch.inf))
            absent = empty
        return torch.cat(levels[::-1], dim=1)

    def affinities(self, logits: Tensor) -> Tensor:
        product = logits.new_ones(logits.shape[0], 1, 1)
        for num_children, level in zip(self.branching, self._levels(logits), strict=True):
            product = (product * torch.unflatten(level, 1, (-1, num_children)).softmax(dim=-1)).flatten(1)[..., None]
        return product.squeeze(-1)

    def choose(self, preferences_NE: Tensor) -> Tensor:
        nodes = torch.zeros(preferences_NE.shape[0], 1, dtype=torch.int64, device=preferences_NE.device)
        for depth, (num_children, num_followed) in enumerate(zip(self.branching, self.choices, strict=True)):
            # A node's probability is the sum over the experts below it; those out of reach have none.
            reachable_NE = preferences_NE.clamp(min=0)
            probabilities = torch.unflatten(reachable_NE, 1, (self.num_nodes[depth], -1)).sum(dim=-1)
            children = nodes[..., None] * num_children + torch.arange(num_children, device=nodes.device)
            candidates = probabilities.gather(1, children.flatten(1)).view(children.shape)
            best = candidates.topk(num_followed, dim=-1).indices
            nodes = children.gather(2, best).flatten(1)
        return nodes

    def losses(self, logits: Tensor, routing: Routing, num_sequences: int) -> dict[str, Tensor]:
        """The z-loss is the mean over nodes."""
        nodes = [
            torch.unflatten(level, 1, (-1, num_children)).flatten(0, 1)
            for num_children, level in zip(self.branching, self._levels(logits), strict=True)
        ]
        total = sum(router_z_loss(level) * level.shape[0] for level in nodes)
        return {"router_z_loss": torch.as_tensor(total) / sum(level.shape[0] for level in nodes)}

    def _levels(self, logits: Tensor) -> list[Tensor]:
        return list(torch.split(logits, self.num_nodes, dim=1))
