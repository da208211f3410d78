"""Points without processes: what a sweep looks like to those who run, compare and report it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ava_exp.config.compose import compose
from ava_exp.config.identity import to_plain
from ava_exp.config.run import RunConfig
from ava_exp.sweeping.record import Point, SweepRecord
from ava_exp.tracking.folder import RunFolder

MakePoint = Callable[..., Point]
FinishRun = Callable[..., RunFolder]


@pytest.fixture(scope="session")
def composed() -> RunConfig:
    return compose(["~local", "debug=default", "tracker=none"])


@pytest.fixture
def make_point(composed: RunConfig, tmp_path: Path) -> MakePoint:
    """Return a point whose runs are below `tmp_path`; its id is made of its choices."""
    numbers = iter(range(1000))

    def make(**choices: str) -> Point:
        config = copy.deepcopy(composed)
        config.output_dir = str(tmp_path)
        number = next(numbers)
        overrides = [f"{key}={value}" for key, value in choices.items()]
        run_id = "-".join(["run", *choices.values()]) or f"run-{number}"
        return Point(number=number, overrides=overrides, choices=choices, run_id=run_id, config=config)

    return make


@pytest.fixture
def finish_run() -> FinishRun:
    """Write what a run leaves behind when it has finished."""

    def finish(point: Point, value: float, values: tuple[float, ...] = ()) -> RunFolder:
        folder = RunFolder(Path(point.config.output_dir) / "runs" / point.run_id).create()
        folder.config.write_text(json.dumps(to_plain(point.config)))
        folder.write_json("summary.json", {"final": {"bits_per_byte": value}})
        lines = []
        for step, measured in enumerate([*values, value], start=1):
            lines.append({"kind": "train", "step": step, "tokens": 100 * step, "loss": 1.0})
            lines.append({"kind": "eval", "step": step, "bits_per_byte": measured, "loss": 1.0})
        lines[-1]["final"] = True
        folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        folder.write_json("status.json", {"status": "finished", "step": len(lines) // 2})
        return folder

    return finish


@pytest.fixture
def record(tmp_path: Path) -> SweepRecord:
    root = tmp_path / "sweeps" / "tests-01234567"
    record = SweepRecord(
        root=root, name="tests", command="python -m ava_exp -m", objective="bits_per_byte", definition={}
    )
    record.create()
    return record
