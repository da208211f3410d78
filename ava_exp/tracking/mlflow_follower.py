"""The process that copies a run's metrics file to MLflow. Started by `MLflowTracker`; it can be killed at any moment.

MLflow itself is asked which steps it has: nothing is sent twice, whatever happened between its commit and anything of
ours, and a database that was lost is filled again from the metrics file. Orders come as JSON lines on standard input:
the first describes the run, the second ends it, and the end of input means that the parent is dead.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ava_exp.tracking.files import to_json
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.lock import exclusive
from ava_exp.tracking.metrics import Record, metric_group, metric_values, parse_record
from ava_exp.tracking.redaction import redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

MESSAGE = "@ava_exp "
"""Starts the lines of standard output that are meant for the parent; everything else is noise for the debug log."""
RUN_TAG = "ava_exp_run"
SWEEP_TAG = "sweep"
"""Of a run: the sweep whose point it is."""
PARENT_TAG = "mlflow.parentRunId"
STATUSES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
INTERVAL_S = 3.0
MAX_WAIT_S = 60.0
LAST_WAIT_S = 0.5
MAX_METRICS = 1000
MAX_PARAMETERS = 100
MAX_KEY_LENGTH = 250
MAX_VALUE_LENGTH = 6000
"""The last four are MLflow's limits."""


def main() -> None:
    """Follow the run that the first order describes until it ends or the parent dies."""
    os.nice(10)  # the training has the processor first
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    orders: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_read_orders, args=(orders,), daemon=True).start()
    order = orders.get()
    with exclusive(Path(order["folder"]) / "tracker.lock"):
        Follower(order, orders).run()


def _read_orders(orders: queue.Queue[dict[str, Any]]) -> None:
    for line in sys.stdin:
        orders.put(json.loads(line))
    os._exit(1)


def tell(**message: Any) -> None:
    """Send a message to the parent: `level` and `text` for the log, or `sent`, the number of records MLflow has."""
    print(MESSAGE + to_json(message), flush=True)


class Follower:
    """Sends what is new every few seconds; while MLflow does not answer, it waits longer and longer in between."""

    def __init__(self, order: dict[str, Any], orders: queue.Queue[dict[str, Any]]) -> None:
        self._order = order
        self._orders = orders
        self._ending: dict[str, Any] | None = None
        self._destination: Destination | None = None
        self._wait_s = INTERVAL_S
        self._in_trouble = False

    def run(self) -> None:
        """Return when the run has ended and MLflow has everything."""
        while not self._attempt():
            if self._ending is not None:
                time.sleep(LAST_WAIT_S)
                continue
            try:
                self._ending = self._orders.get(timeout=self._wait_s)
            except queue.Empty:
                continue

    def _attempt(self) -> bool:
        """Return whether all is done."""
        try:
            self._copy()
        except Exception as error:  # noqa: BLE001 - whatever MLflow, a database or a network raises must not stop it
            self._destination = None
            self._wait_s = min(MAX_WAIT_S, 2 * self._wait_s)
            self._tell_trouble(error)
            return False
        self._wait_s = INTERVAL_S
        if self._in_trouble:
            self._in_trouble = False
            tell(level="INFO", text="The tracker can be used again and has all records.")
        return self._ending is not None

    def _copy(self) -> None:
        if self._destination is None:
            self._destination = Destination(connect(self._order["uri"]), self._order)
        self._destination.send_new()
        if self._ending is not None:
            self._destination.end(STATUSES[self._ending["status"]], self._ending["artifacts"])

    def _tell_trouble(self, error: Exception) -> None:
        reason = redact_text(f"{type(error).__name__}: {error}".splitlines()[0])
        text = f"The tracker cannot be used ({reason}); the run goes on and the tracker is tried again."
        tell(level="DEBUG" if self._in_trouble else "WARNING", text=text)
        self._in_trouble = True


def connect(uri: str) -> MlflowClient:
    """Return a client without telemetry that gives up soon; a local database is created first, under a lock.

    MLflow makes its tables in many steps, which several processes at once, or a kill in between, would spoil:
    they are made in a file of another name.
    """
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "20"
    from mlflow import MlflowClient

    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///"))
        database.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(database.with_name(database.name + ".lock")):
            if not database.exists():
                unfinished = database.with_name(database.name + ".new")
                unfinished.unlink(missing_ok=True)
                MlflowClient(f"sqlite:///{unfinished}").search_experiments(max_results=1)
                unfinished.rename(database)
    return MlflowClient(uri)


class Destination:
    """One run in MLflow. After any error it is thrown away: a new one asks MLflow what it has."""

    def __init__(self, client: MlflowClient, order: dict[str, Any]) -> None:
        self._client = client
        self._folder = RunFolder(Path(order["folder"]))
        self._name = own_name(self._folder)
        run = find_or_create_run(client, order, self._name)
        self._run_id: str = run.info.run_id
        self._position = 0
        self._inode: int | None = None
        self._num_records = 0
        self._sent = {
            (group, metric.step)
            for group in ("train", "eval", "final", "surgery")
            for metric in client.get_metric_history(self._run_id, f"{group}/loss")
        }
        attach_to_sweep(client, run, order.get("tags", {}).get(SWEEP_TAG))
        self._log_parameters(order["parameters"], run.data.params)
        client.update_run(self._run_id, status="RUNNING")

    def send_new(self) -> None:
        """Send the records that were appended to the metrics file since the last time, several in one request."""
        batch: list[Metric] = []
        for record in self._new_records():
            metrics = self._metrics(record)
            if len(batch) + len(metrics) > MAX_METRICS:
                self._send(batch)
                batch = []
            batch += metrics
        self._send(batch)
        tell(sent=self._num_records)

    def end(self, status: str, artifacts: list[str]) -> None:
        """Copy the files, close the run, and write down that nothing is left to send."""
        for path in artifacts:
            self._client.log_artifact(self._run_id, path)
        self._client.set_terminated(self._run_id, status)
        self._folder.write_json(self._folder.tracker.name, {"name": self._name, "complete": True})

    def _new_records(self) -> Iterator[Record]:
        if not self._folder.metrics.exists():
            return
        with open(self._folder.metrics, "rb") as file:
            state = os.fstat(file.fileno())
            if state.st_ino != self._inode or state.st_size < self._position:  # the file was cut back
                self._inode, self._position, self._num_records = state.st_ino, 0, 0
            file.seek(self._position)
            while (line := file.readline()).endswith(b"\n"):
                self._position = file.tell()
                self._num_records += 1
                yield parse_record(line)

    def _metrics(self, record: Record) -> list[Metric]:
        """Return what MLflow lacks of a record. The loss comes last: it is what tells that a record is there."""
        from mlflow.entities import Metric

        step, group = record["step"], metric_group(record)
        if (group, step) in self._sent:
            return []
        self._sent.add((group, step))
        milliseconds = round(1000 * record["time"])
        values = metric_values(record)
        values[f"{group}/loss"] = values.pop(f"{group}/loss", float("nan"))
        return [Metric(name, value, milliseconds, step) for name, value in values.items()]

    def _send(self, metrics: list[Metric]) -> None:
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + MAX_METRICS])

    def _log_parameters(self, parameters: dict[str, Any], known: dict[str, str]) -> None:
        """Log what is new; MLflow's parameters cannot change, so a changed one (a raised budget) becomes a tag."""
        from mlflow.entities import Param

        given = {_plain_key(key): str(value)[:MAX_VALUE_LENGTH] for key, value in parameters.items()}
        new = [Param(key, value) for key, value in given.items() if key not in known]
        for start in range(0, len(new), MAX_PARAMETERS):
            self._client.log_batch(self._run_id, params=new[start : start + MAX_PARAMETERS])
        for key, value in given.items():
            if known.get(key, value) != value:
                self._client.set_tag(self._run_id, f"changed.{key}"[:MAX_KEY_LENGTH], value)


def _plain_key(key: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)[:MAX_KEY_LENGTH]


def own_name(folder: RunFolder) -> str:
    """Return the name under which MLflow knows this folder; written before MLflow hears of it, hence never lost."""
    name = str(folder.read_json(folder.tracker.name, {}).get("name") or uuid.uuid4().hex)
    folder.write_json(folder.tracker.name, {"name": name, "complete": False})
    return name


def find_or_create_run(client: MlflowClient, order: dict[str, Any], name: str) -> Run:
    """Return the MLflow run that carries `name` as a tag."""
    experiment = _find_or_create_experiment(client, order["experiment_name"], order["artifact_root"])
    if found := client.search_runs([experiment], f"tags.{RUN_TAG} = '{name}'", max_results=1):
        return found[0]
    return client.create_run(experiment, tags={**order["tags"], RUN_TAG: name}, run_name=order["name"])


def sweep_tag(sweep: str) -> str:
    """Return the name under which MLflow knows the parent run of a sweep."""
    return f"sweep:{sweep}"


def attach_to_sweep(client: MlflowClient, run: Run, sweep: str | None) -> None:
    """Make a run a child of its sweep's, where MLflow knows that and the run has no parent yet."""
    if sweep is None or PARENT_TAG in run.data.tags:
        return
    wanted = f"tags.{RUN_TAG} = '{sweep_tag(sweep)}'"
    if parents := client.search_runs([run.info.experiment_id], wanted, max_results=1):
        client.set_tag(run.info.run_id, PARENT_TAG, parents[0].info.run_id)
        client.set_tag(run.info.run_id, SWEEP_TAG, sweep)


def _find_or_create_experiment(client: MlflowClient, name: str, artifact_root: str | None) -> str:
    from mlflow.exceptions import MlflowException

    if (experiment := client.get_experiment_by_name(name)) is None:
        try:
            return client.create_experiment(name, artifact_root)
        except MlflowException:
            if (experiment := client.get_experiment_by_name(name)) is None:  # not another process either
                raise
    return str(experiment.experiment_id)
