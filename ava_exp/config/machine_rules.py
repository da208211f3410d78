"""The rules about the machine: precision of the device, files that must exist, writable folders, room on the disk."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ava_exp.config.data import FilesConfig, FileTokenizerConfig
from ava_exp.config.faults import Fault, Rule, Severity, error
from ava_exp.config.machine import DeviceType, Precision
from ava_exp.config.model import MoEConfig
from ava_exp.config.run import RunConfig
from ava_exp.config.stage import PlanConfig, ValidateConfig
from ava_exp.errors import must_be

BYTES_PER_PARAMETER = 12
"""Of a checkpoint: fp32 weights and the two states of Adam."""


def precision_faults(device: DeviceType, compute_capability: str | None, precision: Precision) -> list[Fault]:
    """Return what speaks against a precision on a kind of device; `compute_capability` as CUDA tells it ('8.0').

    Called here with the device that a configuration declares, and by the runtime with the one it finds.
    """
    is_half = precision in (Precision.fp16, Precision.mixed_fp16)
    if device is DeviceType.cpu and is_half:
        mend = "Take `precision=mixed_bf16`, `precision=bf16` or `precision=fp32`."
        return [error("precision.training", "a format that a CPU trains in", precision.value, mend)]
    if device is DeviceType.tpu and is_half:
        mend = "Take `precision=mixed_bf16`, `precision=bf16` or `precision=fp32`."
        return [error("precision.training", "a format that a TPU computes in", precision.value, mend)]
    is_brain = precision in (Precision.bf16, Precision.mixed_bf16)
    if device is DeviceType.cuda and compute_capability and float(compute_capability) < 8.0 and is_brain:
        message = (
            f"`precision.training` is {precision.value!r}, which compute capability {compute_capability} emulates."
        )
        return [Fault(Severity.warning, "precision.training", message, "`precision=mixed_fp16` is faster there.")]
    return []


def _declared_device_does_the_precision(config: RunConfig) -> Iterator[Fault]:
    for precision in {config.precision.training, config.precision.inference}:
        if precision is not None:
            yield from precision_faults(config.hardware.device, config.hardware.compute_capability, precision)


def offload_faults(device: DeviceType, offload_activations: bool) -> list[Fault]:
    """Return what speaks against offloading activations from a device. Called here and once the device is known."""
    if device is DeviceType.cpu and offload_activations:
        mend = "They are in the processor's memory already; `training.recompute` saves some of it."
        return [error("training.offload_activations", "false on a CPU", True, mend)]
    return []


def _declared_device_can_offload(config: RunConfig) -> Iterator[Fault]:
    yield from offload_faults(config.hardware.device, config.training.offload_activations)


def _data_files_exist(config: RunConfig) -> Iterator[Fault]:
    if not isinstance(config.data, FilesConfig):
        return
    if not config.data.paths:
        yield error("data.paths", "at least one file, folder or pattern", config.data.paths)
    for text in config.data.paths:
        path = Path(os.path.expanduser(text))
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)] or [path]
        if not any(match.exists() for match in matches):
            yield error("data.paths", "paths that exist", text)
        elif not any(_has_content(match) for match in matches):
            yield error("data.paths", "files with content, or folders with files", text)


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0


def _tokenizer_file_exists(config: RunConfig) -> Iterator[Fault]:
    if isinstance(config.tokenizer, FileTokenizerConfig) and not Path(config.tokenizer.path).is_file():
        yield error("tokenizer.path", "a file that exists", config.tokenizer.path)


def _resume_is_a_word_or_a_path(config: RunConfig) -> Iterator[Fault]:
    if config.resume not in ("auto", "never") and not Path(config.resume).exists():
        yield error("resume", "`auto`, `never` or the path of a checkpoint", config.resume)


def _folders_are_writable(config: RunConfig) -> Iterator[Fault]:
    if isinstance(config.stage, PlanConfig):
        return  # writes nothing
    for key in ("output_dir", "cache_dir"):
        text = getattr(config, key)
        obstacle = _obstacle(_nearest_existing(Path(text)))
        if obstacle:
            message = f"{must_be(key, 'a folder that can be written to', text)} {obstacle}"
            yield Fault(Severity.critical, key, message)


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder))


def _obstacle(folder: Path) -> str:
    """Return why nothing can be written below `folder`, found out by writing; empty when it can."""
    if not folder.is_dir():
        return f"`{folder}` is not a folder."
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as failure:
        return f"`{folder}`: {failure.strerror}."
    return ""


def _disk_has_room(config: RunConfig) -> Iterator[Fault]:
    folder = _nearest_existing(Path(config.output_dir))
    if isinstance(config.stage, (PlanConfig, ValidateConfig)) or not folder.is_dir():
        return
    checkpoints = config.checkpoint.save_total_limit + 2  # the latest, and the one that is being written
    needed = BYTES_PER_PARAMETER * checkpoints * _approximate_parameters(config)
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = (
            f"`{folder}` has {free / 2**30:.1f} GiB free; {checkpoints} checkpoints take about {needed / 2**30:.1f}."
        )
        yield Fault(Severity.warning, "output_dir", message, "Lower `checkpoint.save_total_limit`, or write elsewhere.")


def _approximate_parameters(config: RunConfig) -> int:
    """Matrices only, as if attention had full width and the feed-forward network were gated."""
    model = config.model
    experts = config.sparsity.num_experts if isinstance(config.sparsity, MoEConfig) else 1
    layer = 4 * model.hidden_size**2 + 3 * experts * model.hidden_size * (model.intermediate_size or 0)
    return model.vocab_size * model.hidden_size + model.num_layers * layer


RULES: tuple[Rule, ...] = (
    _declared_device_does_the_precision,
    _declared_device_can_offload,
    _data_files_exist,
    _tokenizer_file_exists,
    _resume_is_a_word_or_a_path,
    _folders_are_writable,
    _disk_has_room,
)
