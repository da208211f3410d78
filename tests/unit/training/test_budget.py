"""Budgets in every unit."""

from __future__ import annotations

from typing import Any

import pytest

from ava_exp.config.training import BudgetConfig, ParameterCount
from ava_exp.training.budget import resolve_total_steps
from ava_exp.training.state import TrainState


def steps(seconds_per_step: float | None = None, **limits: Any) -> int:
    def measure() -> float:
        assert seconds_per_step is not None, "no limit in seconds was given, so that nothing is to be measured"
        return seconds_per_step

    return resolve_total_steps(
        BudgetConfig(**limits),
        tokens_per_step=100,
        tokens_per_epoch=1050,
        active_parameters=500,
        total_parameters=900,
        seconds_per_step=measure,
    )


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 1001}, 11),
        ({"epochs": 2}, 21),
        ({"chinchilla_multiplier": 20}, 100),
        ({"chinchilla_multiplier": 20, "chinchilla_parameters": ParameterCount.total}, 180),
        ({"steps": 70, "tokens": 1001}, 11),
        ({"tokens": 1}, 1),
    ],
)
def test_each_unit_and_the_smallest_wins(limits: dict[str, Any], expected: int) -> None:
    assert steps(**limits) == expected


def test_seconds_are_turned_into_steps_by_the_measurement() -> None:
    assert steps(0.5, seconds=60) == 120
    assert steps(0.5, seconds=60, steps=10) == 10
    assert steps(0.5, default_seconds=30.0) == 60


def test_train_state_round_trips() -> None:
    state = TrainState(step=3, tokens=7, elapsed_s=0.1 + 0.2, evaluations={2: 1 / 3, 3: 0.25}, loss_scale=2.0)
    assert TrainState.from_json(state.to_json()) == state
    with pytest.raises(TypeError):
        TrainState.from_json({**state.to_json(), "unknown": 1})
