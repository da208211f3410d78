"""MLflow: what it is told of a run, and that a resumed run goes on there."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from ava_exp.config.machine import MLflowConfig, NoTrackerConfig
from ava_exp.errors import ConfigError
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import MetricsFile
from ava_exp.tracking.mlflow_follower import MAX_METRICS, MESSAGE, Destination
from ava_exp.tracking.mlflow_tracker import MLflowTracker
from ava_exp.tracking.trackers import NoTracker, RunStatus, TrackedRun

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
    tracker = MLflowTracker(None, "tests", {"purpose": "test", "note": "why"}, patience_s=60)
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
    assert tags["purpose"] == "test" and tags["mlflow.note.content"] == "why"
    assert tags["changed.budget.steps"] == "20"
    assert [path.name for path in tmp_path.glob("mlartifacts/*/artifacts/*")] == ["config.yaml"]


class FakeClient:
    """Takes what MLflow would."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, int]]] = []

    def get_experiment_by_name(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(experiment_id="1")

    def search_runs(self, experiments: list[str], query: str, max_results: int) -> list[SimpleNamespace]:
        return [SimpleNamespace(info=SimpleNamespace(run_id="run"), data=SimpleNamespace(params={}))]

    def get_metric_history(self, run_id: str, name: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(step=step) for batch in self.batches for key, step in batch if key == name]

    def update_run(self, run_id: str, status: str) -> None:
        assert status == "RUNNING"

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        self.batches.append([(metric.key, metric.step) for metric in metrics])


def test_requests_stay_within_mlflows_limit_and_a_loss_comes_after_the_rest_of_its_record(
    tmp_path: Path, fake_records: Records
) -> None:
    folder, client = RunFolder(tmp_path).create(), FakeClient()
    order = {"folder": str(tmp_path), "experiment_name": "tests", "artifact_root": None, "parameters": {}}
    with MetricsFile(folder.metrics) as metrics:
        for record in [*fake_records(30), *fake_records(1, num_layers=150)]:
            metrics.append({**record, "step": record["step"] + 100 * (len(record.get("expert_load", "")) == 150)})
    Destination(cast("MlflowClient", client), order).send_new()
    assert max(map(len, client.batches)) == MAX_METRICS and len(client.batches) < 12
    sent = [metric for batch in client.batches for metric in batch]
    assert len(set(sent)) == len(sent)
    for step in (*range(1, 31), 101):
        of_record = [key for key, at in sent if at == step and key.startswith(("train/", "experts/"))]
        assert len(of_record) > 30 and of_record[-1] == "train/loss"


def test_a_file_that_was_cut_back_is_read_anew(
    tmp_path: Path, fake_records: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, client = RunFolder(tmp_path).create(), FakeClient()
    order = {"folder": str(tmp_path), "experiment_name": "tests", "artifact_root": None, "parameters": {}}
    records = [record for record in fake_records(30) if record["kind"] == "train"]
    destination = Destination(cast("MlflowClient", client), order)
    with MetricsFile(folder.metrics) as metrics:
        for record in records[:20]:
            metrics.append(record)
        destination.send_new()
        metrics.cut_back(10)
        for record in records[10:]:
            metrics.append(record)
        destination.send_new()
    steps = [step for batch in client.batches for key, step in batch if key == "train/loss"]
    assert steps == list(range(1, 31))
    assert [json.loads(line.removeprefix(MESSAGE)) for line in capsys.readouterr().out.splitlines()] == [
        {"sent": 20},
        {"sent": 30},
    ]


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
