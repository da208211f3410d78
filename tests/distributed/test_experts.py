"""Experts that are divided among ranks train as those of one process do."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest

from ava_exp.config.compose import compose
from ava_exp.config.machine import Precision
from ava_exp.errors import EXIT_USER_ERROR
from ava_exp.models.backends import BackEnd
from ava_exp.models.communication import Collective
from ava_exp.tracking.metrics import of_kind, read_metrics
from ava_exp.training.checkpoint import list_checkpoints
from ava_exp.training.scaling import Assumptions, predict
from tests.distributed.group import Command, run_in_group
from tests.distributed.matrix import IN_FP32, difference
from tests.faults.harness import Experiment, observed

pytestmark = pytest.mark.timeout(600)

DIVIDED = "distributed.expert_parallel=2"
SETTINGS = (
    *("sparsity=moe", "router=deepseek", "sparsity.num_shared_experts=1", "training.recompute=selective"),
    *("training.gradient_clip_val=0.1", "model.dropout=0", "optimizer.learning_rate=1e-3", "budget.steps=8"),
)


def experiment(folder: Path, num_ranks: int) -> Experiment:
    """Return a run of four sequences a step."""
    shape = (f"hardware.num_devices={num_ranks}", f"training.batch_size={4 // num_ranks}")
    return Experiment(output_dir=folder, overrides=(*SETTINGS, *shape))


def divided(experiment: Experiment) -> Command:
    return Command(overrides=[*experiment.command, DIVIDED])


def go_back(experiment: Experiment) -> None:
    """Let a finished run be one that was killed after its last checkpoint but one."""
    shutil.rmtree(list_checkpoints(experiment.folder.checkpoints)[-1])
    status = experiment.folder.root / "status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "status": "running"}))


def test_two_ranks_train_as_one_process_and_either_goes_on_for_the_other(tmp_path: Path) -> None:
    one, two = experiment(tmp_path / "one", 1), experiment(tmp_path / "two", 2)
    one.finish()
    assert [ended.code for ended in run_in_group(2, [divided(two)])[0]] == [0, 0]
    assert difference(two.folder, one.folder).is_within(IN_FP32)
    assert mean_bytes(two) == pytest.approx(predicted_bytes(two), rel=0.1)
    expected = observed(two.folder.root)
    go_back(two)
    elsewhere = Experiment(output_dir=tmp_path / "elsewhere", overrides=two.overrides)
    shutil.copytree(two.output_dir, elsewhere.output_dir, symlinks=True)
    assert [ended.code for ended in run_in_group(2, [divided(two)])[0]] == [0, 0]
    assert observed(two.folder.root) == expected
    elsewhere.finish()
    assert difference(elsewhere.folder, one.folder).weights < 1e-5, "with other micro-batches, and so balance losses"


def mean_bytes(experiment: Experiment) -> float:
    return statistics.mean(
        step["exchanged_bytes"] for step in of_kind(read_metrics(experiment.folder.metrics), "train")
    )


def predicted_bytes(experiment: Experiment) -> float:
    """Return what the planner says of both ranks together."""
    assumptions = Assumptions(mfu=0.3, link_utilisation=0.8, overlap=1.0)
    config = compose([*experiment.command, DIVIDED])
    plan = predict(config, BackEnd.ddp, assumptions, precision=Precision.fp32, expert_parallel=2)
    return 2 * plan.sent[Collective.all_to_all]


def test_one_process_does_not_quietly_have_all_experts(tmp_path: Path) -> None:
    ended = experiment(tmp_path, 2).run(also=(DIVIDED,))
    assert ended.code == EXIT_USER_ERROR
    assert "`distributed.expert_parallel` must be a divisor of the number of ranks (1), but is 2 instead." in ended.err
