"""Pipelines of real, very small stages on this machine: in order, up to one that fails, and on from there."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ava_exp.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_USER_ERROR
from tests.workplace import Workplace

STEPS = (
    "stage=pipeline",
    "pipeline=another_expert",
    "pipeline.steps.generate=['stage=generate','stage.run=step:train_on','stage.prompt_file=prompts.txt']",
)


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def test_a_pipeline_goes_on_at_the_step_that_failed(workplace: Workplace) -> None:
    command = workplace.command(*STEPS, "pipeline.steps.train_on=['init_from=step:surgery','seed=1']")
    failed = workplace.run(command)
    assert failed.returncode == EXIT_USER_ERROR, failed.stdout + failed.stderr
    assert failed.stderr.splitlines()[-1] == (
        "ava_exp: step `generate` failed with exit code 2; the same command goes on there."
    )
    table = {row[0]: row for row in (line.split() for line in failed.stdout.splitlines()[-4:])}
    assert [row[2] for row in table.values()] == ["finished", "finished", "finished", "failed"]
    runs = sorted(path.name for path in (workplace.folder / "outputs" / "runs").iterdir())
    assert sorted(table[name][3] for name in ("pretrain", "surgery", "train_on")) == runs
    assert f"Starting from the weights of {table['surgery'][3]}@12-" in failed.stdout

    (workplace.folder / "prompts.txt").write_text("w01 w02\n")
    resumed = workplace.run(command)
    assert resumed.returncode == EXIT_OK, resumed.stdout + resumed.stderr
    assert resumed.stdout.count("was finished before") == 3 and resumed.stdout.count(": started") == 1
    assert "w01 w02" in resumed.stdout
    assert sorted(path.name for path in (workplace.folder / "outputs" / "runs").iterdir()) == runs


def test_a_stopped_step_saves_and_the_pipeline_goes_on_in_it(workplace: Workplace) -> None:
    command = workplace.command("stage=pipeline", "+pipeline.steps.pretrain=['budget.steps=200']")
    pipeline = workplace.start(command)
    workplace.wait_until(lambda: workplace.num_steps > 3, "3 steps")
    pipeline.send_signal(signal.SIGTERM)
    out, err = pipeline.communicate(timeout=60)
    assert pipeline.returncode == EXIT_RESUMABLE, out + err
    assert "Stopped by SIGTERM at step" in out
    assert err.splitlines()[-1] == (
        "ava_exp: the pipeline was stopped in step `pretrain`. The same command goes on there."
    )
    again = workplace.run(command)
    assert again.returncode == EXIT_OK, again.stdout + again.stderr
    assert "Going on from step" in again.stdout
