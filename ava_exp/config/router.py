"""Configuration of the routers of a mixture of experts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from ava_exp.config.base import ComponentConfig

LOSS_FIELDS = frozenset(
    {
        "load_balancing_weight",
        "load_balancing_weight_end",
        "balance_over",
        "absolute_deviation_weight",
        "router_z_loss_weight",
    }
)


class BalanceScope(Enum):
    """Over which tokens the balance loss takes an expert's load: one micro-batch, or the step as far as it has got."""

    micro_batch = "micro_batch"
    step = "step"


@dataclass(kw_only=True, slots=True)
class RouterConfig(ComponentConfig, ABC):
    """Base of every router: the weights of its losses, which the objective adds up, and what it costs."""

    runtime_fields: ClassVar[frozenset[str]] = LOSS_FIELDS

    load_balancing_weight: float = 0.01
    load_balancing_weight_end: float | None = None
    """Where the weight has moved to, linearly, when the budget is spent; null keeps it constant."""
    balance_over: BalanceScope = BalanceScope.micro_batch
    absolute_deviation_weight: float = 0.0
    router_z_loss_weight: float = 0.001
    whole_expert_dropout: float = 0.0
    """Probability that an expert is out of reach of a whole micro-batch while training."""

    @abstractmethod
    def experts_per_token(self, num_experts: int) -> float:
        """Return how many experts one token visits, or the most where that differs from token to token."""

    def num_weights(self, dim: int, num_experts: int) -> int:
        """Return the router's parameters, all of which take part in a matrix product."""
        return dim * num_experts

    def losses(self) -> dict[str, float]:
        """Return the weight of each loss, beginning with those that are worth watching at a weight of 0."""
        optional = {"absolute_deviation_loss": self.absolute_deviation_weight}
        return {
            "load_balancing_loss": self.load_balancing_weight,
            "router_z_loss": self.router_z_loss_weight,
        } | {name: weight for name, weight in optional.items() if weight > 0}


@dataclass(kw_only=True, slots=True)
class TokenChoiceConfig(RouterConfig):
    """Base of the routers in which a token chooses its experts by scores of its own."""

    routing_temperature: float = 1.0
    jitter: float = 0.0


@dataclass(kw_only=True, slots=True)
class KChoicesConfig(TokenChoiceConfig):
    """Base of the routers in which every token chooses `moe_top_k` experts."""

    moe_top_k: int = 2
    renormalize: bool = True

    def experts_per_token(self, num_experts: int) -> float:
        return self.moe_top_k


@dataclass(kw_only=True, slots=True)
class TopKRouterConfig(KChoicesConfig):
    """Every token goes to the `moe_top_k` experts with the highest softmax probability."""

    builds: ClassVar[str] = "ava_exp.nn.moe.topk:TopKRouter"


@dataclass(kw_only=True, slots=True)
class SwitchRouterConfig(TokenChoiceConfig):
    """Every token goes to its one most probable expert, whose output is weighted by that probability."""

    builds: ClassVar[str] = "ava_exp.nn.moe.switch:SwitchRouter"

    jitter: float = 0.01

    def experts_per_token(self, num_experts: int) -> float:
        return 1


@dataclass(kw_only=True, slots=True)
class SoftRouterConfig(TokenChoiceConfig):
    """Every token goes to every expert: a dense mixture."""

    builds: ClassVar[str] = "ava_exp.nn.moe.soft:SoftRouter"

    load_balancing_weight: float = 0.0

    def experts_per_token(self, num_experts: int) -> float:
        return num_experts


@dataclass(kw_only=True, slots=True)
class SinkhornRouterConfig(KChoicesConfig):
    """While training, experts are chosen on scores balanced over the batch; at inference as `topk` does."""

    builds: ClassVar[str] = "ava_exp.nn.moe.sinkhorn:SinkhornRouter"

    load_balancing_weight: float = 0.0
    num_iterations: int = 8


@dataclass(kw_only=True, slots=True)
class DeepSeekRouterConfig(KChoicesConfig):
    """Sigmoid affinities, balanced by a bias on the selection that follows the load; no balance loss is needed."""

    builds: ClassVar[str] = "ava_exp.nn.moe.deepseek:DeepSeekRouter"
    runtime_fields: ClassVar[frozenset[str]] = LOSS_FIELDS | {"sequence_balance_weight"}

    load_balancing_weight: float = 0.0
    router_z_loss_weight: float = 0.0
    sequence_balance_weight: float = 1e-4
    bias_update_rate: float = 1e-3
    num_groups: int = 1
    groups_per_token: int = 1
    routed_scaling_factor: float = 1.0

    def losses(self) -> dict[str, float]:
        return RouterConfig.losses(self) | {"sequence_balance_loss": self.sequence_balance_weight}


@dataclass(kw_only=True, slots=True)
class TwoStageRouterConfig(KChoicesConfig):
    """One flat score: the best `groups_per_token` groups of experts first, then the best experts inside them.

    `num_groups` null makes groups as many as they are large, as nearly as the number of experts divides.
    """

    builds: ClassVar[str] = "ava_exp.nn.moe.two_stage:TwoStageRouter"

    num_groups: int | None = None
    groups_per_token: int = 1


@dataclass(kw_only=True, slots=True)
class DynamicRouterConfig(TokenChoiceConfig):
    """The fewest experts whose probabilities add up to `threshold`, at most `max_experts`."""

    builds: ClassVar[str] = "ava_exp.nn.moe.dynamic:DynamicRouter"
    runtime_fields: ClassVar[frozenset[str]] = LOSS_FIELDS | {"routing_entropy_weight"}

    threshold: float = 0.4
    max_experts: int = 4
    renormalize: bool = False
    routing_entropy_weight: float = 1e-4
    """Without it a router learns to be unsure, for that buys it more experts."""

    def experts_per_token(self, num_experts: int) -> float:
        return min(self.max_experts, num_experts)

    def losses(self) -> dict[str, float]:
        return RouterConfig.losses(self) | {"routing_entropy_loss": self.routing_entropy_weight}


@dataclass(kw_only=True, slots=True)
class HierarchicalRouterConfig(TokenChoiceConfig):
    """A tree of experts with a router at every node; an expert's weight is the product along its path.

    `branching` is the number of children at each level from the root down, and their product the number of experts;
    null is two levels as nearly alike as the number of experts divides. `choices` says how many children are followed
    at each level.
    """

    builds: ClassVar[str] = "ava_exp.nn.moe.hierarchical:HierarchicalRouter"

    branching: list[int] | None = None
    choices: list[int] = field(default_factory=lambda: [1, 2])
    renormalize: bool = False

    def levels(self, num_experts: int) -> list[int]:
        """Return the number of children at each level."""
        if self.branching is not None:
            return self.branching
        num_groups = balanced_divisor(num_experts)
        return [num_groups, num_experts // num_groups]

    def experts_per_token(self, num_experts: int) -> float:
        return math.prod(self.choices)

    def num_weights(self, dim: int, num_experts: int) -> int:
        levels = self.levels(num_experts)
        return dim * sum(math.prod(levels[: depth + 1]) for depth in range(len(levels)))


@dataclass(kw_only=True, slots=True)
class ExpertChoiceRouterConfig(RouterConfig):
    """Every expert takes the tokens that want it most; at inference, those above a threshold learned while training.

    `average_experts` is the mean number of experts of a token; `threshold_momentum` keeps the running threshold.
    """

    builds: ClassVar[str] = "ava_exp.nn.moe.expert_choice:ExpertChoiceRouter"

    load_balancing_weight: float = 0.0
    average_experts: float = 2.0
    threshold_momentum: float = 0.99

    def experts_per_token(self, num_experts: int) -> float:
        return min(self.average_experts, num_experts)


def balanced_divisor(number: int) -> int:
    """Return the largest divisor that is at most the square root."""
    return max(divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0)
