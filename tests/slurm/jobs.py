"""Submits small trainings to the tests' cluster and looks at what comes of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.jobs import Job, JobFolder, all_jobs
from ava_launchers.slurm_commands import ACTIVE, states
from tests.faults.harness import TINY, Observed, observed, write_corpus

PATIENCE_S = 150.0


@dataclass(frozen=True, slots=True)
class Cluster:
    """A folder on the cluster's file system, with a text to train on."""

    folder: Path

    def command(self, *overrides: str, output_dir: str = "outputs") -> list[str]:
        """Return a command that trains, in which later overrides win."""
        corpus = self.folder / "corpus"
        if not corpus.exists():
            write_corpus(corpus)
        own = [f"data.paths=[{corpus}]", f"cache_dir={self.folder / 'cache'}", f"output_dir={output_dir}"]
        return [sys.executable, "-m", "ava_exp", *TINY, "precision=fp32", *own, *overrides]

    def run(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        """Give a command and wait for it."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

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

    def uninterrupted(self, *overrides: str) -> Observed:
        """Return what the same training leaves when it runs on this machine, and nothing happens to it."""
        done = self.run(self.command(*overrides, output_dir="elsewhere"))
        assert done.returncode == 0, done.stdout + done.stderr
        return observed((self.folder / "elsewhere" / "latest").resolve())

    @property
    def run_folder(self) -> RunFolder:
        return RunFolder(next((self.folder / "outputs" / "runs").iterdir()))

    @property
    def num_steps(self) -> int:
        """How many records of the run's metrics there are."""
        metrics = self.run_folder.metrics
        return metrics.read_text().count('"kind": "train"') if metrics.exists() else 0

    def job(self, job_id: str) -> tuple[JobFolder, Job]:
        return next(pair for pair in all_jobs(self.folder / "outputs") if pair[1].id == job_id)

    def printed(self, job_id: str) -> str:
        """Return what all processes of a job printed."""
        folder, job = self.job(job_id)
        return "\n".join(path.read_text() for path in folder.outputs(job))

    def state(self, job_id: str) -> str:
        return states([job_id]).get(job_id, "UNKNOWN")

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until something has happened; tell what did not."""
        until = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < until, f"{what}: did not happen\n{self._everything()}"
            time.sleep(0.1)

    def wait_for(self, job_id: str, state: str = "COMPLETED") -> None:
        """Wait until a job has ended, and see that it ended so."""
        self.wait_until(lambda: self.state(job_id) not in ACTIVE, f"the end of job {job_id}")
        assert self.state(job_id) == state, self._everything()

    def cancel_all(self) -> None:
        """End what this test has started and has not ended."""
        for _, job in all_jobs(self.folder / "outputs"):
            subprocess.run(["scancel", "--quiet", job.id], timeout=30, check=False)

    def _everything(self) -> str:
        return "\n".join(f"job {job.id}: {self.state(job.id)}\n{self.printed(job.id)}" for _, job in self._jobs())

    def _jobs(self) -> list[tuple[JobFolder, Job]]:
        return all_jobs(self.folder / "outputs")
