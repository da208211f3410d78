"""Several jobs on a real cluster: sweeps as arrays, pipelines as chains, both gone on with after an end half way."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from ava_launchers.slurm_commands import states
from tests.slurm.jobs import Cluster
from tests.workplace import uninterrupted

pytestmark = pytest.mark.timeout(900)

SIX = ("-m", "launcher=slurm", "seed=0,1,2,3,4,5", "sweep.num_parallel=2", "budget.steps=40", "training.batch_size=4")


def points(cluster: Cluster) -> list[dict[str, Any]]:
    (path,) = (cluster.folder / "outputs" / "sweeps").glob("*/sweep.json")
    read: list[dict[str, Any]] = json.loads(path.read_text())["points"]
    return read


def test_a_cancelled_sweep_of_six_points_is_resumed_and_runs_only_what_is_missing(cluster: Cluster) -> None:
    submitted = cluster.run(cluster.command(*SIX))
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    match = re.search(r"Job (\d+): 6 points submitted, 2 at a time", submitted.stdout)
    assert match is not None, submitted.stdout
    array, ids = match[1], [f"{match[1]}_{index}" for index in range(6)]
    numbers_at_work = set()

    def are_two_completed() -> bool:
        counts = Counter(states(ids).values())
        numbers_at_work.add(counts["RUNNING"] + counts["COMPLETING"])
        return counts["COMPLETED"] >= 2

    cluster.wait_until(are_two_completed, "the end of two points", every_s=0.5)
    assert max(numbers_at_work) == 2, "the limit of the array"
    again = cluster.run(cluster.command(*SIX))
    assert again.returncode == 0 and "submitted" not in again.stdout, again.stdout + again.stderr

    assert cluster.ask("cancel", array).returncode == 0
    for job_id in ids:
        cluster.wait_for_end(job_id)
    ended = states(ids)
    finished = {job_id for job_id, state in ended.items() if state == "COMPLETED"}
    assert 2 <= len(finished) < 6 and set(ended.values()) == {"COMPLETED", "CANCELLED"}

    resumed = cluster.run(cluster.command(*SIX, "launcher.wait=true"))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr + cluster.story()
    missing = 6 - len(finished)
    assert f"{missing} point{'s' if missing > 1 else ''} submitted" in resumed.stdout
    rows = points(cluster)
    assert [row["status"] for row in rows] == ["finished"] * 6
    assert {row["job"] for row in rows if row["job"].startswith(array)} == finished, "those did not run again"
    assert len(list((cluster.folder / "outputs" / "runs").iterdir())) == 6
    assert list((cluster.folder / "outputs" / "sweeps").glob("*/report.html"))
    assert len({row["value"] for row in rows}) == 6


def test_a_pipeline_with_a_failing_middle_is_resumed(cluster: Cluster) -> None:
    command = cluster.command(
        "launcher=slurm",
        "stage=pipeline",
        "+pipeline.steps.pretrain=['stage=pretrain']",
        "+pipeline.steps.generate=['stage=generate','stage.run=step:pretrain','stage.prompt_file=prompts.txt']",
        "+pipeline.steps.evaluate=['stage=evaluate','stage.run=step:pretrain']",
    )
    submitted = cluster.run(command)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    first, middle, last = (job.id for _, job in cluster.jobs())
    cluster.wait_for(first)
    cluster.wait_for(middle, "FAILED")
    cluster.wait_for(last, "CANCELLED")
    assert cluster.observed() == uninterrupted()
    assert "prompts.txt" in cluster.printed(middle)

    (cluster.folder / "prompts.txt").write_text("w01 w02\n")
    resumed = cluster.run([*command, "launcher.wait=true"])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr + cluster.story()
    assert "Step `generate` ended FAILED; it is submitted again." in resumed.stdout
    jobs = [job for _, job in cluster.jobs()]
    assert [job.step for job in jobs] == ["pretrain", "generate", "evaluate", "generate", "evaluate"]
    assert "w01 w02" in cluster.printed(jobs[3].id)
