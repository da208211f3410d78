"""The folder of jobs that were submitted to a cluster: what was asked for, the code that they run, what they print."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from ava_exp.config.launcher import SlurmLauncherConfig
from ava_exp.config.run import RunConfig
from ava_exp.tracking.files import to_json, unwritable, write_atomically
from ava_exp.tracking.redaction import redact

RECORD = "jobs.json"
MAX_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a job is to do: the stage of `config`, which `overrides` compose."""

    config: RunConfig
    overrides: Sequence[str]
    step: str | None = None
    """Its name in a pipeline."""
    finished: Path | None = None
    """A file that is to be there when it has ended well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is known of a job since it was submitted."""

    id: str
    """Its number; of a job in an array `<array>_<index>`."""
    name: str
    launcher: str
    """The kind of its configuration, `launcher/slurm`."""
    stage: str
    run_folder: str | None
    """The folder of the run that it trains; None for a job that trains nothing."""
    overrides: list[str]
    """What was asked for, with what had to be decided once: another submission works in the same run folder."""
    directory: str
    """Where the command was given."""
    submitted: str
    step: str | None = None
    """Its name in a pipeline."""
    commit: str | None = None
    """Of the code that it runs, where that came from a checkout; `+` when files differed from it."""


@dataclass(frozen=True, slots=True)
class JobFolder:
    """Paths of one job, or of several that were submitted together and run the same code."""

    root: Path

    @property
    def snapshot(self) -> Path:
        """The code and the options that the job runs, whatever becomes of the originals."""
        return self.root / "snapshot"

    @property
    def logs(self) -> Path:
        """What the job prints, a pair of files for each of its processes."""
        return self.root / "logs"

    def write(self, jobs: Sequence[Job]) -> None:
        """Store what is known of the jobs. Raises RunFolderError where nothing can be written."""
        plain = [redact(dataclasses.asdict(job)) for job in jobs]
        write_atomically(self.root / RECORD, to_json(plain, indent=2) + "\n")

    def read(self) -> list[Job]:
        """Return what `write` stored; nothing while no job was submitted yet, or when the file is damaged."""
        try:
            return [Job(**plain) for plain in json.loads((self.root / RECORD).read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            return []

    def outputs(self, job: Job) -> list[Path]:
        """Return the files with what the job's processes printed, those of the first process first."""

        def order(path: Path) -> tuple[int, str]:
            match = re.fullmatch(r".*_(\d+)_log\.(?:out|err)", path.name)
            return (int(match[1]) if match else 0, path.name)

        return sorted(self.logs.glob(f"{job.id}_*_log.*"), key=order)


def new_job(output_dir: Path, name: str) -> JobFolder:
    """Create and return `<output_dir>/jobs/<name>-<n>`, with the first free number.

    Raises:
        RunFolderError: nothing can be written there.
    """
    jobs = Path(output_dir) / "jobs"
    number = 1
    while True:
        root = jobs / f"{name}-{number}"
        try:
            jobs.mkdir(parents=True, exist_ok=True)
            root.mkdir()
        except FileExistsError:
            number += 1
        except OSError as error:
            raise unwritable(root, error) from error
        else:
            return JobFolder(root.resolve())


def all_jobs(output_dir: Path) -> list[tuple[JobFolder, Job]]:
    """Return every job that was submitted from here, the oldest first."""
    folders = [JobFolder(path) for path in (Path(output_dir) / "jobs").glob("*") if path.is_dir()]
    found = [(folder, job) for folder in folders for job in folder.read()]
    return sorted(found, key=lambda pair: (pair[1].submitted, pair[0].root.name))


class Cluster(Protocol):
    """What answers for the jobs of one kind of cluster."""

    def states(self, job_ids: Sequence[str], *, must_answer: bool = False) -> dict[str, str]: ...
    def is_active(self, state: str) -> bool: ...
    def cancel(self, job_ids: Sequence[str]) -> None: ...


@functools.cache
def cluster() -> Cluster:
    """Return what answers for jobs; found by the name that a launcher's configuration has for it."""
    module, _, name = SlurmLauncherConfig.manages.partition(":")
    return cast(Cluster, getattr(importlib.import_module(module), name)())


def commands_for(name: str, output_dir: str, logs_of: str | None = None) -> list[str]:
    """Return lines with the commands that watch, show and cancel what is called `name`, a job or several."""
    where = "" if output_dir == "outputs" else f" --output-dir {output_dir}"
    meant = {"watch": name, "logs": logs_of or name, "cancel": name}
    return [f"  {what:<10}  python -m ava_exp.runs {what} {whom}{where}" for what, whom in meant.items()]


def pauses() -> Iterator[float]:
    """Yield the seconds between two looks at a job: few at first, so that a short one is soon known to have ended."""
    pause = 0.25
    while True:
        yield pause
        pause = min(MAX_PAUSE_S, 1.1 * pause)
