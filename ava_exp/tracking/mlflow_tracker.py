"""MLflow, served by a process of its own, so that nothing it does or waits for reaches the training process."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import ava_exp
from ava_exp.errors import ConfigError, must_be
from ava_exp.tracking.files import to_json
from ava_exp.tracking.metrics import read_metrics
from ava_exp.tracking.mlflow_follower import MESSAGE
from ava_exp.tracking.redaction import redact, redact_text
from ava_exp.tracking.trackers import RunStatus, TrackedRun

logger = logging.getLogger(__name__)

SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")
NOTE_TAG = "mlflow.note.content"
PATIENCE_S = 10.0
"""How long `finish` waits for a tracker that is slow, locked or absent."""


class MLflowTracker:
    """Follows a run with `ava_exp.tracking.mlflow_follower` in a child process of low priority.

    `uri` null is a SQLite database in the output folder. `tags` are attached to the MLflow run; the tag `note` becomes
    the run's description.

    Raises:
        ConfigError: MLflow cannot write to a `uri` of this kind.
    """

    def __init__(
        self, uri: str | None, experiment_name: str, tags: Mapping[str, str], patience_s: float = PATIENCE_S
    ) -> None:
        if uri is not None and urlsplit(uri).scheme.partition("+")[0] not in SCHEMES:
            kinds = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            raise ConfigError(must_be("tracker.uri", f"null or begin with one of {kinds}", redact_text(uri)))
        self.uri = uri
        self.experiment_name = experiment_name
        self.tags = {NOTE_TAG if name == "note" else name: text for name, text in tags.items()}
        self.patience_s = patience_s
        self._child: _Child | None = None

    def start(self, run: TrackedRun) -> None:
        """Start the follower; whether MLflow can be reached is its business."""
        try:
            self._child = _Child(run.folder.metrics)
        except OSError as error:
            logger.warning("The tracker could not be started (%s); the metrics are in %s.", error, run.folder.metrics)
            return
        output_dir = run.output_dir.resolve()
        self._child.say(
            {
                "folder": run.folder.root.resolve(),
                "name": run.name,
                "uri": self.uri or f"sqlite:///{output_dir / 'mlflow.db'}",
                "artifact_root": None if self.uri else (output_dir / "mlartifacts").as_uri(),
                "experiment_name": self.experiment_name,
                "tags": redact(self.tags),
                "parameters": redact(run.parameters),
            }
        )

    def finish(self, status: RunStatus, artifacts: Sequence[Path] = ()) -> None:
        """Let the follower send the rest; after `patience_s` leave it for the next time the run is opened."""
        if self._child is not None:
            self._child.say({"status": status, "artifacts": [path.resolve() for path in artifacts if path.exists()]})
            self._child.end(self.patience_s)
            self._child = None

    def catch_up(self, run: TrackedRun, status: RunStatus, artifacts: Sequence[Path] = ()) -> None:
        """Send what earlier processes of a run that has ended could not, if there is anything."""
        if not run.folder.read_json(run.folder.tracker.name, {}).get("complete"):
            self.start(run)
            self.finish(status, artifacts)


class _Child:
    """The follower's process: orders go in, messages for the log come out."""

    def __init__(self, metrics: Path) -> None:
        self._metrics = metrics
        self._num_sent: int | None = None
        root = str(Path(ava_exp.__file__).parent.parent)
        code = f"import sys; sys.path.insert(0, {root!r}); from ava_exp.tracking import mlflow_follower as f; f.main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the training, which then ends the follower
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._orders: IO[str] = self._process.stdin
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True)
        self._listener.start()

    def say(self, order: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died, which `end` reports
            self._orders.write(to_json(order) + "\n")
            self._orders.flush()

    def end(self, patience_s: float) -> None:
        """Wait for the follower; kill it when it takes too long, which it survives without loss or repetition."""
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._orders.close()
        self._listener.join()
        if self._process.returncode != 0:
            logger.warning("%s", self._what_remains())

    def _listen(self, output: IO[str]) -> None:
        with output:
            for line in output:
                if line.startswith(MESSAGE):
                    self._take(json.loads(line.removeprefix(MESSAGE)))
                else:
                    logger.debug("follower: %s", line.rstrip())

    def _take(self, message: dict[str, Any]) -> None:
        if "sent" in message:
            self._num_sent = message["sent"]
        else:
            logger.log(logging.getLevelNamesMapping()[message["level"]], "%s", message["text"])

    def _what_remains(self) -> str:
        if self._num_sent is None:
            return "The tracker did not answer; its records are sent when the run is next opened."
        remaining = len(read_metrics(self._metrics)) - self._num_sent
        return f"The tracker is behind: {remaining} records remain; they are sent when the run is next opened."
