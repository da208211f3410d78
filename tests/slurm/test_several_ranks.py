"""Jobs of several ranks on a real cluster: on nodes of their own they train as on one machine, and end together."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from ava_exp.tracking.metrics import of_kind, read_metrics
from tests.slurm.jobs import Cluster
from tests.workplace import SEVERAL, uninterrupted

pytestmark = pytest.mark.timeout(900)

TWO_NODES = ("launcher.num_nodes=2", "launcher.grace_s=10")


def test_two_nodes_train_as_two_processes_of_one_machine(cluster: Cluster) -> None:
    done = cluster.run(cluster.command("launcher=slurm", "launcher.wait=true", *TWO_NODES))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_metrics(cluster.run_folder.metrics)) == len({*map(str, read_metrics(cluster.run_folder.metrics))})
    assert cluster.observed() == uninterrupted("hardware.num_devices=2")


def test_four_nodes_of_two_ranks_finish(cluster: Cluster) -> None:
    done = cluster.run(
        cluster.command("launcher=slurm", "launcher.wait=true", "launcher.num_nodes=4", "hardware.num_devices=8")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(of_kind(read_metrics(cluster.run_folder.metrics), "train")) == 12


def test_a_warning_saves_all_ranks_together_and_one_of_them_requeues(cluster: Cluster) -> None:
    """The signal is the one that SLURM sends before the end of a job's time."""
    overrides = (*SEVERAL, "checkpoint.save_every_n_batches=5000")
    job_id = cluster.submit(*overrides, *TWO_NODES)
    cluster.wait_until(lambda: cluster.num_steps > 20, "20 steps")
    subprocess.run(["scancel", "--signal=USR2", job_id], check=True)
    cluster.wait_for(job_id)
    assert cluster.printed(job_id).count(f"job {job_id} is back in the queue") == 1
    assert cluster.observed() == uninterrupted(*overrides, "hardware.num_devices=2")


def test_a_killed_rank_ends_the_job_of_all(cluster: Cluster) -> None:
    job_id = cluster.submit(*SEVERAL, *TWO_NODES)
    cluster.wait_until(lambda: cluster.num_steps > 20, "20 steps")
    ranks = cluster.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    cluster.wait_for(job_id, "FAILED")
    assert "was killed by SIGKILL" in cluster.printed(job_id)
    again = cluster.submit(*SEVERAL, *TWO_NODES)
    cluster.wait_for(again)
    assert cluster.observed() == uninterrupted(*SEVERAL, "hardware.num_devices=2")
