"""How many optimizer steps a budget pays for."""

from __future__ import annotations

import math
from collections.abc import Callable

from ava_exp.config.training import BudgetConfig, ParameterCount


def resolve_total_steps(
    budget: BudgetConfig,
    *,
    tokens_per_step: int,
    tokens_per_epoch: int,
    active_parameters: int,
    total_parameters: int,
    seconds_per_step: Callable[[], float],
) -> int:
    """Return the smallest of all limits given, in steps and at least 1; `default_seconds` when there is none.

    `seconds_per_step` is called only when a limit in seconds has to be turned into steps.
    """
    limits: list[float] = []
    if budget.steps is not None:
        limits.append(budget.steps)
    if budget.tokens is not None:
        limits.append(budget.tokens / tokens_per_step)
    if budget.epochs is not None:
        limits.append(budget.epochs * tokens_per_epoch / tokens_per_step)
    if budget.chinchilla_multiplier is not None:
        active = budget.chinchilla_parameters is ParameterCount.active
        tokens = budget.chinchilla_multiplier * (active_parameters if active else total_parameters)
        limits.append(tokens / tokens_per_step)
    seconds = budget.seconds if limits or budget.seconds is not None else budget.default_seconds
    if seconds is not None:
        limits.append(seconds / seconds_per_step())
    return max(1, math.ceil(min(limits)))
