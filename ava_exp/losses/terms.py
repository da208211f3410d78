"""Loss terms: each maps a model's output and the labels to a scalar that is already normalised."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ava_exp.config.attention import AttentionConfig, MixtureOfHeadsConfig
from ava_exp.config.loss import LossConfig
from ava_exp.config.model import MoEConfig, SparsityConfig
from ava_exp.config.prediction import MultiTokenConfig, PredictionConfig
from ava_exp.config.router import BalanceScope
from ava_exp.data.loader import IGNORED
from ava_exp.errors import ConfigError
from ava_exp.losses.balance import absolute_deviation_loss, load_balancing_loss
from ava_exp.losses.cross_entropy import linear_cross_entropy, wide_dtype
from ava_exp.losses.head import Measure, linear_measures
from ava_exp.losses.repetition import TokenSets, last_tokens, repeating_tokens
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
    label_nats: Tensor | None = None
    """Shape (B, T), wide: -log p(label) of this micro-batch, without gradient; cross entropy, the first term, fills it
    for the terms that follow."""
    input_ids: Tensor | None = None
    """What the model read, (B, T); the terms on repetition need it."""
    terms: Sequence[tuple[LossTerm, float]] = ()
    """All terms of the objective with their weights in this step. Those on the output distribution share one pass over
    the logits, and its gradient is the weighted sum's; a term that is not here is computed alone."""
    shared: tuple[ModelOutput, dict[Measure, Tensor]] | None = None
    """What that pass found, and in which output."""


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

    name: str = Measure.cross_entropy.value

    def weight_at(self, progress: float) -> float:
        return 1.0

    def __call__(self, output: ModelOutput, labels_BT: Tensor, context: StepContext) -> Tensor:
        if any(isinstance(term, OutputLoss) for term, _ in context.terms):
            return _measured(self, output, labels_BT, context)[Measure.cross_entropy]
        hidden_ND, labels_N = output.hidden.flatten(0, 1), labels_BT.flatten()
        context.label_nats = new_nats(labels_BT, output.hidden)
        nats_N = context.label_nats.flatten()
        return linear_cross_entropy(hidden_ND, output.head, labels_N, context.num_tokens, context.loss_scale, nats_N)


def new_nats(labels: Tensor, hidden: Tensor) -> Tensor:
    """Return room for -log p(label) of every label, in the format that losses of `hidden` are computed in."""
    return hidden.new_empty(labels.shape, dtype=wide_dtype(hidden))


@dataclass(slots=True)
class OutputLoss:
    """A measure of the output distribution: mean over the tokens. What is rewarded has a weight below 0.

    `repeats` maps what was read and the labels to the tokens that a term on repetition is about. Diversity is not
    linear in the tokens: with accumulation it is the mean of the micro-batches' diversities.
    """

    name: str
    weight: float
    repeats: Callable[[Tensor, Tensor], TokenSets] | None = None

    def weight_at(self, progress: float) -> float:
        return self.weight

    def __call__(self, output: ModelOutput, labels_BT: Tensor, context: StepContext) -> Tensor:
        return _measured(self, output, labels_BT, context)[Measure(self.name)]


def _measured(
    term: CrossEntropy | OutputLoss, output: ModelOutput, labels_BT: Tensor, context: StepContext
) -> dict[Measure, Tensor]:
    """Return what the pass found that all terms on the output distribution share; make it where it was not made yet."""
    if context.shared is None or context.shared[0] is not output:
        weighted = [(other, weight) for other, weight in context.terms if isinstance(other, CrossEntropy | OutputLoss)]
        if not any(other is term for other, _ in weighted):
            return _run_pass([(term, 1.0)], output, labels_BT, context)
        context.label_nats = new_nats(labels_BT, output.hidden)
        context.shared = output, _run_pass(weighted, output, labels_BT, context, context.label_nats.flatten())
    return context.shared[1]


def _run_pass(
    weighted: Sequence[tuple[CrossEntropy | OutputLoss, float]],
    output: ModelOutput,
    labels_BT: Tensor,
    context: StepContext,
    nats_N: Tensor | None = None,
) -> dict[Measure, Tensor]:
    unwanted = {}
    for term, _ in weighted:
        if isinstance(term, OutputLoss) and term.repeats is not None:
            assert context.input_ids is not None, "terms on repetition need the step's `input_ids`"
            unwanted[Measure(term.name)] = term.repeats(context.input_ids, labels_BT)
    return linear_measures(
        output.hidden.flatten(0, 1),
        output.head,
        labels_BT.flatten(),
        {Measure(term.name): weight for term, weight in weighted},
        unwanted=unwanted,
        divisor=context.num_tokens,
        expected_scale=context.loss_scale,
        nats_N=nats_N,
    )


@dataclass(slots=True)
class MultiTokenLoss:
    """Mean over the prediction heads of their cross entropy, [deepseek2024v3] eq. 25, in nats per token of the step.

    Behind a confidence gate: at a position a head counts where the labels of the decoder and of all heads before it had
    a probability of at least `threshold`. These are the positions at which generation consults it and may accept what
    it says. The others cost no product with the vocabulary. A position without one of these labels counts nowhere.
    """

    weight: float
    threshold: float
    name: str = "mtp_loss"

    def weight_at(self, progress: float) -> float:
        return self.weight

    def __call__(self, output: ModelOutput, labels_BT: Tensor, context: StepContext) -> Tensor:
        assert context.label_nats is not None, "cross entropy comes first"
        is_open_BT = (labels_BT != IGNORED) & self._confident(context.label_nats)
        shares = []
        for hidden_BTD in output.future:
            labels_BT = labels_BT[:, 1:]
            is_open_BT = is_open_BT[:, :-1] & (labels_BT != IGNORED)
            rows = is_open_BT.flatten().nonzero()[:, 0]
            hidden_ND, labels_N = hidden_BTD.flatten(0, 1)[rows], labels_BT.flatten()[rows]
            nats_N = new_nats(labels_N, hidden_ND)
            shares.append(
                linear_cross_entropy(hidden_ND, output.head, labels_N, context.num_tokens, context.loss_scale, nats_N)
            )
            is_open_BT = is_open_BT.masked_scatter(is_open_BT, self._confident(nats_N))
        return torch.stack(shares).mean()

    def _confident(self, nats: Tensor) -> Tensor:
        """Return where the probability of the label reaches the threshold."""
        return nats <= (-math.log(self.threshold) if self.threshold > 0 else math.inf)


@dataclass(slots=True)
class RouterLoss:
    """A loss of routers, mean over the mixture-of-experts layers.

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
class HeadBalanceLoss:
    """The balance loss of routed attention heads, mean over the layers: 1 when all are used alike [jin2024moh].

    The paper's is smaller, by the number of routed heads over those that a token chooses. With accumulation it is the
    mean of the micro-batches' losses.
    """

    weight: float
    name: str = "head_balance_loss"

    def weight_at(self, progress: float) -> float:
        return self.weight

    def __call__(self, output: ModelOutput, labels_BT: Tensor, context: StepContext) -> Tensor:
        share = int((labels_BT != IGNORED).sum()) / context.num_tokens
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weight > 0):
            losses = [load_balancing_loss(routing.probabilities, routing.counts) for routing in output.head_routings]
            return torch.stack(losses).mean() * share


def build_losses(
    sparsity: SparsityConfig,
    loss: LossConfig | None = None,
    *,
    attention: AttentionConfig | None = None,
    prediction: PredictionConfig | None = None,
) -> list[LossTerm]:
    """Return the terms of the objective, cross entropy first; without a `loss` it has none on the output beside it."""
    terms: list[LossTerm] = [CrossEntropy(), *_output_losses(loss or LossConfig())]
    if isinstance(prediction, MultiTokenConfig) and prediction.num_prediction_heads:
        terms.append(MultiTokenLoss(prediction.mtp_weight, prediction.confidence_threshold_train))
    if isinstance(attention, MixtureOfHeadsConfig):
        terms.append(HeadBalanceLoss(attention.head_balance_weight))
    if isinstance(sparsity, MoEConfig):
        router = sparsity.router
        for name, weight in router.losses().items():
            end = router.load_balancing_weight_end if name == BALANCE else None
            terms.append(RouterLoss(name, weight, _measure(name, router.balance_over), end))
    return terms


def _output_losses(loss: LossConfig) -> list[OutputLoss]:
    weights = {
        Measure.label_smoothing: loss.label_smoothing,
        Measure.z: loss.z_loss_weight,
        Measure.immediate_repetition: loss.immediate_repetition_weight,
        Measure.repetition: loss.repetition_penalty_weight,
        Measure.entropy: -loss.entropy_regularization,
        Measure.diversity: -loss.output_diversity_weight,
    }
    repeats: dict[Measure, Callable[[Tensor, Tensor], TokenSets]] = {
        Measure.immediate_repetition: last_tokens,
        Measure.repetition: functools.partial(repeating_tokens, ngram_size=loss.repetition_ngram_size),
    }
    return [OutputLoss(measure.value, weight, repeats.get(measure)) for measure, weight in weights.items() if weight]


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
