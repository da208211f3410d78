"""Experts that are divided among ranks train as those of one process do."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch

from ava_exp.config.compose import compose
from ava_exp.config.machine import Precision
from ava_exp.models.backends import BackEnd
from ava_exp.models.communication import Collective
from ava_exp.training.checkpoint import list_checkpoints
from ava_exp.training.scaling import Assumptions, predict
from tests.distributed.test_data_parallel import (
    DETERMINISTIC,
    assert_same_training,
    pair,
    steps_of,
    trained,
    weights_of,
)
from tests.faults.harness import Experiment

pytestmark = pytest.mark.timeout(600)

DIVIDED = "distributed.expert_parallel=2"


def go_back(experiment: Experiment) -> None:
    """Let a finished run be one that was killed after its last checkpoint but one."""
    shutil.rmtree(list_checkpoints(experiment.folder.checkpoints)[-1])
    status = experiment.folder.root / "status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "status": "running"}))


def test_two_ranks_train_as_one_process_and_either_goes_on_for_the_other(tmp_path: Path) -> None:
    settings = ("sparsity=moe", "router=deepseek", "sparsity.num_shared_experts=1", "training.recompute=selective")
    one, two = pair(tmp_path, (*settings, *DETERMINISTIC, "training.gradient_accumulation_steps=2"))
    trained(two, 2, DIVIDED)
    assert_same_training(one, two, 2e-5)
    assumptions = Assumptions(mfu=0.3, link_utilisation=0.8, overlap=1.0)
    config = compose([*two.command, DIVIDED])
    plan = predict(config, BackEnd.ddp, assumptions, precision=Precision.fp32, expert_parallel=2)
    measured = [step["exchanged_bytes"] for step in steps_of(two)]
    assert statistics.mean(measured) == pytest.approx(2 * plan.sent[Collective.all_to_all], rel=0.1)
    expected = weights_of(two)
    go_back(two)
    elsewhere = Experiment(output_dir=tmp_path / "elsewhere", overrides=two.overrides)
    shutil.copytree(two.output_dir, elsewhere.output_dir, symlinks=True)
    trained(two, 2, DIVIDED)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(two).items())
    elsewhere.finish()
    assert_same_training(one, elsewhere, 2e-5)


def test_two_pairs_of_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    """Each pair has all experts; layers that tokens skip, and the clipping of one norm, besides."""
    settings = ("sparsity=moe", "mod=learned", "mod.layers=alternating", "training.gradient_clip_val=0.1")
    alone = Experiment(
        output_dir=tmp_path / "one",
        overrides=(*settings, "model.dropout=0", "training.batch_size=4", "hardware.num_devices=1"),
    )
    alone.finish()
    four = (*settings, "model.dropout=0", "training.batch_size=1", "hardware.num_devices=4", DIVIDED)
    together = Experiment(output_dir=tmp_path / "four", overrides=four)
    trained(together, 4)
    assert_same_training(alone, together, 2e-5)


def test_sixteen_bits_with_masters(tmp_path: Path) -> None:
    one, two = pair(tmp_path, ("sparsity=moe", "precision=mixed_bf16", *DETERMINISTIC))
    trained(two, 2, DIVIDED)
    for step, reference in zip(steps_of(two), steps_of(one), strict=True):
        assert step["loss"] == pytest.approx(reference["loss"], rel=0.02)
