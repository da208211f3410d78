"""Several ranks compute what one process computes on the same global batches."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ava_exp.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_USER_ERROR
from ava_exp.tracking.metrics import of_kind, read_metrics
from ava_exp.training.checkpoint import list_checkpoints, read_checkpoint
from tests.distributed.ranks import RanksEnded, start_ranks
from tests.faults.harness import NUM_STEPS, Experiment

pytestmark = pytest.mark.timeout(600)

DETERMINISTIC = ("model.dropout=0", "hardware.num_devices=2")
KINDS = {
    "dense": ("sparsity=dense",),
    "topk": ("sparsity=moe", "router=topk"),
    "three experts": ("sparsity=moe", "router=topk", "model.num_experts=3"),
    "deepseek": ("sparsity=moe", "router=deepseek"),
    "learned depth": ("sparsity=dense", "mod=learned"),
    "hybrid": ("sparsity=moe", "mod=learned", "mod.layers=alternating"),
    "mixture of heads": (
        "sparsity=dense",
        "attention=mixture_of_heads",
        "attention.num_shared_heads=1",
        "attention.heads_per_token=1",
    ),
    "multi-token": ("sparsity=moe", "prediction=multi_token", "loss=label_smoothing"),
}


def trained(experiment: Experiment, num_ranks: int, *also: str) -> RanksEnded:
    ended = start_ranks(num_ranks, [*experiment.command, *also]).wait()
    assert set(ended.codes) == {EXIT_OK}, str(ended)
    return ended


def steps_of(experiment: Experiment) -> list[dict[str, object]]:
    return of_kind(read_metrics(experiment.folder.metrics), "train")


def weights_of(experiment: Experiment) -> dict[str, torch.Tensor]:
    return read_checkpoint(list_checkpoints(experiment.folder.checkpoints)[-1]).tensors["model"]


def pair(tmp_path: Path, settings: Sequence[str]) -> tuple[Experiment, Experiment]:
    """Return a run of one process, which is finished, and one of two ranks with the same global batch."""
    alone = ("training.batch_size=4", "hardware.num_devices=1")
    one = Experiment(output_dir=tmp_path / "one", overrides=(*settings, *alone))
    one.finish()
    return one, Experiment(output_dir=tmp_path / "two", overrides=(*settings, "training.batch_size=2"))


def assert_same_training(one: Experiment, other: Experiment, tolerance: float) -> None:
    assert len(steps_of(one)) == len(steps_of(other)) == NUM_STEPS
    for step, reference in zip(steps_of(other), steps_of(one), strict=True):
        assert step["sample_crc32"] == reference["sample_crc32"]
        assert step["tokens"] == reference["tokens"]
        for name in [key for key in reference if key.endswith("loss") or key in ("grad_norm", "output_entropy")]:
            assert step[name] == pytest.approx(reference[name], rel=tolerance), (name, step["step"])
    for name, weight in weights_of(one).items():
        difference = (weights_of(other)[name].double() - weight.double()).abs().max().item()
        assert difference <= tolerance, name


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one_process_does(tmp_path: Path, kind: str, backend: str) -> None:
    accumulation = 2 if kind in ("dense", "hybrid") else 1
    settings = (*KINDS[kind], *DETERMINISTIC, f"training.gradient_accumulation_steps={accumulation}")
    one, two = pair(tmp_path, settings)
    ended = trained(two, 2, f"distributed={backend}")
    assert ended.outs[1] == "" and "Validation:" in ended.outs[0]
    assert_same_training(one, two, 2e-5)
    for step, reference in zip(steps_of(two), steps_of(one), strict=True):
        for name in ("expert_load", "visits_per_token", "layer_usage", "head_load"):
            if name in reference:
                for own, theirs in zip(step[name], reference[name], strict=True):
                    assert own == pytest.approx(theirs, abs=0.02), "a near tie may be decided the other way"


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
@pytest.mark.parametrize("precision", ["mixed_bf16", "bf16", "bf16 precision.stochastic_rounding=true"])
def test_sixteen_bits_train_as_well_on_two_ranks(tmp_path: Path, precision: str, backend: str) -> None:
    """Products of other shapes round apart: losses agree as 16 bits do, and ranks agree with each other exactly."""
    settings = (*DETERMINISTIC, *f"precision={precision}".split(), "training.gradient_accumulation_steps=2")
    one, two = pair(tmp_path, settings)
    trained(two, 2, f"distributed={backend}")
    for step, reference in zip(steps_of(two), steps_of(one), strict=True):
        assert step["loss"] == pytest.approx(reference["loss"], rel=0.02)


def wait_for_steps(experiment: Experiment, number: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        metrics = experiment.folder.metrics
        if metrics.exists() and len(of_kind(read_metrics(metrics), "train")) >= number:
            return
        time.sleep(0.05)
    raise AssertionError("no steps were taken")


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_a_signal_to_one_rank_stops_all_and_they_go_on_as_if_nothing_had_happened(tmp_path: Path, backend: str) -> None:
    """Random states, of dropout above all, are those of each rank."""
    settings = ("hardware.num_devices=2", "budget.steps=600", "evaluation.interval_steps=1000", "mod=random")
    settings += (f"distributed={backend}", "precision=mixed_bf16")
    whole = Experiment(output_dir=tmp_path / "whole", overrides=settings)
    trained(whole, 2)
    stopped = Experiment(output_dir=tmp_path / "stopped", overrides=settings)
    running = start_ranks(2, stopped.command)
    wait_for_steps(stopped, 5)
    running.signal(1, signal.SIGUSR2)
    ended = running.wait()
    assert ended.codes == [EXIT_RESUMABLE, EXIT_RESUMABLE], str(ended)
    assert 5 <= len(steps_of(stopped)) < 600
    trained(stopped, 2)
    assert [step["loss"] for step in steps_of(stopped)] == [step["loss"] for step in steps_of(whole)]
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(stopped)[name], weight), name


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, backend: str) -> None:
    settings = (*DETERMINISTIC, "training.batch_size=2", "budget.steps=600", "evaluation.interval_steps=1000")
    one = Experiment(
        output_dir=tmp_path / "one", overrides=(*settings, "training.gradient_accumulation_steps=2", "budget.steps=600")
    )
    one.finish()
    other = Experiment(output_dir=tmp_path / "other", overrides=settings)
    running = start_ranks(2, [*other.command, f"distributed={backend}"])
    wait_for_steps(other, 5)
    running.signal(0, signal.SIGTERM)
    assert running.wait().codes == [EXIT_RESUMABLE] * 2
    other.finish()
    assert [step["sample_crc32"] for step in steps_of(other)] == [step["sample_crc32"] for step in steps_of(one)]
    losses = [[float(step["loss"]) for step in steps_of(run)] for run in (one, other)]
    assert math.fsum(losses[1][-20:]) == pytest.approx(math.fsum(losses[0][-20:]), rel=1e-2)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["distributed=single"], "`distributed=single` is one process, but 2 were started. Choose `distributed=ddp`."),
        (
            ["hardware.num_devices=4", "hardware.strict=true"],
            "`hardware.num_devices` is 4, but 2 processes were started",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence_of_every_rank(tmp_path: Path, overrides: list[str], expected: str) -> None:
    experiment = Experiment(output_dir=tmp_path, overrides=(*DETERMINISTIC, *overrides))
    ended = start_ranks(2, experiment.command).wait()
    assert ended.codes == [EXIT_USER_ERROR] * 2, str(ended)
    assert all(expected in err and "Traceback" not in err for err in ended.errs), str(ended)


def test_one_process_is_no_data_parallelism(tmp_path: Path) -> None:
    ended = Experiment(output_dir=tmp_path, overrides=("distributed=ddp",)).run()
    assert ended.code == EXIT_USER_ERROR and "`distributed=ddp` needs several ranks" in ended.err
