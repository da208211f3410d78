"""How fast a run would be, how long it would take and what it would cost, at an assumed share of the devices' peak."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ava_exp.config.run import RunConfig
from ava_exp.models.arithmetic import ParameterBreakdown, training_flops_per_token
from ava_exp.training.budget import resolve_total_steps

SECONDS_PER_HOUR = 3600


@dataclass(kw_only=True, slots=True, frozen=True)
class Forecast:
    """What the budget comes to. `cost` is None without `hardware.price_per_hour`, else in its currency."""

    steps: int
    tokens: int
    seconds: float
    cost: float | None


def tokens_per_second(config: RunConfig, *, peak_tflops: float, assumed_mfu: float) -> float:
    """Return the rate of all devices together. `peak_tflops` is one device's, in the format that computes."""
    flops = training_flops_per_token(config.architecture, config.data.sequence_length)
    return assumed_mfu * peak_tflops * 1e12 * config.hardware.num_devices / flops


def forecast(config: RunConfig, breakdown: ParameterBreakdown, tokens_per_s: float) -> Forecast | None:
    """Return what the budget comes to at this rate, its epochs left out: how long one is, only the data tells.

    None for a budget of nothing but epochs.
    """
    limits, hardware = dataclasses.replace(config.budget, epochs=None), config.hardware
    given = (limits.steps, limits.tokens, limits.seconds, limits.chinchilla_multiplier)
    if config.budget.epochs is not None and not any(given):
        return None
    batch_size = config.training.batch_size or hardware.batch_size
    sequences_per_step = batch_size * config.training.gradient_accumulation_steps * hardware.num_devices
    tokens_per_step = sequences_per_step * config.data.sequence_length
    steps = resolve_total_steps(
        limits,
        tokens_per_step=tokens_per_step,
        tokens_per_epoch=0,
        active_parameters=breakdown.active,
        total_parameters=breakdown.total,
        seconds_per_step=lambda: tokens_per_step / tokens_per_s,
    )
    seconds, price = steps * tokens_per_step / tokens_per_s, hardware.price_per_hour
    cost = None if price is None else price * hardware.num_devices * seconds / SECONDS_PER_HOUR
    return Forecast(steps=steps, tokens=steps * tokens_per_step, seconds=seconds, cost=cost)
