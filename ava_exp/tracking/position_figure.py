"""The figure of perplexity by position."""

from __future__ import annotations

import itertools
import math

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from ava_exp.tracking.plotting import BLUE, GREEN, GREY, HEIGHT, ORANGE, RED, WIDTH
from ava_exp.tracking.positions import PositionReport

COLOURS = (GREY, RED, ORANGE, GREEN, "#8a5fb5", BLUE)


def draw_positions(report: PositionReport) -> Figure:
    """Perplexity over position, one line for each measurement, and where the original texts ended."""
    figure = Figure(figsize=(WIDTH, HEIGHT + 0.9), layout="constrained")
    axis = figure.subplots()
    axis.set_title("Perplexity by position")
    middles = [(start + stop) / 2 for start, stop in itertools.pairwise(report.edges)]
    for number, (name, curve) in enumerate(report.curves.items()):
        colour = COLOURS[number % len(COLOURS)] if len(report.curves) > 1 else BLUE
        values = [math.exp(min(loss, 700.0)) for loss in curve.losses]
        axis.plot(middles, values, color=colour, marker="o", markersize=3.5, label=name)
    if 0 < report.original_length < report.length:
        axis.axvline(report.original_length, color=GREY, linestyle=":", linewidth=1.2)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.2, 1.4, 1.6, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.minorticks_off()
    axis.set_ylabel("perplexity of the next token")
    axis.set_xlabel("position in the text (tokens)")
    axis.set_xlim(0, report.length)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8.5)
    return figure
