"""What runs on the nodes of a job: one task for each rank; the first puts a job that was stopped back in the queue."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ava_exp.errors import EXIT_OK, EXIT_RESUMABLE, UserError
from ava_launchers import slurm_commands
from ava_launchers.rank import Place
from ava_launchers.supervisor import STOP_SIGNALS, Supervisor, tell

FIRST_PORT, NUM_PORTS = 20_000, 12_000
"""Below the ports that Linux gives out by itself."""


@dataclass(kw_only=True, slots=True)
class SlurmTask:
    """The function of a job, called in each of its tasks; submitit brings it there.

    It takes the place of submitit's handlers: those save on one rank only. Signals go to the rank and come back as
    an exit code, on which the first rank's task requeues the job.
    """

    overrides: list[str]
    grace_s: float
    hang_timeout_s: float | None
    max_requeues: int
    ended: str
    """A folder in which every task that has ended leaves a file."""
    finished: str | None = None
    """A file that the first task makes when the job has ended well."""

    def __call__(self) -> int:
        """Run the rank of this task. Ends the process with the rank's exit code where that is not 0."""
        for number in (*STOP_SIGNALS, signal.SIGCONT):  # submitit's handlers; the supervisor has its own while it runs
            signal.signal(number, signal.SIG_IGN)
        place = place_in_job()
        command = [sys.executable, "-m", "ava_exp", *self.overrides]
        supervisor = Supervisor(
            command,
            [place],
            grace_s=self.grace_s,
            hang_timeout_s=self.hang_timeout_s,
            time_left_s=slurm_commands.time_left_s(own_id()),
        )
        outcome = supervisor.run()
        self._wait_for_the_others(place)
        if not outcome.is_resumable:
            if outcome.code != EXIT_OK:
                raise SystemExit(outcome.code)
            if place.rank == 0 and self.finished is not None:
                Path(self.finished).touch()
            return EXIT_OK
        if place.rank == 0 and not self._requeue():
            raise SystemExit(EXIT_RESUMABLE)
        return EXIT_OK

    def _wait_for_the_others(self, place: Place) -> None:
        """Let them end by themselves before SLURM ends them, as it does when one task fails or the job is requeued."""
        folder = Path(self.ended) / f"{os.environ['SLURM_JOB_ID']}.{restarts()}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / str(place.rank)).touch()
        until = time.monotonic() + self.grace_s
        while len(list(folder.iterdir())) < place.world_size and time.monotonic() < until:
            time.sleep(0.2)

    def _requeue(self) -> bool:
        """Put the job back into the queue, unless somebody ended it on purpose; tell what was done."""
        job_id = own_id()
        state = slurm_commands.states([job_id]).get(job_id, "UNKNOWN")
        if state != "RUNNING":  # cancelled, or requeued by the cluster itself
            tell(f"stopped; job {job_id} is {state}, and is left to whoever made it so.")
            return False
        if restarts() >= self.max_requeues:
            tell(f"stopped; job {job_id} was started again {restarts()} times (`launcher.max_requeues`), no more.")
            return False
        try:
            slurm_commands.requeue(job_id)
        except UserError as error:
            tell(f"stopped, but {error}")
            return False
        tell(f"stopped; job {job_id} is back in the queue and will go on from there.")
        return True


def own_id() -> str:
    """Return what this job is called; in an array that is not its number."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def restarts() -> int:
    """Return how often this job was put back into the queue."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def place_in_job() -> Place:
    """Return this task's place among the ranks of its job."""
    from submitit import JobEnvironment

    environment = JobEnvironment()
    first = environment.hostnames[0]
    return Place(
        rank=environment.global_rank,
        local_rank=environment.local_rank,
        world_size=environment.num_tasks,
        local_world_size=environment.num_tasks // environment.num_nodes,
        master_address=first if _is_known(first) else os.environ["SLURM_LAUNCH_NODE_IPADDR"],
        master_port=FIRST_PORT + (7 * int(environment.raw_job_id) + restarts()) % NUM_PORTS,
    )


def _is_known(host: str) -> bool:
    """Whether the name of a node is a name on the network, too."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True
