"""The table in the terminal that a sweep ends in."""

from __future__ import annotations

from collections.abc import Sequence

from ava_exp.config.sweep import Objective
from ava_exp.sweeping.record import Point, PointStatus
from ava_exp.sweeping.results import Group, grouped

NOTHING = "–"


def rows(points: Sequence[Point], objective: Objective) -> list[list[str]]:
    """Return the head and one row for every group of seeds, the best first."""
    groups = grouped(points, objective.is_maximized)
    keys = list(groups[0].choices) if groups else []
    has_seeds = any(len(group.points) > 1 for group in groups)
    head = [*keys, *(["seeds"] if has_seeds else []), objective.value, "status"]
    return [head, *(_row(group, keys, has_seeds) for group in groups)]


def _row(group: Group, keys: Sequence[str], has_seeds: bool) -> list[str]:
    seeds = [f"{len(group.values)} of {len(group.points)}"] if has_seeds else []
    return [*(group.choices.get(key) or NOTHING for key in keys), *seeds, spread(group), status_of(group)]


def spread(group: Group) -> str:
    """Write the mean objective of a group, with the standard deviation over its seeds."""
    if not group.values:
        return NOTHING
    return f"{group.mean:.4f}" + (f" ± {group.deviation:.4f}" if group.deviation is not None else "")


def status_of(group: Group) -> str:
    """Say how the points of a group stand, where they are not all finished with their number."""
    counts = {status: sum(point.status is status for point in group.points) for status in PointStatus}
    present = {status.value: count for status, count in counts.items() if count}
    if len(present) == 1:
        return next(iter(present))
    return ", ".join(f"{count} {name}" for name, count in present.items())


def as_text(table: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned lines, with a rule below the head."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])
