"""Sweeps of real, very small trainings, from the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ava_exp.errors import EXIT_FAILURE, EXIT_OK, EXIT_RESUMABLE, EXIT_USER_ERROR

if TYPE_CHECKING:
    from tests.conftest import CommandLine

SMALL = ["debug=default", "tracker=none", "precision=fp32", "hardware=cpu"]


@pytest.fixture(autouse=True)
def _text(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(12):
        words = f"The quick brown fox number {number} jumps over the lazy dog, and again. "
        (tmp_path / "texts" / f"{number}.txt").write_text(words * 60)


DATA = ["data=files", "data.paths=[texts]"]


def records(folder: Path) -> list[dict[str, Any]]:
    (path,) = (folder / "outputs" / "sweeps").glob("*/sweep.json")
    points: list[dict[str, Any]] = json.loads(path.read_text())["points"]
    return points


def test_a_grid_is_run_compared_and_reported(program: CommandLine, tmp_path: Path) -> None:
    arguments = ["-m", *SMALL, *DATA, "optimizer.learning_rate=1e-4,1e-2", "seed=0,1", "sweep.num_parallel=2"]
    outcome = program(*arguments)
    assert outcome.code == EXIT_OK, outcome.out + outcome.err
    points = records(tmp_path)
    assert [point["status"] for point in points] == ["finished"] * 4
    assert len({point["run_id"] for point in points}) == 4
    for point in points:
        summary = json.loads((tmp_path / point["folder"] / "summary.json").read_text())
        assert point["value"] == summary["final"]["bits_per_byte"]
        assert point["seconds"] > 0
    table = outcome.out[outcome.out.index("optimizer.learning_rate  ") :].splitlines()
    assert [line.split()[0] for line in table[2:4]] == ["0.01", "0.0001"]
    assert "±" in table[2]
    (report,) = (tmp_path / "outputs" / "sweeps").glob("*/report.html")
    assert str(report.relative_to(tmp_path)) in outcome.out

    again = program(*arguments)
    assert again.code == EXIT_OK
    assert again.out.count("was finished before") == 4
    assert "started" not in again.out
    assert [point["seconds"] for point in records(tmp_path)] == [point["seconds"] for point in points]

    alone = program(*SMALL, *DATA, "seed=1", "optimizer.learning_rate=1e-2")
    assert "This run is finished." in alone.out, "a point is the run of its own command"


def test_what_fails_is_told_at_once_and_at_the_end_and_tried_again_later(program: CommandLine, tmp_path: Path) -> None:
    arguments = ["-m", *SMALL, "data=files", "data.paths=[none],[texts]", "seed=0"]
    outcome = program(*arguments)
    assert outcome.code == EXIT_USER_ERROR, outcome.out + outcome.err
    first, *_ = [line for line in outcome.out.splitlines() if "failed" in line]
    assert "'none'" in first
    assert outcome.out.index(first) < outcome.out.index("[texts]: finished")
    assert outcome.err.splitlines()[-1] == "ava_exp: 1 of 2 points failed. The same command tries again."
    assert [point["status"] for point in records(tmp_path)] == ["failed", "finished"]

    shutil.copytree(tmp_path / "texts", tmp_path / "none")
    again = program(*arguments)
    assert again.code == EXIT_OK, again.err
    assert again.out.count(": started") == 1


def test_a_process_that_dies_is_tried_again_and_told(program: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "outputs" / "runs").mkdir(parents=True)
    (tmp_path / "outputs" / "cache").write_text("a file where a folder must be")
    outcome = program("-m", *SMALL, *DATA, "seed=0,1", "sweep.max_retries=0")
    assert outcome.code in (EXIT_FAILURE, EXIT_USER_ERROR)
    assert "2 of 2 points failed" in outcome.err


def test_a_stopped_sweep_saves_its_points_and_goes_on(program: CommandLine, tmp_path: Path) -> None:
    arguments = ["-m", *SMALL, *DATA, "seed=0,1,2", "sweep.num_parallel=2", "budget.steps=250"]
    arguments += ["evaluation.interval_steps=125", "checkpoint.save_every_n_batches=20"]
    command = [sys.executable, "-m", "ava_exp", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True, process_group=0) as sweep:
        _until_checkpoints(tmp_path, 2)
        os.kill(sweep.pid, signal.SIGINT)
        out, err = sweep.communicate(timeout=90)
    assert sweep.returncode == EXIT_RESUMABLE, out + err
    assert [point["status"] for point in records(tmp_path)] == ["interrupted", "interrupted", "waiting"]
    assert err.splitlines()[-1].endswith("3 of 3 points are left. The same command goes on.")

    again = program(*arguments)
    assert again.code == EXIT_OK, again.out + again.err
    assert [point["status"] for point in records(tmp_path)] == ["finished"] * 3
    for point in records(tmp_path)[:2]:
        assert (
            "Going on from step"
            in (next((tmp_path / "outputs/sweeps").glob("*/logs")) / f"{point['run_id']}.log").read_text()
        )
        assert not Path(f"{tmp_path / point['folder']}-2").exists()


def _until_checkpoints(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while len({path.parent.parent for path in folder.glob("outputs/runs/*/checkpoints/step_*")}) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_sweeps_of_one_definition_do_not_run_together(program: CommandLine, tmp_path: Path) -> None:
    from ava_exp.tracking.lock import RunLock

    arguments = ["-m", *SMALL, *DATA, "seed=0,1"]
    assert program(*arguments).code == EXIT_OK
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    with RunLock(folder / "sweep.lock"):
        outcome = program(*arguments)
    assert outcome.code == EXIT_USER_ERROR
    assert "is in use by process" in outcome.err
    assert "the same command then goes on" in outcome.err


def test_points_that_are_one_run_are_refused(program: CommandLine, tmp_path: Path) -> None:
    outcome = program("-m", *SMALL, *DATA, "budget.steps=3,4")
    assert (outcome.code, outcome.err.count("\n")) == (EXIT_USER_ERROR, 1)
    assert "points 0 (budget.steps=3) and 1 (budget.steps=4) are the same run" in outcome.err


def test_points_are_children_of_the_sweep_in_mlflow(program: CommandLine, tmp_path: Path) -> None:
    small = [argument for argument in SMALL if argument != "tracker=none"]
    outcome = program("-m", *small, *DATA, "seed=0,1", "sweep.num_parallel=2")
    assert outcome.code == EXIT_OK, outcome.out + outcome.err
    connection = sqlite3.connect(tmp_path / "outputs" / "mlflow.db")
    names = dict(connection.execute("select run_uuid, name from runs").fetchall())
    parents = connection.execute("select run_uuid, value from tags where key = 'mlflow.parentRunId'").fetchall()
    status = dict(connection.execute("select name, status from runs").fetchall())
    best = connection.execute("select value from metrics where key = 'best/bits_per_byte'").fetchall()
    connection.close()
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert {names[parent] for _, parent in parents} == {folder.name}
    assert {names[child] for child, _ in parents} == {point["run_id"] for point in records(tmp_path)}
    assert set(status.values()) == {"FINISHED"}
    assert best[0][0] == pytest.approx(statistics.fmean(point["value"] for point in records(tmp_path)))
    assert list(tmp_path.glob("outputs/mlartifacts/**/report.html"))


def test_hydras_own_sweeper_can_be_chosen(program: CommandLine, tmp_path: Path) -> None:
    outcome = program("-m", *SMALL, *DATA, "hydra/sweeper=basic", "seed=0,1", "budget.steps=2")
    assert outcome.code == EXIT_OK, outcome.err
    assert outcome.out.count("── point") == 2
    assert len(list((tmp_path / "outputs" / "runs").iterdir())) == 2
    assert not list((tmp_path / "outputs" / "sweeps").glob("*/sweep.json"))


def test_a_search_is_run_pruned_and_goes_on(program: CommandLine, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    arguments = ["-m", "sweep=recipe_search", *SMALL, *DATA, "budget.seconds=null", "evaluation.interval_steps=2"]
    outcome = program(*arguments, "sweep.optuna.num_trials=2", "sweep.optuna.num_startup_trials=1")
    assert outcome.code == EXIT_OK, outcome.out + outcome.err
    assert [point["status"] for point in records(tmp_path)] == ["finished"] * 2
    again = program(*arguments, "sweep.optuna.num_trials=3", "sweep.optuna.num_startup_trials=1")
    assert again.code == EXIT_OK, again.out + again.err
    points = records(tmp_path)
    assert [point["trial"] for point in points] == [0, 1, 2]
    assert again.out.count(": started") == 1
