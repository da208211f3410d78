"""One optimizer step, in the order of the mathematics: forward, backward, clip, update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ava_exp.data.loader import IGNORED, Batch
from ava_exp.losses.terms import LossTerm
from ava_exp.models.decoder import Decoder
from ava_exp.optim.update import Updater


@dataclass(kw_only=True, slots=True)
class StepMetrics:
    """What one step did. `losses` are unweighted means over the step; `expert_counts` is (layers, E) or None."""

    losses: dict[str, float]
    grad_norm: float
    applied: bool
    num_tokens: int
    expert_counts: Tensor | None


def train_step(
    model: Decoder,
    updater: Updater,
    micro_batches: Sequence[Batch],
    terms: Sequence[LossTerm],
    *,
    learning_rate: float,
    max_norm: float,
    device: torch.device,
    backward: Callable[[Tensor], None],
) -> StepMetrics:
    """Accumulate the gradient of the weighted terms over `micro_batches` and apply it once."""
    num_tokens = sum(int((batch.labels != IGNORED).sum()) for batch in micro_batches)
    sums = torch.zeros(len(terms), device=device)
    counts: Tensor | None = None
    for batch in micro_batches:
        output = model(batch.input_ids.to(device, non_blocking=True))
        labels = batch.labels.to(device, non_blocking=True)
        values = torch.stack([term(output, labels, num_tokens) for term in terms])
        weights = torch.tensor([term.weight for term in terms], device=device)
        backward((values * weights).sum() * updater.loss_scale.scale)
        updater.collect_gradients()
        sums += values.detach()
        if output.routings:
            layer_counts = torch.stack([routing.counts for routing in output.routings])
            counts = layer_counts if counts is None else counts + layer_counts
    norm, applied = updater.apply(learning_rate, max_norm)
    losses = {term.name: value for term, value in zip(terms, sums.tolist(), strict=True)}
    return StepMetrics(losses=losses, grad_norm=norm, applied=applied, num_tokens=num_tokens, expert_counts=counts)
