"""Experiment trackers: what every tracker does, and the one that does nothing.

The metrics file of a run is the queue of every tracker: what a tracker has not taken yet is still in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from ava_exp.tracking.folder import RunFolder


class RunStatus(StrEnum):
    """How a run stands: at work, done, stopped and resumable, or failed."""

    running = "running"
    finished = "finished"
    stopped = "stopped"
    failed = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """What a tracker is told of a run. `parameters` is the flattened configuration."""

    folder: RunFolder
    name: str
    parameters: dict[str, Any]
    output_dir: Path


class Tracker(Protocol):
    """Copies a run's metrics to where runs are compared. It never slows, delays or stops the run."""

    def start(self, run: TrackedRun) -> None:
        """Begin to follow the run's metrics file; a resumed run continues where the tracker stands."""

    def finish(self, status: RunStatus, artifacts: Sequence[Path] = ()) -> None:
        """Hand over the rest, the files and the status; wait a few seconds at most. Nothing started: do nothing."""

    def catch_up(self, run: TrackedRun, status: RunStatus, artifacts: Sequence[Path] = ()) -> None:
        """Hand over what earlier processes of a run that has ended could not, if there is anything."""


class NoTracker:
    """Tracks nothing; the run folder has everything all the same."""

    def start(self, run: TrackedRun) -> None:
        """Do nothing."""

    def finish(self, status: RunStatus, artifacts: Sequence[Path] = ()) -> None:
        """Do nothing."""

    def catch_up(self, run: TrackedRun, status: RunStatus, artifacts: Sequence[Path] = ()) -> None:
        """Do nothing."""
