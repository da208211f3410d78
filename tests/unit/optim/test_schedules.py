"""Schedules at their landmarks."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from ava_exp.config.training import (
    ConstantConfig,
    CosineConfig,
    CosineRestartsConfig,
    InverseSqrtConfig,
    LinearConfig,
    ScheduleConfig,
    WSDConfig,
)
from ava_exp.optim.schedules import Schedule

ALL = [CosineConfig, CosineRestartsConfig, LinearConfig, WSDConfig, ConstantConfig, InverseSqrtConfig]


def build(config: ScheduleConfig, total_steps: int = 1000, tokens_per_step: int = 100) -> Schedule:
    schedule: Schedule = config.build(total_steps=total_steps, tokens_per_step=tokens_per_step)
    return schedule


@pytest.mark.parametrize("config", ALL)
def test_warm_up_is_linear_and_ends_at_the_peak(config: type[ScheduleConfig]) -> None:
    schedule = build(config(warmup_steps=10))
    assert [schedule.factor(step) for step in range(10)] == pytest.approx([(i + 1) / 10 for i in range(10)])


@pytest.mark.parametrize("config", ALL)
def test_factors_stay_between_the_minimum_and_one(config: type[ScheduleConfig]) -> None:
    schedule = build(config(min_lr_ratio=0.2, warmup_steps=0))
    factors = [schedule.factor(step) for step in range(1200)]
    assert max(factors) <= 1.0
    assert min(factors) >= 0.2 - 1e-12


def values_at(config: ScheduleConfig, *steps: int) -> list[float]:
    schedule = build(config)
    return [schedule.factor(step) for step in steps]


COMMON: dict[str, Any] = {"warmup_steps": 0, "min_lr_ratio": 0.0}


def test_landmarks() -> None:
    assert values_at(CosineConfig(**COMMON), 0, 500, 1000) == pytest.approx([1, 0.5, 0])
    assert values_at(LinearConfig(**COMMON), 0, 250, 1000) == pytest.approx([1, 0.75, 0])
    assert values_at(ConstantConfig(**COMMON), 0, 999) == [1, 1]
    assert values_at(CosineRestartsConfig(**COMMON, num_cycles=2), 0, 250, 499, 500, 1000) == pytest.approx(
        [1, 0.5, 0, 1, 0], abs=1e-4
    )
    assert values_at(WSDConfig(**COMMON, decay_ratio=0.2), 0, 800, 900, 1000) == pytest.approx([1, 1, 0.5, 0])
    assert values_at(InverseSqrtConfig(warmup_steps=100, min_lr_ratio=0.0), 99, 399) == pytest.approx([1, 0.5])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 30),
        ({"warmup_ratio": 0.1}, 100),
        ({"warmup_tokens": 5050}, 51),
        ({"warmup_steps": 7, "warmup_tokens": 5050}, 7),
        ({"warmup_steps": 5000}, 1000),
    ],
)
def test_warm_up_in_steps_tokens_or_share(changes: dict[str, Any], expected: int) -> None:
    assert build(CosineConfig(**changes)).num_warmup_steps == expected


@pytest.mark.parametrize("config", ALL)
def test_fields_are_the_constructor_keywords(config: type[ScheduleConfig]) -> None:
    own = {field.name for field in fields(config)}
    assert {field.name for field in fields(config().component())} == own | {"total_steps", "tokens_per_step"}
