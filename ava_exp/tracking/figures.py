"""Figures of a run, drawn from its metrics file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter, StrMethodFormatter

from ava_exp.tracking.depth_figures import draw_depth
from ava_exp.tracking.files import unwritable
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.plotting import (
    BLUE,
    GREEN,
    GREY,
    HEIGHT,
    ORANGE,
    RED,
    STYLE,
    History,
    curve,
    new_figure,
    read_history,
    series,
)
from ava_exp.tracking.position_figure import draw_positions
from ava_exp.tracking.positions import PositionReport
from ava_exp.tracking.router_figures import draw_balance, draw_experts, draw_heads, draw_specialisation

BASELINES = {"gzip": ("gzip -9", "--"), "xz": ("xz", ":")}


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
            paths.append(_write(folder.figures / f"{name}.png", partial(draw, history)))
    return paths


def write_position_figure(folder: RunFolder, report: PositionReport, name: str) -> Path:
    """Write the figure of perplexities by position into `figures/` and return its path. Raises RunFolderError."""
    return _write(folder.figures / f"{name}.png", lambda: draw_positions(report))


def _write(path: Path, draw: Callable[[], Figure]) -> Path:
    try:
        with matplotlib.rc_context(STYLE):
            draw().savefig(path)
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def _evaluations(axis: Axes, history: History, name: str, label: str) -> None:
    """Draw the evaluations as a line, with a diamond at those on the whole split."""
    axis.plot(*series(history.evaluations, name), color=ORANGE, marker="o", markersize=4, label=label)
    if whole := [record for record in history.evaluations if record.get("final")]:
        steps, values = series(whole, name)
        axis.plot(steps, values, color=ORANGE, marker="D", markersize=7, linestyle="", label=f"{label} (whole split)")


def draw_loss(history: History) -> Figure:
    """Training loss, step by step and smoothed, with the evaluations."""
    figure, (axis,) = new_figure("Loss")
    curve(axis, *series(history.train, "loss"), BLUE, "training")
    _evaluations(axis, history, "loss", "validation")
    axis.set_ylabel("cross entropy (nats per token)")
    axis.legend()
    return figure


def draw_bits_per_byte(history: History) -> Figure:
    """Bits per byte of the evaluations beside those of general compressors."""
    figure, (axis,) = new_figure("Compression of unseen text")
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
    figure, (rate, norm) = new_figure("Learning rate and gradient norm", rows=2, height=4.2)
    rate.plot(*series(history.train, "learning_rate"), color=GREEN)
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    curve(norm, *series(history.train, "grad_norm"), RED, "gradient norm")
    norm.set_ylabel("gradient norm (L2)")
    norm.set_yscale("log")
    norm.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    norm.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    norm.minorticks_off()
    return figure


def draw_throughput(history: History) -> Figure:
    """Tokens per second and, where the device's peak is known, model FLOPs utilisation."""
    steps, mfu = series(history.train, "mfu")
    figure, axes = new_figure("Throughput", rows=2 if len(mfu) else 1, height=4.2 if len(mfu) else HEIGHT)
    curve(axes[0], *series(history.train, "tokens_per_s"), BLUE, "throughput")
    axes[0].set_ylabel("tokens per second")
    axes[0].set_ylim(bottom=0)
    if len(mfu):
        curve(axes[1], steps, mfu, GREEN, "MFU")
        axes[1].set_ylabel("model FLOPs utilisation")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[1].set_ylim(bottom=0)
    return figure


def _positions(history: History) -> Figure:
    assert history.positions is not None
    return draw_positions(history.positions)


FIGURES: dict[str, tuple[Callable[[History], bool], Callable[[History], Figure]]] = {
    "loss": (lambda history: bool(history.train), draw_loss),
    "bits_per_byte": (lambda history: bool(history.evaluations), draw_bits_per_byte),
    "optimisation": (lambda history: bool(history.train), draw_optimisation),
    "throughput": (lambda history: bool(history.train), draw_throughput),
    "experts": (lambda history: bool(history.routed), draw_experts),
    "heads": (lambda history: bool(history.headed), draw_heads),
    "balance": (lambda history: bool(history.routed), draw_balance),
    "specialisation": (lambda history: bool(history.by_source), draw_specialisation),
    "positions": (lambda history: history.positions is not None, _positions),
    "depth": (lambda history: bool(history.depths), draw_depth),
}
"""Every figure by file name: whether a run has what it needs, and how it is drawn."""
