"""A trained run learns to read longer texts, and is compared by position before and after."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from ava_exp.errors import EXIT_OK, EXIT_USER_ERROR
from ava_exp.stages.runs import recorded_initial_weights
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.positions import PositionReport
from ava_exp.tracking.report import write_report
from ava_exp.training.checkpoint import list_checkpoints
from tests.faults.faults import kill_at_step
from tests.faults.harness import SYNCHRONOUS, Experiment, observed

LONG = ("experiment=long_context", "stage.sequence_length=64", "stage.max_tokens=256", "training.batch_size=null")
COLUMNS = ["windows of 16", "unscaled", "linear", "ntk", "yarn"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A finished run of texts of 16 tokens, which no test changes."""
    output_dir = tmp_path_factory.mktemp("source") / "outputs"
    experiment = Experiment(output_dir=output_dir, overrides=(SYNCHRONOUS,), draw=False)
    assert experiment.run().code == EXIT_OK
    return experiment


@pytest.fixture
def experiment(trained: Experiment, tmp_path: Path) -> Experiment:
    return trained.copy(tmp_path / "outputs")


def config_of(folder: RunFolder) -> dict[str, dict[str, object]]:
    config: dict[str, dict[str, object]] = yaml.safe_load(folder.config.read_text())
    return config


def test_before_and_after(experiment: Experiment) -> None:
    source = experiment.folder
    ended = experiment.run(also=LONG)
    assert ended.code == EXIT_OK, ended.out + ended.err
    folder, config = experiment.folder, config_of(experiment.folder)
    assert folder.root != source.root
    assert config["data"]["sequence_length"] == config["model"]["max_position_embeddings"] == 64
    assert config["model"]["original_max_position_embeddings"] == 16
    assert (config["model"]["rope_scaling"], config["model"]["rope_scaling_factor"]) == ("yarn", 4.0)
    assert config["training"]["batch_size"] == 1  # of two sequences of 16 tokens, at least one
    assert config["optimizer"]["learning_rate"] == pytest.approx(0.3 * 1e-2)
    report = PositionReport.read(folder)
    assert report is not None
    assert list(report.curves) == [*COLUMNS, "yarn, trained"]
    assert (report.edges[0], report.edges[-1], sum(report.tokens)) == (0, 64, 256)
    runs = {name: curve.run for name, curve in report.curves.items()}
    assert {runs.pop("yarn, trained")} == {folder.root.name} and {*runs.values()} == {source.root.name}
    assert all(math.isfinite(loss) for curve in report.curves.values() for loss in curve.losses)
    cut, unscaled = (report.curves[name].losses for name in ("windows of 16", "unscaled"))
    assert cut[:4] == pytest.approx(unscaled[:4])  # the first 16 positions of both see the same
    assert cut[4:] != pytest.approx(unscaled[4:])
    assert 'alt="positions"' in write_report(folder).read_text()
    assert (folder.figures / "positions.png").stat().st_size > 10_000
    assert "Perplexity from position 16 on: " in ended.out and "yarn, trained" in ended.out


def test_a_kill_leaves_no_trace(experiment: Experiment, tmp_path: Path) -> None:
    killed = experiment.copy(tmp_path / "killed")
    expected = experiment.finish(also=LONG)
    before = None
    for step in (2, 5):
        assert killed.run(kill_at_step(step), also=LONG).killed
        measured = killed.folder.read_json("positions.json")
        assert list(measured["curves"]) == COLUMNS
        assert before in (None, measured), "what was measured before is measured once"
        before = measured
    assert killed.finish(also=LONG) == expected
    assert killed.folder.read_json("positions.json") == experiment.folder.read_json("positions.json")
    again = killed.run(also=LONG)
    assert again.code == EXIT_OK
    assert "This run is finished" in again.out and "Perplexity from position 16 on" in again.out
    assert len(list((killed.output_dir / "runs").iterdir())) == 2


def test_another_scaling_of_the_latest_run_starts_from_its_source(experiment: Experiment) -> None:
    source = experiment.folder.root.name
    assert experiment.run(also=[*LONG, "budget.steps=1"]).code == EXIT_OK
    ended = experiment.run(also=[*LONG, "budget.steps=1", "stage.rope_scaling=linear", "stage.learning_rate=1e-4"])
    assert ended.code == EXIT_OK, ended.err
    config = config_of(experiment.folder)
    assert (config["model"]["rope_scaling"], config["optimizer"]["learning_rate"]) == ("linear", 1e-4)
    recorded = recorded_initial_weights(experiment.folder)
    assert recorded is not None and recorded.name.startswith(f"{source}@12-")


def test_the_longer_run_is_like_any_other(experiment: Experiment) -> None:
    assert experiment.run(also=[*LONG, "budget.steps=2"]).code == EXIT_OK
    folder = experiment.folder
    assert observed(folder.root).final["step"] == list_checkpoints(folder.checkpoints)[-1].name
    evaluated = experiment.run(also=["stage=evaluate", "stage.run=latest"])
    assert evaluated.code == EXIT_OK, evaluated.err
    assert json.loads(evaluated.out)["run"] == folder.root.name
    assert experiment.run(also=["stage=generate", "stage.run=latest", "stage.max_new_tokens=40"]).code == EXIT_OK


@pytest.mark.parametrize(
    ("also", "message"),
    [
        (["stage.sequence_length=16"], "`stage.sequence_length` must be more than the 16 tokens"),
        (["stage.run=nothing"], "there is no run `nothing`"),
        (["data.sequence_length=64"], "`data.sequence_length` must be left out"),
        (["optimizer.learning_rate=2e-3"], "Give `stage.learning_rate`."),
        (["model.num_layers=3"], "`model.num_layers` must be left out"),
        (["stage.sequence_length=1000000"], "too few for one sequence"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(experiment: Experiment, also: list[str], message: str) -> None:
    ended = experiment.run(also=[*LONG, *also])
    assert ended.code == EXIT_USER_ERROR
    assert message in ended.err
    assert ended.err.count("\n") == 1


def test_a_run_that_is_scaled_already_is_refused_by_name(experiment: Experiment) -> None:
    source = experiment.folder.root.name
    assert experiment.run(also=[*LONG, "budget.steps=1"]).code == EXIT_OK
    ended = experiment.run(also=[*LONG, f"stage.run={experiment.folder.root.name}"])
    assert ended.code == EXIT_USER_ERROR
    assert f"a run whose positions are not scaled yet: start from {source}@12-" in ended.err


def evaluate(experiment: Experiment, *settings: str) -> tuple[int, str, str]:
    ended = experiment.run(also=["stage=evaluate", "stage.run=latest", *(f"stage.{setting}" for setting in settings)])
    return ended.code, ended.out, ended.err


def test_evaluation_by_position(experiment: Experiment) -> None:
    code, out, err = evaluate(experiment, "by_position=true", "position_bins=doubling", "sequence_length=128")
    assert code == EXIT_OK, err
    report = PositionReport.read(experiment.folder, "positions_128.json")
    assert report is not None and report.edges == [0, 32, 64, 128]
    assert list(report.curves) == ["as it is"]
    assert "64 to 127" in out and "positions_128.json" in out
    assert (experiment.folder.figures / "positions_128.png").stat().st_size > 10_000
    whole = json.loads(evaluate(experiment, "sequence_length=128")[1])
    assert whole["sequence_length"] == 128
    assert report.curves["as it is"].loss == pytest.approx(whole["loss"], rel=1e-6)
    assert sum(report.tokens) == whole["tokens"]


def test_evaluation_with_scaled_positions(experiment: Experiment) -> None:
    losses = {}
    for kind in ("none", "linear", "ntk", "yarn"):
        code, out, err = evaluate(experiment, f"rope_scaling={kind}", "sequence_length=2048")
        assert code == EXIT_OK, err
        losses[kind] = json.loads(out)["loss"]
    assert len(set(losses.values())) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["sequence_length=2048"], "must be at most the `model.max_position_embeddings` of"),
        (["rope_scaling=yarn"], "must be more than the 16 tokens"),
        (["rope_scaling=yarn", "sequence_length=16"], "must be more than the 16 tokens"),
    ],
)
def test_evaluation_beyond_what_the_model_can_is_refused(
    experiment: Experiment, settings: list[str], message: str
) -> None:
    code, _, err = evaluate(experiment, *settings)
    assert code == EXIT_USER_ERROR and message in err
