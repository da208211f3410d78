"""Pipelines as jobs that wait for one another, on a cluster that is played by scripts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ava_exp.tracking.jobs import all_jobs
from ava_launchers.slurm_task import SlurmTask
from tests.unit.launchers.conftest import Script

if TYPE_CHECKING:
    from tests.conftest import CommandLine

PIPELINE = (
    "~local",
    "launcher=slurm",
    "model=tiny",
    "tracker=none",
    "hardware=cpu",
    "stage=pipeline",
    "pipeline=longer_texts",
    "pipeline.steps.evaluate=['stage=evaluate','stage.run=step:extend','launcher.time_limit_minutes=7']",
)


@pytest.fixture
def counting(cluster: None, script: Script, tmp_path: Path) -> None:
    """The played cluster counts its jobs, from 42 on, and keeps the script of each."""
    (tmp_path / "number").write_text("41")
    body = f'n=$(($(cat {tmp_path}/number) + 1)); echo $n >{tmp_path}/number; cp "$1" {tmp_path}/$n.sh'
    script("sbatch", f"{body}; echo Submitted batch job $n")


def options(tmp_path: Path, job_id: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", (tmp_path / f"{job_id}.sh").read_text(), re.MULTILINE))


def test_each_job_waits_for_the_one_before_it(command_line: CommandLine, counting: None, tmp_path: Path) -> None:
    import submitit

    outcome = command_line(*PIPELINE)
    assert outcome.code == 0, outcome.err
    jobs = all_jobs(tmp_path / "outputs")
    assert [(job.id, job.step) for _, job in jobs] == [
        ("42", "prepare"),
        ("43", "pretrain"),
        ("44", "extend"),
        ("45", "evaluate"),
    ]
    (folder,) = {folder.root for folder, _ in jobs}
    assert "dependency" not in options(tmp_path, "42")
    for job_id in ("43", "44", "45"):
        asked = options(tmp_path, job_id)
        assert asked["dependency"] == f"afterok:{int(job_id) - 1}" and asked["kill-on-invalid-dep"] == "yes"
    assert options(tmp_path, "45")["time"] == "7" and "time" not in options(tmp_path, "44")
    (run,) = (tmp_path / "outputs" / "runs").iterdir()
    assert [job.run_folder for _, job in jobs] == [None, str(run), None, None], "what is known by now"
    task = submitit.SlurmJob(folder / "logs", "44").submission().function
    assert isinstance(task, SlurmTask)
    (pipeline,) = (tmp_path / "outputs" / "pipelines").iterdir()
    assert task.finished == str(pipeline / "extend.finished")
    assert {"stage.run=step:pretrain", "pipeline.step=extend"} <= {*task.overrides}
    assert f"ava_exp.runs watch {folder.name}" in outcome.out and f"ava_exp.runs cancel {folder.name}" in outcome.out


def test_the_same_command_submits_what_is_left_when_no_job_is_at_it(
    command_line: CommandLine, counting: None, script: Script, tmp_path: Path
) -> None:
    command_line(*PIPELINE)
    (pipeline,) = (tmp_path / "outputs" / "pipelines").iterdir()
    script("squeue", "echo '42|COMPLETED'; echo '43|RUNNING'; echo '44|PENDING'; echo '45|PENDING'")
    (pipeline / "prepare.finished").touch()
    again = command_line(*PIPELINE)
    assert again.code == 0, again.err
    assert "nothing was submitted" in again.out and not (tmp_path / "46.sh").exists()
    status = {line.split()[0]: line.split()[2] for line in again.out.splitlines()[-5:-1]}
    assert status == {"prepare": "finished", "pretrain": "running", "extend": "pending", "evaluate": "pending"}

    script("squeue", "echo '42|COMPLETED'; echo '43|FAILED'; echo '44|CANCELLED'; echo '45|CANCELLED'")
    resumed = command_line(*PIPELINE)
    assert resumed.code == 0, resumed.err
    assert "Step `pretrain` ended FAILED; it is submitted again." in resumed.out
    assert [job.step for _, job in all_jobs(tmp_path / "outputs")][4:] == ["pretrain", "extend", "evaluate"]
    assert "dependency" not in options(tmp_path, "46") and options(tmp_path, "47")["dependency"] == "afterok:46"


def test_waiting_ends_with_the_step_that_failed(
    command_line: CommandLine, counting: None, script: Script, tmp_path: Path
) -> None:
    script("squeue", "echo '42|COMPLETED'; echo '43|FAILED'; echo '44|CANCELLED'; echo '45|CANCELLED'")
    outcome = command_line(*PIPELINE, "launcher.wait=true")
    assert outcome.code == 1
    assert "Step `pretrain`: FAILED" in outcome.out
    assert outcome.err == "ava_exp: step `prepare` ended COMPLETED; the same command goes on there.\n"
