"""How long a run takes to stop when it is asked to, as it measured itself."""

from __future__ import annotations

import logging
from typing import Any

from ava_exp.errors import RunFolderError
from ava_exp.tracking.folder import RunFolder

logger = logging.getLogger(__name__)

SAFETY = 1.5
"""A step or a save may take longer than the longest one so far."""
NUM_SAVES = 2
"""One may be under way beside the training when the last one is asked for."""
ENDING_S = 15.0
"""For what follows the last save: the report, the tracker, the way back into the queue."""
FILE = "stopping.json"


class StoppingTime:
    """The step that a run is in when it is asked to stop, and the save that follows, at their longest so far.

    `folder` has what earlier processes of the run measured.
    """

    def __init__(self, folder: RunFolder | None = None) -> None:
        earlier = folder.read_json(FILE, {}) if folder is not None else {}
        self.step_s, self.save_s = (float(earlier.get(name, 0.0)) for name in ("step_s", "save_s"))
        self._previous: tuple[int, float] | None = None

    def seconds(self) -> float:
        """Return how long before its end a job should be told to stop; 0 as long as nothing was saved."""
        return SAFETY * (self.step_s + NUM_SAVES * self.save_s) + ENDING_S if self.save_s else 0.0

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

    def keep(self, folder: RunFolder) -> None:
        """Write down what was measured, for the next process of the run."""
        try:
            folder.write_json(FILE, {"step_s": self.step_s, "save_s": self.save_s})
        except RunFolderError as error:  # which then measures anew
            logger.warning("%s", error)
