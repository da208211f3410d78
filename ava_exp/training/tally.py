"""What the routers of a model did in one step, over all its micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ava_exp.models.decoder import Decoder
from ava_exp.nn.moe.routing import Routing


@dataclass(kw_only=True, slots=True)
class LayerTally:
    """One layer's sums over a step: visits (E,) that were computed and that tokens chose, and what is observed."""

    counts: Tensor
    chosen_counts: Tensor
    observed: Tensor | None


class ExpertTally:
    """Adds up routings, which the model returns: nothing is counted twice when activations are recomputed."""

    def __init__(self) -> None:
        self.layers: list[LayerTally] = []
        self.num_micro_batches = 0

    def add(self, routings: Sequence[Routing]) -> None:
        """Add one micro-batch's routings, one for every mixture-of-experts layer. Nothing waits for the device."""
        self.num_micro_batches += 1
        if not self.layers:
            self.layers = [
                LayerTally(counts=r.counts, chosen_counts=r.chosen_counts, observed=r.observed) for r in routings
            ]
            return
        for layer, routing in zip(self.layers, routings, strict=True):
            layer.counts = layer.counts + routing.counts
            layer.chosen_counts = layer.chosen_counts + routing.chosen_counts
            if layer.observed is not None and routing.observed is not None:
                layer.observed = layer.observed + routing.observed

    def adapt(self, model: Decoder) -> None:
        """Let every router learn from the whole step."""
        for layer, tally in zip(model.moe_layers(), self.layers, strict=True):
            mean = None if tally.observed is None else tally.observed / self.num_micro_batches
            layer.router.adapt(tally.chosen_counts, mean)

    def visits(self) -> list[list[int]]:
        """Return the visits of every layer's experts, in one transfer from the device."""
        return self._lists([layer.counts for layer in self.layers])

    def dropped(self) -> list[int]:
        """Return how many of each layer's chosen visits were not made."""
        chosen = self._lists([layer.chosen_counts for layer in self.layers])
        return [sum(wanted) - sum(made) for wanted, made in zip(chosen, self.visits(), strict=True)]

    def _lists(self, counts: list[Tensor]) -> list[list[int]]:
        if not counts:
            return []
        values = torch.split(torch.cat(counts).cpu(), [len(count) for count in counts])
        return [part.tolist() for part in values]
