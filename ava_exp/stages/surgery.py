"""Change the experts of a trained run, and write what comes of it as a run folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from ava_exp.config.run import RunConfig
from ava_exp.config.stage import SurgeryConfig
from ava_exp.config.surgery import SETTINGS, SurgeryKind
from ava_exp.data.loader import EvaluationLoader
from ava_exp.errors import EXIT_OK
from ava_exp.losses.terms import build_losses, require_balance_loss
from ava_exp.models.surgery import Parameters, Surgeon, SurgeryReport
from ava_exp.stages import assembly
from ava_exp.stages.steps import announce
from ava_exp.stages.trained import SavedRun, open_saved_run, set_capacity
from ava_exp.tracking.folder import RunFolder, new_attempt
from ava_exp.tracking.metrics import MetricsFile
from ava_exp.training.checkpoint import write_checkpoint
from ava_exp.training.history import RoutingHistory
from ava_exp.training.saver import restore_snapshot, take_snapshot

SUFFIX = "-surgery"


def run(config: RunConfig) -> int:
    """Do the operation, print what it did to the loss, and write the result. Return the exit code."""
    settings = config.stage
    assert isinstance(settings, SurgeryConfig)
    saved = open_saved_run(config, settings.run)
    if settings.operation is SurgeryKind.scale_load_balancing:
        require_balance_loss(build_losses(saved.config.sparsity))
    model = assembly.build_decoder(saved.config, saved.runtime)
    updater = assembly.build_updater(saved.config, saved.runtime, model)
    surgeon = Surgeon(model, updater)
    set_capacity(model, saved.snapshot.state["train"])
    state = restore_snapshot(saved.snapshot, updater, reset_optimizer=False, surgeon=surgeon)
    batches = EvaluationLoader(
        saved.data.validation,
        sequence_length=saved.config.data.sequence_length,
        batch_size=saved.runtime.resolution.batch_size,
        max_tokens=settings.max_tokens,
        mask_documents=saved.config.data.mask_documents,
    )
    report = surgeon.operate(settings, list(batches), step=state.step, device=saved.runtime.device)
    state.mod_capacity = model.mod_capacity
    if settings.operation not in SETTINGS:
        state.routing = RoutingHistory()
    _print(report)
    folder = new_attempt(Path(config.output_dir), saved.folder.root.name.removesuffix(SUFFIX) + SUFFIX)
    extra = {"fingerprints": saved.snapshot.state.get("fingerprints"), "run": folder.root.name}
    checkpoint = write_checkpoint(folder.checkpoints, take_snapshot(updater, state, extra, surgeon))
    _describe(folder, saved, report, state.step)
    announce(config, folder)
    print(f"Checkpoint: {checkpoint}")
    print(f"Train on with `resume={folder.root}`; look at it with `stage.run={folder.root.name}`.")
    return EXIT_OK


def _print(report: SurgeryReport) -> None:
    for line in report.done:
        print(line)
    print(f"loss {report.loss_before:.4f} before, {report.loss_after:.4f} after, on validation text")
    print(f"{_in_words(report.before)} before, {_in_words(report.after)} after")


def _in_words(parameters: Parameters) -> str:
    return f"{parameters.total:,} parameters ({parameters.active:,} active)"


def _describe(folder: RunFolder, saved: SavedRun, report: SurgeryReport, step: int) -> None:
    """Write down what the new run is: the configuration it was made from, and what was done to it."""
    for name in (saved.folder.config.name, saved.folder.resolution.name):
        shutil.copyfile(saved.folder.root / name, folder.root / name)
    folder.write_json("surgery.json", {"run": saved.folder.root.name, **report.record(step)})
    with MetricsFile(folder.metrics) as metrics:
        metrics.append(report.record(step))
