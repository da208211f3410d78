"""Figures of depth: how many tokens each layer processes, and which tokens skip."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ava_exp.tracking.plotting import BLUE, GREY, ORANGE, WIDTH, History
from ava_exp.tracking.text import evenly

MAX_LAYERS = 12
FREQUENCIES = ("rarest\nfifth", "", "", "", "most\nfrequent")


def draw_depth(history: History) -> Figure:
    """What every layer processes of validation text, over time beside what it should; and who skips, at the end."""
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.1, 1))
    _draw_usage(figure.add_subplot(grid[0, :]), history)
    by_frequency = figure.add_subplot(grid[1, 0])
    by_kind = figure.add_subplot(grid[1, 1], sharey=by_frequency)
    last = history.depths[-1]
    shares = [float("nan") if share is None else share for share in last["skipped_by_frequency"]]
    _draw_bars(by_frequency, FREQUENCIES[: len(shares)], shares, BLUE, "by frequency of the token")
    kinds = last.get("skipped_by_kind") or {}
    _draw_bars(by_kind, list(kinds), list(kinds.values()), ORANGE, "by kind of the token")
    by_frequency.set_ylabel("layers skipped")
    figure.suptitle("Which tokens pass through which layers", x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _draw_usage(axis: Axes, history: History) -> None:
    records = history.depths
    steps, layers = [record["step"] for record in records], records[-1]["mod_layers"]
    chosen = evenly(len(layers), MAX_LAYERS)
    for position, place in enumerate(chosen):
        colour = matplotlib.colormaps["viridis"](0.9 * position / max(1, len(chosen) - 1))
        shares = [record["processed_share"][place] for record in records]
        axis.plot(steps, shares, color=colour, marker="o", markersize=3, label=f"layer {layers[place]}")
    capacities = [record["mod_capacity"] for record in records]
    axis.plot(steps, capacities, color=GREY, linestyle="--", label="as configured")
    axis.set_title("share of tokens that a layer processes, validation text", fontsize=9, fontweight="normal")
    axis.set_xlabel("step")
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.legend(fontsize=8, ncols=2)


def _draw_bars(axis: Axes, names: Sequence[str], shares: Sequence[float], colour: str, title: str) -> None:
    axis.bar(range(len(shares)), shares, color=colour)
    axis.set_xticks(range(len(names)), names, fontsize=7.5, rotation=0 if len(names) < 6 else 20)
    axis.set_title(title, fontsize=9, fontweight="normal")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
