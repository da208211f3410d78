"""Sweeps as arrays of jobs, on a cluster that is played by scripts; `tests/slurm` has them on a real one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from ava_exp.config.compose import compose
from ava_exp.config.identity import to_plain
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.jobs import all_jobs
from ava_launchers.slurm_task import SlurmTask
from tests.unit.launchers.conftest import Script

if TYPE_CHECKING:
    from tests.conftest import CommandLine

COMMON = ("~local", "launcher=slurm", "model=tiny", "tracker=none", "hardware=cpu")
SWEEP = ("-m", *COMMON, "seed=0,1,2", "sweep.num_parallel=2")


def options(tmp_path: Path) -> dict[str, str]:
    """Return what the last submission asked for."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", (tmp_path / "submitted.sh").read_text(), re.MULTILINE))


def points(tmp_path: Path) -> list[dict[str, Any]]:
    (path,) = (tmp_path / "outputs" / "sweeps").glob("*/sweep.json")
    read: list[dict[str, Any]] = json.loads(path.read_text())["points"]
    return read


def finish(tmp_path: Path, job_id: str, seed: int, value: float) -> None:
    """Leave in a job's run folder what a training leaves."""
    job = next(job for _, job in all_jobs(tmp_path / "outputs") if job.id == job_id)
    assert job.run_folder is not None
    folder = RunFolder(Path(job.run_folder))
    folder.config.write_text(yaml.safe_dump(to_plain(compose([*COMMON, f"seed={seed}"]))))
    folder.write_json("summary.json", {"final": {"bits_per_byte": value}, "seconds": 1.5})
    folder.metrics.touch()
    folder.write_json("status.json", {"status": "finished"})


def test_points_are_one_array_and_the_command_returns(command_line: CommandLine, cluster: None, tmp_path: Path) -> None:
    import submitit

    outcome = command_line(*SWEEP)
    assert outcome.code == 0, outcome.err
    assert options(tmp_path)["array"] == "0-2%2"
    jobs = all_jobs(tmp_path / "outputs")
    assert [job.id for _, job in jobs] == ["42_0", "42_1", "42_2"]
    assert len({folder.root for folder, _ in jobs}) == 1, "one copy of the code for all"
    assert {Path(str(job.run_folder)).name for _, job in jobs} == {
        path.name for path in (tmp_path / "outputs" / "runs").iterdir()
    }
    for index, (folder, job) in enumerate(jobs):
        task = submitit.SlurmJob(folder.logs, job.id).submission().function
        assert isinstance(task, SlurmTask)
        assert f"seed={index}" in task.overrides
    for text in (
        "Sweep folder: ",
        "Job 42: 3 points submitted, 2 at a time.",
        "ava_exp.runs watch 42",
        "ava_exp.runs logs 42_0",
        "ava_exp.runs cancel 42",
        "The same command looks again",
    ):
        assert text in outcome.out
    assert [(point["status"], point["job"]) for point in points(tmp_path)] == [
        ("queued", "42_0"),
        ("queued", "42_1"),
        ("queued", "42_2"),
    ]


def test_the_same_command_submits_only_what_is_missing(
    command_line: CommandLine, cluster: None, script: Script, tmp_path: Path
) -> None:
    command_line(*SWEEP)
    script("squeue", "echo '42_0|RUNNING'; echo '42_[1-2]|PENDING'")
    (tmp_path / "submitted.sh").unlink()
    again = command_line(*SWEEP)
    assert again.code == 0, again.err
    assert not (tmp_path / "submitted.sh").exists()
    assert "Nothing is left to submit: 1 running, 2 queued." in again.out

    finish(tmp_path, "42_0", seed=0, value=2.5)
    ((folder, job), *_) = [pair for pair in all_jobs(tmp_path / "outputs") if pair[1].id == "42_1"]
    (folder.logs / f"{job.id}_0_log.out").write_text("ava_exp: the disk is full.\n")
    script("squeue", "echo '42_0|COMPLETED'; echo '42_1|FAILED'; echo '42_2|CANCELLED by 0'")
    script("sbatch", f'cp "$1" {tmp_path}/submitted.sh\necho Submitted batch job 43')
    resumed = command_line(*SWEEP)
    assert resumed.code == 0, resumed.err
    assert options(tmp_path)["array"] == "0-1%2"
    assert "[1] seed=1: job 42_1 ended FAILED: ava_exp: the disk is full.; submitted again" in resumed.out
    assert [(point["status"], point["job"]) for point in points(tmp_path)] == [
        ("finished", "42_0"),
        ("queued", "43_0"),
        ("queued", "43_1"),
    ]
    assert "Report: " in resumed.out, "of what has finished"


def test_waiting_tries_failed_points_again_and_ends_with_what_came_of_them(
    command_line: CommandLine, cluster: None, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = tmp_path / "number"
    number.write_text("41")
    script("sbatch", f"n=$(($(cat {number}) + 1)); echo $n >{number}; echo Submitted batch job $n")
    script(
        "squeue",
        "echo '42_0|FAILED'; echo '42_1|FAILED'; echo '42_2|CANCELLED'; echo '43_0|FAILED'; echo '43_1|FAILED'",
    )
    outcome = command_line(*SWEEP, "launcher.wait=true")
    assert number.read_text().strip() == "43", "`sweep.max_retries` is 1, and a cancelled point is left alone"
    assert outcome.code == 75
    assert [point["status"] for point in points(tmp_path)] == ["failed", "failed", "interrupted"]
    assert "[0] seed=0 failed: job 43_0 ended FAILED" in outcome.err
    assert "3 of 3 points are left. The same command goes on." in outcome.err


def test_points_that_ask_for_different_things_are_arrays_of_their_own(
    command_line: CommandLine, cluster: None, script: Script, tmp_path: Path
) -> None:
    number = tmp_path / "number"
    number.write_text("41")
    script(
        "sbatch", f'n=$(($(cat {number}) + 1)); echo $n >{number}; cp "$1" {tmp_path}/$n; echo Submitted batch job $n'
    )
    outcome = command_line("-m", *COMMON, "seed=0,1", 'sweep.points=[["name=a"],["name=b","launcher.memory_gib=2"]]')
    assert outcome.code == 0, outcome.err
    assert "Job 42 and 43: 4 points submitted" in outcome.out
    assert "--mem=" not in (tmp_path / "42").read_text()
    assert "#SBATCH --mem=2048M" in (tmp_path / "43").read_text()
    names = [(next(text for text in point["overrides"] if "name" in text), point["job"]) for point in points(tmp_path)]
    assert names == [("name=a", "42_0"), ("name=a", "42_1"), ("name=b", "43_0"), ("name=b", "43_1")]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["launcher=local,slurm"], "`launcher` must be the same for all points of a sweep."),
        (["stage=evaluate", "seed=0,1"], "`launcher` must be local in a sweep of `stage=evaluate`"),
        (["seed=0,1", "sweep.devices=[0]"], "`sweep.devices` must be empty with `launcher=slurm`"),
        (["sweep=recipe_search"], "`launcher.wait` must be true with a search, which needs to know how a point ended"),
    ],
)
def test_what_cannot_be_jobs_is_refused_before_anything_is_made(
    command_line: CommandLine, cluster: None, tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    outcome = command_line("-m", *COMMON, *overrides)
    assert outcome.code == 2
    assert sentence in outcome.err and len(outcome.err.splitlines()) == 1
    assert not list(tmp_path.glob("outputs/jobs/*")) and not list(tmp_path.glob("outputs/runs/*"))
