"""Figures of a run, drawn from its metrics file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ava_exp.tracking.experts import expert_summary, relative_load
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import Record, of_kind, read_metrics

BLUE, ORANGE, GREEN, RED, GREY = "#2f6fb2", "#e07b1a", "#2e9e6b", "#c8443c", "#7a828c"
STYLE = {
    "figure.dpi": 150,
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
WIDTH, HEIGHT = 8.0, 3.8
MAX_COLUMNS = 300
MAX_LAYERS = 12
BASELINE_STYLES = {"gzip": ("gzip −9", "--"), "xz": ("xz", ":")}

Draw = Callable[[list[Record], Mapping[str, float]], Figure]


def write_figures(folder: RunFolder) -> list[Path]:
    """Write the figures that the run's metrics allow as PNG files into `figures/` and return their paths.

    A dense model has no experts and a run stopped early may have no evaluation: their figures are left out.
    """
    records = read_metrics(folder.metrics)
    baselines = folder.read_json("summary.json", {}).get("baselines") or {}
    paths = []
    for name, (needs, draw) in FIGURES.items():
        if any(needs(record) for record in records):
            path = folder.figures / f"{name}.png"
            with matplotlib.rc_context(STYLE):
                draw(records, baselines).savefig(path)
            paths.append(path)
    return paths


def _is_training(record: Record) -> bool:
    return bool(record["kind"] == "train")


def _is_evaluation(record: Record) -> bool:
    return bool(record["kind"] == "eval")


def _has_experts(record: Record) -> bool:
    return bool(record.get("expert_load"))


def _series(records: list[Record], kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of one field, without the records that lack it."""
    points = [(record["step"], record[name]) for record in of_kind(records, kind) if record.get(name) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Average over a window of a fortieth of the run, centred, shorter at the ends; gaps are left out."""
    half = max(1, len(values) // 80)
    finite = np.where(np.isfinite(values), values, 0.0)
    sums = np.convolve(finite, np.ones(2 * half + 1), "same")
    counts = np.convolve(np.isfinite(values).astype(float), np.ones(2 * half + 1), "same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _figure(title: str, rows: int = 1, height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].set_title(title)
    axes[-1].set_xlabel("step")
    return figure, list(axes)


def _curve(axis: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    """Draw single steps lightly and their average on top; limits follow the average and most of the steps."""
    axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.9)
    axis.plot(steps, _smooth(values), color=color, label=label)
    axis.margins(x=0.01)


def draw_loss(records: list[Record], baselines: Mapping[str, float]) -> Figure:
    """Training loss, step by step and smoothed, with the evaluations."""
    figure, (axis,) = _figure("Loss")
    _curve(axis, *_series(records, "train", "loss"), BLUE, "training")
    axis.plot(*_series(records, "eval", "loss"), color=ORANGE, marker="o", markersize=4, label="validation")
    axis.set_ylabel("cross entropy (nats per token)")
    axis.legend()
    return figure


def draw_bits_per_byte(records: list[Record], baselines: Mapping[str, float]) -> Figure:
    """Bits per byte of the evaluations beside those of general compressors."""
    figure, (axis,) = _figure("Compression of unseen text")
    steps, values = _series(records, "eval", "bits_per_byte")
    axis.plot(steps, values, color=ORANGE, marker="o", markersize=4, label="this model")
    axis.annotate(
        f"{values[-1]:.2f}", (steps[-1], values[-1]), (0, 7), textcoords="offset points", ha="center", color=ORANGE
    )
    for name, value in baselines.items():
        label, style = BASELINE_STYLES.get(name, (name, "-."))
        axis.axhline(value, color=GREY, linestyle=style, linewidth=1.4, label=f"{label} ({value:.2f})")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("bits per byte (lower is better)")
    axis.legend()
    return figure


def draw_optimisation(records: list[Record], baselines: Mapping[str, float]) -> Figure:
    """Learning rate and gradient norm."""
    figure, (rate, norm) = _figure("Learning rate and gradient norm", rows=2, height=4.4)
    rate.plot(*_series(records, "train", "learning_rate"), color=GREEN)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    _curve(norm, *_series(records, "train", "grad_norm"), RED, "gradient norm")
    norm.set_ylabel("gradient norm (L2)")
    norm.set_yscale("log")
    return figure


def draw_throughput(records: list[Record], baselines: Mapping[str, float]) -> Figure:
    """Tokens per second and, where the device's peak is known, model FLOPs utilisation."""
    steps, mfu = _series(records, "train", "mfu")
    figure, axes = _figure("Throughput", rows=2 if len(mfu) else 1, height=4.4 if len(mfu) else HEIGHT)
    _curve(axes[0], *_series(records, "train", "tokens_per_s"), BLUE, "throughput")
    axes[0].set_ylabel("tokens per second")
    axes[0].set_ylim(bottom=0)
    if len(mfu):
        _curve(axes[1], steps, mfu, GREEN, "MFU")
        axes[1].set_ylabel("model FLOPs utilisation")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes[1].set_ylim(bottom=0)
    return figure


def draw_experts(records: list[Record], baselines: Mapping[str, float]) -> Figure:
    """Share of tokens by expert and time, one panel a layer, in units of the balanced share."""
    shown = [record for record in records if record.get("expert_load")]
    loads = np.array([[relative_load(layer) for layer in record["expert_load"]] for record in shown])
    layers = evenly(loads.shape[1], MAX_LAYERS)
    columns = min(2, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(WIDTH, 1.2 + 1.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    figure.suptitle("Expert utilisation by layer and time", x=0.01, ha="left", fontsize=11, fontweight="bold")
    colours = TwoSlopeNorm(1.0, 0.0, max(2.0, float(np.nanpercentile(loads, 99.5))))
    extent = (shown[0]["step"], shown[-1]["step"] + 1, loads.shape[2] - 0.5, -0.5)
    for axis, layer in zip(axes, layers, strict=False):
        image = axis.imshow(
            _columns(loads[:, layer]).T,
            aspect="auto",
            cmap="RdBu_r",
            norm=colours,
            extent=extent,
            interpolation="nearest",
        )
        axis.set_title(f"layer {layer}", fontsize=9, fontweight="normal")
        axis.grid(visible=False)
        axis.set_ylabel("expert")
        axis.label_outer()
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    figure.supxlabel("step", fontsize=9.5, color="#3d444c")
    figure.colorbar(image, ax=axes, label="tokens, in units of the balanced share", pad=0.02)
    return figure


def evenly(count: int, limit: int) -> list[int]:
    """Choose at most `limit` of `count` positions, evenly from the first to the last."""
    return sorted({round(position) for position in np.linspace(0, count - 1, min(count, limit))})


def _columns(load_SE: np.ndarray) -> np.ndarray:
    """Average steps until at most `MAX_COLUMNS` columns of the picture are left."""
    return np.stack([part.mean(axis=0) for part in np.array_split(load_SE, min(MAX_COLUMNS, len(load_SE)))])


def draw_balance(records: list[Record], baselines: Mapping[str, float]) -> Figure:
    """Gini coefficient and normalised routing entropy of every layer over time."""
    shown = [record for record in records if record.get("expert_load")]
    steps = np.array([record["step"] for record in shown])
    summaries = [[expert_summary(load) for load in record["expert_load"]] for record in shown]
    most = np.log(max(2, len(shown[0]["expert_load"][0])))
    figure, (gini, entropy) = _figure("Expert balance", rows=2, height=4.8)
    layers = evenly(len(summaries[0]), MAX_LAYERS)
    for position, layer in enumerate(layers):
        colour = matplotlib.colormaps["viridis"](position / max(1, len(layers) - 1) * 0.9)
        gini.plot(
            steps, _smooth(np.array([row[layer]["gini"] for row in summaries])), color=colour, label=f"layer {layer}"
        )
        entropies = np.array([row[layer]["routing_entropy"] for row in summaries]) / most
        entropy.plot(steps, _smooth(entropies), color=colour)
    gini.set_ylabel("Gini coefficient\n(0 is balanced)")
    gini.set_ylim(bottom=0)
    gini.margins(x=0.01)
    gini.legend(ncols=4, fontsize=8)
    entropy.set_ylabel("routing entropy\n(share of the most possible)")
    entropy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


FIGURES: dict[str, tuple[Callable[[Record], bool], Draw]] = {
    "loss": (_is_training, draw_loss),
    "bits_per_byte": (_is_evaluation, draw_bits_per_byte),
    "optimisation": (_is_training, draw_optimisation),
    "throughput": (_is_training, draw_throughput),
    "experts": (_has_experts, draw_experts),
    "balance": (_has_experts, draw_balance),
}
"""Every figure by file name: which records it needs, and how it is drawn."""
