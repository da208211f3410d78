"""What a router decides, and the losses that keep it balanced."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Routing:
    """A router's decision for N tokens.

    `expert_ids` (N, k) int64 and `weights` (N, k) fp32 say which experts a token visits and how their outputs add up;
    `losses` holds unweighted scalars, each a mean over tokens; `counts` (E,) int64 are assignments per expert.
    """

    expert_ids: Tensor
    weights: Tensor
    counts: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


def count_assignments(expert_ids_Nk: Tensor, num_experts: int) -> Tensor:
    """Return how many of the N·k assignments go to each expert, (E,) int64."""
    return torch.bincount(expert_ids_Nk.flatten(), minlength=num_experts)


def load_balancing_loss(probabilities_NE: Tensor, counts_E: Tensor) -> Tensor:
    """Switch balance loss [fedus2022switch] eq. 4: E · Σ f_i · P_i, which is 1 when both are uniform.

    f_i is the share of assignments (of all k choices, where the paper has k = 1) and carries no gradient;
    P_i is the mean router probability.
    """
    shares = counts_E.to(probabilities_NE.dtype) / counts_E.sum()
    return probabilities_NE.shape[-1] * (shares * probabilities_NE.mean(dim=0)).sum()


def router_z_loss(logits_NE: Tensor) -> Tensor:
    """Router z-loss [zoph2022stmoe] eq. 5: the mean squared log-partition, which keeps logits small."""
    return logits_NE.logsumexp(dim=-1).square().mean()
