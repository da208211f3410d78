"""A run whose experts were changed goes on like any other: killed, resumed, evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ava_exp.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_USER_ERROR
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import read_metrics
from ava_exp.training.checkpoint import list_checkpoints, read_checkpoint
from tests.faults.faults import STEP, Fault, kill_at_step
from tests.faults.harness import NUM_STEPS, SYNCHRONOUS, Experiment

STOP_AT_FIVE = Fault(action="SIGTERM", operation=STEP, at=5)


def operate(experiment: Experiment, *settings: str) -> RunFolder:
    """Operate on the run that was last written; return the folder of the result."""
    also = ["stage=surgery", "stage.run=latest", *(f"stage.{setting}" for setting in settings)]
    ended = experiment.run(also=also)
    assert ended.code == EXIT_OK, ended.out + ended.err
    assert "before, " in ended.out and "after, on validation text" in ended.out
    return experiment.folder


@pytest.fixture
def operated(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Experiment, RunFolder]:
    """A run that was stopped after five steps, with an expert more in one layer and one pruned in the other."""
    overrides = (SYNCHRONOUS, *getattr(request, "param", ()))
    experiment = Experiment(output_dir=tmp_path / "outputs", overrides=overrides, draw=False)
    assert experiment.run(STOP_AT_FIVE).code == EXIT_RESUMABLE
    operate(experiment, "operation=add_expert", "layer=0", "noise=0.1")
    return experiment, operate(experiment, "operation=prune_expert", "layer=1", "expert=2")


@pytest.mark.parametrize(
    "operated",
    [("precision=mixed_bf16",), ("router=deepseek", "precision=bf16"), ("router=expert_choice", "sparsity=moe")],
    ids=["mixed_bf16", "deepseek", "expert_choice"],
    indirect=True,
)
def test_training_goes_on_from_it_and_a_kill_leaves_no_trace(
    operated: tuple[Experiment, RunFolder], tmp_path: Path
) -> None:
    experiment, folder = operated
    killed = experiment.copy(tmp_path / "killed")
    also = [f"resume={folder.root}"]
    expected = experiment.finish(also=also)
    for step in (1, 4):
        assert killed.run(kill_at_step(step), also=also).killed
    assert killed.finish(also=also) == expected
    snapshot = read_checkpoint(list_checkpoints(experiment.folder.checkpoints)[-1])
    assert snapshot.step == NUM_STEPS
    experts = [snapshot.tensors["model"][f"blocks.{layer}.feed_forward.experts.up"].shape[0] for layer in (0, 1)]
    assert experts == [5, 3]
    operations = [event["operation"] for event in snapshot.state["surgery"]["history"]]
    assert operations == ["add_expert", "prune_expert"]
    last = read_metrics(experiment.folder.metrics)[-2]
    assert [len(load) for load in last["expert_load"]] == [5, 3]


def test_a_pruned_expert_comes_back_after_further_training(operated: tuple[Experiment, RunFolder]) -> None:
    experiment, folder = operated
    kept = read_checkpoint(list_checkpoints(folder.checkpoints)[-1]).tensors["pruned"]["0:experts.up"]
    experiment.finish(also=[f"resume={folder.root}"])
    restored = operate(experiment, "operation=restore_expert", "layer=1")
    model = read_checkpoint(list_checkpoints(restored.checkpoints)[-1]).tensors["model"]
    assert (model["blocks.1.feed_forward.experts.up"][2] == kept).all()


def test_it_is_evaluated_generates_and_is_on_record(operated: tuple[Experiment, RunFolder]) -> None:
    experiment, folder = operated
    record = read_metrics(folder.metrics)[-1]
    assert (record["kind"], record["operation"], record["step"]) == ("surgery", "prune_expert", 5)
    evaluated = experiment.run(also=["stage=evaluate", f"stage.run={folder.root.name}", "stage.max_tokens=50000"])
    assert evaluated.code == EXIT_OK
    report = json.loads(evaluated.out)
    assert report["run"] == folder.root.name and report["loss"] == pytest.approx(record["loss"], rel=1e-5)
    generated = experiment.run(also=["stage=generate", f"stage.run={folder.root}", "stage.max_new_tokens=3"])
    assert generated.code == EXIT_OK and generated.out


def test_what_cannot_be_is_one_line_and_leaves_no_folder(operated: tuple[Experiment, RunFolder]) -> None:
    experiment, folder = operated
    for settings, sentence in (
        (["operation=prune_expert", "layer=7"], "`layer` must be one with experts (0, 1), but is 7 instead."),
        (["operation=adjust_routing_temperature"], "`value` must be given"),
    ):
        also = ["stage=surgery", "stage.run=latest", *(f"stage.{setting}" for setting in settings)]
        ended = experiment.run(also=also)
        assert ended.code == EXIT_USER_ERROR and sentence in ended.err and "Traceback" not in ended.err
    assert experiment.folder.root == folder.root
