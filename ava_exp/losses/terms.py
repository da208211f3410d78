"""Loss terms: each maps a model's output and the labels to a scalar that is already normalised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ava_exp.config.mod import LearnedModConfig, ModConfig
from ava_exp.config.model import MoEConfig, SparsityConfig
from ava_exp.config.router import BalanceScope
from ava_exp.data.loader import IGNORED
from ava_exp.errors import ConfigError
from ava_exp.losses.balance import absolute_deviation_loss, load_balancing_loss
from ava_exp.losses.cross_entropy import linear_cross_entropy
from ava_exp.nn.moe.routing import Routing
from ava_exp.nn.output import ModelOutput

BALANCE = "load_balancing_loss"


@dataclass(slots=True, kw_only=True)
class StepContext:
    """What a term may know of the step beside its own micro-batch."""

    num_tokens: int
    """Valid tokens of the whole step: over all micro-batches and all ranks."""
    loss_scale: float = 1.0
    """By what the backward pass multiplies the objective."""
    chosen_counts: list[Tensor] = field(default_factory=list)
    """For every mixture-of-experts layer, the visits (E,) chosen in the step so far, this micro-batch included."""


class LossTerm(Protocol):
    """One summand of the objective.

    `__call__` returns this micro-batch's share of a mean over the step's valid tokens. Summing the shares gives the
    mean, however the step is cut. `weight_at` takes the share of the budget that is spent, 0 to 1.
    """

    name: str

    def weight_at(self, progress: float) -> float: ...

    def __call__(self, output: ModelOutput, labels_BT: Tensor, context: StepContext) -> Tensor: ...


@dataclass(slots=True)
class CrossEntropy:
    """Mean negative log-likelihood of the labels, in nats per token, from fp32 logits."""

    name: str = "loss"

    def weight_at(self, progress: float) -> float:
        return 1.0

    def __call__(self, output: ModelOutput, labels_BT: Tensor, context: StepContext) -> Tensor:
        hidden_ND, labels_N = output.hidden.flatten(0, 1), labels_BT.flatten()
        return linear_cross_entropy(hidden_ND, output.head, labels_N, context.num_tokens, context.loss_scale)


@dataclass(slots=True)
class RouterLoss:
    """A loss of routers, mean over the mixture-of-experts layers; of each, over the tokens that it processes.

    `measure` maps a layer's routing and its chosen counts in the step so far to a mean over the micro-batch's tokens.
    What is not linear in the tokens, as the balance losses are not, is with accumulation the mean of the micro-batches'
    losses. A weight of 0 leaves the loss to be watched, without a gradient.
    """

    name: str
    weight: float
    measure: Callable[[Routing, Tensor], Tensor]
    weight_end: float | None = None

    @property
    def is_minimised(self) -> bool:
        """Whether it ever has a weight."""
        return bool(self.weight or self.weight_end)

    def weight_at(self, progress: float) -> float:
        end = self.weight if self.weight_end is None else self.weight_end
        return self.weight + (end - self.weight) * progress

    def __call__(self, output: ModelOutput, labels_BT: Tensor, context: StepContext) -> Tensor:
        share = int((labels_BT != IGNORED).sum()) / context.num_tokens
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_minimised):
            layers = zip(output.routings, context.chosen_counts, strict=True)
            return torch.stack([self.measure(routing, counts) for routing, counts in layers]).mean() * share


@dataclass(slots=True)
class PredictorLoss:
    """How well predictors say which tokens their layer has chosen: binary cross entropy in nats per token, the mean
    over the layers that tokens may skip. Its gradient reaches the predictors only."""

    weight: float
    name: str = "mod_predictor_loss"

    def weight_at(self, progress: float) -> float:
        return self.weight

    def __call__(self, output: ModelOutput, labels_BT: Tensor, context: StepContext) -> Tensor:
        share = int((labels_BT != IGNORED).sum()) / context.num_tokens
        return torch.stack([depth.losses[self.name] for depth in output.depths]).mean() * share


def build_losses(sparsity: SparsityConfig, mod: ModConfig | None = None) -> list[LossTerm]:
    """Return the terms of the objective, cross entropy first."""
    terms: list[LossTerm] = [CrossEntropy()]
    if isinstance(sparsity, MoEConfig):
        router = sparsity.router
        for name, weight in router.losses().items():
            end = router.load_balancing_weight_end if name == BALANCE else None
            terms.append(RouterLoss(name, weight, _measure(name, router.balance_over), end))
    if isinstance(mod, LearnedModConfig):
        terms.append(PredictorLoss(mod.predictor_weight))
    return terms


def require_balance_loss(terms: Sequence[LossTerm]) -> None:
    """Raise ConfigError where no balance loss has a weight that a factor could change."""
    if not any(isinstance(term, RouterLoss) and term.name == BALANCE and term.is_minimised for term in terms):
        raise ConfigError(
            "the balance loss has a weight of 0, which no factor changes. "
            "Train on with a `sparsity.router.load_balancing_weight` above 0."
        )


def _measure(name: str, scope: BalanceScope) -> Callable[[Routing, Tensor], Tensor]:
    if name == "absolute_deviation_loss":
        return lambda routing, _: absolute_deviation_loss(routing.probabilities)
    if name != BALANCE:
        return lambda routing, _: routing.losses[name]
    if scope is BalanceScope.step:  # as far as the step has got: [qiu2025demons] §3
        return _balance
    return lambda routing, _: _balance(routing, routing.chosen_counts)


def _balance(routing: Routing, counts_E: Tensor) -> Tensor:
    """Return the balance loss as it is, with the gradient that the layer's factor gives it."""
    loss, factor = load_balancing_loss(routing.probabilities, counts_E), routing.load_balancing_factor
    return loss if factor == 1 else loss.detach() + factor * (loss - loss.detach())
