"""What a router decides about tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Routing:
    """A router's decision for N tokens, E experts and at most k experts a token."""

    expert_ids: Tensor
    """Shape (N, k), int64: the experts that a token visits; -1 is no visit."""
    weights: Tensor
    """Shape (N, k), fp32: how the experts' outputs add up."""
    counts: Tensor
    """Shape (E,), int64: visits of each expert."""
    chosen_counts: Tensor
    """Shape (E,), int64: the visits that tokens had asked for, before any capacity was imposed."""
    affinities: Tensor
    """Shape (N, E), fp32: the router's score of every expert, which weights are made of. It has a gradient."""
    probabilities: Tensor
    """Shape (N, E): the affinities, summing to 1 for every token. They have a gradient."""
    preferences: Tensor
    """Shape (N, E): in what order a token wants the experts, the largest first; minus infinity is out of reach."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Unweighted scalars, each a mean over tokens."""
    observed: Tensor | None = None
    """Shape (E,), fp32: what the router learns from after the step, besides the counts."""
    load_balancing_factor: float = 1.0
    """How much more, or less, the balance loss weighs in this layer."""
    ragged: bool = False
    """Whether an id may be -1."""


def count_visits(expert_ids_Nk: Tensor, num_experts: int) -> Tensor:
    """Return the visits of each expert, (E,) int64, without waiting for the device."""
    ids = expert_ids_Nk.flatten()
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    # -1 is counted in the last place, which is then left out.
    return counts.scatter_add_(0, ids % (num_experts + 1), torch.ones_like(ids))[:num_experts]


def renormalize(weights_Nk: Tensor) -> Tensor:
    """Return weights that sum to 1 for every token; a token without a visit keeps its zeros."""
    return weights_Nk / weights_Nk.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights_Nk.dtype).tiny)


def router_z_loss(logits_NE: Tensor) -> Tensor:
    """Router z-loss [zoph2022stmoe] eq. 5: the mean squared log-partition, which keeps logits small."""
    return logits_NE.logsumexp(dim=-1).square().mean()
