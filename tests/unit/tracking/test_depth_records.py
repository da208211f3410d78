"""What trackers, terminal, figures and report make of records about depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ava_exp.tracking.figures import write_figures
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import MetricsFile, Record, describe_evaluation, describe_step, metric_values
from ava_exp.tracking.report import write_report

TRAIN: Record = {
    "kind": "train",
    "step": 3,
    "elapsed_s": 1.0,
    "tokens": 10,
    "loss": 2.0,
    "learning_rate": 1e-3,
    "grad_norm": 1.0,
    "tokens_per_s": 100.0,
    "mfu": None,
    "layer_usage": [1.0, 0.5],
    "average_depth": 1.5,
    "mod_capacity": 0.5,
    "compute_savings": 0.2345,
}
EVALUATION: Record = {
    "kind": "eval",
    "step": 3,
    "loss": 2.5,
    "perplexity": 12.2,
    "noncausal_loss": 2.25,
    "noncausal_perplexity": 9.5,
    "bits_per_byte": 2.0,
    "token_accuracy": 0.25,
    "mod_capacity": 0.5,
    "mod_layers": [1],
    "processed_share": [0.45],
    "predictor_accuracy": [0.91],
    "skipped_by_frequency": [0.1, None, 0.3, 0.4, 0.5],
    "skipped_by_kind": {"letters": 0.6, "white space": 0.7},
}


def test_every_number_has_a_name() -> None:
    train, seen = metric_values(TRAIN), metric_values(EVALUATION | {"final": True})
    assert train["depth/layer_0/usage"] == 1.0 and train["depth/layer_1/usage"] == 0.5
    assert train["train/average_depth"] == 1.5 and train["train/compute_savings"] == 0.2345
    assert seen["final/noncausal_loss"] == 2.25
    assert {name: value for name, value in seen.items() if "/depth/" in name} == {
        "final/depth/layer_1/processed_share": 0.45,
        "final/depth/layer_1/predictor_accuracy": 0.91,
        "final/depth/skipped/letters": 0.6,
        "final/depth/skipped/white_space": 0.7,
        "final/depth/skipped/frequency_0": 0.1,
        "final/depth/skipped/frequency_2": 0.3,
        "final/depth/skipped/frequency_3": 0.4,
        "final/depth/skipped/frequency_4": 0.5,
    }


def test_lines_of_the_terminal() -> None:
    assert describe_step(TRAIN, 10).endswith("depth 1.50 of 2")
    assert describe_evaluation(EVALUATION).endswith("loss 2.250 with the choice of training")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("change", [{}, {"skipped_by_kind": None, "predictor_accuracy": None}])
def test_the_report_has_a_figure_and_a_table(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = RunFolder(tmp_path).create()
    with MetricsFile(folder.metrics) as metrics:
        for record in (TRAIN, EVALUATION | change, TRAIN | {"step": 4}, EVALUATION | change | {"step": 4}):
            metrics.append(record)
    assert "depth" in [path.stem for path in write_figures(folder)]
    page = write_report(folder).read_text(encoding="utf-8")
    assert "Depth at step 4" in page and "1.50 of 2 layers" in page and "23.4%" in page
    assert "<td>45.0%" in page.replace(' class="number"', "")
    assert ("91.0%" in page) == (not change)
    assert "loss, choice of training" in page
