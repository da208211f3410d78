"""Signals: what they ask for is done once, whole, and however often they come."""

from __future__ import annotations

import pytest

from ava_exp.errors import EXIT_RESUMABLE
from ava_exp.tracking.metrics import of_kind, read_metrics
from ava_exp.training.checkpoint import list_checkpoints, step_of, verify_checkpoint
from tests.faults.faults import STEP, Fault
from tests.faults.harness import SYNCHRONOUS, Experiment, uninterrupted


def at_step(name: str, step: int) -> Fault:
    return Fault(action=name, operation="step", at=step)


def in_every_save(name: str) -> Fault:
    """Send a signal at each of the operations on checkpoints, removals included."""
    return Fault(action=name, path="/checkpoints/", times=10_000)


def is_new_checkpoint(path: str) -> bool:
    return "/checkpoints/" in path and path.endswith(".tmp")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("step", [1, 5, 6, 12])
def test_16_a_stop_signal_saves_at_that_very_step(experiment: Experiment, name: str, step: int) -> None:
    ended = experiment.run(at_step(name, step))
    assert ended.code == EXIT_RESUMABLE
    assert f"Stopped by {name} at step {step} of 12, saved. The same command goes on from there." in ended.out
    assert step_of(experiment.checkpoints[-1]) == step
    assert ended.operations.count(("step", "")) == step
    assert experiment.folder.read_json("status.json")["status"] == "stopped"
    assert experiment.finish() == uninterrupted()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_is_answered_at_once_with_a_line(experiment: Experiment, name: str) -> None:
    ended = experiment.run(at_step(name, 5), at_step(name, 5))
    assert ended.err.count(f"{name}: ") == 1
    assert "saving" in ended.err


def test_a_signal_during_preparation_stops_before_the_first_step(experiment: Experiment) -> None:
    prepared = Fault(action="SIGINT", operation="write", path="config.yaml")
    ended = experiment.run(prepared)
    assert ended.code == EXIT_RESUMABLE and (STEP, "") not in ended.operations
    assert "Stopped by SIGINT at step 0 of 12. The same command goes on" in ended.out, "nothing was there to be saved"
    assert experiment.run(at_step("SIGTERM", 5)).code == EXIT_RESUMABLE
    again = experiment.run(prepared)
    assert again.code == EXIT_RESUMABLE and (STEP, "") not in again.operations
    assert "Stopped by SIGINT at step 5 of 12, saved." in again.out
    assert experiment.finish() == uninterrupted()


@pytest.mark.parametrize("step", [6, 12])
def test_an_evaluation_that_a_signal_cut_short_is_made_up_for_once(experiment: Experiment, step: int) -> None:
    """At the next start, of which there may be several before the next checkpoint."""
    experiment.overrides = (SYNCHRONOUS,)
    assert experiment.run(at_step("SIGINT", step)).code == EXIT_RESUMABLE
    evaluated = of_kind(read_metrics(experiment.folder.metrics), "eval")
    assert [record["step"] for record in evaluated] == list(range(3, step, 3))
    kill_after_it = Fault(operation="write", path=r"metrics\.jsonl", after=True)
    for _ in range(2):  # no checkpoint knows of it yet, nor of the choices that the next one is compared with
        assert experiment.run(kill_after_it).killed
    assert experiment.finish() == uninterrupted()
    assert [path.name for path in experiment.folder.checkpoints.iterdir() if path.suffix] == []


def test_a_signal_while_an_evaluation_is_made_up_for(experiment: Experiment) -> None:
    for _ in range(3):
        signals = (Fault(action="SIGINT", operation="write", path="config.yaml"), at_step("SIGINT", 6))
        ended = experiment.run(*signals if experiment.output_dir.exists() else signals[1:])
        assert ended.code == EXIT_RESUMABLE
        assert step_of(experiment.checkpoints[-1]) == 6
    assert experiment.finish() == uninterrupted()


@pytest.mark.parametrize("step", [1, 4, 6])
def test_sigusr1_saves_and_goes_on(experiment: Experiment, step: int) -> None:
    ended = experiment.run(at_step("SIGUSR1", step))
    assert ended.code == 0
    renamed = [path for operation, path in ended.operations if operation == "rename" and is_new_checkpoint(path)]
    assert [path[-6:-4] for path in renamed] == [f"{n:02d}" for n in sorted({step, 3, 6, 9, 12})]
    assert experiment.finish() == uninterrupted()


def test_many_sigusr1_cost_one_save_a_step(experiment: Experiment) -> None:
    ended = experiment.run(in_every_save("SIGUSR1"))
    assert ended.code == 0
    renamed = [path for operation, path in ended.operations if operation == "rename" and is_new_checkpoint(path)]
    assert len(renamed) == len(set(renamed)) <= 12
    assert experiment.finish() == uninterrupted()


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_17_a_second_signal_while_saving(experiment: Experiment, name: str, asynchronous: str) -> None:
    """The first one makes it save; the second comes in the middle of that save."""
    experiment.overrides = (f"checkpoint.asynchronous={asynchronous}",)
    second = Fault(action=name, operation="write", path=r"step_00000005\.tmp", at=2)
    ended = experiment.run(at_step("SIGTERM", 5), second)
    assert ended.code == EXIT_RESUMABLE
    assert [step_of(path) for path in experiment.checkpoints] == [3, 5]
    assert experiment.finish() == uninterrupted()


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_17_a_storm_of_signals_while_saving(experiment: Experiment, name: str, asynchronous: str) -> None:
    experiment.overrides = (f"checkpoint.asynchronous={asynchronous}",)
    for _ in range(2):
        ended = experiment.run(at_step(name, 2), in_every_save(name), in_every_save("SIGUSR1"))
        assert ended.code == EXIT_RESUMABLE
    folders = sorted(experiment.folder.checkpoints.iterdir())
    assert folders == list_checkpoints(experiment.folder.checkpoints)
    assert [verify_checkpoint(path) for path in folders] == [None] * len(folders)
    assert [step_of(path) for path in folders] in ([2, 3], [2, 4], [2, 3, 4])
    assert experiment.finish() == uninterrupted()


def test_17_killed_while_answering_a_signal(experiment: Experiment) -> None:
    """The grace period is over in the middle of the save: it is discarded whole."""
    ended = experiment.run(at_step("SIGTERM", 5), Fault(action="tear", operation="write", path=r"step_00000005\.tmp"))
    assert ended.killed
    assert [step_of(path) for path in experiment.checkpoints] == [3]
    again = experiment.run(at_step("SIGTERM", 1))
    assert "Going on from step 3" in again.out
    assert experiment.finish() == uninterrupted()


def test_stopped_again_and_again_it_still_ends_the_same(experiment: Experiment) -> None:
    for step in range(1, 12):
        assert experiment.run(at_step("SIGTERM", 1)).code == EXIT_RESUMABLE
        assert step_of(experiment.checkpoints[-1]) == step
    assert experiment.finish() == uninterrupted()
