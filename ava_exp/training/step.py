"""One optimizer step, in the order of the mathematics: forward, backward, clip, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ava_exp.data.loader import IGNORED, Batch
from ava_exp.losses.terms import LossTerm, StepContext
from ava_exp.models.decoder import Decoder
from ava_exp.optim.update import Updater
from ava_exp.training.tally import ExpertTally


@dataclass(kw_only=True, slots=True)
class StepMetrics:
    """What one step did. `losses` are unweighted means over the step; `tally` is what its routers did."""

    losses: dict[str, float]
    grad_norm: float
    applied: bool
    num_tokens: int
    tally: ExpertTally
    head_counts: list[Tensor] = field(default_factory=list)
    """By layer with a mixture of heads, how many tokens chose each of the routed ones, (R,) int64."""


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
) -> StepMetrics:
    """Accumulate the gradient of the weighted terms over `micro_batches`, apply it once, and let routers adapt.

    `progress` is the share of the budget that is spent, on which the weights of terms may depend.
    """
    num_tokens = sum(int((batch.labels != IGNORED).sum()) for batch in micro_batches)
    sums = torch.zeros(len(terms), device=device)
    weighted = [(term, term.weight_at(progress)) for term in terms]
    weights = torch.tensor([weight for _, weight in weighted], device=device)
    tally, head_counts = ExpertTally(), list[Tensor]()
    for batch in micro_batches:
        input_ids = batch.input_ids.to(device, non_blocking=True)
        output = model(input_ids, **batch.masks_on(device))
        labels = batch.labels.to(device, non_blocking=True)
        tally.add(output.routings)
        head_counts = _added(head_counts, [routing.counts for routing in output.head_routings])
        context = StepContext(
            num_tokens=num_tokens,
            loss_scale=updater.loss_scale.scale,
            chosen_counts=[layer.chosen_counts for layer in tally.layers],
            input_ids=input_ids,
            terms=weighted,
        )
        values = torch.stack([term(output, labels, context) for term in terms])
        backward((values * weights).sum() * updater.loss_scale.scale)
        updater.collect_gradients()
        sums += values.detach()
    norm, applied = updater.apply(learning_rate, max_norm)
    if applied:
        tally.adapt(model)
    losses = {term.name: value for term, value in zip(terms, sums.tolist(), strict=True)}
    return StepMetrics(
        losses=losses, grad_norm=norm, applied=applied, num_tokens=num_tokens, tally=tally, head_counts=head_counts
    )


def _added(so_far: list[Tensor], counts: list[Tensor]) -> list[Tensor]:
    return [one + other for one, other in zip(so_far, counts, strict=True)] if so_far else counts
