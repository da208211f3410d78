"""How evenly a layer's tokens are spread over its experts."""

from __future__ import annotations

import math
from collections.abc import Sequence


def expert_summary(load: Sequence[float]) -> dict[str, float]:
    """Summarise one layer's shares of tokens per expert, which sum to 1 (or to 0 where there were no tokens).

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
