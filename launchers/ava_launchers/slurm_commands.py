"""What is asked of SLURM besides submitting: the state of jobs, an end, another start. No question waits for ever."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable

from ava_exp.errors import UserError

SECONDS = 30.0
ACTIVE = frozenset(
    {
        "PENDING",
        "CONFIGURING",
        "RUNNING",
        "COMPLETING",
        "SUSPENDED",
        "STOPPED",
        "SIGNALING",
        "REQUEUED",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
        "RESIZING",
        "SPECIAL_EXIT",
        "STAGE_OUT",
    }
)
"""States of a job that has not ended; PREEMPTED jobs that come back are PENDING."""
ELSEWHERE = "run the command where the cluster takes jobs (a login node), or leave `launcher=slurm` out."


def is_here() -> bool:
    """Whether this machine belongs to a cluster with SLURM."""
    return shutil.which("sbatch") is not None


def require() -> None:
    """Raise UserError on a machine that cannot submit."""
    if not is_here():
        raise UserError(f"`launcher=slurm` needs `sbatch`, which is not on this machine: {ELSEWHERE}")


def states(job_ids: Iterable[str]) -> dict[str, str]:
    """Return the state of each job that SLURM still knows, in its words (`PENDING`, `RUNNING`, `COMPLETED`, …)."""
    wanted = sorted(set(job_ids))
    if not wanted or not is_here():
        return {}
    found = _read(["squeue", "--noheader", "--states=all", "--format=%i|%T", f"--jobs={','.join(wanted)}"])
    for missing in [job_id for job_id in wanted if job_id not in found]:  # one that is unknown hides all others
        found |= _read(["squeue", "--noheader", "--states=all", "--format=%i|%T", f"--jobs={missing}"])
    ended = [job_id for job_id in wanted if job_id not in found]
    if ended and shutil.which("sacct"):
        found |= _read(
            ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State", f"--jobs={','.join(ended)}"]
        )
    return {job_id: state for job_id, state in found.items() if job_id in wanted}


def _read(command: list[str]) -> dict[str, str]:
    pairs = [line.strip().split("|") for line in _output(command).splitlines() if "|" in line]
    return {job_id: state.split()[0] for job_id, state in pairs if state}  # `CANCELLED by 1000`


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def cancel(job_id: str) -> None:
    """End a job, pending or running. Raises UserError when SLURM refuses."""
    _do(["scancel", job_id], f"job {job_id} could not be cancelled")


def requeue(job_id: str) -> None:
    """Put a running job back into the queue. Raises UserError when SLURM refuses."""
    _do(["scontrol", "requeue", job_id], f"job {job_id} could not be put back into the queue")


def _do(command: list[str], failure: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{failure}: {error}") from error
    if done.returncode != 0:
        raise UserError(f"{failure}: {done.stderr.strip() or f'exit code {done.returncode}'}")


class SlurmJobs:
    """What the command for runs asks about jobs, whatever the cluster."""

    def states(self, job_ids: Iterable[str]) -> dict[str, str]:
        """Return the states of those jobs that are known, in capital letters."""
        return states(job_ids)

    def is_active(self, state: str) -> bool:
        """Whether a job in this state has not ended."""
        return state in ACTIVE

    def cancel(self, job_id: str) -> None:
        """End a job. Raises UserError when that is not possible."""
        if not is_here():
            raise UserError(f"job {job_id} is on a cluster, and `scancel` is not on this machine.")
        cancel(job_id)
