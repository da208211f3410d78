"""Everything of a run that is resumable, besides weights, optimizer and random states, in one dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ava_exp.training.history import RoutingHistory


@dataclass(kw_only=True, slots=True)
class TrainState:
    """`step` counts finished optimizer steps; the position in the data follows from it alone."""

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_scale: float = 1.0
    loss_scale_good_steps: int = 0
    evaluations: dict[int, float] = field(default_factory=dict)
    """Validation loss by step."""
    mod_capacity: float | None = None
    """The share of tokens that layers processed in the last step; None where none may be skipped."""
    routing: RoutingHistory = field(default_factory=RoutingHistory, compare=False)
    """Tensors, which are no part of the JSON."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` restores them exactly (floats are written so that they round-trip)."""
        values = {name.name: getattr(self, name.name) for name in fields(self) if name.name != "routing"}
        return {**values, "evaluations": {str(step): loss for step, loss in self.evaluations.items()}}

    @classmethod
    def from_json(cls, values: dict[str, Any], routing: RoutingHistory | None = None) -> TrainState:
        """Restore a state; raises TypeError on unknown or missing fields."""
        evaluations = {int(step): loss for step, loss in values["evaluations"].items()}
        return cls(**{**values, "evaluations": evaluations}, routing=routing or RoutingHistory())
