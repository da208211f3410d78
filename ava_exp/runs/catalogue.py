"""Runs and jobs below one output folder, each with how it stands now."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ava_exp.errors import RunFolderError, did_you_mean
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.jobs import Job, JobFolder, all_jobs, cluster
from ava_exp.tracking.lock import read_owner
from ava_exp.tracking.metrics import Record, parse_record
from ava_exp.tracking.trackers import RunStatus

TAIL_BYTES = 1 << 18
"""How much of the end of a metrics file is read for its last record; those of large mixtures are long."""
INTERRUPTED = "interrupted"
"""The process is gone, killed or lost with its machine; the same command goes on."""
SUBMITTED = "submitted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A run, the newest job that trains it, or both."""

    name: str
    folder: RunFolder | None
    job_folder: JobFolder | None = None
    job: Job | None = None
    job_state: str | None = None

    @property
    def owner(self) -> dict[str, Any] | None:
        """The process that works in the run's folder: `pid`, `host`, `started`, `command`."""
        return read_owner(self.folder.lock) if self.folder else None

    @property
    def has_local_process(self) -> bool:
        """Whether that process lives, on this machine."""
        owner = self.owner
        return owner is not None and owner["host"] == socket.gethostname() and _is_alive(owner["pid"])

    @property
    def has_active_job(self) -> bool:
        return self.job_state is not None and cluster().is_active(self.job_state)

    @property
    def status(self) -> str:
        """How it stands, in one word."""
        written = self.progress.get("status")
        if self.has_local_process:
            return RunStatus.running
        if self.has_active_job and self.job_state is not None:
            return self.job_state.lower()
        if written == RunStatus.running:
            elsewhere = self.owner is not None and self.owner["host"] != socket.gethostname() and self.job is None
            return RunStatus.running if elsewhere else INTERRUPTED
        return written or (self.job_state or SUBMITTED if self.job else INTERRUPTED).lower()

    @property
    def is_active(self) -> bool:
        """Whether something is at work, or waits for its turn."""
        return self.has_active_job or self.status == RunStatus.running

    @property
    def progress(self) -> dict[str, Any]:
        """`status`, `step` and `total_steps` as the run wrote them last."""
        return (self.folder.read_json("status.json") if self.folder else None) or {}

    @property
    def last_step(self) -> Record:
        """The newest record of a training step; empty before the first."""
        return last_step_of(self.folder.metrics) if self.folder else {}

    def steps(self) -> str:
        """Return `12/100`, as far as known."""
        step = self.last_step.get("step", self.progress.get("step"))
        return "" if step is None else f"{step}/{self.progress.get('total_steps', '?')}"

    def loss(self) -> str:
        """Return the newest training loss."""
        return f"{self.last_step['loss']:.4f}" if "loss" in self.last_step else ""


def last_step_of(metrics: Path) -> Record:
    """Return the last whole record of a training step in a metrics file; empty where there is none."""
    if not metrics.exists():
        return {}
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            record = parse_record(line)
        except ValueError:  # torn, or the middle of a line
            continue
        if record.get("kind") == "train":
            return record
    return {}


def all_entries(output_dir: Path) -> list[Entry]:
    """Return every run, oldest first, and every job that trains none; of several jobs of a run the newest."""
    jobs = all_jobs(output_dir)
    states = cluster().states([job.id for _, job in jobs]) if jobs else {}
    entries = {path.name: Entry(name=path.name, folder=RunFolder(path)) for path in _run_folders(output_dir)}
    for folder, job in jobs:
        run = Path(job.run_folder) if job.run_folder else None
        alone = f"{folder.root.name}-{job.step}" if job.step else folder.root.name
        name = run.name if run is not None and run.name in entries else alone
        run_folder = entries[name].folder if name in entries else None
        entries[name] = Entry(
            name=name, folder=run_folder, job_folder=folder, job=job, job_state=states.get(job.id, "UNKNOWN")
        )
    return list(entries.values())


def _run_folders(output_dir: Path) -> list[Path]:
    folders = [path for path in (output_dir / "runs").glob("*") if path.is_dir()]
    return sorted(folders, key=lambda path: (path / "logs").stat().st_ctime if (path / "logs").exists() else 0)


def find_entry(output_dir: Path, name: str) -> Entry:
    """Return what is called `name`: a run's folder or path, `latest`, the id of a job or the folder of one.

    Raises:
        RunFolderError: there is no such thing.
    """
    entries = all_entries(output_dir)
    latest = (output_dir / "latest").resolve().name if name == "latest" else None
    wanted = latest or Path(name).name
    for entry in reversed(entries):
        known = {entry.name, entry.job.id if entry.job else "", entry.job_folder.root.name if entry.job_folder else ""}
        if wanted in known:
            return entry
    for folder, job in all_jobs(output_dir):  # an older one of the same run
        if wanted in (job.id, folder.root.name):
            state = cluster().states([job.id]).get(job.id, "UNKNOWN")
            return Entry(name=folder.root.name, folder=None, job_folder=folder, job=job, job_state=state)
    names = [entry.name for entry in entries]
    hint = did_you_mean(wanted, names) if names else "there are none yet."
    raise RunFolderError(f"there is no run or job `{name}` in {output_dir}; {hint}")


def find_entries(output_dir: Path, name: str) -> list[Entry]:
    """Return what is called `name`: the jobs that were submitted together, as those of an array, or one thing.

    Several are found by the number of their array or by the folder of their jobs, with or without its last number.

    Raises:
        RunFolderError: there is no such thing.
    """
    entries, wanted = all_entries(output_dir), Path(name).name
    several = [] if any(entry.name == wanted for entry in entries) else [e for e in entries if wanted in _groups_of(e)]
    return several or [find_entry(output_dir, name)]


def _groups_of(entry: Entry) -> set[str]:
    if entry.job is None or entry.job_folder is None:
        return set()
    folder = entry.job_folder.root.name
    array, _, index = entry.job.id.partition("_")
    return {folder, folder.rpartition("-")[0], *([array] if index else [])}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
