"""How evenly a layer's visits are spread over its experts, and what else a record tells of its routers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LAYER_FIELDS = (
    "visits_per_token",
    "dropped_share",
    "dead_experts",
    "token_entropy",
    "churn",
    "source_information",
)
"""Fields of records, besides the load, that have one number for every routed layer, or null."""
OVERALL: dict[str, Callable[[Sequence[float]], float]] = {
    "dead_experts": sum,
    "min_utilization": min,
    "max_utilization": max,
}
"""How layers are summed up where that is not their mean."""


def expert_summary(load: Sequence[float]) -> dict[str, float]:
    """Summarise one layer's shares of visits per expert, which sum to 1 (or to 0 where there were no visits).

    `gini` is 0 when all experts get the same and approaches 1 when one gets everything; `routing_entropy` is in nats,
    at most log(number of experts); `imbalance` is the largest share over the mean. The deviation is the population's.
    """
    count, total = len(load), sum(load)
    assert count > 0, "a layer has at least one expert"
    mean = total / count
    return {
        "mean_utilization": mean,
        "std_utilization": math.sqrt(sum((share - mean) ** 2 for share in load) / count),
        "min_utilization": min(load),
        "max_utilization": max(load),
        "gini": _gini(load) if total else 0.0,
        "routing_entropy": -sum(share * math.log(share) for share in load if share > 0),
        "imbalance": max(load) / mean if total else 0.0,
    }


def _gini(load: Sequence[float]) -> float:
    count = len(load)
    weighted = sum((2 * rank - count - 1) * share for rank, share in enumerate(sorted(load), start=1))
    return weighted / (count * sum(load))


def relative_load(load: Sequence[float]) -> list[float]:
    """Return the shares in units of the balanced share: 1 is what an expert gets when all get the same."""
    return [share * len(load) for share in load]


def normalized_entropy(load: Sequence[float]) -> float:
    """Return the entropy of the load as a share of the most possible, so that layers of any size compare."""
    return expert_summary(load)["routing_entropy"] / math.log(len(load)) if len(load) > 1 else 1.0


def layer_statistics(record: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return what a record tells of every routed layer; layers may differ in their number of experts."""
    layers = [expert_summary(load) for load in record.get("expert_load") or ()]
    for name in LAYER_FIELDS:
        for layer, value in zip(layers, record.get(name) or (), strict=False):
            if value is not None:
                layer[name] = float(value)
    return layers


def overall_statistics(layers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over layers of what they have; of dead experts the sum, of extremes the extreme."""
    overall = {}
    for name in dict.fromkeys(name for layer in layers for name in layer):
        values = [layer[name] for layer in layers if name in layer]
        overall[name] = float(OVERALL[name](values)) if name in OVERALL else sum(values) / len(values)
    return overall


def overall_of(record: Mapping[str, Any], name: str) -> float | None:
    """Return one figure of a record for the whole model, or None where the record does not have it."""
    values = [{name: value} for value in record.get(name) or () if value is not None]
    return overall_statistics(values)[name] if values else None
