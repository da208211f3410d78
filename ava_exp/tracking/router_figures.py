"""Figures of routers: who is visited, how evenly, how steadily, and by which text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ava_exp.tracking.experts import expert_summary, normalized_entropy, relative_load
from ava_exp.tracking.metrics import Record
from ava_exp.tracking.plotting import STYLE, WIDTH, History, new_figure, smooth
from ava_exp.tracking.text import evenly

MAX_COLUMNS = 300
MAX_LAYERS = 12
MAX_SPECIALISED_LAYERS = 4
MAX_LABEL_CHARACTERS = 22
MAX_MARKERS = 30
PANEL_HEIGHT = 1.9
ENTROPY = "routing entropy\n(share of the most possible)"


def draw_experts(history: History) -> Figure:
    """Share of visits by expert and time, one panel a layer, in units of the balanced share."""
    return _draw_loads(history.routed, "expert_load", "expert", "Expert utilisation by layer and time")


def draw_heads(history: History) -> Figure:
    """The same for the routed heads of a mixture of heads."""
    return _draw_loads(history.headed, "head_load", "routed head", "Use of routed attention heads by layer and time")


def _draw_loads(records: Sequence[Record], name: str, kind: str, title: str) -> Figure:
    steps = [record["step"] for record in records]
    layers = evenly(len(records[0][name]), MAX_LAYERS)
    loads = [_loads([record[name][layer] for record in records]) for layer in layers]
    alike = len({load.shape[1] for load in loads}) == 1
    figure, axes = _panels(len(layers), height=1.3, sharey=alike)
    norm = _around_one(np.concatenate([load.ravel() for load in loads]))
    for axis, layer, load in zip(axes, layers, loads, strict=True):
        extent = (steps[0] - 0.5, steps[-1] + 0.5, load.shape[1] - 0.5, -0.5)
        image = _heat_map(axis, _columns(load).T, norm, f"layer {layer}", extent=extent)
        axis.set_ylabel(kind)
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        if alike:
            axis.label_outer()
    _label(figure, title, "step")
    figure.colorbar(image, ax=axes, label="× balanced share", pad=0.02)
    return figure


def _loads(shares: Sequence[Sequence[float]]) -> np.ndarray:
    """Return (steps, experts); where a layer had fewer experts than at another time there is no number."""
    rows = [relative_load(share) for share in shares]
    loads = np.full((len(rows), max(map(len, rows))), np.nan)
    for place, row in zip(loads, rows, strict=True):
        place[: len(row)] = row
    return loads


def _columns(loads: np.ndarray) -> np.ndarray:
    """Average steps (the first dimension) until at most `MAX_COLUMNS` columns of the picture are left."""
    return np.stack([part.mean(axis=0) for part in np.array_split(loads, min(MAX_COLUMNS, len(loads)))])


@dataclass(frozen=True, slots=True)
class _Panel:
    """One figure of every layer over time: `values` (steps, layers)."""

    label: str
    records: Sequence[Record]
    values: np.ndarray
    share: bool = False
    """Whether to write it in per cent."""
    smoothed: bool = True

    def draw(self, axis: Axes) -> None:
        steps = [record["step"] for record in self.records]
        layers = evenly(self.values.shape[1], MAX_LAYERS)
        style: dict[str, Any] = (
            {} if self.smoothed else {"marker": "o" if len(steps) < MAX_MARKERS else "", "markersize": 3}
        )
        for position, layer in enumerate(layers):
            colour = matplotlib.colormaps["viridis"](0.9 * position / max(1, len(layers) - 1))
            values = smooth(self.values[:, layer]) if self.smoothed else self.values[:, layer]
            axis.plot(steps, values, color=colour, label=f"layer {layer}", **style)
        axis.set_ylabel(self.label)
        axis.margins(x=0.01)
        if self.share:
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))


def draw_balance(history: History) -> Figure:
    """Gini coefficient and normalised entropy of every layer over time; what was dropped, died and changed, if any."""
    panels = list(_balance_panels(history))
    figure, axes = new_figure("Expert balance", rows=len(panels), height=0.8 + PANEL_HEIGHT * len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        panel.draw(axis)
        if panel.label != ENTROPY:
            axis.set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def _balance_panels(history: History) -> Iterator[_Panel]:
    loads = [record["expert_load"] for record in history.routed]
    ginis = np.array([[expert_summary(load)["gini"] for load in layers] for layers in loads])
    yield _Panel("Gini coefficient\n(0 is balanced)", history.routed, ginis)
    entropies = np.array([[normalized_entropy(load) for load in layers] for layers in loads])
    yield _Panel(ENTROPY, history.routed, entropies, share=True)
    records, values = _layer_series(history.routed, "dropped_share")
    if values.any():
        yield _Panel("dropped visits", records, values, share=True)
    records, values = _layer_series(history.routed, "dead_experts")
    if values.any():
        yield _Panel("dead experts", records, values, smoothed=False)
    records, values = _layer_series(history.evaluations, "churn")
    if len(records):
        yield _Panel("churn since the\nevaluation before", records, values, share=True, smoothed=False)


def _layer_series(records: Sequence[Record], name: str) -> tuple[list[Record], np.ndarray]:
    """Return the records that have a field, and its values (records, layers); what is null is no number."""
    having = [record for record in records if record.get(name)]
    return having, np.array([record[name] for record in having], dtype=float)


def draw_specialisation(history: History) -> Figure:
    """How much more, or less, a source's tokens visit an expert than all tokens do, in some layers, at the end."""
    record = history.by_source[-1]
    layers = evenly(len(record["source_load"]), MAX_SPECIALISED_LAYERS)
    ratios = [_ratios(record["source_load"][layer], record["expert_load"][layer]) for layer in layers]
    names = [_label_text(name) for name in record["sources"]]
    figure, axes = _panels(len(layers), height=0.6 + 0.18 * len(names), sharey=True, sharex=False)
    norm = _around_one(np.concatenate([ratio.ravel() for ratio in ratios]))
    for axis, layer, ratio in zip(axes, layers, ratios, strict=True):
        image = _heat_map(axis, ratio, norm, f"layer {layer} (NMI {record['source_information'][layer]:.3f})")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _label(figure, f"Visits by source of the text, at step {record['step']:,}", "expert")
    figure.colorbar(image, ax=axes, label="× share of all text", pad=0.02)
    return figure


def _ratios(source_load: list[list[float]], load: list[float]) -> np.ndarray:
    """Return (sources, experts); a source without a token and an expert without a visit have no number."""
    shares, overall = np.array(source_load, dtype=float), np.array(load, dtype=float)
    seen = (shares.sum(axis=1, keepdims=True) > 0) & (overall > 0)
    ratios = np.full(shares.shape, np.nan)
    np.divide(shares, overall, out=ratios, where=seen)
    return ratios


def _label_text(name: str) -> str:
    short = name if len(name) <= MAX_LABEL_CHARACTERS else f"…{name[1 - MAX_LABEL_CHARACTERS :]}"
    return short.replace("$", r"\$")  # no formula


def _panels(count: int, *, height: float, sharey: bool, sharex: bool = True) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels in two columns."""
    rows, columns = -(-count // 2), min(2, count)
    figure = Figure(figsize=(WIDTH, 1.1 + height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _heat_map(axis: Axes, values: np.ndarray, norm: TwoSlopeNorm, title: str, **further: Any) -> AxesImage:
    axis.set_title(title, fontsize=9, fontweight="normal")
    axis.grid(visible=False)
    return axis.imshow(values, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest", **further)


def _around_one(values: np.ndarray) -> TwoSlopeNorm:
    """Return colours whose middle is 1, and whose end is what all but a few values stay below."""
    finite = values[np.isfinite(values)]
    return TwoSlopeNorm(1.0, 0.0, max(2.0, float(np.percentile(finite, 99.5))) if len(finite) else 2.0)


def _label(figure: Figure, title: str, below: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.supxlabel(below, fontsize=9.5, color=STYLE["axes.labelcolor"])
