"""What came of a sweep: points that differ in their seed alone as one group, and what each swept parameter explains."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ava_exp.sweeping.definition import SEED
from ava_exp.sweeping.record import Point, PointStatus
from ava_exp.tracking.metrics import of_kind, read_metrics

MIN_BINNED = 9
"""Points that it takes for bins with three in each."""
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Group:
    """Points that differ in their seed alone."""

    choices: dict[str, str]
    points: list[Point]

    @property
    def values(self) -> list[float]:
        """The objective of every finished point."""
        return [point.value for point in self.points if point.value is not None]

    @property
    def mean(self) -> float:
        """The mean objective; NaN where no point has one."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds, with n - 1; None for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def label(self) -> str:
        return " ".join(f"{key}={value}" if value else f"~{key}" for key, value in self.choices.items()) or "(alone)"


def grouped(points: Iterable[Point], is_maximized: bool) -> list[Group]:
    """Return the groups, the best first; those without a value come last."""
    groups: dict[tuple[tuple[str, str], ...], Group] = {}
    for point in points:
        choices = {key: value for key, value in point.choices.items() if key != SEED}
        groups.setdefault(tuple(choices.items()), Group(choices, [])).points.append(point)
    sign = -1 if is_maximized else 1
    return sorted(groups.values(), key=lambda group: (not group.values, sign * group.mean if group.values else 0))


@dataclass(frozen=True, slots=True)
class Importance:
    """How much of the objective's variance a parameter explains. `share` None: each of its values was seen once."""

    key: str
    share: float | None
    num_levels: int


def importances(points: Sequence[Point]) -> list[Importance]:
    """Return the importance of every swept parameter, the greatest first.

    It is the share of the variance between the means of its values, as epsilon squared [kelley1935unbiased]: with n
    points at k values, and sums of squares within values and in all, `1 - (n - 1) / (n - k) * within / all`, not below
    0. Unlike the plain share (eta squared) it is 0 on average for a parameter without effect. Numbers that were seen
    less than twice each, as in a search, are cut into as many bins of equal size as the root of n, from 9 points on.
    """
    finished = [point for point in points if point.value is not None and math.isfinite(point.value)]
    keys = list(finished[0].choices) if finished else []
    found = [_importance(key, finished) for key in keys]
    return sorted(found, key=lambda importance: -1.0 if importance.share is None else importance.share, reverse=True)


def _importance(key: str, points: Sequence[Point]) -> Importance:
    levels = _levels([point.choices.get(key, "") for point in points])
    values = np.array([point.value for point in points], dtype=float)
    num_points, num_levels = len(values), len(set(levels))
    total = float(((values - values.mean()) ** 2).sum())
    if num_levels < 2 or num_points <= num_levels:
        return Importance(key, None, num_levels)
    if total == 0:
        return Importance(key, 0.0, num_levels)
    within = 0.0
    for level in set(levels):
        own = values[np.array([other == level for other in levels])]
        within += float(((own - own.mean()) ** 2).sum())
    share = 1 - (num_points - 1) / (num_points - num_levels) * within / total
    return Importance(key, max(0.0, share), num_levels)


def _levels(texts: Sequence[str]) -> list[str]:
    """Return the values as they are, or the bins of numbers that were seen less than twice each, as in a search."""
    is_repeated = len(texts) >= 2 * len(set(texts))
    if is_repeated or len(texts) < MIN_BINNED or any(as_number(text) is None for text in texts):
        return list(texts)
    num_bins = math.isqrt(len(texts))
    order = sorted(set(texts), key=lambda text: as_number(text) or 0.0)
    return [f"bin {order.index(text) * num_bins // len(order)}" for text in texts]


def as_number(text: str) -> float | None:
    """Return the number that a value is, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def curve_of(point: Point, objective: str) -> tuple[Values, Values]:
    """Return the tokens a point was trained on at its evaluations, and the objective there; empty without a run."""
    folder = point.folder
    records = read_metrics(folder.metrics) if folder else []
    evaluations = [record for record in of_kind(records, "eval") if record.get(objective) is not None]
    train = of_kind(records, "train")
    if not evaluations or not train:
        return np.empty(0), np.empty(0)
    by_step = {record["step"]: record[objective] for record in evaluations}  # the last one is on the whole split
    steps = np.array(list(by_step), dtype=float)
    tokens = np.interp(steps, [record["step"] for record in train], [record["tokens"] for record in train])
    return tokens, np.array(list(by_step.values()), dtype=float)


def band(points: Sequence[Point], objective: str) -> tuple[Values, Values, Values]:
    """Return tokens, mean and standard deviation of a group's curves, as far as the shortest goes."""
    curves = [curve for point in points if len((curve := curve_of(point, objective))[0])]
    if not curves:
        return np.empty(0), np.empty(0), np.empty(0)
    tokens = min((tokens for tokens, _ in curves), key=lambda tokens: float(tokens[-1]))
    values = np.array([np.interp(tokens, own, measured) for own, measured in curves])
    return tokens, values.mean(axis=0), values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(tokens))


def unfinished(points: Iterable[Point]) -> list[Point]:
    """Return the points that ended without a result or did not begin."""
    return [point for point in points if point.status not in (PointStatus.finished, PointStatus.pruned)]
