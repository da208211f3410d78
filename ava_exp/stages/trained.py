"""Finds a trained run and loads its model, for the stages that use one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ava_exp.config.run import RunConfig
from ava_exp.data.prepare import PreparedData
from ava_exp.models.decoder import Decoder
from ava_exp.models.surgery import Surgeon
from ava_exp.runtime import DTYPES, Runtime, open_runtime
from ava_exp.stages import assembly
from ava_exp.stages.runs import find_checkpoint, find_run, read_config
from ava_exp.tracking.folder import RunFolder
from ava_exp.training.checkpoint import Snapshot, read_checkpoint
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
    return TrainedRun(
        folder=saved.folder,
        config=saved.config,
        runtime=saved.runtime,
        data=saved.data,
        model=load_decoder(saved.config, saved.runtime, saved.snapshot),
        step=saved.snapshot.step,
    )


def load_decoder(config: RunConfig, runtime: Runtime, snapshot: Snapshot) -> Decoder:
    """Build a model with a snapshot's weights, to be used and not trained. Raises CheckpointError."""
    model = assembly.build_decoder(config, runtime)
    follow_surgery(snapshot, Surgeon(model))
    if config.precision.inference is not None:
        model = model.to(DTYPES[config.precision.inference])
    load_weights(snapshot, model.state_dict(keep_vars=True))
    return model.eval()


def open_saved_run(config: RunConfig, run: str | None) -> SavedRun:
    """Find a run as `open_trained_run` does, and read what it left. Raises RunFolderError when there is nothing."""
    folder = find_run(config, run)
    checkpoint = find_checkpoint(folder)
    trained = read_config(folder)
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
