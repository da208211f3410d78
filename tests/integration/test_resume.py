"""Going on with a run: the same command, another budget, another attempt, another run's checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ava_exp.errors import EXIT_RESUMABLE
from ava_exp.tracking.metrics import of_kind, read_metrics
from ava_exp.training.checkpoint import list_checkpoints, read_checkpoint, step_of
from tests.faults.faults import STEP, Fault, kill_at_step
from tests.faults.harness import NUM_STEPS, SYNCHRONOUS, Experiment, harness, observed, uninterrupted

TENSORS = ("model.safetensors", "optimizer.safetensors", "random.safetensors")


def stop_at(step: int) -> Fault:
    return Fault(action="SIGTERM", operation=STEP, at=step)


def attempts(experiment: Experiment) -> list[str]:
    """Return how the names of the attempts end, oldest first."""
    names = sorted(path.name for path in (experiment.output_dir / "runs").iterdir())
    return [name.removeprefix(names[0]) for name in names]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16 precision.stochastic_rounding=true", "mixed_bf16"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, precision: str, accumulation: int, asynchronous: str
) -> None:
    settings = (*f"precision={precision}".split(), f"training.gradient_accumulation_steps={accumulation}")
    experiment = Experiment(output_dir=tmp_path, overrides=(*settings, f"checkpoint.asynchronous={asynchronous}"))
    assert experiment.run(stop_at(5)).code == EXIT_RESUMABLE
    assert experiment.run(stop_at(3)).code == EXIT_RESUMABLE
    assert experiment.finish() == uninterrupted(*settings)


@pytest.mark.parametrize("router", ["deepseek", "expert_choice"])
def test_what_a_router_learned_beside_gradients_goes_on_too(tmp_path: Path, router: str) -> None:
    settings = ("sparsity=moe", f"router={router}", "precision=mixed_bf16")
    experiment = Experiment(output_dir=tmp_path, overrides=settings)
    assert experiment.run(stop_at(5)).code == EXIT_RESUMABLE
    assert experiment.finish() == uninterrupted(*settings)
    tensors = read_checkpoint(experiment.checkpoints[-1]).tensors["model"]
    learned = {
        name.rpartition(".")[2]: tensors[name] for name in tensors if ".router." in name and "weight" not in name
    }
    assert learned.keys() == ({"bias"} if router == "deepseek" else {"threshold", "num_updates"})
    assert all(value.any() for value in learned.values())
    if "bias" in learned:
        moves = learned["bias"] / 1e-3
        torch.testing.assert_close(moves, moves.round())  # twelve steps of 0.001, which bf16 would have rounded away
    else:
        assert learned["num_updates"] == NUM_STEPS


def test_draws_of_activations_and_all_terms_go_on_too(tmp_path: Path) -> None:
    settings = ("model.activation=hard_mixture", "loss=anti_repetition", "training.gradient_accumulation_steps=2")
    experiment = Experiment(output_dir=tmp_path, overrides=settings)
    assert experiment.run(stop_at(5)).code == EXIT_RESUMABLE
    assert experiment.finish() == uninterrupted(*settings)
    (*_, last) = of_kind(read_metrics(experiment.folder.metrics), "eval")
    assert sum(last["activation_weights"]["layer_1"].values()) == pytest.approx(1)
    (*_, step) = of_kind(read_metrics(experiment.folder.metrics), "train")
    assert {"immediate_repetition_loss", "repetition_loss", "output_entropy", "output_diversity"} < step.keys()


def test_prediction_heads_go_on_too(tmp_path: Path) -> None:
    settings = ("prediction=multi_token", "prediction.confidence_threshold_train=0.01", "precision=mixed_bf16")
    experiment = Experiment(output_dir=tmp_path, overrides=settings)
    assert experiment.run(stop_at(5)).code == EXIT_RESUMABLE
    assert experiment.finish() == uninterrupted(*settings)
    records = read_metrics(experiment.folder.metrics)
    assert all(record["mtp_loss"] > 0 for record in of_kind(records, "train")[-3:])
    assert all(0 <= record["future_acceptance_3"] <= 1 for record in of_kind(records, "eval"))
    tensors = read_checkpoint(experiment.checkpoints[-1]).tensors["model"]
    assert {name.split(".")[1] for name in tensors if name.startswith("prediction_heads.")} == {"0", "1", "2"}


def test_routers_are_watched_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """Churn, dead experts and specialisation, also when the stop comes while an evaluation is due."""
    files = ",".join(str(harness().folder / "corpus" / f"{number:02d}.txt") for number in range(24))
    settings = (f"data.paths=[{files}]", "sparsity.capacity_factor=1.0", "sparsity.num_experts=8")
    whole = Experiment(output_dir=tmp_path / "whole", overrides=settings)
    expected = whole.finish()
    evaluations = of_kind(read_metrics(whole.folder.metrics), "eval")
    assert ["churn" in record for record in evaluations] == [False, True, True, True]
    assert all(0 < churn < 1 for record in evaluations[1:] for churn in record["churn"])
    assert all(len(record["sources"]) > 1 and max(record["source_information"]) > 0 for record in evaluations)
    steps = of_kind(read_metrics(whole.folder.metrics), "train")
    assert any(sum(record["dropped_share"]) > 0 for record in steps)
    stopped = Experiment(output_dir=tmp_path / "stopped", overrides=settings)
    assert stopped.run(stop_at(6)).code == EXIT_RESUMABLE
    assert stopped.run(stop_at(6)).code == EXIT_RESUMABLE, "before the last evaluation"
    assert stopped.finish() == expected
    assert "routing.safetensors" in expected.final


def test_the_output_tells_where_it_goes_on(experiment: Experiment) -> None:
    experiment.run(stop_at(5))
    ended = experiment.run()
    assert f"Going on from step 5 ({experiment.folder.checkpoints / 'step_00000005'})" in ended.out
    assert attempts(experiment) == [""]


def test_a_finished_run_says_so_and_does_nothing(experiment: Experiment) -> None:
    experiment.finish()
    files = {path: path.read_bytes() for path in experiment.folder.checkpoints.rglob("*") if path.is_file()}
    metrics = experiment.folder.metrics.read_bytes()
    ended = experiment.run()
    assert ended.code == 0 and (STEP, "") not in ended.operations
    assert f"This run is finished. Its report: {experiment.folder.report}" in ended.out
    assert "Raise the budget to train it further, or start again with `resume=never`." in ended.out
    assert {path: path.read_bytes() for path in files} == files
    assert experiment.folder.metrics.read_bytes() == metrics


def test_a_raised_budget_goes_on_with_the_same_run(tmp_path: Path) -> None:
    constant = ("schedule=constant", "schedule.warmup_steps=2", SYNCHRONOUS)
    raised = Experiment(output_dir=tmp_path / "raised", overrides=constant)
    assert raised.run(also=["budget.steps=7"]).code == 0
    ended = raised.run(kill_at_step(4))  # the command of the whole run
    assert ended.killed and "Going on from step 7" in ended.out
    assert raised.finish().final["step"] == f"step_{NUM_STEPS:08d}"
    whole = Experiment(output_dir=tmp_path / "whole", overrides=constant)
    expected, actual = whole.finish(), observed(raised.folder.root)
    trained = [record for record in actual.records if record[0] == "train"]
    assert trained == [record for record in expected.records if record[0] == "train"]
    assert {name: actual.final[name] for name in TENSORS} == {name: expected.final[name] for name in TENSORS}
    assert attempts(raised) == [""]
    finished = raised.run(also=["budget.steps=7"])
    assert finished.code == 0 and "This run is finished" in finished.out, "a smaller budget is spent already"


def test_resume_never_starts_a_numbered_attempt_that_the_plain_command_goes_on_with(experiment: Experiment) -> None:
    experiment.finish()
    first = experiment.folder.root
    ended = experiment.run(stop_at(5), also=["resume=never"])
    assert ended.code == EXIT_RESUMABLE and "Going on" not in ended.out
    assert attempts(experiment) == ["", "-2"]
    assert experiment.folder.root.name == f"{first.name}-2"
    assert experiment.finish() == uninterrupted() == observed(first)
    assert attempts(experiment) == ["", "-2"]
    assert experiment.run(stop_at(1), also=["resume=never"]).code == EXIT_RESUMABLE
    assert attempts(experiment) == ["", "-2", "-3"]


@pytest.fixture
def source(experiment: Experiment) -> Experiment:
    """A run that was stopped after five steps, with checkpoints at 3 and 5."""
    experiment.overrides = (SYNCHRONOUS,)
    assert experiment.run(stop_at(5)).code == EXIT_RESUMABLE
    return experiment


@pytest.mark.parametrize("place", ["run", "checkpoints", "newest", "older", "latest", "relative", "copy"])
def test_resume_from_a_path_starts_an_attempt_there(source: Experiment, tmp_path: Path, place: str) -> None:
    root = source.folder.root
    copy = shutil.copytree(source.checkpoints[0], tmp_path / "my best model")
    paths = {
        "run": root,
        "checkpoints": root / "checkpoints",
        "newest": source.checkpoints[-1],
        "older": source.checkpoints[0],
        "latest": source.output_dir / "latest",
        "relative": Path(os.path.relpath(root, source.harness.folder)),
        "copy": copy,
    }
    start = 3 if place in ("older", "copy") else 5
    before = observed(root)
    actual = source.finish(also=[f"resume='{paths[place]}'"])
    expected = uninterrupted()
    assert actual.final == expected.final
    assert actual.records == [record for record in expected.records if int(str(record[1])) > start]
    assert attempts(source) == ["", "-2"]
    assert observed(root) == before, "where it came from is not touched"


@pytest.mark.parametrize("path", ["latest", "run"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_same_command_goes_on_with_the_attempt_that_it_started(source: Experiment, step: int, path: str) -> None:
    """Also when the path leads to the attempt itself by then, and when that attempt has no checkpoint of its own."""
    given = source.output_dir / "latest" if path == "latest" else source.folder.root
    for _ in range(2):
        ended = source.run(kill_at_step(step), also=[f"resume={given}"])
        assert ended.killed and "Going on from step" in ended.out
        assert attempts(source) == ["", "-2"]
    actual = source.finish(also=[f"resume={given}"])
    assert actual.final == uninterrupted().final
    assert [record[1] for record in actual.records if record[0] == "train"] == list(range(6, NUM_STEPS + 1))
    assert attempts(source) == ["", "-2"]


def test_the_plain_command_goes_on_with_an_attempt_from_a_path_where_that_began(source: Experiment) -> None:
    assert source.run(kill_at_step(1), also=[f"resume={source.checkpoints[0]}"]).killed
    ended = source.run(stop_at(1))
    assert "Going on from step 3" in ended.out, "never a silent restart from zero"
    assert source.finish().final == uninterrupted().final
    assert attempts(source) == ["", "-2"]


def test_a_path_to_a_run_without_steps_left_says_so(source: Experiment) -> None:
    source.finish()
    ended = source.run(also=[f"resume={source.folder.root}"])
    assert ended.code == 0 and "all 12 steps of the budget: raise the budget" in ended.out
    assert (STEP, "") not in ended.operations


def test_a_path_to_nothing_is_refused_and_leaves_no_attempt(source: Experiment, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path, source.folder.logs):
        ended = source.run(also=[f"resume={path}"])
        assert ended.code == 2 and "ava_exp: `resume` must be" in ended.err and str(path) in ended.err
    assert attempts(source) == [""]
    assert source.finish() == uninterrupted()


def test_a_checkpoint_of_another_model_is_refused(source: Experiment) -> None:
    path = source.folder.root
    for override, sentence in (
        ("model.num_layers=3", "the checkpoint holds another model"),
        ("model.hidden_size=64", "must be of shape"),
        ("model.num_experts=8", "must be of shape"),
    ):
        ended = source.run(also=[override, f"resume={path}"])
        assert ended.code == 2 and sentence in ended.err and "Traceback" not in ended.err


def test_reset_optimizer_keeps_the_weights_and_forgets_the_moments(source: Experiment, tmp_path: Path) -> None:
    kept, reset = source.copy(tmp_path / "kept"), source.copy(tmp_path / "reset")
    ended = reset.run(also=["reset_optimizer=true"])
    assert ended.code == 0 and "Going on from step 5" in ended.out and "with a new optimizer" in ended.out
    expected, actual = kept.finish().records, observed(reset.folder.root).records
    assert len(expected) == len(actual)
    first = next(index for index, record in enumerate(expected) if record[:2] == ("train", 6))
    assert actual[: first + 1] == expected[: first + 1], (
        "weights, samples, random states and learning rate are the same"
    )
    changed = [index for index, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b]
    assert changed and changed[0] == first + 1


def test_reset_optimizer_at_a_path_is_done_once(source: Experiment, tmp_path: Path) -> None:
    """A requeued command must not forget its own moments again."""
    also = [f"resume={source.folder.root}", "reset_optimizer=true"]
    killed = source.copy(tmp_path / "killed")
    expected = source.finish(also=also)
    for step in (2, 5, 3):
        assert killed.run(kill_at_step(step), also=also).killed
    assert killed.finish(also=also) == expected
    assert expected.final["optimizer.safetensors"] != uninterrupted().final["optimizer.safetensors"]


def test_a_budget_in_seconds_is_turned_into_steps_once(experiment: Experiment, tmp_path: Path) -> None:
    also = ["budget.steps=null", "budget.seconds=0.5"]
    assert experiment.run(Fault(operation="write", path=r"metrics\.jsonl", at=2), also=also).killed
    total = experiment.folder.read_json("status.json")["total_steps"]
    resolution = experiment.folder.resolution.read_bytes()
    ended = experiment.run(also=also)
    assert ended.code == 0 and "measured" not in ended.out
    assert experiment.folder.resolution.read_bytes() == resolution
    assert experiment.folder.read_json("status.json") == {"status": "finished", "step": total, "total_steps": total}
    in_steps = Experiment(output_dir=tmp_path / "in_steps", overrides=(f"budget.steps={total}",))
    assert observed(experiment.folder.root) == in_steps.finish()


def test_what_was_measured_to_choose_a_precision_is_kept(experiment: Experiment) -> None:
    experiment.overrides = ("precision=auto",)
    assert experiment.run(stop_at(5)).code == EXIT_RESUMABLE
    resolution = experiment.folder.resolution.read_bytes()
    (experiment.harness.folder / "cache" / "matrix_product_rates.json").unlink()
    ended = experiment.run()
    assert ended.code == 0 and "chose" not in ended.out
    assert experiment.folder.resolution.read_bytes() == resolution
    assert not (experiment.harness.folder / "cache" / "matrix_product_rates.json").exists()


def test_the_real_command_killed_and_interrupted_ends_like_one_that_was_not(tmp_path: Path) -> None:
    """Signals from outside, a new interpreter each time, pictures and report included."""
    steps = 200
    longer = (f"budget.steps={steps}", "checkpoint.save_every_n_batches=20", "evaluation.interval_steps=50")
    experiment = Experiment(output_dir=tmp_path, overrides=longer)

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ava_exp", *experiment.command]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
        while process.poll() is None:
            if (tmp_path / "latest").exists() and step_reached(experiment.folder.metrics) >= step:
                return
            time.sleep(0.005)
        pytest.fail(f"it ended by itself: {process.communicate()[0]}")

    killed = start()
    wait_for_step(killed, 50)  # a checkpoint at 40 means that the one at 20 is whole
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    newest = step_of(list_checkpoints(experiment.folder.checkpoints)[-1])
    interrupted = start()
    wait_for_step(interrupted, step_reached(experiment.folder.metrics) + 10)
    interrupted.send_signal(signal.SIGINT)
    time.sleep(0.01)
    interrupted.send_signal(signal.SIGINT)
    output = interrupted.communicate()[0]
    assert interrupted.returncode == EXIT_RESUMABLE, output
    assert f"Going on from step {newest}" in output and "Stopped by SIGINT" in output
    finished = start()
    output = finished.communicate()[0]
    assert finished.returncode == 0, output
    assert experiment.folder.report.is_file()
    records = of_kind(read_metrics(experiment.folder.metrics), "train")
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    whole = Experiment(output_dir=tmp_path / "whole", overrides=longer, draw=False)
    assert observed(experiment.folder.root) == whole.finish()


def step_reached(metrics: Path) -> int:
    return max((record["step"] for record in read_metrics(metrics)), default=0)


@pytest.mark.parametrize("setting", ["training.recompute=full", "training.recompute=selective"])
def test_recomputation_leaves_every_number_as_it_is(tmp_path: Path, setting: str) -> None:
    settings = ("precision=fp32", "model.dropout=0.1")
    experiment = Experiment(output_dir=tmp_path, overrides=(*settings, setting))
    assert experiment.run(stop_at(5)).code == EXIT_RESUMABLE
    assert experiment.finish() == uninterrupted(*settings)
