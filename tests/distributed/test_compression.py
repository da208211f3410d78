"""Gradients that travel compressed: fewer bytes, an error that is told, and a run that goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from ava_exp.errors import EXIT_OK, EXIT_RESUMABLE
from ava_exp.tracking.metrics import of_kind, read_metrics
from tests.distributed.group import Command, Fault, run_in_group
from tests.faults.harness import Experiment, observed

pytestmark = pytest.mark.timeout(600)

ERRORS = {"none": None, "fp16": (1e-7, 1e-4), "bf16": (1e-3, 1e-2), "powersgd": (1e-2, 1.0)}
"""Between which the relative error of a sum must be."""


def test_two_ranks_send_less_and_say_what_it_costs(tmp_path: Path) -> None:
    settings = ("hardware.num_devices=2", "distributed=ddp", "precision=mixed_bf16", "model.intermediate_size=128")
    runs = {
        name: Experiment(output_dir=tmp_path / name, overrides=(*settings, f"distributed.gradient_compression={name}"))
        for name in ERRORS
    }
    stopped = Experiment(output_dir=tmp_path / "stopped", overrides=runs["powersgd"].overrides)
    ends = run_in_group(
        2,
        [
            *(Command(overrides=run.command) for run in runs.values()),
            Command(overrides=stopped.command, fault=Fault(rank=1, step=5, action="SIGTERM")),
            Command(overrides=stopped.command),
        ],
    )
    expected = [*[EXIT_OK] * len(runs), EXIT_RESUMABLE, EXIT_OK]
    assert [[ended.code for ended in each] for each in ends] == [[code] * 2 for code in expected], ends
    assert observed(stopped.folder.root) == observed(runs["powersgd"].folder.root), "it remembers what it lost"
    records = {name: read_metrics(run.folder.metrics) for name, run in runs.items()}
    losses = {name: of_kind(of, "eval")[-1]["loss"] for name, of in records.items()}
    sent = {name: {record.get("gradient_bytes") for record in of_kind(of, "train")} for name, of in records.items()}
    assert sent["none"] == {None} and sent["fp16"] == sent["bf16"]
    assert 0 < max(sent["powersgd"]) < max(sent["bf16"]) / 2
    for name, bounds in ERRORS.items():
        assert losses[name] == pytest.approx(losses["none"], rel=0.1), losses
        for record in of_kind(records[name], "eval"):
            assert bounds is None if name == "none" else bounds[0] < record["compression_error"] < bounds[1], record
