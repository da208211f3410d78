"""The section `sweep`, and the files of `sweeps/`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ava_exp.config.compose import compose
from ava_exp.config.folders import option_names
from ava_exp.config.identity import config_hash
from ava_exp.config.sweep import Objective, OptunaConfig, SweepConfig, sweep_faults
from ava_exp.config.validate import validate
from ava_exp.errors import EXIT_OK, EXIT_USER_ERROR

if TYPE_CHECKING:
    from tests.conftest import CommandLine

NUM_POINTS = {"learning_rate": 3, "router_ablation": 18, "mod_capacity": 10, "expert_count": 10, "recipe_search": 1}


def test_a_sweep_makes_no_other_run() -> None:
    assert config_hash(compose(["sweep=learning_rate", "sweep.num_parallel=3"])) == config_hash(compose([]))


@pytest.mark.parametrize(
    ("sweep", "key"),
    [
        (SweepConfig(optuna=OptunaConfig(space={"seed": "1,2"}), grid={"seed": "1,2"}), "sweep.grid"),
        (SweepConfig(optuna=OptunaConfig(space={"seed": "1,2"}), points=[["seed=1"]]), "sweep.points"),
        (SweepConfig(devices=[0, 0]), "sweep.devices"),
        (SweepConfig(devices=[-1]), "sweep.devices"),
        (SweepConfig(points=[["seed=1"], []]), "sweep.points"),
    ],
)
def test_what_does_not_go_together_is_a_fault(sweep: SweepConfig, key: str) -> None:
    assert [fault[0] for fault in sweep_faults(sweep)] == [key]
    run = compose([])
    run.sweep = sweep
    assert [fault.key for fault in validate(run)] == [key]


def test_an_ordinary_sweep_has_no_fault() -> None:
    sweep = SweepConfig(points=[["seed=1"], ["seed=2"]], grid={"model": "tiny,small"}, devices=[1, 0])
    assert list(sweep_faults(sweep)) == []


def test_accuracy_alone_should_be_high() -> None:
    assert [objective for objective in Objective if objective.is_maximized] == [Objective.token_accuracy]


@pytest.mark.parametrize("name", option_names("sweep"))
def test_every_point_of_a_shipped_sweep_is_sound(command_line: CommandLine, name: str) -> None:
    outcome = command_line("-m", f"sweep={name}", "stage=validate")
    assert outcome.code == EXIT_OK, outcome.out + outcome.err
    assert outcome.out.count("── point") == outcome.out.count("no faults") == NUM_POINTS[name]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("gird: {seed: '1,2'}", "in `sweep/mine`: `sweep.gird` does not exist: did you mean `sweep.grid`"),
        ("grid: {sed: '1,2'}", "`sed` does not exist: did you mean `seed`"),
        ("grid: {optimizer.learning_rat: '1,2'}", "did you mean `optimizer.learning_rate`"),
        ("overrides: [model=../secret]", "in `sweep=mine`: `model=../secret`: an option is the name of a file"),
        ("points: [[model=/etc/x]]", "not a path"),
        ("grid: {model: 'tiny,../x'}", "not a path"),
        ("overrides: ['+hydra.callbacks.x={_target_: os.system}']", "a point has neither"),
        ("overrides: ['tracker={_target_: os.system}']", "`_target_` is not accepted"),
        ("points: [[hydra/launcher=basic]]", "a point has neither"),
        ("overrides: [sweep=learning_rate]", "a point has neither"),
        ("grid: {'~sweep.grid': 'a,b'}", "a point has neither"),
        ("overrides: ['seed=1,2']", "in `sweep=mine`: `seed=1,2` is several values"),
        ("overrides: [seed]", "is not `key=value`"),
        ("num_parallel: 0", "`sweep.num_parallel` must be at least 1"),
        ("objective: speed", "`sweep.objective` must be one of"),
        ("optuna: {space: {seed: '1,2'}}\ngrid: {seed: '1,2'}", "`sweep.grid` must be empty"),
    ],
)
def test_a_wrong_file_is_one_line_before_anything_runs(
    conf: Path, command_line: CommandLine, tmp_path: Path, text: str, complaint: str
) -> None:
    (conf.parent / "sweeps" / "mine.yaml").write_text(text)
    outcome = command_line("-m", "sweep=mine", "debug=default", "tracker=none")
    assert (outcome.code, outcome.err.count("\n")) == (EXIT_USER_ERROR, 1), outcome
    assert complaint in outcome.err
    assert not (tmp_path / "outputs" / "runs").exists()
