"""The run that stands for a whole sweep in MLflow: the parent of its points' runs.

MLflow is spoken to by short processes of their own, so that a slow or absent server cannot keep a sweep. The first
one creates a local database, before any point opens it.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ava_exp
from ava_exp.config.machine import MLflowConfig
from ava_exp.tracking.files import to_json
from ava_exp.tracking.mlflow_follower import (
    MAX_PARAMETERS,
    MAX_VALUE_LENGTH,
    STATUSES,
    SWEEP_TAG,
    connect,
    find_or_create_run,
    sweep_tag,
)
from ava_exp.tracking.redaction import redact, redact_text
from ava_exp.tracking.trackers import RunStatus

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0


class SweepTracker:
    """Tells MLflow of a sweep. `config` is how its points are tracked; `name` is what their tag `sweep` says."""

    def __init__(self, config: MLflowConfig, name: str, output_dir: Path, patience_s: float = PATIENCE_S) -> None:
        root = output_dir.resolve()
        self._patience_s = patience_s
        self._order = {
            "name": name,
            "uri": config.uri or f"sqlite:///{root / 'mlflow.db'}",
            "artifact_root": None if config.uri else (root / "mlartifacts").as_uri(),
            "experiment_name": config.experiment_name,
            "tags": redact({tag: text for tag, text in config.tags.items() if tag != "note"}) | {SWEEP_TAG: name},
        }

    def start(self, parameters: Mapping[str, str]) -> bool:
        """Create the database, if need be, and the parent run. Return whether MLflow has taken it."""
        return self._say({"parameters": redact(dict(parameters))})

    def finish(self, status: RunStatus, metrics: Mapping[str, float], artifacts: Sequence[Path]) -> bool:
        """Close the parent run with its results. Return whether MLflow has taken them."""
        files = [str(path.resolve()) for path in artifacts if path.exists()]
        return self._say({"status": status.value, "metrics": dict(metrics), "artifacts": files})

    def _say(self, message: dict[str, Any]) -> bool:
        root = str(Path(ava_exp.__file__).parent.parent)
        code = f"import sys; sys.path.insert(0, {root!r}); from ava_exp.tracking import sweep_tracker as t; t.main()"
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                input=to_json({**self._order, **message}),
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=self._patience_s,
                check=False,
                start_new_session=True,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            logger.warning("The tracker does not know of the sweep (%s); its points go on.", type(error).__name__)
            return False
        if done.returncode != 0:
            words = redact_text((done.stderr.strip().splitlines() or ["no reason given"])[-1])
            logger.warning("The tracker does not know of the sweep (%s); its points go on.", words)
        return done.returncode == 0


def main() -> None:
    """Do what the order on standard input says: open the parent run, or close it where there is a status."""
    order = json.load(sys.stdin)
    client = connect(order["uri"])
    run = find_or_create_run(client, order, sweep_tag(order["name"]))
    if "status" in order:
        _close(client, run.info.run_id, order)
    else:
        _describe(client, run.info.run_id, order["parameters"], run.data.params)


def _describe(client: MlflowClient, run: str, parameters: dict[str, Any], known: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    new = [Param(key, str(value)[:MAX_VALUE_LENGTH]) for key, value in parameters.items() if key not in known]
    for start in range(0, len(new), MAX_PARAMETERS):
        client.log_batch(run, params=new[start : start + MAX_PARAMETERS])
    client.update_run(run, status="RUNNING")


def _close(client: MlflowClient, run: str, order: dict[str, Any]) -> None:
    for name, value in order["metrics"].items():
        client.log_metric(run, name, float(value))
    for path in order["artifacts"]:
        client.log_artifact(run, path)
    client.set_terminated(run, STATUSES[order["status"]])
