"""The decoder and what is minimised of it as one module, which is what wrappers for several ranks take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ava_exp.data.loader import Batch
from ava_exp.losses.terms import LossTerm, StepContext
from ava_exp.models.decoder import Decoder
from ava_exp.nn.output import ModelOutput
from ava_exp.parallel.ranks import Ranks
from ava_exp.training.depth import DepthTally
from ava_exp.training.tally import ExpertTally


@dataclass(kw_only=True, slots=True)
class StepTally:
    """What the micro-batches of a step did: this rank's until `complete`, but for what tokens chose. That is always of
    all ranks, as balance losses are made of it."""

    experts: ExpertTally = field(default_factory=ExpertTally)
    depths: DepthTally = field(default_factory=DepthTally)
    head_counts: list[Tensor] = field(default_factory=list)
    """By layer with a mixture of heads, how many tokens chose each of the routed ones, (R,) int64."""

    def add(self, output: ModelOutput, ranks: Ranks) -> None:
        """Add one micro-batch, and write into `output` what the tokens of all ranks chose."""
        routings, heads = output.routings, output.head_routings
        totals = ranks.add_up([*(each.chosen_counts for each in routings), *(each.counts for each in heads)])
        for routing, total in zip(routings, totals[: len(routings)], strict=True):
            routing.chosen_counts = total
        for head, total in zip(heads, totals[len(routings) :], strict=True):
            head.counts = total
        self.experts.add(routings)
        self.depths.add(output.depths)
        counts = [head.counts for head in heads]
        if self.head_counts:
            counts = [one + other for one, other in zip(self.head_counts, counts, strict=True)]
        self.head_counts = counts

    def complete(self, ranks: Ranks) -> None:
        """Make all of it that of all ranks."""
        self.experts.add_up(ranks)
        self.depths.add_up(ranks)


class Objective(nn.Module):
    """The terms of the objective, of what a decoder makes of a micro-batch."""

    def __init__(self, model: Decoder, terms: Sequence[LossTerm], ranks: Ranks) -> None:
        super().__init__()
        self.model, self.terms, self.ranks = model, terms, ranks

    def forward(
        self, batch: Batch, weights: Sequence[float], num_tokens: int, loss_scale: float, tally: StepTally
    ) -> Tensor:
        """Return the terms' shares of this micro-batch, (K,); `tally` takes what the model did.

        `num_tokens` are the labels of the whole step, over all ranks.
        """
        device = self.model.embedding.weight.device
        input_ids_BT = batch.input_ids.to(device, non_blocking=True)
        output = self.model(input_ids_BT, **batch.masks_on(device))
        labels_BT = batch.labels.to(device, non_blocking=True)
        tally.add(output, self.ranks)
        context = StepContext(
            num_tokens=num_tokens,
            loss_scale=loss_scale,
            chosen_counts=[layer.chosen_counts for layer in tally.experts.layers],
            input_ids=input_ids_BT,
            terms=list(zip(self.terms, weights, strict=True)),
        )
        return torch.stack([term(output, labels_BT, context) for term in self.terms])
