"""What is resumable comes back exactly."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ava_exp.training.state import TrainState


def test_every_field_comes_back_through_json() -> None:
    state = TrainState(
        step=7,
        tokens=8,
        elapsed_s=0.1 + 0.2,
        skipped_steps=3,
        skipped_in_a_row=2,
        loss_scale=2.0**15,
        loss_scale_good_steps=5,
        evaluations={3: 1 / 3, 12: 0.1},
        mod_capacity=0.7,
    )
    default = TrainState()
    fields = [field.name for field in dataclasses.fields(state) if field.name != "routing"]
    assert all(getattr(state, name) != getattr(default, name) for name in fields)
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.parametrize("values", [{"surprise": 1, "evaluations": {}}, {"step": 1}])
def test_what_does_not_fit_is_refused(values: dict[str, object]) -> None:
    with pytest.raises((TypeError, KeyError)):
        TrainState.from_json(values)
