"""Finds runs by what a user calls them, the folder that a run works in, and the weights that it starts from."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ava_exp.config.identity import from_plain, run_id
from ava_exp.config.run import RunConfig
from ava_exp.errors import CheckpointError, RunFolderError, UserError, did_you_mean
from ava_exp.tracking.folder import RunFolder, new_attempt, newest_attempt
from ava_exp.training.checkpoint import (
    Snapshot,
    folder_of,
    list_checkpoints,
    newest_good_checkpoint,
    resolve_checkpoint,
    step_of,
    weights_fingerprint,
)

LATEST = "latest"
INITIAL = "initial.json"
"""Whose weights a run began with; `latest` soon leads to the run itself."""
ORIGIN = "origin.json"
"""Where an attempt began, when that is another run's checkpoint."""
AT_STEP = re.compile(r"(?P<run>.+)@(?P<step>\d+)(?:-(?P<fingerprint>[0-9a-f]{8}))?")


def find_run(config: RunConfig, run: str | None) -> RunFolder:
    """Return the folder of a run given by name or path, or of the one that `config` trains.

    Raises RunFolderError when there is none.
    """
    output_dir = Path(config.output_dir)
    runs = sorted(path.name for path in (output_dir / "runs").glob("*") if path.is_dir())
    if run is None:
        name = run_id(with_initial_weights(config)[0])
        folder = newest_attempt(output_dir, name)
        if folder is None:
            known = f"Name one with `stage.run=`: {', '.join(runs)}." if runs else "There are no runs yet: train one."
            raise RunFolderError(f"the run {name}, which this command line describes, does not exist. {known}")
        return folder
    for candidate in (output_dir / "latest" if run == LATEST else output_dir / "runs" / run, Path(run)):
        if candidate.is_dir():
            return RunFolder(candidate.resolve())
    if not runs:
        raise UserError(f"there is no run in {output_dir / 'runs'}: train one first.")
    raise RunFolderError(f"there is no run `{run}`; {did_you_mean(run, runs)}")


def find_checkpoint(folder: RunFolder) -> Path:
    """Return a run's newest good checkpoint; newer ones that are damaged are named. Raises RunFolderError."""
    checkpoint, problems = newest_good_checkpoint(folder.checkpoints)
    for problem in problems:
        print(problem)
    if checkpoint is None:
        raise RunFolderError(f"{folder.root} has no checkpoint yet.")
    return checkpoint


def read_config(folder: RunFolder) -> RunConfig:
    """Return the configuration that a run was trained with. Raises RunFolderError or ConfigError."""
    if not folder.config.is_file():
        raise RunFolderError(f"{folder.config} is missing, so that nobody knows what the run is.")
    return from_plain(yaml.safe_load(folder.config.read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialWeights:
    """The checkpoint that a run starts from. `name` is `RUN@STEP-FINGERPRINT`, a part of the run's identity."""

    asked_for: str
    name: str
    folder: RunFolder
    checkpoint: Path

    def record(self) -> dict[str, Any]:
        """Return what the new run's folder keeps of it."""
        return {
            "asked_for": self.asked_for,
            "name": self.name,
            "folder": str(self.folder.root),
            "checkpoint": str(self.checkpoint),
        }

    def check_tokenizer(self, snapshot: Snapshot, fingerprint: str) -> None:
        """Raise CheckpointError unless the weights are of a model that reads the tokens of this tokenizer."""
        theirs = (snapshot.state.get("fingerprints") or {}).get("tokenizer")
        if theirs != fingerprint:
            raise CheckpointError(
                f"{self.name} was trained with another tokenizer ({str(theirs)[:8]}) than this run has "
                f"({fingerprint[:8]}): its weights mean other tokens. Take its `data` and `tokenizer`, or give its "
                "tokenizer with `tokenizer=file`."
            )


def recorded_initial_weights(folder: RunFolder) -> InitialWeights | None:
    """Return what `InitialWeights.record` kept in a run's folder; None for a run that started from nothing."""
    values = folder.read_json(INITIAL)
    if values is None:
        return None
    return InitialWeights(
        asked_for=values["asked_for"],
        name=values["name"],
        folder=RunFolder(Path(values["folder"])),
        checkpoint=Path(values["checkpoint"]),
    )


def find_initial_weights(config: RunConfig, asked_for: str) -> InitialWeights:
    """Return the checkpoint that `asked_for` means. Raises RunFolderError or CheckpointError when there is none."""
    given = AT_STEP.fullmatch(asked_for)
    if given is None or Path(asked_for).is_dir():
        folder = find_run(config, asked_for)
        checkpoint = find_checkpoint(folder)
    else:
        folder = find_run(config, given["run"])
        checkpoint = _checkpoint_at(folder, int(given["step"]))
    fingerprint = weights_fingerprint(checkpoint)
    if given is not None and given["fingerprint"] not in (None, fingerprint):
        raise CheckpointError(
            f"`init_from` {asked_for}: the weights at step {given['step']} are others now ({fingerprint})."
        )
    name = f"{folder.root.name}@{step_of(checkpoint)}-{fingerprint}"
    return InitialWeights(asked_for=asked_for, name=name, folder=folder, checkpoint=checkpoint.resolve())


def _checkpoint_at(folder: RunFolder, step: int) -> Path:
    kept = list_checkpoints(folder.checkpoints)
    wanted = folder_of(folder.checkpoints, step)
    if wanted not in kept:
        steps = ", ".join(str(step_of(path)) for path in kept) or "none"
        raise CheckpointError(f"{folder.root} has no checkpoint at step {step}; it has {steps}.")
    return wanted


def with_initial_weights(config: RunConfig) -> tuple[RunConfig, InitialWeights | None]:
    """Return the configuration with `init_from` as a part of its identity, and the weights it means.

    `latest` may lead to the very run that was started from what was the latest then: the same command goes on with it.
    """
    if config.init_from is None:
        return config, None
    if config.init_from == LATEST and (Path(config.output_dir) / LATEST).is_dir():
        folder = find_run(config, LATEST)
        recorded = recorded_initial_weights(folder)
        if recorded is not None and recorded.asked_for == LATEST:
            same = dataclasses.replace(config, init_from=recorded.name)
            newest = newest_attempt(Path(config.output_dir), run_id(same))
            if newest is not None and newest.root.resolve() == folder.root.resolve():
                return same, recorded
    initial = find_initial_weights(config, config.init_from)
    return dataclasses.replace(config, init_from=initial.name), initial


def choose_attempt(config: RunConfig) -> RunFolder:
    """Return the folder to work in: the newest attempt at this run, or a new one where `resume` asks for that.

    A path is looked at before a folder is made, so that a refused one leaves no empty attempt to go on with. What it
    leads to is written down: `outputs/latest` will soon lead to the new attempt itself.
    """
    output_dir, name = Path(config.output_dir), run_id(config)
    newest = newest_attempt(output_dir, name)
    if newest is not None and config.resume != "never":
        asked_for = newest.read_json(ORIGIN, {}).get("resume")
        if config.resume in ("auto", asked_for):
            return newest.create()
    if config.resume in ("auto", "never"):
        return new_attempt(output_dir, name)
    checkpoint = resolve_checkpoint(Path(config.resume))
    folder = new_attempt(output_dir, name)
    folder.write_json(ORIGIN, {"resume": config.resume, "checkpoint": str(checkpoint.resolve())})
    return folder
