"""Jobs on a real cluster: they are the runs that they would be here, whatever becomes of them on the way."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import ava_exp
from tests.slurm.jobs import Cluster
from tests.workplace import LONG, uninterrupted

pytestmark = pytest.mark.timeout(900)


def test_a_job_is_the_run_that_it_would_be_here(cluster: Cluster) -> None:
    done = cluster.run(cluster.command("launcher=slurm", "launcher.wait=true"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "COMPLETED" in done.stdout
    assert cluster.observed() == uninterrupted()


def test_a_failed_job_ends_the_wait_with_1(cluster: Cluster) -> None:
    done = cluster.run(cluster.command("launcher=slurm", "launcher.wait=true", "launcher.setup=['exit 7']"))
    assert (done.returncode, "FAILED" in done.stderr) == (1, True)


def test_devices_that_the_cluster_does_not_have_are_one_line(cluster: Cluster) -> None:
    done = cluster.run(cluster.command("launcher=slurm", "hardware=h100"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("ava_exp: SLURM did not take the job: ")


def test_the_command_for_runs_knows_the_job(cluster: Cluster) -> None:
    job_id = cluster.submit(*LONG)
    cluster.wait_until(lambda: cluster.num_steps > 20, "20 steps")
    rows = [line.split() for line in cluster.ask("list").stdout.splitlines()]
    assert rows[1][:2] == [cluster.run_folder.root.name, "running"] and rows[1][-1] == job_id
    assert cluster.ask("logs", job_id).returncode == 0
    watched = cluster.ask("watch", job_id, "--interval-s", "0.5")
    assert watched.returncode == 0, watched.stdout + watched.stderr
    assert watched.stdout.splitlines()[-1].split()[1:3] == ["finished", "300/300"]


def test_a_requeue_by_the_operator_goes_on_bit_for_bit(cluster: Cluster) -> None:
    """The job is not warned: it goes on from the newest checkpoint."""
    job_id = cluster.submit(*LONG)
    cluster.wait_until(lambda: cluster.num_steps > 50, "50 steps")
    subprocess.run(["scontrol", "requeue", job_id], check=True)
    cluster.wait_for(job_id)
    assert "Going on from step" in cluster.printed(job_id)
    assert cluster.observed() == uninterrupted(*LONG)


def test_a_pre_empted_job_saves_goes_back_and_goes_on_bit_for_bit(cluster: Cluster) -> None:
    overrides = (*LONG, "budget.steps=1500", "checkpoint.save_every_n_batches=5000")
    job_id = cluster.submit(*overrides)
    cluster.wait_until(lambda: cluster.num_steps > 50, "50 steps")
    whole_cluster = ["sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    subprocess.run(whole_cluster, check=True, cwd=cluster.folder)
    cluster.wait_for(job_id)
    printed = cluster.printed(job_id)
    assert printed.count(f"job {job_id} is back in the queue") == 1
    assert "saved. The same command goes on" in printed and "Going on from step" in printed
    assert cluster.observed() == uninterrupted(*overrides)


def test_a_cancelled_job_stays_cancelled_and_the_same_command_goes_on_here(cluster: Cluster) -> None:
    job_id = cluster.submit(*LONG)
    cluster.wait_until(lambda: cluster.num_steps > 50, "50 steps")
    assert cluster.ask("cancel", job_id).returncode == 0
    cluster.wait_for(job_id, "CANCELLED")
    assert cluster.ask("list").stdout.splitlines()[1].split()[1] in ("stopped", "interrupted")
    here = cluster.run(cluster.command(*LONG))
    assert here.returncode == 0 and "Going on from step" in here.stdout
    assert cluster.observed() == uninterrupted(*LONG)


def test_code_that_is_edited_after_submission_makes_no_difference(cluster: Cluster, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in ("ava_exp", "conf", "sweeps", "launchers"):
        source = Path(ava_exp.__file__).parents[1] / name
        shutil.copytree(source, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = f"{checkout}:{checkout / 'launchers'}:{os.environ.get('PYTHONPATH', '')}"
    job_id = cluster.submit("+launcher.sbatch_parameters.begin=now+5", PYTHONPATH=path)
    for edited in (checkout / "ava_exp" / "cli.py", checkout / "launchers" / "ava_launchers" / "slurm_task.py"):
        edited.write_text("raise SystemExit('the edited code ran')\n")
    (checkout / "conf" / "config.yaml").unlink()
    broken = cluster.run(cluster.command(), PYTHONPATH=path)
    assert "the edited code ran" in broken.stderr
    cluster.wait_for(job_id)
    assert cluster.observed() == uninterrupted()


def test_a_job_is_not_submitted_twice(cluster: Cluster) -> None:
    job_id = cluster.submit("+launcher.sbatch_parameters.begin=now+60")
    again = cluster.run(cluster.command("launcher=slurm"))
    assert again.returncode == 2
    assert f"job {job_id} (PENDING) trains" in again.stderr


SLOW = """
import os, pathlib, time
if "RANK" in os.environ:
    fsync, write_text = os.fsync, pathlib.Path.write_text
    def slow_fsync(file):
        time.sleep(0.5)
        fsync(file)
    def slow_write_text(path, *arguments, **keywords):
        time.sleep(0.2 * path.name.startswith("rank_"))  # after each step: the heartbeat
        return write_text(path, *arguments, **keywords)
    os.fsync, pathlib.Path.write_text = slow_fsync, slow_write_text
"""


def test_a_job_out_of_time_stops_as_early_as_its_slow_saves_need_and_goes_on_bit_for_bit(cluster: Cluster) -> None:
    """A minute is the least that SLURM counts in. Its own warning is made harmless: it comes too late for this run."""
    slow = cluster.folder / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(SLOW)
    overrides = (*LONG, "budget.steps=150", "checkpoint.save_every_n_batches=40")
    job_id = cluster.submit(
        *overrides,
        "launcher.time_limit_minutes=1",
        "launcher.warning_s=30",
        "+launcher.sbatch_parameters.signal=CONT@1",
        PYTHONPATH=f"{slow}:{os.environ.get('PYTHONPATH', '')}",
    )
    cluster.wait_for(job_id)
    printed = cluster.printed(job_id)
    first, _, rest = printed.partition("Going on from step")
    assert "s of the job's time are left, and stopping takes up to" in first
    assert "Stopped by SIGUSR2" in first and f"job {job_id} is back in the queue" in first
    assert rest, "it was started again"
    assert cluster.observed() == uninterrupted(*overrides)
