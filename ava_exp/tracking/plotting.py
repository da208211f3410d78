"""What all figures have in common: the records they are drawn from, their style, and how curves are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import Record, of_kind, read_metrics
from ava_exp.tracking.positions import PositionReport

BLUE, ORANGE, GREEN, RED, GREY = "#2f6fb2", "#e07b1a", "#2e9e6b", "#c8443c", "#7a828c"
STYLE: dict[Any, Any] = {
    "figure.dpi": 180,
    "figure.facecolor": "white",
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b5bbc2",
    "axes.labelcolor": "#3d444c",
    "axes.grid": True,
    "grid.color": "#e6e9ec",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#3d444c",
    "ytick.color": "#3d444c",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
WIDTH, HEIGHT = 6.4, 3.5


@dataclass(frozen=True, slots=True)
class History:
    """What figures are drawn from."""

    train: list[Record]
    evaluations: list[Record]
    """The last one is on the whole validation split, if the run got that far."""
    routed: list[Record]
    """The `train` records that tell the load of experts."""
    by_source: list[Record]
    """The evaluations that tell it by source of the text."""
    baselines: dict[str, float]
    positions: PositionReport | None = None
    """Of a run that extended another's context."""
    depths: list[Record] = field(default_factory=list)
    """The evaluations that tell what tokens skip."""
    headed: list[Record] = field(default_factory=list)
    """The `train` records that tell which attention heads tokens choose."""


def read_history(folder: RunFolder) -> History:
    """Sort the records of a run by what they say."""
    records = read_metrics(folder.metrics)
    train, evaluations = of_kind(records, "train"), of_kind(records, "eval")
    return History(
        train=train,
        evaluations=evaluations,
        routed=[record for record in train if record.get("expert_load")],
        by_source=[record for record in evaluations if record.get("source_load")],
        headed=[record for record in train if record.get("head_load")],
        depths=[record for record in evaluations if record.get("mod_layers")],
        baselines=folder.read_json("summary.json", {}).get("baselines") or {},
        positions=PositionReport.read(folder),
    )


def series(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of one field, without the records that lack it."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Average over a window of a twenty-fifth of the run, centred, shorter at the ends; gaps are left out."""
    window = np.ones(2 * max(1, len(values) // 50) + 1)
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), window, "full")
    counts = np.convolve(finite.astype(float), window, "full")
    inside = slice(len(window) // 2, len(window) // 2 + len(values))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)[inside]


def new_figure(title: str, rows: int = 1, height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    axes[0].set_title(title)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return figure, axes


def curve(axis: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    """Draw single steps lightly and their average on top."""
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.9)
    axis.plot(steps, smooth(values), color=colour, label=label)
    axis.margins(x=0.01)
