"""Everything of a run that is resumable and is not a tensor, in one dataclass."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


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

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` restores them exactly (floats are written so that they round-trip)."""
        return {**asdict(self), "evaluations": {str(step): loss for step, loss in self.evaluations.items()}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """Restore a state; raises TypeError on unknown or missing fields."""
        evaluations = {int(step): loss for step, loss in values["evaluations"].items()}
        return cls(**{**values, "evaluations": evaluations})
