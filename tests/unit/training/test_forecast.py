"""Speed, time and cost of a budget, computed by hand."""

from __future__ import annotations

import pytest

from ava_exp.config.compose import compose
from ava_exp.models.arithmetic import count_parameters, training_flops_per_token
from ava_exp.training.forecast import Forecast, forecast, tokens_per_second

SHAPE = ("hardware=8xh100", "training.batch_size=4", "data.sequence_length=100")
TOKENS_PER_STEP = 8 * 4 * 100


def forecast_at(tokens_per_s: float, *overrides: str) -> Forecast | None:
    config = compose(["~local", *SHAPE, *overrides])
    return forecast(config, count_parameters(config.architecture), tokens_per_s)


def test_the_rate_is_the_assumed_share_of_all_peaks() -> None:
    config = compose(["~local", "hardware=8xh100"])
    flops = training_flops_per_token(config.architecture, config.data.sequence_length)
    rate = tokens_per_second(config, peak_tflops=2.0, assumed_mfu=0.25)
    assert rate * flops == pytest.approx(0.25 * 8 * 2e12)


def test_a_budget_in_tokens() -> None:
    expected = Forecast(steps=10, tokens=10 * TOKENS_PER_STEP, seconds=3200.0, cost=None)
    assert forecast_at(10.0, f"budget.tokens={10 * TOKENS_PER_STEP - 1}") == expected


def test_accumulation_makes_steps_longer() -> None:
    once, twice = (
        forecast_at(10.0, "budget.steps=5", f"training.gradient_accumulation_steps={count}") for count in (1, 2)
    )
    assert once is not None and twice is not None
    assert (once.steps, twice.steps) == (5, 5)
    assert twice.seconds == 2 * once.seconds == 2 * 5 * TOKENS_PER_STEP / 10


def test_a_budget_in_seconds_depends_on_the_rate() -> None:
    slow, fast = (forecast_at(rate, "budget.seconds=64") for rate in (100.0, 500.0))
    assert slow is not None and fast is not None
    assert (slow.steps, fast.steps) == (2, 10)
    assert slow.seconds == fast.seconds == 64


def test_the_price_is_that_of_one_device() -> None:
    found = forecast_at(1.0, "budget.steps=9", "hardware.price_per_hour=2.5")
    assert found is not None
    assert found.seconds == 8 * 3600
    assert found.cost == 2.5 * 8 * 8


def test_epochs_are_left_out() -> None:
    assert forecast_at(1.0, "budget.epochs=3") is None
    assert forecast_at(1.0, "budget.epochs=3", "budget.steps=9") == forecast_at(1.0, "budget.steps=9")
