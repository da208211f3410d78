"""Submits small trainings to the tests' cluster and looks at what comes of them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass

from ava_exp.tracking.jobs import Job, JobFolder, all_jobs
from ava_launchers.slurm_commands import ACTIVE, states
from tests.workplace import Workplace


@dataclass(frozen=True, slots=True)
class Cluster(Workplace):
    """A folder on the cluster's file system."""

    def submit(self, *overrides: str, **environment: str) -> str:
        """Submit a training and return the job's id."""
        done = self.run(self.command("launcher=slurm", *overrides), **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        match = re.search(r"Job (\d+) was submitted", done.stdout)
        assert match is not None, done.stdout
        return match[1]

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Ask the command for runs."""
        return self.run([sys.executable, "-m", "ava_exp.runs", *arguments])

    def jobs(self) -> list[tuple[JobFolder, Job]]:
        """Return all jobs that were submitted, oldest first."""
        return all_jobs(self.folder / "outputs")

    def printed(self, job_id: str) -> str:
        """Return what all processes of a job printed."""
        folder, job = next(pair for pair in self.jobs() if pair[1].id == job_id)
        return "\n".join(path.read_text() for path in folder.outputs(job))

    def state(self, job_id: str) -> str:
        return states([job_id]).get(job_id, "UNKNOWN")

    def wait_for(self, job_id: str, state: str = "COMPLETED") -> None:
        """Wait until a job has ended, and see that it ended so."""
        self.wait_for_end(job_id)
        assert self.state(job_id) == state, self.story()

    def wait_for_end(self, job_id: str) -> None:
        """Wait until a job has ended, without taking the processor from it by asking all the time."""
        self.wait_until(lambda: self.state(job_id) not in ACTIVE, f"the end of job {job_id}", every_s=0.5)

    def cancel_all(self) -> None:
        """End what this test has started and has not ended."""
        for _, job in self.jobs():
            subprocess.run(["scancel", "--quiet", job.id], timeout=30, check=False)

    def story(self) -> str:
        return "\n".join(f"job {job.id}: {self.state(job.id)}\n{self.printed(job.id)}" for _, job in self.jobs())
