"""Loss terms: each maps a model's output and the labels to a scalar that is already normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ava_exp.config.model import MoEConfig, SparsityConfig
from ava_exp.data.loader import IGNORED
from ava_exp.losses.cross_entropy import linear_cross_entropy
from ava_exp.nn.output import ModelOutput


class LossTerm(Protocol):
    """One summand of the objective.

    `__call__` returns this micro-batch's share of a mean over `num_tokens`, the valid tokens of the whole step: over
    all micro-batches and all ranks. Summing the shares gives the mean, however the step is cut.
    """

    name: str
    weight: float

    def __call__(self, output: ModelOutput, labels_BT: Tensor, num_tokens: int) -> Tensor: ...


@dataclass(slots=True)
class CrossEntropy:
    """Mean negative log-likelihood of the labels, in nats per token, from fp32 logits."""

    name: str = "loss"
    weight: float = 1.0

    def __call__(self, output: ModelOutput, labels_BT: Tensor, num_tokens: int) -> Tensor:
        return linear_cross_entropy(output.hidden.flatten(0, 1), output.head, labels_BT.flatten(), num_tokens)


@dataclass(slots=True)
class RouterLoss:
    """A router's own loss, mean over the mixture-of-experts layers.

    The balance loss is not linear in the assignments: with accumulation it is the mean of the micro-batches' losses.
    """

    name: str
    weight: float

    def __call__(self, output: ModelOutput, labels_BT: Tensor, num_tokens: int) -> Tensor:
        share = int((labels_BT != IGNORED).sum()) / num_tokens
        return torch.stack([routing.losses[self.name] for routing in output.routings]).mean() * share


def build_losses(sparsity: SparsityConfig) -> list[LossTerm]:
    """Return the terms of the objective, cross entropy first."""
    terms: list[LossTerm] = [CrossEntropy()]
    if isinstance(sparsity, MoEConfig):
        terms.append(RouterLoss("load_balancing_loss", sparsity.load_balancing_weight))
        terms.append(RouterLoss("router_z_loss", sparsity.router_z_loss_weight))
    return terms
