"""A record of surgery, and what comes after it, in everything that is made from records."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ava_exp.models.surgery import Parameters, SurgeryReport
from ava_exp.tracking.figures import FIGURES, read_history, write_figures
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.logs import RecordLog
from ava_exp.tracking.metrics import MetricsFile, metric_values
from ava_exp.tracking.report import write_report
from ava_exp.tracking.view import LineView

Records = Callable[..., Iterator[dict[str, Any]]]
SENTENCE = (
    "add_expert after step 20: layer 0: expert 8 is a copy of expert 3; loss 4.5000 before, 4.2500 after; "
    "1,000 parameters before, 1,200 after"
)


@pytest.fixture
def records(fake_records: Records) -> list[dict[str, Any]]:
    """A run that got an expert more in its first layer halfway."""
    report = SurgeryReport(
        operation="add_expert",
        done=["layer 0: expert 8 is a copy of expert 3"],
        loss_before=4.5,
        loss_after=4.25,
        before=Parameters(total=1000, active=500),
        after=Parameters(total=1200, active=510),
    )
    before = [record for record in fake_records(40) if record["step"] <= 20]
    after = [record for record in fake_records(40) if record["step"] > 20]
    for record in after:
        if record["kind"] == "train":
            record["expert_load"][0] = [*record["expert_load"][0], 0.0]
    return [*before, report.record(20), *after]


def test_it_is_told_in_one_line(records: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    console = Console(file=io.StringIO(), width=300)
    log = RecordLog(40)
    with caplog.at_level(logging.INFO), LineView(40, ["run"], console) as view:
        for record in records:
            view.update(record)
            log.append(record)
    assert isinstance(console.file, io.StringIO)
    assert SENTENCE in console.file.getvalue()
    assert SENTENCE in caplog.messages


def test_the_tracker_has_its_numbers(records: list[dict[str, Any]]) -> None:
    (event,) = (record for record in records if record["kind"] == "surgery")
    assert metric_values(event) == {
        "surgery/loss_before": 4.5,
        "surgery/loss": 4.25,
        "surgery/parameters_before": 1000.0,
        "surgery/parameters": 1200.0,
        "surgery/active_parameters_before": 500.0,
        "surgery/active_parameters": 510.0,
    }


def test_figures_and_report_take_layers_that_change_their_size(records: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run").create()
    with MetricsFile(folder.metrics) as metrics:
        for record in records:
            metrics.append(record)
    history = read_history(folder)
    assert len(write_figures(folder)) == sum(has_data(history) for has_data, _ in FIGURES.values())
    assert folder.figures.joinpath("experts.png").is_file()
    assert write_report(folder).is_file()
