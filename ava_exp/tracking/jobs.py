"""The folder of a job that was submitted to a cluster: what was asked for, the code that it runs, what it prints."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from ava_exp.tracking.files import to_json, unwritable, write_atomically
from ava_exp.tracking.redaction import redact

RECORD = "job.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is known of a job since it was submitted."""

    id: str
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
    commit: str | None = None
    """Of the code that it runs, where that came from a checkout; `+` when files differed from it."""


@dataclass(frozen=True, slots=True)
class JobFolder:
    """Paths of one job."""

    root: Path

    @property
    def snapshot(self) -> Path:
        """The code and the options that the job runs, whatever becomes of the originals."""
        return self.root / "snapshot"

    @property
    def logs(self) -> Path:
        """What the job prints, a pair of files for each of its processes."""
        return self.root / "logs"

    def write(self, job: Job) -> None:
        """Store what is known of the job. Raises RunFolderError where nothing can be written."""
        write_atomically(self.root / RECORD, to_json(redact(dataclasses.asdict(job)), indent=2) + "\n")

    def read(self) -> Job | None:
        """Return what `write` stored; None while the job was not submitted yet, or when the file is damaged."""
        try:
            return Job(**json.loads((self.root / RECORD).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

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
    found = [(folder, job) for folder in folders if (job := folder.read()) is not None]
    return sorted(found, key=lambda pair: (pair[1].submitted, pair[0].root.name))
