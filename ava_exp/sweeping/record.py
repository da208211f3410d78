"""The points of a sweep, how they stand, and the file that keeps this up to date."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from ava_exp.config.identity import to_plain
from ava_exp.config.run import RunConfig
from ava_exp.errors import RunFolderError
from ava_exp.tracking.files import restore_numbers, to_json, unwritable, write_atomically
from ava_exp.tracking.folder import RunFolder, newest_attempt
from ava_exp.tracking.redaction import redact

HASH_LENGTH = 8


class PointStatus(StrEnum):
    """How a point stands. `queued` has a job that has not begun; `interrupted` goes on when the sweep is run again;
    `pruned` was given up on purpose."""

    waiting = "waiting"
    queued = "queued"
    running = "running"
    finished = "finished"
    failed = "failed"
    interrupted = "interrupted"
    pruned = "pruned"


@dataclass(kw_only=True, slots=True)
class Point:
    """One run of a sweep: an ordinary command line, whose run is found again by its id."""

    number: int
    overrides: list[str]
    choices: dict[str, str]
    """What it has that other points have not, by key or group."""
    run_id: str
    config: RunConfig
    status: PointStatus = PointStatus.waiting
    attempts: int = 0
    seconds: float = 0.0
    value: float | None = None
    """The objective at the end of the run."""
    error: str = ""
    code: int | None = None
    """The exit code of its last process."""
    root: str | None = None
    """The folder of its run, once it has ended."""
    job: str | None = None
    """The id of the newest job that trains it."""
    log: str | None = None
    """The file with what that job prints, once it prints something."""
    trial: int | None = None
    """The number of the trial that a search made of it."""

    @property
    def label(self) -> str:
        """What tells the point from the others, as one would write it."""
        return " ".join(f"{key}={value}" if value else f"~{key}" for key, value in self.choices.items()) or "(alone)"

    @property
    def folder(self) -> RunFolder | None:
        """The folder of its run, if it was started."""
        return newest_attempt(Path(self.config.output_dir), self.run_id)


@dataclass(kw_only=True, slots=True)
class SweepRecord:
    """A sweep's folder and its points; `save` brings `sweep.json` up to date."""

    root: Path
    name: str
    command: str
    objective: str
    definition: dict[str, Any]
    points: list[Point] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.root / "sweep.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def id(self) -> str:
        """The name of the folder: the sweep's name and the hash of its definition."""
        return self.root.name

    def log(self, point: Point) -> Path:
        """Return the file with everything that a point's process or job wrote."""
        return Path(point.log) if point.log else self.root / "logs" / f"{point.run_id}.log"

    def create(self) -> None:
        """Make the folder. Raises RunFolderError where it cannot be written."""
        try:
            (self.root / "logs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.root, error) from error

    def save(self) -> None:
        """Write the record, whole or not at all. Raises RunFolderError."""
        content = {
            "name": self.name,
            "command": self.command,
            "objective": self.objective,
            "definition": self.definition,
            "points": [_plain(point) for point in self.points],
        }
        write_atomically(self.file, to_json(redact(content), indent=2) + "\n")

    def earlier(self) -> dict[str, dict[str, Any]]:
        """Return what an earlier process of this sweep wrote of its points, by run id. Raises RunFolderError."""
        if not self.file.exists():
            return {}
        try:
            return {point["run_id"]: point for point in restore_numbers(json.loads(self.file.read_text()))["points"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{self.file} cannot be read ({error}); delete it, the runs stay.") from error


def _plain(point: Point) -> dict[str, Any]:
    names = (
        "number",
        "run_id",
        "overrides",
        "choices",
        "status",
        "attempts",
        "seconds",
        "value",
        "error",
        "job",
        "trial",
    )
    return {name: getattr(point, name) for name in names} | {"folder": point.root}


def definition_hash(definition: dict[str, Any]) -> str:
    """Return the same 8 hexadecimal digits for the same points, in whatever order they are written."""
    canonical = json.dumps(definition, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:HASH_LENGTH]


def of_status(points: Iterable[Point], status: PointStatus) -> list[Point]:
    """Return the points that stand like this."""
    return [point for point in points if point.status is status]


def is_finished(point: Point) -> bool:
    """Whether the point's run has finished with the budget that is asked for now."""
    folder = point.folder
    if folder is None or point.config.resume != "auto" or not folder.config.is_file():
        return False
    status = folder.read_json("status.json", {})
    if status.get("status") != "finished":
        return False
    budget = yaml.safe_load(folder.config.read_text(encoding="utf-8")).get("budget")
    # A run that is opened again to be trained further says so in its configuration first.
    is_settled = folder.status.stat().st_mtime_ns >= folder.config.stat().st_mtime_ns
    return bool(is_settled and budget == to_plain(point.config)["budget"])


def objective_of(point: Point, objective: str) -> float | None:
    """Return the objective at the end of a point's run; None where it was not measured."""
    folder = point.folder
    final = (restore_numbers(folder.read_json("summary.json", {})) if folder else {}).get("final") or {}
    value = final.get(objective)
    return None if value is None else float(value)
