"""The metrics file."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from ava_exp.tracking import metrics
from ava_exp.tracking.metrics import MetricsFile, metric_values, read_metrics


def _append(path: Path, *steps: int) -> None:
    with MetricsFile(path) as file:
        for step in steps:
            file.append({"kind": "train", "step": step, "loss": step / 3})


def _steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_numbers_come_back_bit_for_bit_and_the_file_is_standard_json(tmp_path: Path) -> None:
    record = {
        "kind": "train",
        "step": 1,
        "loss": 0.1 + 0.2,
        "grad_norm": math.inf,
        "mfu": None,
        "x": [math.nan, -math.inf],
    }
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        file.append(record)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert read["loss"] == 0.1 + 0.2 and read["grad_norm"] == math.inf and read["mfu"] is None
    assert math.isnan(read["x"][0]) and read["x"][1] == -math.inf
    assert read["time"] > 1.7e9


def test_records_are_on_the_file_at_once(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        for step in range(3):
            file.append({"kind": "train", "step": step})
            assert _steps(tmp_path / "metrics.jsonl")[-1] == step


def test_the_load_of_experts_is_rounded_without_touching_the_callers_record(tmp_path: Path) -> None:
    record = {"kind": "train", "step": 1, "expert_load": [[1 / 3, 2 / 3]]}
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        file.append(record)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["expert_load"] == [[0.33333, 0.66667]]
    assert record == {"kind": "train", "step": 1, "expert_load": [[1 / 3, 2 / 3]]}


def test_an_evaluation_that_the_checkpoint_does_not_know_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        for step in (1, 2):
            file.append({"kind": "train", "step": step})
            file.append({"kind": "eval", "step": step})
        file.cut_back(2, {1, 2})
        assert len(read_metrics(path)) == 4
        file.cut_back(2, {1})
    assert [(record["kind"], record["step"]) for record in read_metrics(path)] == [
        ("train", 1),
        ("eval", 1),
        ("train", 2),
    ]


def test_cutting_back_drops_later_steps_and_a_torn_line_and_appending_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _append(path, 1, 2, 3, 4, 5)
    kept = path.read_bytes().splitlines(keepends=True)[:3]
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 2, "lo')
    with MetricsFile(path) as file:
        file.cut_back(3)
        assert path.read_bytes() == b"".join(kept)
        file.append({"kind": "train", "step": 4})
    assert _steps(path) == [1, 2, 3, 4]


def test_cutting_back_a_whole_file_leaves_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _append(path, 1, 2)
    inode = path.stat().st_ino
    with MetricsFile(path) as file:
        file.cut_back(2)
    assert path.stat().st_ino == inode


def test_a_line_that_is_no_record_is_reported_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    _append(path, 1)
    with path.open("ab") as file:
        file.write(b"\0\0\0\n")
    _append(path, 2)
    assert _steps(path) == [1, 2]
    assert "line 2 is no metric record" in caplog.text


def test_no_file_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_what_waits_in_memory_is_bounded_and_the_loss_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics, "MAX_PENDING", 3)
    with caplog.at_level(logging.WARNING), monkeypatch.context() as disk:
        file = MetricsFile(tmp_path / "metrics.jsonl")
        disk.setattr(metrics.os, "write", full)
        for step in range(1, 6):
            file.append({"kind": "train", "step": step})
        disk.undo()
        file.close()
    assert _steps(tmp_path / "metrics.jsonl") == [3, 4, 5]
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert "2 metric records could not be written" in caplog.text


def test_names_for_trackers() -> None:
    train = {"kind": "train", "step": 3, "time": 1.0, "loss": 2.0, "mfu": None, "skipped": True, "sample_crc32": 7}
    layer = {
        "mean_utilization": 0.5,
        "std_utilization": 0.0,
        "min_utilization": 0.5,
        "max_utilization": 0.5,
        "gini": 0.0,
        "routing_entropy": math.log(2),
        "imbalance": 1.0,
        "dead_experts": 3.0,
    }
    experts = {f"experts/{place}/{name}": value for place in ("layer_0", "overall") for name, value in layer.items()}
    routed = {**train, "expert_load": [[0.5, 0.5]], "dead_experts": [3]}
    assert metric_values(routed) == pytest.approx({"train/loss": 2.0, "train/skipped": 1.0, **experts})
    evaluation = {"kind": "eval", "step": 3, "bits_per_byte": 1.5, "final": False}
    assert metric_values(evaluation) == {"eval/bits_per_byte": 1.5}
    assert metric_values({**evaluation, "final": True}) == {"final/bits_per_byte": 1.5}
    learned = {**evaluation, "activation_weights": {"layer_1_shared": {"gelu": 0.75, "relu": 0.25}}}
    shares = {f"eval/activations/layer_1_shared/{name}": share for name, share in (("gelu", 0.75), ("relu", 0.25))}
    assert metric_values(learned) == {"eval/bits_per_byte": 1.5, **shares}
    observed = {
        **evaluation,
        "expert_load": [[0.5, 0.5], [1.0, 0.0, 0.0]],
        "churn": [None, 0.25],
        "sources": ["a", "b"],
    }
    values = metric_values(observed)
    assert values["eval/experts/layer_1/churn"] == values["eval/experts/overall/churn"] == 0.25
    assert "eval/experts/layer_0/churn" not in values
    assert values["eval/experts/layer_1/gini"] == pytest.approx(2 / 3)
    assert "final/experts/layer_0/gini" in metric_values({**observed, "final": True})
