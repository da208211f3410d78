"""How long a run takes to stop when it is asked to, as it measured itself."""

from __future__ import annotations

from typing import Any

SAFETY = 1.5
"""A step or a save may take longer than the longest one so far."""


class StoppingTime:
    """The step that a run is in when it is asked to stop, and the save that follows, at their longest so far.

    `earlier` are the longest ones of earlier processes, in seconds: what `to_json` gave.
    """

    def __init__(self, earlier: dict[str, float] | None = None) -> None:
        self.step_s, self.save_s = (float((earlier or {}).get(name, 0.0)) for name in ("step_s", "save_s"))
        self._previous: tuple[int, float] | None = None

    @property
    def seconds(self) -> float:
        """How long before its end a job should be told to stop; 0 as long as nothing was saved."""
        return SAFETY * (self.step_s + self.save_s) if self.save_s else 0.0

    def observe(self, record: dict[str, Any]) -> None:
        """Take note of the record of a step. The first one of a process is left out: it warms up."""
        if record.get("kind") != "train":
            return
        step, elapsed_s = record["step"], record["elapsed_s"]
        if self._previous is not None and step > self._previous[0]:
            self.step_s = max(self.step_s, (elapsed_s - self._previous[1]) / (step - self._previous[0]))
        self._previous = step, elapsed_s

    def saved(self, seconds: float) -> None:
        """Take note of how long a save took, from its beginning until it was on disk."""
        self.save_s = max(self.save_s, seconds)

    def to_json(self) -> dict[str, float]:
        """Return what was measured, for the next process of the run."""
        return {"step_s": self.step_s, "save_s": self.save_s}
