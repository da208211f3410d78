"""Faults injected into what a run leaves behind: full disks, locked trackers, killed processes, secrets."""

from __future__ import annotations

import contextlib
import logging
import random
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ava_exp.errors import RunFolderError
from ava_exp.tracking.folder import RunFolder, new_attempt, newest_attempt
from ava_exp.tracking.lock import RunLock
from ava_exp.tracking.logs import configure_logging
from ava_exp.tracking.metadata import collect_metadata
from ava_exp.tracking.metrics import MetricsFile, read_metrics
from ava_exp.tracking.mlflow_tracker import MLflowTracker
from ava_exp.tracking.report import write_report
from ava_exp.tracking.trackers import RunStatus, TrackedRun

NUM_RECORDS = 12
SECRET = "hunter2-very-secret"


@contextlib.contextmanager
def _full_disk(at_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _record(step: int, num_layers: int = 1) -> dict[str, Any]:
    state = {"elapsed_s": 1.5 * step, "tokens": 64 * step, "loss": 1 / step, "learning_rate": 1e-3, "grad_norm": 1.0}
    load = [[0.25] * 4] * num_layers
    return {"kind": "train", "step": step, **state, "tokens_per_s": 43.0, "mfu": None, "expert_load": load}


def _append(folder: RunFolder, steps: range, num_layers: int = 1) -> None:
    with MetricsFile(folder.metrics) as metrics:
        for step in steps:
            metrics.append(_record(step, num_layers))


def _start(tracker: MLflowTracker, folder: RunFolder, output_dir: Path) -> MLflowTracker:
    tracker.start(TrackedRun(folder=folder, name=folder.root.name, parameters={}, output_dir=output_dir))
    return tracker


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def _tracked_steps(output_dir: Path) -> dict[str, list[int]]:
    """Return the steps that MLflow has, with repetitions, by run."""
    query = "SELECT name, step FROM runs JOIN metrics USING (run_uuid) WHERE key = 'train/loss' ORDER BY step"
    steps: dict[str, list[int]] = {}
    with contextlib.closing(sqlite3.connect(output_dir / "mlflow.db", timeout=30)) as database:
        for name, step in database.execute(query):
            steps.setdefault(name, []).append(step)
    return steps


def test_05_a_full_disk_costs_the_logs_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path).create()
    logger = logging.getLogger("ava_exp.training")
    with configure_logging(folder):
        with _full_disk(at_bytes=300):
            for step in range(20):
                logger.info("step %d", step)
        logger.info("there is room again")
    (warning,) = capsys.readouterr().err.splitlines()
    assert "Logs cannot be written" in warning and "the run goes on" in warning
    text = (folder.logs / "training.log").read_text()
    assert "step 2" in text and "step 19" not in text and "there is room again" in text


def test_05_a_full_disk_costs_the_metrics_one_warning_and_no_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        with _full_disk(at_bytes=1000):
            for step in range(1, 31):
                metrics.append(_record(step))
        assert 0 < path.stat().st_size <= 1000
        assert path.read_bytes().endswith(b"\n"), "a reader never sees half a record"
        metrics.append(_record(31))
    assert [record["step"] for record in read_metrics(path)] == list(range(1, 32))
    (warning,) = _warnings(caplog)
    assert "the run goes on" in warning


def test_21_a_locked_tracker_holds_nothing_up_and_gets_everything_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = new_attempt(tmp_path, "run")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        tracker = _start(MLflowTracker(None, "tests", {}, patience_s=1.0), folder, tmp_path)
        _append(folder, range(1, NUM_RECORDS + 1))
        tracker.finish(RunStatus.finished)
        assert _followers(psutil.Process()) == [], "the follower is not left behind"
    (warning,) = _warnings(caplog)
    assert "sent when the run is next opened" in warning

    run = TrackedRun(folder=folder, name="run", parameters={}, output_dir=tmp_path)
    MLflowTracker(None, "tests", {}, patience_s=60).catch_up(run, RunStatus.finished)
    assert _tracked_steps(tmp_path) == {"run": list(range(1, NUM_RECORDS + 1))}
    before = (tmp_path / "mlflow.db").stat().st_mtime_ns
    MLflowTracker(None, "tests", {}, patience_s=60).catch_up(run, RunStatus.finished)
    assert (tmp_path / "mlflow.db").stat().st_mtime_ns == before, "nothing was left, so nothing is opened"


def test_21_an_absent_tracker_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = new_attempt(tmp_path, "run")
    tracker = _start(MLflowTracker("http://me:hunter2@127.0.0.1:9", "tests", {}, patience_s=0.5), folder, tmp_path)
    _append(folder, range(1, NUM_RECORDS + 1))
    while not _warnings(caplog):
        time.sleep(0.05)
    tracker.finish(RunStatus.finished)
    trouble, remains = _warnings(caplog)
    assert "The tracker cannot be used" in trouble and "hunter2" not in trouble
    assert "sent when the run is next opened" in remains
    assert len(read_metrics(folder.metrics)) == NUM_RECORDS


def test_21_a_follower_killed_at_any_moment_repeats_and_loses_nothing(tmp_path: Path) -> None:
    generator = random.Random(0)
    folder = new_attempt(tmp_path, "run")
    num_records = 400
    _append(folder, range(1, num_records + 1), num_layers=8)
    num_interrupted = 0
    for _ in range(4):
        tracker = _start(MLflowTracker(None, "tests", {}, patience_s=60), folder, tmp_path)
        known = _num_tracked(tmp_path)
        while (num_tracked := _num_tracked(tmp_path)) == known < num_records:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.2))
        (follower,) = _followers(psutil.Process())
        follower.kill()
        tracker.finish(RunStatus.stopped)
        num_interrupted += 0 < num_tracked < num_records
    assert num_interrupted >= 2, "the kills came too late to show anything"
    _start(MLflowTracker(None, "tests", {}, patience_s=60), folder, tmp_path).finish(RunStatus.finished)
    assert _tracked_steps(tmp_path) == {"run": list(range(1, num_records + 1))}


def _followers(parent: psutil.Process) -> list[psutil.Process]:
    """The tracker's processes, among others that tests of this worker may have started."""
    return [child for child in parent.children() if "mlflow_follower" in " ".join(child.cmdline())]


def _num_tracked(output_dir: Path) -> int:
    return sum(map(len, _tracked_steps(output_dir).values())) if (output_dir / "mlflow.db").exists() else 0


def test_21_a_follower_ends_with_a_killed_run(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from ava_exp.tracking.folder import new_attempt\n"
        "from ava_exp.tracking.mlflow_tracker import MLflowTracker; from ava_exp.tracking.trackers import TrackedRun\n"
        "out = Path(sys.argv[1]); folder = new_attempt(out, 'run')\n"
        "MLflowTracker(None, 'tests', {}).start("
        "TrackedRun(folder=folder, name='run', parameters={}, output_dir=out))\n"
        "print('started', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stdout.readline() == b"started\n"
        (follower,) = _followers(psutil.Process(run.pid))
        run.kill()
    while follower.is_running() and follower.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)


def test_22_several_processes_open_a_new_tracker_database_at_once(tmp_path: Path) -> None:
    folders = [new_attempt(tmp_path, f"run-{letter}") for letter in "abcd"]
    for folder in folders:
        _append(folder, range(1, NUM_RECORDS + 1))
    trackers = [_start(MLflowTracker(None, "tests", {}, patience_s=120), folder, tmp_path) for folder in folders]
    for tracker in trackers:
        tracker.finish(RunStatus.finished)
    assert _tracked_steps(tmp_path) == {folder.root.name: list(range(1, NUM_RECORDS + 1)) for folder in folders}


HOLDER = (
    "import os, sys, time; from pathlib import Path; from ava_exp.tracking.lock import RunLock\n"
    "with RunLock(Path(sys.argv[1])):\n"
    "    child = os.fork() if len(sys.argv) > 2 else 1\n"
    "    print(child, flush=True) if child else None\n"
    "    time.sleep(600)"
)


@contextlib.contextmanager
def _holder(path: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that holds the lock until it is killed, and the number that it prints."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), *arguments], stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_23_a_second_process_is_refused_and_a_dead_owner_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with _holder(path) as (owner, _):
        refusal = rf"{tmp_path} is in use by process {owner.pid} on .*resume=never"
        with pytest.raises(RunFolderError, match=refusal), RunLock(path):
            pass
    assert str(owner.pid) in path.read_text(), "its name is still there, but it is dead"
    with RunLock(path):
        assert str(owner.pid) not in path.read_text()


def test_23_a_forked_worker_does_not_hold_the_lock_of_its_dead_parent(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with _holder(path, "fork") as (_, worker_pid):
        worker = psutil.Process(worker_pid)
    try:
        assert worker.is_running()
        with RunLock(path):
            pass
    finally:
        worker.kill()


@pytest.mark.parametrize("occupied", ["outputs", "outputs/runs", "outputs/runs/quick-1a2b"])
def test_25_a_place_that_cannot_be_written_is_refused_in_one_sentence(tmp_path: Path, occupied: str) -> None:
    (tmp_path / occupied).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / occupied).write_text("a file in the folder's place")
    assert newest_attempt(tmp_path / "outputs", "quick-1a2b") is None
    with pytest.raises(RunFolderError) as refusal:
        new_attempt(tmp_path / "outputs", "quick-1a2b")
    sentence = str(refusal.value)
    assert "quick-1a2b cannot be written" in sentence and "output_dir=" in sentence and "\n" not in sentence


def test_25_a_part_of_the_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    folder = new_attempt(tmp_path, "run")
    folder.logs.rmdir()
    folder.logs.write_text("a file in the folder's place")
    with pytest.raises(RunFolderError, match="run cannot be written"):
        folder.create()


def test_40_secrets_reach_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    folder = new_attempt(tmp_path, "run")
    command = ["python", "-m", "ava_exp", f"hub.token={SECRET}", f"tracker.uri=postgresql://me:{SECRET}@host/db"]
    with configure_logging(folder, verbose=True):
        logger = logging.getLogger("ava_exp.training")
        logger.info("Authorization: Bearer %s", SECRET)
        try:
            raise ConnectionError(f"https://me:{SECRET}@host refused")
        except ConnectionError:
            logger.exception("the hub cannot be reached with password='%s'", SECRET)
        folder.write_json("metadata.json", collect_metadata(command))
        folder.write_json("difference.json", {"hub.token": [None, SECRET]})
        _append(folder, range(1, 3))
        tracker = MLflowTracker(None, "tests", {"api_key": SECRET}, patience_s=60)
        parameters = {"hub.token": SECRET, "data.url": f"https://me:{SECRET}@host"}
        tracker.start(TrackedRun(folder=folder, name="run", parameters=parameters, output_dir=tmp_path))
        tracker.finish(RunStatus.finished, [write_report(folder)])
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"debug.log", "metadata.json", "mlflow.db", "report.html"} <= {path.name for path in written}
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in capsys.readouterr().err
