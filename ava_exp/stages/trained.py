"""Finds a trained run and loads its model, for the stages that use one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from ava_exp.config.identity import from_plain, run_id
from ava_exp.config.run import RunConfig
from ava_exp.data.prepare import PreparedData
from ava_exp.errors import RunFolderError, UserError, did_you_mean
from ava_exp.models.decoder import Decoder
from ava_exp.models.surgery import Surgeon
from ava_exp.runtime import DTYPES, Runtime, open_runtime
from ava_exp.stages import assembly
from ava_exp.tracking.folder import RunFolder, newest_attempt
from ava_exp.training.checkpoint import Snapshot, newest_good_checkpoint, read_checkpoint
from ava_exp.training.saver import follow_surgery, load_weights


@dataclasses.dataclass(kw_only=True, slots=True)
class TrainedRun:
    """A run and its model, in the precision it computes in, from its newest good checkpoint."""

    folder: RunFolder
    config: RunConfig
    runtime: Runtime
    data: PreparedData
    model: Decoder
    step: int


@dataclasses.dataclass(kw_only=True, slots=True)
class SavedRun:
    """A run and its newest good checkpoint, before a model is built."""

    folder: RunFolder
    config: RunConfig
    runtime: Runtime
    data: PreparedData
    snapshot: Snapshot


def open_trained_run(config: RunConfig, run: str | None) -> TrainedRun:
    """Load the run named `run` (a name, a path, or `latest`), or else the one that `config` trains.

    Raises RunFolderError when there is none.
    """
    saved = open_saved_run(config, run)
    trained = saved.config
    model = assembly.build_decoder(trained, saved.runtime)
    follow_surgery(saved.snapshot, Surgeon(model))
    if trained.precision.inference is not None:
        model = model.to(DTYPES[trained.precision.inference])
    load_weights(saved.snapshot, model.state_dict(keep_vars=True))
    set_capacity(model, saved.snapshot.state["train"])
    return TrainedRun(
        folder=saved.folder,
        config=trained,
        runtime=saved.runtime,
        data=saved.data,
        model=model.eval(),
        step=saved.snapshot.step,
    )


def set_capacity(model: Decoder, state: dict[str, Any]) -> None:
    """Let layers process the share of tokens that they did when the state was saved: annealing may be under way."""
    if (capacity := state.get("mod_capacity")) is not None:
        model.mod_capacity = capacity


def open_saved_run(config: RunConfig, run: str | None) -> SavedRun:
    """Find a run as `open_trained_run` does, and read what it left. Raises RunFolderError when there is nothing."""
    folder = find_run(config, run)
    checkpoint, problems = newest_good_checkpoint(folder.checkpoints)
    for problem in problems:
        print(problem)
    if checkpoint is None:
        raise RunFolderError(f"{folder.root} has no checkpoint yet.")
    if not folder.config.is_file():
        raise RunFolderError(f"{folder.config} is missing, so that nobody knows what the run is.")
    trained = from_plain(yaml.safe_load(folder.config.read_text(encoding="utf-8")))
    trained.hardware, trained.cache_dir = config.hardware, config.cache_dir
    if config.precision.inference is not None:
        trained.precision.inference = config.precision.inference
    stored = (folder.read_json("resolution.json") or {}).get("runtime")
    runtime = open_runtime(
        trained.hardware,
        trained.precision,
        batch_size=trained.training.batch_size,
        cache_dir=Path(trained.cache_dir),
        stored=stored,
    )
    data = assembly.prepare(trained, lambda line: None)
    return SavedRun(folder=folder, config=trained, runtime=runtime, data=data, snapshot=read_checkpoint(checkpoint))


def find_run(config: RunConfig, run: str | None) -> RunFolder:
    """Return the folder of a run given by name or path, or of the one that `config` trains."""
    output_dir = Path(config.output_dir)
    runs = sorted(path.name for path in (output_dir / "runs").glob("*") if path.is_dir())
    if run is None:
        folder = newest_attempt(output_dir, run_id(config))
        if folder is None:
            known = f"Name one with `stage.run=`: {', '.join(runs)}." if runs else "There are no runs yet: train one."
            raise RunFolderError(
                f"the run {run_id(config)}, which this command line describes, does not exist. {known}"
            )
        return folder
    for candidate in (output_dir / "latest" if run == "latest" else output_dir / "runs" / run, Path(run)):
        if candidate.is_dir():
            return RunFolder(candidate.resolve())
    if not runs:
        raise UserError(f"there is no run in {output_dir / 'runs'}: train one first.")
    raise RunFolderError(f"there is no run `{run}`; {did_you_mean(run, runs)}")
