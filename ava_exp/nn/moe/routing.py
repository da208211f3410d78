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
    token_ids: Tensor | None = None
    """Shape (N,), int64: which of the B · T tokens of the batch these are, where others skip the layer; None is all."""

    @classmethod
    def of_nobody(cls, num_experts: int, device: torch.device) -> Routing:
        """Return what there is to say where every token skips the layer."""
        none = torch.empty(0, 1, dtype=torch.int64, device=device)
        scores = torch.empty(0, num_experts, device=device)
        counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        return cls(
            expert_ids=none,
            weights=torch.empty(0, 1, device=device),
            counts=counts,
            chosen_counts=counts,
            affinities=scores,
            probabilities=scores,
            preferences=scores,
            ragged=True,
            token_ids=none.squeeze(1),
        )

    def of_tokens(self, values_N: Tensor) -> Tensor:
        """Return the values of these tokens, given those of all B · T."""
        return values_N if self.token_ids is None else values_N[self.token_ids]

    def expert_ids_of_all(self, num_tokens: int) -> Tensor:
        """Return the experts of all B · T tokens, (B · T, k): -1 throughout for a token that skips the layer."""
        if self.token_ids is None:
            return self.expert_ids
        ids = self.expert_ids.new_full((num_tokens, self.expert_ids.shape[1]), -1)
        return ids.index_copy_(0, self.token_ids, self.expert_ids)


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
