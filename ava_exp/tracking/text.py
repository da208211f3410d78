"""Numbers as people read them, and curves drawn in characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"


def format_count(value: float) -> str:
    """Write a count with three significant digits: 1234567 becomes `1.23M`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            scaled = value / (1e3 if unit == "k" else limit)
            return f"{scaled:.{max(0, 2 - int(math.log10(scaled)))}f}{unit}"
    return f"{value:,.0f}"


def format_bytes(value: float) -> str:
    """Write a number of bytes in binary units: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """Write a duration with its two largest units: `1 h 05 min`, `2 min 03 s`, `8.4 s`."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw values, averaged to at most `width` characters, between their own least and greatest."""
    points = [value for value in resample(values, width) if math.isfinite(value)]
    if not points:
        return ""
    low, high = min(points), max(points)
    return "".join(block((point - low) / (high - low) if high > low else 0.5) for point in points)


def block(fraction: float) -> str:
    """Return the character whose height is `fraction` of a line."""
    if not math.isfinite(fraction):
        return "?"
    return BLOCKS[min(len(BLOCKS) - 1, max(0, int(fraction * len(BLOCKS))))]


def resample(values: Sequence[float], count: int) -> list[float]:
    """Average neighbours until at most `count` values are left."""
    size = -(-len(values) // count) if values else 1
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(group) / len(group) for group in groups]


def evenly(count: int, limit: int) -> list[int]:
    """Choose at most `limit` (two or more) of `count` positions, evenly from the first to the last."""
    if count <= limit:
        return list(range(count))
    return [round(index * (count - 1) / (limit - 1)) for index in range(limit)]


class Curve:
    """A long series in bounded memory: whenever it is full, neighbours are averaged and later ones come in pairs."""

    def __init__(self, capacity: int = 512) -> None:
        self.values: list[float] = []
        self._capacity = capacity
        self._stride = 1
        self._group: list[float] = []

    def append(self, value: float) -> None:
        """Add the next value of the series."""
        self._group.append(value)
        if len(self._group) == self._stride:
            self.values.append(sum(self._group) / self._stride)
            self._group = []
        if len(self.values) == self._capacity:
            self.values = resample(self.values, self._capacity // 2)
            self._stride *= 2
