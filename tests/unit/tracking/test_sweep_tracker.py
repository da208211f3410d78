"""The run that stands for a sweep in MLflow, and how its points' runs become its children."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ava_exp.config.machine import MLflowConfig
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import MetricsFile
from ava_exp.tracking.mlflow_tracker import MLflowTracker
from ava_exp.tracking.sweep_tracker import SweepTracker
from ava_exp.tracking.trackers import RunStatus, TrackedRun

Records = Callable[..., Iterator[dict[str, Any]]]
NAME = "mine-01234567"


def query(output_dir: Path, text: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(output_dir / "mlflow.db")
    try:
        return connection.execute(text).fetchall()
    finally:
        connection.close()


def follow(output_dir: Path, name: str, records: list[dict[str, Any]], tags: dict[str, str]) -> None:
    """Track a run as a point's process does."""
    folder = RunFolder(output_dir / "runs" / name).create()
    with MetricsFile(folder.metrics) as metrics:
        for record in records:
            metrics.append(record)
    tracker = MLflowTracker(None, "tests", tags, patience_s=60)
    tracker.start(TrackedRun(folder=folder, name=name, parameters={}, output_dir=output_dir))
    tracker.finish(RunStatus.finished)


def test_points_are_children_of_their_sweep_alone(tmp_path: Path, fake_records: Records) -> None:
    config = MLflowConfig(experiment_name="tests", tags={"purpose": "test", "note": "of a run"})
    report = tmp_path / "report.html"
    report.write_text("a page")
    tracker = SweepTracker(config, NAME, tmp_path)
    assert tracker.start({"command": "python -m ava_exp -m seed=1,2", "uri": "http://me:hunter2@host"})
    follow(tmp_path, "point", list(fake_records(2)), {"sweep": NAME})
    follow(tmp_path, "alone", list(fake_records(2)), {})
    follow(tmp_path, "of_another", list(fake_records(2)), {"sweep": "unknown-00000000"})
    assert tracker.finish(RunStatus.finished, {"best/loss": 1.5}, [report, tmp_path / "absent.html"])

    runs = {name: (uuid, status) for uuid, name, status in query(tmp_path, "select run_uuid, name, status from runs")}
    assert set(runs) == {NAME, "point", "alone", "of_another"}
    assert runs[NAME][1] == "FINISHED"
    parents = query(tmp_path, "select run_uuid, value from tags where key = 'mlflow.parentRunId'")
    assert parents == [(runs["point"][0], runs[NAME][0])]
    assert query(tmp_path, "select run_uuid, value from metrics where key = 'best/loss'") == [(runs[NAME][0], 1.5)]
    assert [path.name for path in tmp_path.glob(f"mlartifacts/{runs[NAME][0]}/artifacts/*")] == ["report.html"]
    assert "hunter2" not in str(query(tmp_path, "select value from params"))


def test_a_sweep_that_goes_on_is_the_same_run(tmp_path: Path) -> None:
    config = MLflowConfig(experiment_name="tests")
    for status in (RunStatus.stopped, RunStatus.finished):
        tracker = SweepTracker(config, NAME, tmp_path)
        assert tracker.start({"command": f"until {status}"})
        assert tracker.finish(status, {}, [])
    assert query(tmp_path, "select name, status from runs") == [(NAME, "FINISHED")]


def test_a_server_that_is_absent_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = SweepTracker(MLflowConfig(uri="http://127.0.0.1:9"), NAME, tmp_path, patience_s=30)
    with caplog.at_level(logging.WARNING):
        assert not tracker.start({})
    assert "its points go on" in caplog.text
