"""Several ranks stop together, go on together, and go on in other shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ava_exp.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_USER_ERROR
from ava_exp.tracking.metrics import of_kind, read_metrics
from ava_exp.training.checkpoint import list_checkpoints, read_checkpoint
from tests.distributed.group import Command, Fault, run_in_group
from tests.faults.harness import NUM_STEPS, Experiment, observed

pytestmark = pytest.mark.timeout(600)

TWO = ("hardware.num_devices=2", "training.batch_size=2")
DETERMINISTIC = (
    "model.dropout=0",
    "sparsity.router.jitter=0",
    "model.load_balancing_weight=0",  # which depends on how a step is cut into micro-batches
    "optimizer.learning_rate=1e-3",
)


def steps_of(experiment: Experiment) -> list[dict[str, object]]:
    return of_kind(read_metrics(experiment.folder.metrics), "train")


def weights_of(experiment: Experiment) -> dict[str, torch.Tensor]:
    return read_checkpoint(list_checkpoints(experiment.folder.checkpoints)[-1]).tensors["model"]


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_what_happens_to_one_rank_happens_to_all(tmp_path: Path, backend: str) -> None:
    """A signal stops all ranks at one step, from which they go on bit for bit, with the random states of each; a loss
    that is none lets all of them skip its step, and too many of them are the end of all."""
    settings = (*TWO, "mod=random", f"distributed={backend}", "precision=mixed_bf16")
    whole, stopped, skipping, hopeless = (
        Experiment(output_dir=tmp_path / name, overrides=settings) for name in ("whole", "stopped", "skips", "ends")
    )
    ends = run_in_group(
        2,
        [
            Command(overrides=whole.command),
            Command(overrides=stopped.command, fault=Fault(rank=1, step=5, action="SIGUSR2")),
            Command(overrides=stopped.command),
            Command(overrides=skipping.command, fault=Fault(rank=1, step=5, action="nan")),
            Command(
                overrides=[*hopeless.command, "training.max_skipped_steps=1"],
                fault=Fault(rank=0, step=5, action="nan"),
            ),
        ],
    )
    expected = [EXIT_OK, EXIT_RESUMABLE, EXIT_OK, EXIT_OK, EXIT_USER_ERROR]
    assert [[ended.code for ended in each] for each in ends] == [[code] * 2 for code in expected], ends
    assert observed(stopped.folder.root) == observed(whole.folder.root)
    assert [step["skipped"] for step in steps_of(skipping)] == [number == 5 for number in range(1, NUM_STEPS + 1)]
    assert all("1 steps in a row had a loss or gradient that is not finite" in ended.error for ended in ends[4])
    assert list_checkpoints(hopeless.folder.checkpoints)[-1].name == "step_00000003"


def test_a_run_goes_on_in_other_shapes(tmp_path: Path) -> None:
    """With copies, cut into parts by torch and by DeepSpeed, with copies again, and as one process: the same sequences
    in the same order, and the same weights."""
    one = Experiment(output_dir=tmp_path / "one", overrides=(*DETERMINISTIC, "training.batch_size=4"))
    one.finish()
    other = Experiment(output_dir=tmp_path / "other", overrides=(*DETERMINISTIC, *TWO))
    shapes = ("ddp", "fsdp2", "zero3", "ddp")
    ends = run_in_group(
        2,
        [
            Command(overrides=[*other.command, f"distributed={shape}"], fault=Fault(rank=0, step=2, action="SIGTERM"))
            for shape in shapes
        ],
    )
    assert [[ended.code for ended in each] for each in ends] == [[EXIT_RESUMABLE] * 2] * len(shapes), ends
    assert len(steps_of(other)) == 2 * len(shapes) < NUM_STEPS
    other.finish(also=("hardware.num_devices=1",))
    for step, expected in zip(steps_of(other), steps_of(one), strict=True):
        assert (step["sample_crc32"], step["tokens"]) == (expected["sample_crc32"], expected["tokens"])
        assert step["loss"] == pytest.approx(expected["loss"], rel=2e-6)
    for name, weight in weights_of(one).items():
        assert (weights_of(other)[name] - weight).abs().max() <= 2e-5, name


def test_what_cannot_be_is_one_sentence_of_every_rank(tmp_path: Path) -> None:
    command = Experiment(output_dir=tmp_path, overrides=TWO).command
    wrong = {
        "distributed=single": "`distributed=single` is one process, but 2 were started. Choose `distributed=ddp`.",
        "hardware.num_devices=4": "`hardware.num_devices` is 4, but 2 processes were started",
    }
    ends = run_in_group(2, [Command(overrides=[*command, "hardware.strict=true", override]) for override in wrong])
    for each, sentence in zip(ends, wrong.values(), strict=True):
        assert [ended.code for ended in each] == [EXIT_USER_ERROR] * 2
        assert all(sentence in ended.error for ended in each), each
