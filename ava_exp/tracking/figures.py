"""Figures of a run, drawn from its metrics file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter, StrMethodFormatter

from ava_exp.tracking.experts import expert_summary, relative_load
from ava_exp.tracking.files import unwritable
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import Record, of_kind, read_metrics
from ava_exp.tracking.text import evenly

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
MAX_COLUMNS = 300
MAX_LAYERS = 12
BASELINES = {"gzip": ("gzip -9", "--"), "xz": ("xz", ":")}


@dataclass(frozen=True, slots=True)
class History:
    """What figures are drawn from."""

    train: list[Record]
    evaluations: list[Record]
    """The last one is on the whole validation split, if the run got that far."""
    routed: list[Record]
    """The `train` records that tell the load of experts."""
    baselines: dict[str, float]


def read_history(folder: RunFolder) -> History:
    """Sort the records of a run by what they say."""
    records = read_metrics(folder.metrics)
    train = of_kind(records, "train")
    return History(
        train=train,
        evaluations=of_kind(records, "eval"),
        routed=[record for record in train if record.get("expert_load")],
        baselines=folder.read_json("summary.json", {}).get("baselines") or {},
    )


def write_figures(folder: RunFolder) -> list[Path]:
    """Write the figures that the run's metrics allow as PNG files into `figures/` and return their paths.

    A dense model has no experts and a run stopped early may have no evaluation: their figures are left out.

    Raises:
        RunFolderError: A file cannot be written.
    """
    history = read_history(folder)
    paths = []
    for name, (has_data, draw) in FIGURES.items():
        if has_data(history):
            path = folder.figures / f"{name}.png"
            try:
                with matplotlib.rc_context(STYLE):
                    draw(history).savefig(path)
            except OSError as error:
                raise unwritable(path, error) from error
            paths.append(path)
    return paths


def _series(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of one field, without the records that lack it."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average over a window of a twenty-fifth of the run, centred, shorter at the ends; gaps are left out."""
    window = np.ones(2 * max(1, len(values) // 50) + 1)
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), window, "full")
    counts = np.convolve(finite.astype(float), window, "full")
    inside = slice(len(window) // 2, len(window) // 2 + len(values))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)[inside]


def _figure(title: str, rows: int = 1, height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    axes[0].set_title(title)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return figure, axes


def _curve(axis: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    """Draw single steps lightly and their average on top."""
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.9)
    axis.plot(steps, _smooth(values), color=colour, label=label)
    axis.margins(x=0.01)


def _evaluations(axis: Axes, history: History, name: str, label: str) -> None:
    """Draw the evaluations as a line, with a diamond at those on the whole split."""
    axis.plot(*_series(history.evaluations, name), color=ORANGE, marker="o", markersize=4, label=label)
    if whole := [record for record in history.evaluations if record.get("final")]:
        steps, values = _series(whole, name)
        axis.plot(steps, values, color=ORANGE, marker="D", markersize=7, linestyle="", label=f"{label} (whole split)")


def draw_loss(history: History) -> Figure:
    """Training loss, step by step and smoothed, with the evaluations."""
    figure, (axis,) = _figure("Loss")
    _curve(axis, *_series(history.train, "loss"), BLUE, "training")
    _evaluations(axis, history, "loss", "validation")
    axis.set_ylabel("cross entropy (nats per token)")
    axis.legend()
    return figure


def draw_bits_per_byte(history: History) -> Figure:
    """Bits per byte of the evaluations beside those of general compressors."""
    figure, (axis,) = _figure("Compression of unseen text")
    _evaluations(axis, history, "bits_per_byte", "this model")
    for name, value in history.baselines.items():
        label, style = BASELINES[name]
        axis.axhline(value, color=GREY, linestyle=style, linewidth=1.4, label=f"{label} ({value:.2f})")
    last = history.evaluations[-1]
    axis.annotate(
        f"{last['bits_per_byte']:.2f}",
        (last["step"], last["bits_per_byte"]),
        (0, 9),
        textcoords="offset points",
        ha="center",
        color=ORANGE,
        fontweight="bold",
    )
    axis.set_ylim(bottom=0)
    axis.set_ylabel("bits per byte (lower is better)")
    axis.legend()
    return figure


def draw_optimisation(history: History) -> Figure:
    """Learning rate and gradient norm."""
    figure, (rate, norm) = _figure("Learning rate and gradient norm", rows=2, height=4.2)
    rate.plot(*_series(history.train, "learning_rate"), color=GREEN)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _curve(norm, *_series(history.train, "grad_norm"), RED, "gradient norm")
    norm.set_ylabel("gradient norm (L2)")
    norm.set_yscale("log")
    norm.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    norm.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    norm.minorticks_off()
    return figure


def draw_throughput(history: History) -> Figure:
    """Tokens per second and, where the device's peak is known, model FLOPs utilisation."""
    steps, mfu = _series(history.train, "mfu")
    figure, axes = _figure("Throughput", rows=2 if len(mfu) else 1, height=4.2 if len(mfu) else HEIGHT)
    _curve(axes[0], *_series(history.train, "tokens_per_s"), BLUE, "throughput")
    axes[0].set_ylabel("tokens per second")
    axes[0].set_ylim(bottom=0)
    if len(mfu):
        _curve(axes[1], steps, mfu, GREEN, "MFU")
        axes[1].set_ylabel("model FLOPs utilisation")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[1].set_ylim(bottom=0)
    return figure


def draw_experts(history: History) -> Figure:
    """Share of tokens by expert and time, one panel a layer, in units of the balanced share."""
    steps = [record["step"] for record in history.routed]
    loads = _padded([[relative_load(layer) for layer in record["expert_load"]] for record in history.routed])
    layers = evenly(loads.shape[1], MAX_LAYERS)
    rows, columns = -(-len(layers) // 2), min(2, len(layers))
    figure = Figure(figsize=(WIDTH, 1.1 + 1.3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    look: dict[str, Any] = {
        "aspect": "auto",
        "cmap": "RdBu_r",
        "norm": TwoSlopeNorm(1.0, 0.0, max(2.0, float(np.nanpercentile(loads, 99.5)))),
        "extent": (steps[0] - 0.5, steps[-1] + 0.5, loads.shape[2] - 0.5, -0.5),
        "interpolation": "nearest",
    }
    for axis, layer in zip(axes, layers, strict=False):
        image = axis.imshow(_columns(loads[:, layer]).T, **look)
        axis.set_title(f"layer {layer}", fontsize=9, fontweight="normal")
        axis.set_ylabel("expert")
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.grid(visible=False)
        axis.label_outer()
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    figure.suptitle("Expert utilisation by layer and time", x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.supxlabel("step", fontsize=9.5, color=STYLE["axes.labelcolor"])
    figure.colorbar(image, ax=axes, label="× balanced share", pad=0.02)
    return figure


def _padded(loads: list[list[list[float]]]) -> np.ndarray:
    """Return an array of loads (steps, layers, experts), with gaps where surgery has changed how many there are."""
    most = max(len(layer) for step in loads for layer in step)
    return np.array([[[*layer, *[math.nan] * (most - len(layer))] for layer in step] for step in loads])


def _columns(loads: np.ndarray) -> np.ndarray:
    """Average steps (the first dimension) until at most `MAX_COLUMNS` columns of the picture are left."""
    return np.stack([part.mean(axis=0) for part in np.array_split(loads, min(MAX_COLUMNS, len(loads)))])


def draw_balance(history: History) -> Figure:
    """Gini coefficient and normalised routing entropy of every layer over time."""
    steps = [record["step"] for record in history.routed]
    summaries = [[expert_summary(load) for load in record["expert_load"]] for record in history.routed]
    most = np.log(max(2, len(history.routed[0]["expert_load"][0])))
    figure, (gini, entropy) = _figure("Expert balance", rows=2, height=4.6)
    layers = evenly(len(summaries[0]), MAX_LAYERS)
    for position, layer in enumerate(layers):
        colour = matplotlib.colormaps["viridis"](0.9 * position / max(1, len(layers) - 1))
        ginis = np.array([row[layer]["gini"] for row in summaries])
        entropies = np.array([row[layer]["routing_entropy"] for row in summaries])
        gini.plot(steps, _smooth(ginis), color=colour, label=f"layer {layer}")
        entropy.plot(steps, _smooth(entropies / most), color=colour)
    gini.set_ylabel("Gini coefficient\n(0 is balanced)")
    gini.set_ylim(bottom=0)
    gini.margins(x=0.01)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    entropy.set_ylabel("routing entropy\n(share of the most possible)")
    entropy.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


FIGURES: dict[str, tuple[Callable[[History], bool], Callable[[History], Figure]]] = {
    "loss": (lambda history: bool(history.train), draw_loss),
    "bits_per_byte": (lambda history: bool(history.evaluations), draw_bits_per_byte),
    "optimisation": (lambda history: bool(history.train), draw_optimisation),
    "throughput": (lambda history: bool(history.train), draw_throughput),
    "experts": (lambda history: bool(history.routed), draw_experts),
    "balance": (lambda history: bool(history.routed), draw_balance),
}
"""Every figure by file name: whether a run has what it needs, and how it is drawn."""
