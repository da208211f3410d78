"""One step of a pipeline: the runs that its configuration means, and what it leaves for the steps after it."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ava_exp.config.pipeline import references
from ava_exp.config.run import RunConfig
from ava_exp.errors import RunFolderError
from ava_exp.tracking.files import to_json, write_atomically
from ava_exp.tracking.folder import RunFolder

RUN = "stage.run"


@dataclass(frozen=True, slots=True)
class StepFiles:
    """What is known of a step, in its pipeline's folder."""

    folder: Path
    name: str

    @property
    def made(self) -> Path:
        """Names the run that the step works on, once there is one."""
        return self.folder / f"{self.name}.json"

    @property
    def finished(self) -> Path:
        """Is there when the step has ended well."""
        return self.folder / f"{self.name}.finished"

    @property
    def is_finished(self) -> bool:
        """Whether the step has ended well, and what it made is still there."""
        return self.finished.exists() and (self.run is None or self.run.is_dir())

    @property
    def run(self) -> Path | None:
        """The folder of the run that the step works on; None where it makes none, or did not come so far."""
        try:
            return Path(json.loads(self.made.read_text(encoding="utf-8"))["run"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{self.made} cannot be read ({error}); delete it, the run stays.") from error


def announce(config: RunConfig, folder: RunFolder) -> None:
    """Let `latest`, and the step of a pipeline that this process does, lead to a run."""
    folder.point_latest(Path(config.output_dir))
    pipeline = config.pipeline
    if pipeline.folder is not None and pipeline.step is not None:
        made = StepFiles(Path(pipeline.folder), pipeline.step).made
        write_atomically(made, to_json({"run": str(folder.root.resolve())}) + "\n")


def references_of(config: RunConfig) -> dict[str, re.Match[str]]:
    """Return what a configuration means by the name of a step, by key."""
    values = {"init_from": config.init_from, "resume": config.resume, RUN: getattr(config.stage, "run", None)}
    return references(values)


def with_step_runs(config: RunConfig) -> RunConfig:
    """Return the configuration with the runs of earlier steps in the place of their names.

    Raises:
        RunFolderError: a step has made no run.
    """
    found = references_of(config)
    if not found or config.pipeline.folder is None:
        return config
    paths = {key: _path_of(Path(config.pipeline.folder), match) for key, match in found.items()}
    changes: dict[str, Any] = {key: path for key, path in paths.items() if key != RUN}
    if RUN in paths:
        changes["stage"] = stage = copy.copy(config.stage)
        stage.run = paths[RUN]  # type: ignore[attr-defined]
    return dataclasses.replace(config, **changes)


def _path_of(folder: Path, match: re.Match[str]) -> str:
    run = StepFiles(folder, match["name"]).run
    if run is None:
        raise RunFolderError(f"the step `{match['name']}` has made no run that a later one could use.")
    return f"{run}{match['rest'] or ''}"
