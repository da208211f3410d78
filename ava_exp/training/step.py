"""One optimizer step, in the order of the mathematics: forward, backward, clip, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ava_exp.data.loader import IGNORED, Batch
from ava_exp.losses.terms import LossTerm
from ava_exp.models.decoder import Decoder
from ava_exp.optim.update import Updater
from ava_exp.parallel.ranks import Ranks
from ava_exp.parallel.strategy import Alone
from ava_exp.training.depth import DepthTally
from ava_exp.training.objective import Objective, StepTally
from ava_exp.training.tally import ExpertTally


@dataclass(kw_only=True, slots=True)
class StepMetrics:
    """What one step did, on all ranks. `losses` are unweighted means over the step; `tally` is what its routers did,
    `depths` what tokens skipped."""

    losses: dict[str, float]
    grad_norm: float
    applied: bool
    num_tokens: int
    tally: ExpertTally
    head_counts: list[Tensor] = field(default_factory=list)
    """By layer with a mixture of heads, how many tokens chose each of the routed ones, (R,) int64."""
    depths: DepthTally = field(default_factory=DepthTally)
    travelled: dict[str, float] = field(default_factory=dict)
    """How gradients and tokens travelled between ranks, where that is not as usual."""


def train_step(
    model: Decoder,
    updater: Updater,
    micro_batches: Sequence[Batch],
    terms: Sequence[LossTerm],
    *,
    learning_rate: float,
    progress: float = 0.0,
    max_norm: float,
    device: torch.device,
    backward: Callable[[Tensor], None],
    strategy: Alone | None = None,
) -> StepMetrics:
    """Accumulate the gradient of the weighted terms over `micro_batches`, apply it once, and let routers adapt.

    `progress` is the share of the budget that is spent, on which the weights of terms may depend, and the share of
    tokens that layers process. `strategy` says how several ranks do this together; each has its own micro-batches.
    """
    strategy = strategy or Alone(Objective(model, terms, Ranks()), updater)
    ranks = strategy.ranks
    model.anneal(progress)
    (num_tokens,) = ranks.sums([sum(int((batch.labels != IGNORED).sum()) for batch in micro_batches)])
    sums = torch.zeros(len(terms), device=device)
    own_weights = [term.weight_at(progress) for term in terms]
    weights = torch.tensor(own_weights, device=device)
    tally, scale = StepTally(), updater.loss_scale.scale
    for number, batch in enumerate(micro_batches, start=1):
        with strategy.accumulate(is_last=number == len(micro_batches)):
            values = strategy.objective(batch, own_weights, num_tokens, scale, tally)
            backward((values * weights).sum() * scale)
        sums += values.detach()
    norm, applied = updater.apply(learning_rate, max_norm)
    tally.complete(ranks)
    if applied:
        tally.experts.adapt(model)
    (sums,) = ranks.add_up([sums])
    losses = {term.name: value for term, value in zip(terms, sums.tolist(), strict=True)}
    return StepMetrics(
        losses=losses,
        grad_norm=norm,
        applied=applied,
        num_tokens=num_tokens,
        tally=tally.experts,
        head_counts=tally.head_counts,
        depths=tally.depths,
        travelled=strategy.record(),
    )
