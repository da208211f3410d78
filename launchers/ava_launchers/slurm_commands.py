"""What is asked of SLURM besides submitting: the state of jobs, an end, another start. No question waits for ever."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence

from ava_exp.errors import UserError

SECONDS = 30.0
NUM_REPEATS, PAUSE_S = 4, 3.0
UNKNOWN_JOB = "Invalid job id"
"""What squeue says of a job that it has forgotten."""
TIME_LEFT = re.compile(r"(?:(?:(?P<days>\d+)-)?(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d+)")
ARRAY = re.compile(r"(?P<array>\d+)_\[(?P<indices>[\d,-]+)(?:%\d+)?\]")
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


def states(job_ids: Iterable[str], *, must_answer: bool = False) -> dict[str, str]:
    """Return the state of each job that SLURM still knows, in its words (`PENDING`, `RUNNING`, `COMPLETED`, …).

    A job of an array is called `<array>_<index>`. Where SLURM does not answer no job is known; with `must_answer`, for
    whoever would submit again what he does not find, it is asked several times, and then UserError is raised.
    """
    wanted = set(job_ids)
    if not wanted or not is_here():
        return {}
    whole = _whole(wanted)
    found = _in_queue(whole, must_answer)
    for missing in sorted(whole - _whole(found)) if len(whole) > 1 else []:  # one that is unknown hides all
        found |= _in_queue({missing}, must_answer)
    if (ended := whole - _whole(found)) and shutil.which("sacct"):
        jobs = f"--jobs={','.join(sorted(ended))}"
        found |= _read(_output(["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State", jobs]))
    # Jobs of an array that were cancelled before they began have its name.
    states_of = {job_id: found.get(job_id, found.get(job_id.partition("_")[0])) for job_id in wanted}
    return {job_id: state for job_id, state in states_of.items() if state is not None}


def _whole(job_ids: Iterable[str]) -> set[str]:
    """Return the jobs, with an array in place of those of its own."""
    return {job_id.partition("_")[0] for job_id in job_ids}


def _in_queue(job_ids: set[str], must_answer: bool) -> dict[str, str]:
    jobs = f"--jobs={','.join(sorted(job_ids))}"
    command = ["squeue", "--array", "--noheader", "--states=all", "--format=%i|%T", jobs]
    done = _ask(command)
    for _ in range(NUM_REPEATS if must_answer else 0):
        if _is_answer(done):
            break
        time.sleep(PAUSE_S)
        done = _ask(command)
    if must_answer and not _is_answer(done):
        why = done.stderr.strip().splitlines()[-1:] if done is not None else []
        raise UserError(f"SLURM does not tell which jobs there are ({''.join(why) or 'no answer'}): try again later.")
    return _read(done.stdout) if done is not None else {}


def _is_answer(done: subprocess.CompletedProcess[str] | None) -> bool:
    return done is not None and (done.returncode == 0 or UNKNOWN_JOB in done.stderr)


def _read(text: str) -> dict[str, str]:
    pairs = [line.strip().split("|") for line in text.splitlines() if "|" in line]
    # A state may be `CANCELLED by 1000`.
    return {job_id: state.split()[0] for ids, state in pairs if state for job_id in _each(ids)}


def _each(job_ids: str) -> list[str]:
    """Return the jobs that are meant by `7_[0-2,5%2]`, as those of an array that wait are written."""
    match = ARRAY.fullmatch(job_ids)
    if match is None:
        return [job_ids]
    ranges = [part.partition("-") for part in match["indices"].split(",")]
    return [
        f"{match['array']}_{index}" for first, _, last in ranges for index in range(int(first), int(last or first) + 1)
    ]


def _output(command: list[str]) -> str:
    done = _ask(command)
    return done.stdout if done is not None else ""


def _ask(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    """Return what a command of SLURM answers; None where it does not."""
    try:
        return subprocess.run(
            command,
            env={**os.environ, "SLURM_BITSTR_LEN": "0"},  # or long lists of indices end in dots
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def time_left_s(job_id: str) -> float | None:
    """Return how long a running job may go on; None where that has no limit or is not known."""
    text = _output(["squeue", "--noheader", "--format=%L", f"--jobs={job_id}"]).strip()
    match = TIME_LEFT.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(match[name] or 0) for name in ("days", "hours", "minutes", "seconds"))
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def cancel(job_ids: Sequence[str]) -> None:
    """End jobs, pending or running. Raises UserError when SLURM refuses."""
    _do(["scancel", *job_ids], f"{named(job_ids)} could not be cancelled")


def named(job_ids: Sequence[str]) -> str:
    """Return `job 7` or `jobs 7 and 8`."""
    return f"job{'s' if len(job_ids) > 1 else ''} {' and '.join(job_ids)}"


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

    def states(self, job_ids: Iterable[str], *, must_answer: bool = False) -> dict[str, str]:
        """Return the states of those jobs that are known, in capital letters."""
        return states(job_ids, must_answer=must_answer)

    def is_active(self, state: str) -> bool:
        """Whether a job in this state has not ended."""
        return state in ACTIVE

    def cancel(self, job_ids: Sequence[str]) -> None:
        """End jobs. Raises UserError when that is not possible."""
        if not is_here():
            raise UserError(f"{named(job_ids)}: on a cluster, and `scancel` is not on this machine.")
        cancel(job_ids)
