"""A limit on the tokens of an expert, and what becomes of those above it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ava_exp.config.model import Overflow
from ava_exp.nn.moe.router import Router
from ava_exp.nn.moe.routing import Routing, count_visits


def expert_capacity(num_tokens: int, experts_per_token: float, num_experts: int, capacity_factor: float) -> int:
    """Return ceil(k · N / E · factor), the tokens that one expert may get [lepikhin2020gshard] §2.2, alg. 1.

    The Ava text leaves k out: its factor of 3.0 is 1.5 here.
    """
    share = experts_per_token * num_tokens / num_experts
    return math.ceil(round(share * capacity_factor, 6))  # 100 * 1.1 is 110, and 110.00000000000001 in floats


@torch.no_grad()
def admit(
    expert_ids_Nk: Tensor, preferences_NE: Tensor, capacity: int, overflow: Overflow, num_sequences: int
) -> Tensor:
    """Return the (N, k) visits that are admitted, -1 for those that are not; `next_best` fills in other experts.

    Experts admit tokens in the order of their position in the sequence, and at the same position in the order of the
    sequences: what becomes of a token never depends on a later one. With `next_best` a token that is refused asks for
    the expert it wants next, until it has as many as it had chosen. All experts rank tokens alike, so these proposals
    [gale1962college] lead to what admitting one token after the other would.
    """
    num_experts = preferences_NE.shape[1]
    chosen_NE = _visited(expert_ids_Nk, num_experts)
    if overflow is not Overflow.next_best:
        admitted_NE = _admitted(chosen_NE, capacity, num_sequences)
        kept = admitted_NE.gather(1, expert_ids_Nk.clamp(min=0))
        return expert_ids_Nk.where(kept, -1)
    wanted_N = chosen_NE.sum(dim=1)
    order_NE = preferences_NE.where(~chosen_NE, torch.inf).argsort(dim=1, descending=True, stable=True)
    rank_NE = order_NE.argsort(dim=1)
    reachable_N = ((preferences_NE > -torch.inf) | chosen_NE).sum(dim=1)
    asked_N = wanted_N
    while True:
        admitted_NE = _admitted(rank_NE < asked_N[:, None], capacity, num_sequences)
        more_N = torch.minimum(asked_N + wanted_N - admitted_NE.sum(dim=1), reachable_N)
        if torch.equal(more_N, asked_N):
            break
        asked_N = more_N
    best = rank_NE.where(admitted_NE, num_experts).topk(expert_ids_Nk.shape[1], dim=1, largest=False)
    return best.indices.where(best.values < num_experts, -1)


def _visited(expert_ids_Nk: Tensor, num_experts: int) -> Tensor:
    """Return (N, E) bool: whether a token visits an expert."""
    visited = torch.zeros(expert_ids_Nk.shape[0], num_experts + 1, dtype=torch.bool, device=expert_ids_Nk.device)
    return visited.scatter_(1, expert_ids_Nk % (num_experts + 1), True)[:, :num_experts]


def _admitted(asking_NE: Tensor, capacity: int, num_sequences: int) -> Tensor:
    """Return which of the asking tokens, (N, E) bool, are among the first `capacity` of their expert."""
    by_position = torch.unflatten(asking_NE, 0, (num_sequences, -1)).transpose(0, 1)
    place = by_position.flatten(0, 1).cumsum(dim=0).view(by_position.shape).transpose(0, 1).flatten(0, 1)
    return asking_NE & (place <= capacity)


def limit(routing: Routing, router: Router, capacity: int, overflow: Overflow, num_sequences: int) -> Routing:
    """Return the routing with no more than `capacity` visits to any expert.

    Dropped visits weigh nothing, and the others what they weighed; with `next_best` weights are those of the experts
    that are visited in the end.
    """
    expert_ids = admit(routing.expert_ids, routing.preferences, capacity, overflow, num_sequences)
    if overflow is Overflow.next_best:
        weights = router.weigh(routing.affinities, expert_ids)
    else:
        weights = routing.weights.masked_fill(expert_ids < 0, 0)
    counts = count_visits(expert_ids, routing.counts.numel())
    return replace(routing, expert_ids=expert_ids, weights=weights, counts=counts, ragged=True)
