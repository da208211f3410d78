"""Measures of the output distribution that an objective may have: all of them in one pass over a head's logits.

As in `cross_entropy.py` one slice of the logits exists at a time, and turns into the gradient of the weighted sum of
all measures. So the weights have to be known when the pass is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ava_exp.losses.cross_entropy import cached_parts, head_slices, valid_labels, wide_dtype
from ava_exp.losses.repetition import TokenSets

SMALLEST_REST = 1e-5
"""Unlikelihood takes 1 - p as at least this, as its published code does: 1 - p of fp32 has no digits below."""


class Measure(Enum):
    """What can be measured of the distribution p = softmax(z) over V tokens at a position with the label y.

    Each has the name that it is reported by. All are in nats per token, `z` in nats² per token.

    - `cross_entropy`: -log p(y).
    - `label_smoothing`: z(y) - mean z, by how much the cross entropy with the uniform distribution exceeds that with
      the label. With the weight ε it turns cross entropy into the one with (1 - ε) label + ε uniform, which is the
      regulariser of [szegedy2016rethinking].
    - `z`: (log Σ exp z)² [chowdhery2022palm].
    - `immediate_repetition` and `repetition`: Σ -log(1 - p(c)) over the tokens c that would repeat the token just read,
      or an n-gram of the context: the token-level unlikelihood of [welleck2020unlikelihood], which has n = 1.
    - `entropy`: -Σ p log p, rewarded by [pereyra2017confidence].
    - `diversity`: the entropy of the mean of p over a micro-batch.
    """

    cross_entropy = "loss"
    label_smoothing = "label_smoothing_loss"
    z = "z_loss"
    immediate_repetition = "immediate_repetition_loss"
    repetition = "repetition_loss"
    entropy = "output_entropy"
    diversity = "output_diversity"


def linear_measures(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    weights: Mapping[Measure, float],
    *,
    unwanted: Mapping[Measure, TokenSets] | None = None,
    divisor: float = 1.0,
    expected_scale: float = 1.0,
    nats_N: Tensor | None = None,
) -> dict[Measure, Tensor]:
    """Return the measures that have a key in `weights`, each summed over the labels that are not `IGNORED` and divided
    by `divisor`: fp32 scalars (fp64 for fp64). `unwanted` has the tokens of the two repetitions.

    The sum of `diversity` is the entropy of the mean distribution times the number of labels. Its gradient needs that
    mean, for which the logits are computed once more.

    Gradients are those of Σ weight · measure, and of no other combination: the backward pass must begin with the
    weights times one common factor, which is best `expected_scale`, as in `linear_cross_entropy`.

    `nats_N`, where it is given, is filled with each row's own -log p(label), which means nothing where the label is
    `IGNORED`.
    """
    sums = _Pass(labels_N, dict(weights), dict(unwanted or {}), divisor, expected_scale, nats_N)
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or head_VD.requires_grad):
        values_K: Tensor = _LinearMeasures.apply(hidden_ND, head_VD, sums)  # type: ignore[no-untyped-call]
    else:
        values_K = sums.run(hidden_ND, head_VD)
    return dict(zip(weights, values_K.unbind(), strict=True))


class _LinearMeasures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_VD: Tensor, sums: _Pass) -> Tensor:
        grad_hidden = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head_VD) if ctx.needs_input_grad[1] else None
        values_K = sums.run(hidden_ND, head_VD, grad_hidden, grad_head)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.expected = [weight * sums.expected_scale for weight in sums.weights.values()]
        return values_K

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> Any:
        gradients = ctx.saved_tensors
        index = next((index for index, expected in enumerate(ctx.expected) if expected), None)
        if index is None:  # nothing has a weight: what was computed are zeros
            return *gradients, None
        factor = grad_K[index] / ctx.expected[index]
        if factor.device.type == "cpu":
            expected_K = factor * torch.tensor(ctx.expected, dtype=grad_K.dtype)
            assert torch.allclose(grad_K, expected_K, equal_nan=True), "measures are minimised with their weights"
        # A factor of 1 is the rule, and multiplying the head's gradient by it costs a pass over memory.
        if factor.device.type != "cpu" or factor.item() != 1:
            gradients = [None if gradient is None else gradient * factor for gradient in gradients]
        return *gradients, None


@dataclass(slots=True)
class _Pass:
    """One pass over the rows: adds measures up and turns the logits into the gradient of their weighted sum."""

    labels: Tensor
    weights: dict[Measure, float]
    unwanted: dict[Measure, TokenSets]
    divisor: float
    expected_scale: float
    nats: Tensor | None

    def run(
        self,
        hidden_ND: Tensor,
        head_VD: Tensor,
        grad_hidden: Tensor | None = None,
        grad_head: Tensor | None = None,
    ) -> Tensor:
        """Return the measures (K,), divided, and write the gradients that there is room for."""
        valid_N, labels_N1 = valid_labels(self.labels)
        sums = {measure: torch.zeros((), dtype=wide_dtype(hidden_ND), device=hidden_ND.device) for measure in Measure}
        mean_V = _mean_distribution(hidden_ND, head_VD, valid_N) if Measure.diversity in self.weights else None
        if mean_V is not None:
            sums[Measure.diversity] = _entropy(mean_V) * valid_N.sum()
        for rows in head_slices(hidden_ND, head_VD):
            logits_SV = hidden_ND[rows] @ head_VD.t()
            for part in cached_parts(logits_SV):
                own = slice(rows.start + part.start, rows.start + part.stop)
                some = _Rows(logits_SV[part], labels_N1[own])
                if self.nats is not None:
                    self.nats[own] = some.nats_R
                for measure, value_R in self._measure(some, own, mean_V):
                    sums[measure] += value_R.masked_fill(~valid_N[own], 0).sum()
                if grad_hidden is not None or grad_head is not None:
                    scale_R1 = valid_N[own, None] / (self.divisor / self.expected_scale)
                    torch.mul(some.gradient(), scale_R1, out=logits_SV[part])
            if grad_hidden is not None:
                torch.mm(logits_SV, head_VD, out=grad_hidden[rows])
            if grad_head is not None:
                grad_head.addmm_(logits_SV.t(), hidden_ND[rows])
        return torch.stack([sums[measure] for measure in self.weights]) / self.divisor

    def _measure(self, rows: _Rows, own: slice, mean_V: Tensor | None) -> Iterator[tuple[Measure, Tensor]]:
        """Measure some rows, each with its weight in their gradient; `diversity` has no value of its own by row."""
        for measure, weight in self.weights.items():
            if measure in (Measure.immediate_repetition, Measure.repetition):
                yield measure, rows.unlikelihood(weight, *self.unwanted[measure].of(own))
            elif measure is Measure.diversity:
                assert mean_V is not None
                rows.diversity(weight, mean_V)
            else:
                yield measure, _MEASURES[measure](rows, weight)


class _Rows:
    """A few rows of logits z and their softmax p. Measuring them adds to the gradient with respect to z, which is

    p · (by_row + by_token) + at_label, at the label + everywhere + what is scattered.
    """

    def __init__(self, logits_RV: Tensor, labels_R1: Tensor) -> None:
        self.z_RV, self.labels_R1 = logits_RV.to(wide_dtype(logits_RV)), labels_R1
        self.p_RV = self.z_RV.softmax(dim=1)
        # From the largest probability, which cannot vanish: a third of the time of `logsumexp`.
        self.log_partition_R = self.z_RV.amax(dim=1) - self.p_RV.amax(dim=1).log()
        self.label_logits_R = self.z_RV.gather(1, labels_R1)[:, 0]
        self.nats_R = self.log_partition_R - self.label_logits_R
        self.by_row_R = torch.zeros_like(self.log_partition_R)
        self.by_token_RV: Tensor | None = None
        self.at_label, self.everywhere = 0.0, 0.0
        self.scattered: list[tuple[Tensor, Tensor, Tensor]] = []

    def cross_entropy(self, weight: float) -> Tensor:
        self.by_row_R += weight
        self.at_label -= weight
        return self.nats_R

    def label_smoothing(self, weight: float) -> Tensor:
        self.at_label += weight
        self.everywhere -= weight / self.z_RV.shape[1]
        return self.label_logits_R - self.z_RV.mean(dim=1)

    def z(self, weight: float) -> Tensor:
        self.by_row_R += 2 * weight * self.log_partition_R
        return self.log_partition_R.square()

    def unlikelihood(self, weight: float, rows_A: Tensor, ids_A: Tensor) -> Tensor:
        p_A = self.p_RV[rows_A, ids_A]
        rest_A = (1 - p_A).clamp(min=SMALLEST_REST)
        odds_A = p_A / rest_A
        self.by_row_R.index_add_(0, rows_A, odds_A, alpha=-weight)
        # p · (1 + odds) are the odds again, but where 1 - p has no digits: together with by_row that still leaves p.
        self.scattered.append((rows_A, ids_A, weight * p_A * (1 + odds_A)))
        return torch.zeros_like(self.by_row_R).index_add_(0, rows_A, rest_A.log(), alpha=-1)

    def entropy(self, weight: float) -> Tensor:
        log_p_RV = self.z_RV - self.log_partition_R[:, None]
        entropy_R = -(self.p_RV * log_p_RV).sum(dim=1)
        self.by_row_R -= weight * entropy_R
        self._add_by_token(log_p_RV.mul_(-weight))
        return entropy_R

    def diversity(self, weight: float, mean_V: Tensor) -> None:
        log_mean_V = mean_V.clamp(min=torch.finfo(mean_V.dtype).tiny).log()
        self.by_row_R += weight * (self.p_RV @ log_mean_V)
        self._add_by_token(-weight * log_mean_V)

    def _add_by_token(self, values: Tensor) -> None:
        self.by_token_RV = values if self.by_token_RV is None else self.by_token_RV + values

    def gradient(self) -> Tensor:
        """Return the gradient (R, V), in the place of p."""
        factors = self.by_row_R[:, None]
        gradient_RV = self.p_RV.mul_(factors if self.by_token_RV is None else self.by_token_RV + factors)
        if self.everywhere:
            gradient_RV += self.everywhere
        if self.at_label:
            at_label_R1 = torch.full_like(self.by_row_R, self.at_label)[:, None]
            gradient_RV.scatter_add_(1, self.labels_R1, at_label_R1)
        for rows_A, ids_A, values_A in self.scattered:
            gradient_RV.index_put_((rows_A, ids_A), values_A, accumulate=True)
        return gradient_RV


_MEASURES: dict[Measure, Callable[[_Rows, float], Tensor]] = {
    Measure.cross_entropy: _Rows.cross_entropy,
    Measure.label_smoothing: _Rows.label_smoothing,
    Measure.z: _Rows.z,
    Measure.entropy: _Rows.entropy,
}


def _mean_distribution(hidden_ND: Tensor, head_VD: Tensor, valid_N: Tensor) -> Tensor:
    """Return the mean (V,) of the softmax over the rows that are valid: all zeros where none is."""
    sum_V = torch.zeros(len(head_VD), dtype=wide_dtype(hidden_ND), device=hidden_ND.device)
    for rows in head_slices(hidden_ND, head_VD):
        logits_SV = hidden_ND[rows] @ head_VD.t()
        for part in cached_parts(logits_SV):
            sum_V += logits_SV[part].to(sum_V.dtype).softmax(dim=1).t() @ valid_N[rows][part].to(sum_V.dtype)
    return sum_V / valid_N.sum().clamp(min=1)


def _entropy(p_V: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(p_V, p_V).sum()
    return entropy
