"""What the routers of a model did in one step, over all its micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ava_exp.losses.balance import load_balancing_loss
from ava_exp.models.decoder import Decoder
from ava_exp.nn.moe.routing import Routing
from ava_exp.parallel.ranks import Ranks
from ava_exp.tracking.experts import expert_summary


@dataclass(kw_only=True, slots=True)
class LayerTally:
    """One layer's sums over a step: visits (E,) that were computed and that tokens chose, and what is observed."""

    num_tokens: int
    counts: Tensor
    chosen_counts: Tensor
    probability_sums: Tensor
    observed: Tensor | None

    @classmethod
    def of(cls, routing: Routing) -> LayerTally:
        """Start with one micro-batch."""
        return cls(
            num_tokens=routing.expert_ids.shape[0],
            counts=routing.counts,
            chosen_counts=routing.chosen_counts,
            probability_sums=routing.probabilities.detach().sum(dim=0),
            observed=routing.observed,
        )

    def __add__(self, other: LayerTally) -> LayerTally:
        both_observed = self.observed is not None and other.observed is not None
        return LayerTally(
            num_tokens=self.num_tokens + other.num_tokens,
            counts=self.counts + other.counts,
            chosen_counts=self.chosen_counts + other.chosen_counts,
            probability_sums=self.probability_sums + other.probability_sums,
            observed=self.observed + other.observed if both_observed else None,  # type: ignore[operator]
        )


@dataclass(kw_only=True, slots=True, frozen=True)
class LayerVisits:
    """What the host is told of one layer's step."""

    num_tokens: int
    by_expert: list[int]
    """Visits that were computed."""
    chosen: int
    """Visits that tokens had asked for, before any capacity was imposed."""

    @property
    def total(self) -> int:
        return sum(self.by_expert)

    @property
    def shares(self) -> list[float]:
        """By expert, the share of the layer's visits: they sum to 1, or to 0 where there were none."""
        total = max(1, self.total)
        return [count / total for count in self.by_expert]

    @property
    def dropped(self) -> int:
        """How many chosen visits were not made."""
        return self.chosen - self.total

    @property
    def dropped_share(self) -> float:
        return self.dropped / max(1, self.chosen)

    @property
    def per_token(self) -> float:
        """Visits of a token that the layer processed."""
        return self.total / max(1, self.num_tokens)


class ExpertTally:
    """Adds up routings, which the model returns: nothing is counted twice when activations are recomputed."""

    def __init__(self) -> None:
        self.layers: list[LayerTally] = []
        self.num_micro_batches = 0

    def add(self, routings: Sequence[Routing]) -> None:
        """Add one micro-batch's routings, one for every mixture-of-experts layer. Nothing waits for the device."""
        self.num_micro_batches += 1
        added = [LayerTally.of(routing) for routing in routings]
        self.layers = [one + other for one, other in zip(self.layers, added, strict=True)] if self.layers else added

    def add_up(self, ranks: Ranks) -> None:
        """Make the sums those of all ranks; what tokens chose already is."""
        if ranks.num_ranks == 1 or not self.layers:
            return
        self.num_micro_batches *= ranks.num_ranks
        num_tokens = ranks.sums([layer.num_tokens for layer in self.layers])
        observed = [layer for layer in self.layers if layer.observed is not None]
        values = [layer.counts for layer in self.layers] + [layer.probability_sums for layer in self.layers]
        sums = iter(ranks.add_up([*values, *(layer.observed for layer in observed if layer.observed is not None)]))
        for layer, number in zip(self.layers, num_tokens, strict=True):
            layer.num_tokens, layer.counts = number, next(sums)
        for layer in self.layers:
            layer.probability_sums = next(sums)
        for layer in observed:
            layer.observed = next(sums)

    def adapt(self, model: Decoder) -> None:
        """Let every router learn from the whole step."""
        for layer, tally in zip(model.moe_layers(), self.layers, strict=True):
            mean = None if tally.observed is None else tally.observed / self.num_micro_batches
            layer.router.adapt(tally.chosen_counts, mean)

    def visits(self) -> list[LayerVisits]:
        """Return every layer's visits, in one transfer from the device."""
        if not self.layers:
            return []
        counts = [torch.cat([layer.counts, layer.chosen_counts.sum()[None]]) for layer in self.layers]
        values = torch.split(torch.cat(counts).cpu(), [len(count) for count in counts])
        return [
            LayerVisits(num_tokens=layer.num_tokens, by_expert=part[:-1].tolist(), chosen=int(part[-1]))
            for layer, part in zip(self.layers, values, strict=True)
        ]

    def statistics(self) -> dict[str, Any]:
        """Return `per_expert_utilization`, `routing_entropy`, `load_balance_loss` and `tokens_dropped`.

        They are by layer, in `layers`, and for the model, in `aggregate`: every expert's share of all visits, layer
        after layer; the means of entropy (nats) and balance loss over layers; and all visits that were dropped.
        """
        visits = self.visits()
        layers = [_statistics(tally, layer) for tally, layer in zip(self.layers, visits, strict=True)]
        total = max(1, sum(layer.total for layer in visits))
        count = max(1, len(layers))
        aggregate = {
            "per_expert_utilization": [visit / total for layer in visits for visit in layer.by_expert],
            "routing_entropy": sum(layer["routing_entropy"] for layer in layers) / count,
            "load_balance_loss": sum(layer["load_balance_loss"] for layer in layers) / count,
            "tokens_dropped": sum(layer["tokens_dropped"] for layer in layers),
        }
        return {"layers": layers, "aggregate": aggregate}


def _statistics(tally: LayerTally, visits: LayerVisits) -> dict[str, Any]:
    mean_probabilities = tally.probability_sums / tally.num_tokens
    return {
        "per_expert_utilization": visits.shares,
        "routing_entropy": expert_summary(visits.shares)["routing_entropy"],
        "load_balance_loss": load_balancing_loss(mean_probabilities[None], tally.chosen_counts).item(),
        "tokens_dropped": visits.dropped,
    }
