"""Runs on a GPU of this machine, or on several, where there are any: what they compute is what the CPU computes.

`python -m pytest -m gpu` runs these alone. Everything about GPUs that needs none is tested elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ava_exp.tracking.metrics import of_kind, read_metrics
from tests.distributed.group import Command, run_in_group
from tests.faults.harness import Experiment

KIND = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
NUM_GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(KIND is None, reason="needs a GPU: CUDA or MPS"),
]
needs_two = pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs two CUDA devices, and here are {NUM_GPUS}")

SETTINGS = ("model.dropout=0", "optimizer.learning_rate=1e-3", "training.batch_size=4")
KINDS = {
    "dense": ("sparsity=dense",),
    "experts": ("sparsity=moe", "router=topk"),
    "experts and depth": ("sparsity=moe", "router=topk", "mod=learned", "mod.layers=alternating"),
}
BACK_ENDS = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "ddp distributed.expert_parallel=2")


def run(folder: Path, *overrides: str) -> Experiment:
    return Experiment(output_dir=folder, overrides=(*SETTINGS, *overrides))


def losses(experiment: Experiment) -> list[float]:
    return [float(step["loss"]) for step in of_kind(read_metrics(experiment.folder.metrics), "train")]


def runtime_of(experiment: Experiment) -> dict[str, Any]:
    found: dict[str, Any] = experiment.folder.read_json("summary.json")["runtime"]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_trains_as_the_cpu_does(tmp_path: Path, kind: str) -> None:
    here = run(tmp_path / "cpu", *KINDS[kind])
    there = run(tmp_path / "gpu", *KINDS[kind], f"hardware={'auto' if KIND == 'cuda' else KIND}")
    here.finish()
    there.finish()
    assert runtime_of(there)["device"] == KIND
    assert losses(there) == pytest.approx(losses(here), rel=1e-3)


def test_the_precision_that_is_chosen_trains_as_well(tmp_path: Path) -> None:
    here = run(tmp_path / "cpu", "sparsity=moe")
    there = run(tmp_path / "gpu", "sparsity=moe", "hardware=auto", "precision=auto")
    here.finish()
    there.finish()
    assert KIND != "cuda" or runtime_of(there)["precision"].startswith("mixed_")
    assert losses(there) == pytest.approx(losses(here), rel=0.02)


@needs_two
@pytest.mark.parametrize("backend", BACK_ENDS)
def test_two_gpus_train_as_one_process_does(tmp_path: Path, backend: str) -> None:
    one = run(tmp_path / "one", "sparsity=moe")
    shape = ("hardware=auto", "hardware.num_devices=2", "training.batch_size=2", *f"distributed={backend}".split())
    two = run(tmp_path / "two", "sparsity=moe", *shape)
    one.finish()
    assert [ended.code for ended in run_in_group(2, [Command(overrides=two.command)])[0]] == [0, 0]
    assert runtime_of(two)["device"] == "cuda"
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
