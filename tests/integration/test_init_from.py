"""A run that starts from another's weights: which, in whose name, killed and resumed, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from ava_exp.errors import EXIT_OK, EXIT_USER_ERROR
from ava_exp.tracking.folder import RunFolder
from ava_exp.training.checkpoint import list_checkpoints, read_checkpoint, step_of, weights_fingerprint
from tests.faults.faults import kill_at_step
from tests.faults.harness import NUM_STEPS, SYNCHRONOUS, Experiment, harness

SECOND = ("seed=1", "data.sequence_length=24")
"""What makes the second run another one."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A finished run, which no test changes."""
    output_dir = tmp_path_factory.mktemp("source") / "outputs"
    experiment = Experiment(output_dir=output_dir, overrides=(SYNCHRONOUS,), draw=False)
    assert experiment.run().code == EXIT_OK
    return experiment


@pytest.fixture
def experiment(trained: Experiment, tmp_path: Path) -> Experiment:
    return trained.copy(tmp_path / "outputs")


def init_from(what: str, *also: str) -> list[str]:
    return [f"init_from={what}", *SECOND, *also]


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return read_checkpoint(list_checkpoints(folder.checkpoints)[-1]).tensors["model"]


def test_it_starts_from_the_weights_and_with_nothing_else(experiment: Experiment) -> None:
    source = experiment.folder
    ended = experiment.run(also=init_from("latest", "budget.steps=1", "optimizer.learning_rate=1e-30"))
    assert ended.code == EXIT_OK, ended.err
    assert experiment.folder.root != source.root
    assert f"Starting from the weights of {source.root.name}@{NUM_STEPS}-" in ended.out
    theirs, ours = weights(source), weights(experiment.folder)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    snapshot = read_checkpoint(experiment.checkpoints[-1])
    assert (snapshot.step, snapshot.state["train"]["step"]) == (1, 1)
    assert list(snapshot.state["train"]["evaluations"]) == ["1"]


@pytest.mark.parametrize("settings", [(), ("router=deepseek", "precision=mixed_bf16")], ids=["fp32", "deepseek"])
def test_a_kill_leaves_no_trace_and_latest_is_still_the_run_it_was(tmp_path: Path, settings: tuple[str, ...]) -> None:
    experiment = Experiment(output_dir=tmp_path / "outputs", overrides=(SYNCHRONOUS, *settings), draw=False)
    assert experiment.run().code == EXIT_OK
    killed = experiment.copy(tmp_path / "killed")
    expected = experiment.finish(also=init_from("latest"))
    for step in (2, 4):  # the first before anything was saved
        assert killed.run(kill_at_step(step), also=init_from("latest")).killed
    assert killed.finish(also=init_from("latest")) == expected
    assert len(list((killed.output_dir / "runs").iterdir())) == 2
    finished = killed.run(also=init_from("latest"))
    assert finished.code == EXIT_OK and "This run is finished" in finished.out


def test_the_source_and_its_weights_are_a_part_of_the_identity(experiment: Experiment) -> None:
    source = experiment.folder
    first = experiment.checkpoints[-1]
    name = f"{source.root.name}@{NUM_STEPS}-{weights_fingerprint(first)}"
    for what in ("latest", source.root.name, str(source.root), f"{source.root.name}@{NUM_STEPS}", name):
        assert experiment.run(also=init_from(what, "budget.steps=1")).code == EXIT_OK
        assert yaml.safe_load(experiment.folder.config.read_text())["init_from"] == name
        source.point_latest(experiment.output_dir)
    assert len(list((experiment.output_dir / "runs").iterdir())) == 2
    assert experiment.run(also=[f"budget.steps={NUM_STEPS + 1}"]).code == EXIT_OK
    assert experiment.run(also=init_from("latest", "budget.steps=1")).code == EXIT_OK
    assert len(list((experiment.output_dir / "runs").iterdir())) == 3


def test_an_older_checkpoint_can_be_named(experiment: Experiment) -> None:
    source, older = experiment.folder, experiment.checkpoints[0]
    also = init_from(f"{source.root.name}@{step_of(older)}", "budget.steps=1", "optimizer.learning_rate=1e-30")
    assert experiment.run(also=also).code == EXIT_OK
    assert torch.equal(
        weights(experiment.folder)["embedding.weight"], read_checkpoint(older).tensors["model"]["embedding.weight"]
    )


def test_it_is_found_by_its_command_line(experiment: Experiment) -> None:
    assert experiment.run(also=init_from("latest", "budget.steps=1")).code == EXIT_OK
    evaluated = experiment.run(also=init_from("latest", "stage=evaluate"))
    assert evaluated.code == EXIT_OK, evaluated.err
    assert json.loads(evaluated.out)["run"] == experiment.folder.root.name


def test_the_weights_may_come_from_a_run_whose_experts_were_changed(experiment: Experiment) -> None:
    also = ["stage=surgery", "stage.run=latest", "stage.operation=add_expert", "stage.layer=0"]
    assert experiment.run(also=also).code == EXIT_OK
    assert experiment.run(kill_at_step(5), also=init_from("latest")).killed
    experiment.finish(also=init_from("latest"))
    assert [weights(experiment.folder)[f"blocks.{layer}.feed_forward.experts.up"].shape[0] for layer in (0, 1)] == [
        5,
        4,
    ]


@pytest.mark.parametrize(
    ("what", "also", "message"),
    [
        ("tiny-00000000", (), "there is no run `tiny-00000000`"),
        ("NAME@5", (), "has no checkpoint at step 5; it has "),
        ("NAME@12-00000000", (), "the weights at step 12 are others now"),
        ("NAME", ("model.hidden_size=48",), "does not fit this run: "),
        ("NAME", ("model.num_layers=1",), "does not fit this run: the checkpoint holds another model"),
        ("NAME", ("sparsity.num_experts=8",), "does not fit this run: "),
        ("NAME", ("tokenizer.vocab_size=280",), "was trained with another tokenizer"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    experiment: Experiment, what: str, also: tuple[str, ...], message: str
) -> None:
    ended = experiment.run(also=init_from(what.replace("NAME", experiment.folder.root.name), *also))
    assert ended.code == EXIT_USER_ERROR
    assert message in ended.err
    assert ended.err.startswith("ava_exp: ") and ended.err.count("\n") == 1


def test_a_run_without_a_checkpoint_and_no_run_at_all_are_refused(experiment: Experiment, tmp_path: Path) -> None:
    (experiment.output_dir / "runs" / "empty" / "checkpoints").mkdir(parents=True)
    assert "has no checkpoint yet" in experiment.run(also=init_from("empty")).err
    alone = dataclasses.replace(experiment, output_dir=tmp_path / "alone", harness=harness())
    assert "train one first" in alone.run(also=init_from("latest")).err
