"""Experts that are divided among ranks train as those of one process do."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from ava_exp.config.compose import compose
from ava_exp.config.machine import Precision
from ava_exp.errors import EXIT_OK, EXIT_RESUMABLE
from ava_exp.models.backends import BackEnd
from ava_exp.models.communication import Collective
from ava_exp.training.scaling import Assumptions, predict
from tests.distributed.group import Command, Fault, run_in_group
from tests.distributed.matrix import IN_MIXED, Difference, difference
from tests.distributed.test_data_parallel import DETERMINISTIC, TWO, steps_of
from tests.faults.harness import Experiment, observed

pytestmark = pytest.mark.timeout(600)

DIVIDED = "distributed.expert_parallel=2"
ALONE = ("hardware.num_devices=1", "training.batch_size=4")
BOUND = Difference(2e-5, 2e-5, 0.02)
ENDS = Fault(rank=1, step=9, action="SIGTERM")
DEEPSEEK = ("sparsity=moe", "router=deepseek", "sparsity.num_shared_experts=1", "training.recompute=selective")
MIXED = ("sparsity=moe", "precision=mixed_bf16")


def test_two_ranks_train_as_one_process_and_either_goes_on_for_the_other(tmp_path: Path) -> None:
    settings = (*DEEPSEEK, *DETERMINISTIC, "training.gradient_accumulation_steps=2")
    one = Experiment(output_dir=tmp_path / "one", overrides=(*settings, *ALONE))
    two, stopped, elsewhere = (
        Experiment(output_dir=tmp_path / name, overrides=(*settings, *TWO, DIVIDED)) for name in ("2", "stops", "there")
    )
    one_mixed = Experiment(output_dir=tmp_path / "one_mixed", overrides=(*MIXED, *DETERMINISTIC, *ALONE))
    two_mixed = Experiment(output_dir=tmp_path / "two_mixed", overrides=(*MIXED, *DETERMINISTIC, *TWO, DIVIDED))
    ends = run_in_group(
        2,
        [
            Command(overrides=two.command),
            Command(overrides=stopped.command, fault=ENDS),
            Command(overrides=stopped.command),
            Command(overrides=elsewhere.command, fault=ENDS),
            Command(overrides=two_mixed.command),
        ],
    )
    expected = [EXIT_OK, EXIT_RESUMABLE, EXIT_OK, EXIT_RESUMABLE, EXIT_OK]
    assert [[ended.code for ended in each] for each in ends] == [[code] * 2 for code in expected], ends
    one.finish()
    one_mixed.finish()
    elsewhere.finish(also=("hardware.num_devices=1", "distributed.expert_parallel=1"))
    assert observed(stopped.folder.root) == observed(two.folder.root)
    assert (found := difference(two.folder, one.folder)).is_within(BOUND), found
    assert difference(elsewhere.folder, one.folder).weights <= BOUND.weights, "its micro-batches are smaller"
    assert (found := difference(two_mixed.folder, one_mixed.folder)).is_within(IN_MIXED), found
    assumptions = Assumptions(mfu=0.3, link_utilisation=0.8, overlap=1.0)
    plan = predict(compose(two.command), BackEnd.ddp, assumptions, precision=Precision.fp32, expert_parallel=2)
    measured = [step["exchanged_bytes"] for step in steps_of(two)]
    assert statistics.mean(measured) == pytest.approx(2 * plan.sent[Collective.all_to_all], rel=0.1)


def test_two_pairs_of_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    """Each pair has all experts; layers that tokens skip, and the clipping of one norm, besides."""
    settings = ("sparsity=moe", "mod=learned", "mod.layers=alternating", "training.gradient_clip_val=0.1")
    one = Experiment(output_dir=tmp_path / "one", overrides=(*settings, *DETERMINISTIC, *ALONE))
    four = Experiment(
        output_dir=tmp_path / "four",
        overrides=(*settings, *DETERMINISTIC, "training.batch_size=1", "hardware.num_devices=4", DIVIDED),
    )
    (ends,) = run_in_group(4, [Command(overrides=four.command)])
    assert [ended.code for ended in ends] == [EXIT_OK] * 4, ends
    one.finish()
    assert (found := difference(four.folder, one.folder)).is_within(BOUND), found
