"""MLflow: what it is told of a run, and that a resumed run goes on there."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ava_exp.config.machine import MLflowConfig, NoTrackerConfig
from ava_exp.errors import ConfigError
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import MetricsFile
from ava_exp.tracking.mlflow_tracker import MLflowTracker
from ava_exp.tracking.trackers import NoTracker, RunStatus, TrackedRun

Records = Callable[..., Iterator[dict[str, Any]]]


def _query(output_dir: Path, query: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(output_dir / "mlflow.db")
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def _session(
    folder: RunFolder, output_dir: Path, records: list[dict[str, Any]], status: RunStatus, **parameters: Any
) -> None:
    """Write records as one process of a run would, and let MLflow follow."""
    tracker = MLflowTracker(None, "tests", {"purpose": "test"}, patience_s=60)
    tracker.start(TrackedRun(folder=folder, name="quick", parameters=parameters, output_dir=output_dir))
    with MetricsFile(folder.metrics) as metrics:
        metrics.cut_back(records[0]["step"] - 1)
        for record in records:
            metrics.append(record)
    tracker.finish(status, [folder.config, folder.report])


def test_a_stopped_and_resumed_run_is_one_run_without_repeated_steps(tmp_path: Path, fake_records: Records) -> None:
    folder = RunFolder(tmp_path / "runs" / "quick-1a2b").create()
    records = list(fake_records(20))
    folder.config.write_text("name: quick\n")
    first = [record for record in records if record["step"] <= 12]
    _session(folder, tmp_path, first, RunStatus.stopped, **{"budget.steps": 12, "hub.token": "hunter2", "odd key!": 1})
    assert _query(tmp_path, "SELECT status FROM runs") == [("KILLED",)]

    again = [record for record in records if record["step"] > 9]
    _session(folder, tmp_path, again, RunStatus.finished, **{"budget.steps": 20, "seed": 0})

    assert _query(tmp_path, "SELECT name, status FROM runs") == [("quick", "FINISHED")]
    for key, expected in (("train/loss", range(1, 21)), ("eval/loss", range(2, 21, 2)), ("final/loss", [20])):
        steps = _query(tmp_path, f"SELECT step FROM metrics WHERE key = '{key}' ORDER BY step")
        assert [step for (step,) in steps] == list(expected), key
    (gini,) = _query(tmp_path, "SELECT value FROM metrics WHERE key = 'experts/layer_3/gini' AND step = 5")
    assert 0 < gini[0] < 1
    parameters = dict(_query(tmp_path, "SELECT key, value FROM params"))
    assert parameters == {"budget.steps": "12", "hub.token": "[redacted]", "odd key_": "1", "seed": "0"}
    tags = dict(_query(tmp_path, "SELECT key, value FROM tags"))
    assert tags["purpose"] == "test" and tags["changed.budget.steps"] == "20"
    assert [path.name for path in tmp_path.glob("mlartifacts/*/artifacts/*")] == ["config.yaml"]


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "sqlit:///x", "ftp://me:hunter2@host/"])
def test_an_address_that_mlflow_cannot_use_is_refused_at_once(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"`tracker.uri` must be null or begin with one of sqlite://") as refusal:
        MLflowTracker(uri, "tests", {})
    assert "hunter2" not in str(refusal.value)


def test_trackers_are_built_from_their_configuration(tmp_path: Path) -> None:
    tracker = MLflowConfig(uri="http://host:5000", tags={"a": "b"}).build()
    assert (tracker.uri, tracker.experiment_name, tracker.tags) == ("http://host:5000", "ava_exp", {"a": "b"})
    tracker.finish(RunStatus.finished)  # never started: nothing to do
    nothing = NoTrackerConfig().build()
    assert isinstance(nothing, NoTracker)
    nothing.start(TrackedRun(folder=RunFolder(tmp_path), name="x", parameters={}, output_dir=tmp_path))
    nothing.finish(RunStatus.failed)
    assert list(tmp_path.iterdir()) == []
