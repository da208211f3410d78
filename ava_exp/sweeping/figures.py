"""Figures of a sweep: curves with seeds as bands, importance, parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from ava_exp.config.sweep import Objective
from ava_exp.sweeping.definition import SEED
from ava_exp.sweeping.record import Point
from ava_exp.sweeping.results import Group, Importance, as_number, band, grouped, importances
from ava_exp.tracking.files import unwritable
from ava_exp.tracking.plotting import BLUE, HEIGHT, STYLE, WIDTH
from ava_exp.tracking.text import format_count

MAX_CURVES = 10
"""As many as there are colours that can be told apart; the best groups are drawn."""
LOG_RATIO = 10.0
"""Numbers that differ by more than this are drawn on a logarithmic axis."""
LABEL_LENGTH = 44
TICK_DISTANCE = 0.06
"""Of the height of an axis."""


def write_figures(points: Sequence[Point], objective: Objective, folder: Path) -> list[Path]:
    """Write the figures that the points allow as PNG files and return their paths. Raises RunFolderError."""
    finished = [point for point in points if point.value is not None and math.isfinite(point.value)]
    groups = [group for group in grouped(points, objective.is_maximized) if group.values]
    shares = importances(points)
    keys = [key for key in (finished[0].choices if finished else {}) if key != SEED]
    figures: dict[str, Figure] = {}
    with matplotlib.rc_context(STYLE):
        if groups:
            figures["curves"] = draw_curves(groups, objective)
        if len(shares) > 1 and any(importance.share is not None for importance in shares):
            figures["importance"] = draw_importance(shares)
        if keys and len(finished) > 1:
            figures["parallel_coordinates"] = draw_parallel_coordinates(finished, keys, objective)
        return [_write(figure, folder / f"{name}.png") for name, figure in figures.items()]


def _write(figure: Figure, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def draw_curves(groups: Sequence[Group], objective: Objective) -> Figure:
    """The objective at every evaluation: the mean over seeds, and one standard deviation to both sides."""
    figure = Figure(figsize=(WIDTH, HEIGHT + 0.12 * min(len(groups), MAX_CURVES)), layout="constrained")
    axis = figure.subplots()
    for number, group in enumerate(groups[:MAX_CURVES]):
        tokens, mean, deviation = band(group.points, objective.value)
        if not len(tokens):
            continue
        shown = slice(len(tokens) // 4, None)  # the first evaluations are far off, and would hide the differences
        tokens, mean, deviation = tokens[shown], mean[shown], deviation[shown]
        colour = matplotlib.colormaps["tab10"](number)
        axis.plot(tokens, mean, color=colour, label=_label(group))
        axis.fill_between(tokens, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)
    axis.set_title(f"Validation: {_words(objective)}")
    axis.set_xlabel("tokens trained on")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axis.set_ylabel(_words(objective))
    if axis.lines:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def draw_importance(shares: Sequence[Importance]) -> Figure:
    """The importance of every parameter as a bar."""
    known = [importance for importance in reversed(shares) if importance.share is not None]
    figure = Figure(figsize=(WIDTH, 1.2 + 0.4 * len(known)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh([_short(i.key) for i in known], [i.share or 0.0 for i in known], color=BLUE, height=0.6)
    axis.bar_label(bars, labels=[f"{i.share:.0%}" for i in known], padding=4)
    axis.set_title("What explains the differences")
    axis.set_xlabel("share of the variance (epsilon squared)")
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlim(0, 1.08)
    return figure


def draw_parallel_coordinates(points: Sequence[Point], keys: Sequence[str], objective: Objective) -> Figure:
    """Every point as a line through its values and its objective; the colour is the objective's."""
    values = np.array([point.value for point in points], dtype=float)
    columns = [_positions([point.choices.get(key, "") for point in points]) for key in keys]
    span = float(values.max() - values.min()) or 1.0
    shares = (values - values.min()) / span
    heights = np.array([*(column[0] for column in columns), shares])
    figure = Figure(figsize=(max(WIDTH, 1.6 * (len(keys) + 1)), HEIGHT + 0.4), layout="constrained")
    axis = figure.subplots()
    colours = matplotlib.colormaps["viridis_r" if objective.is_maximized else "viridis"]
    worst_first = np.argsort(values if objective.is_maximized else -values)
    for index in worst_first:
        axis.plot(range(len(heights)), heights[:, index], color=colours(shares[index]), alpha=0.85, linewidth=1.6)
    for place, (_, ticks) in enumerate(columns):
        _draw_scale(axis, place, ticks)
    _draw_scale(axis, len(keys), [(0.0, f"{values.min():.4g}"), (1.0, f"{values.max():.4g}")])
    axis.set_xticks(range(len(heights)), [*(_short(key.rpartition(".")[2]) for key in keys), _words(objective)])
    axis.set_yticks([])
    axis.set_xlim(-0.3, len(heights) - 0.4)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.set_title("Points by what they chose")
    return figure


def _draw_scale(axis: Axes, place: int, ticks: Sequence[tuple[float, str]]) -> None:
    axis.axvline(place, color="#b5bbc2", linewidth=1)
    for height, text in ticks:
        axis.annotate(
            _short(text),
            (place, height),
            (5, 0),
            textcoords="offset points",
            fontsize=7.5,
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
        )


def _positions(texts: Sequence[str]) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Return a height from 0 to 1 for every value, and ticks: numbers by size, other values by order of appearance."""
    distinct = list(dict.fromkeys(texts))
    numbers = {text: as_number(text) for text in distinct}
    known = [number for number in numbers.values() if number is not None]
    if len(known) == len(distinct) and len(set(known)) > 1:
        is_log = min(known) > 0 and max(known) / min(known) > LOG_RATIO
        scale = {text: math.log(number) if is_log else number for text, number in numbers.items() if number is not None}
    else:
        scale = {text: float(place) for place, text in enumerate(distinct)}
    low, high = min(scale.values()), max(scale.values())
    height = {text: (value - low) / (high - low) if high > low else 0.5 for text, value in scale.items()}
    return np.array([height[text] for text in texts]), _apart([(height[text], _tick(text)) for text in distinct])


def _apart(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Leave out ticks that would be written on top of others; the ends stay."""
    shown: list[tuple[float, str]] = []
    for tick in sorted(ticks):
        if not shown or tick[0] - shown[-1][0] >= TICK_DISTANCE:
            shown.append(tick)
        elif tick[0] == 1.0:
            shown[-1] = tick
    return shown


def _tick(text: str) -> str:
    number = as_number(text)
    return f"{number:.4g}" if number is not None and len(text) > 8 else text or "none"


def _label(group: Group) -> str:
    """Return what a group chose, by the last part of its keys; its first point's number where that is too long."""
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in group.choices.items() if value]
    text = " ".join(parts) or group.label
    return text if len(text) <= LABEL_LENGTH else f"point {group.points[0].number}"


def _short(text: str) -> str:
    return text if len(text) <= LABEL_LENGTH else f"…{text[-LABEL_LENGTH + 1 :]}"


def _words(objective: Objective) -> str:
    return objective.value.replace("_", " ")
