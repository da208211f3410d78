"""Losses that keep the load of experts even, of one layer's routing."""

from __future__ import annotations

from torch import Tensor


def load_balancing_loss(probabilities_NE: Tensor, counts_E: Tensor) -> Tensor:
    """Switch balance loss [fedus2022switch] eq. 4: E · Σ f_i · P_i, which is 1 when both are uniform.

    f_i is the share of visits (of all k choices, where the paper has k = 1), carries no gradient, and may be counted
    over more tokens than these; P_i is the mean router probability.
    """
    shares = counts_E.to(probabilities_NE.dtype) / counts_E.sum()
    return probabilities_NE.shape[-1] * (shares * probabilities_NE.mean(dim=0)).sum()


def absolute_deviation_loss(probabilities_NE: Tensor) -> Tensor:
    """E · mean_i |P_i - 1 / E| of the mean router probabilities P: between 0, uniform, and 2 (E - 1) / E, collapsed.

    The Vishwamai text has it on counts of visits, which carry no gradient.
    """
    num_experts = probabilities_NE.shape[-1]
    return (num_experts * probabilities_NE.mean(dim=0) - 1).abs().mean()
