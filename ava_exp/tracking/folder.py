"""The folder of a run: where everything it writes lies, and how the folder of a run is found again."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ava_exp.errors import RunFolderError, must_be
from ava_exp.tracking.files import to_json, unwritable, write_atomically
from ava_exp.tracking.redaction import redact

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run. Nothing is created before `create`."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def difference(self) -> Path:
        """What differs from the default configuration: `{key: [default, actual]}`."""
        return self.root / "difference.json"

    @property
    def metadata(self) -> Path:
        """Machine, versions, command line and start time."""
        return self.root / "metadata.json"

    @property
    def resolution(self) -> Path:
        """What was measured or depends on time, decided once and reused when the run is resumed."""
        return self.root / "resolution.json"

    @property
    def status(self) -> Path:
        """Whether the run goes on, finished, stopped or failed."""
        return self.root / "status.json"

    @property
    def metrics(self) -> Path:
        """One JSON record a line."""
        return self.root / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The final numbers."""
        return self.root / "summary.json"

    @property
    def samples(self) -> Path:
        """Text that the model wrote."""
        return self.root / "samples.txt"

    @property
    def report(self) -> Path:
        """One self-contained page about the run."""
        return self.root / "report.html"

    @property
    def tracker(self) -> Path:
        """The name under which the experiment tracker knows this run."""
        return self.root / "tracker.json"

    @property
    def lock(self) -> Path:
        """Held by the process that runs."""
        return self.root / "run.lock"

    @property
    def failure(self) -> Path:
        """Which rank failed, and how, for the others."""
        return self.root / "failure.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def create(self) -> RunFolder:
        """Make the folder and its subfolders and see that they can be written to; return itself.

        Raises:
            RunFolderError: The place cannot be written to.
        """
        try:
            for path in (self.root, self.checkpoints, self.figures, self.logs):
                path.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise unwritable(self.root, error) from error
        return self

    def write_json(self, name: str, value: Any) -> None:
        """Replace the file `name` of this folder whole, without secrets.

        Raises:
            RunFolderError: The file cannot be written.
        """
        write_atomically(self.root / name, to_json(redact(value), indent=2) + "\n")

    def read_json(self, name: str, default: Any = None) -> Any:
        """Return the content of the file `name`, or `default` where there is none.

        Raises:
            RunFolderError: The file is not JSON.
        """
        path = self.root / name
        if not path.exists():
            return default
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"{path} cannot be read ({error}); delete it or start anew with resume=never."
            ) from error

    def point_latest(self, output_dir: Path) -> None:
        """Let `<output_dir>/latest` point to this run; the last of several processes wins."""
        latest = Path(output_dir) / "latest"
        temporary = latest.with_name(f".latest.{os.getpid()}.{threading.get_ident()}")
        target = os.path.relpath(self.root.resolve(), latest.parent.resolve())
        try:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
            os.replace(temporary, latest)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            logger.warning("%s was not updated (%s); this run is in %s.", latest, error.strerror, self.root)


def newest_attempt(output_dir: Path, run_id: str) -> RunFolder | None:
    """Return the folder of the last attempt at a run, or None when it was never started.

    Raises:
        RunFolderError: The name is no plain folder name, or a link stands in the folder's place.
    """
    number = _newest_number(output_dir, run_id)
    return RunFolder(_attempt(output_dir, run_id, number)) if number else None


def new_attempt(output_dir: Path, run_id: str) -> RunFolder:
    """Create and return the folder of a further attempt: `<run_id>`, then `<run_id>-2` and so on.

    Two processes never get the same one. Raises `RunFolderError` where nothing can be written.
    """
    number = _newest_number(output_dir, run_id) + 1
    while True:
        root = _attempt(output_dir, run_id, number)
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            root.mkdir()
        except FileExistsError as error:
            if not root.is_dir():
                raise unwritable(root, error) from error
            number += 1
        except OSError as error:
            raise unwritable(root, error) from error
        else:
            return RunFolder(root).create()


def _newest_number(output_dir: Path, run_id: str) -> int:
    _check_plain(run_id)
    pattern = re.compile(re.escape(run_id) + r"(?:-([2-9]|[1-9]\d+))?")
    runs = Path(output_dir) / "runs"
    newest = 0
    for path in runs.iterdir() if runs.is_dir() else ():
        if (match := pattern.fullmatch(path.name)) and path.is_dir():
            if path.is_symlink():
                raise RunFolderError(f"{path} must be a folder, but is a link instead. Remove it or rename the run.")
            newest = max(newest, int(match[1] or 1))
    return newest


def _attempt(output_dir: Path, run_id: str, number: int) -> Path:
    return Path(output_dir) / "runs" / (run_id if number == 1 else f"{run_id}-{number}")


def _check_plain(run_id: str) -> None:
    if run_id in ("", ".", "..") or set(run_id) & set("/\\\0"):
        raise RunFolderError(must_be("name", "usable as the name of a folder", run_id))
