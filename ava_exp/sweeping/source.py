"""Where the next point comes from: a queue that has all from the start, or a search (`search.py`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Protocol

from ava_exp.sweeping.record import Point


class PointSource(Protocol):
    """Gives points to run, and is told how they go. `total` is how many there are in all."""

    total: int

    def next(self) -> Point | None:
        """Return the next point; None where there is none now. After a point has ended there may be one again."""

    def ended(self, point: Point) -> None:
        """Take note of a point that will not be tried again."""

    def should_prune(self, point: Point) -> bool:
        """Whether a point that runs is to be given up, as its evaluations go."""

    def close(self) -> None:
        """Take note that no more points are run, although some may be left."""


class Queue:
    """Points that are known from the start, in order. `total` counts also those that are not worth a start."""

    def __init__(self, points: Iterable[Point], total: int | None = None) -> None:
        self._waiting = deque(points)
        self.total = len(self._waiting) if total is None else total

    def next(self) -> Point | None:
        return self._waiting.popleft() if self._waiting else None

    def ended(self, point: Point) -> None:
        """Nothing depends on it."""

    def should_prune(self, point: Point) -> bool:
        return False

    def close(self) -> None:
        """Nothing is left open."""
