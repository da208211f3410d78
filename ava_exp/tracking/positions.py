"""Perplexity by position: the file that keeps it, and the table that shows it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from ava_exp.tracking.files import restore_numbers
from ava_exp.tracking.folder import RunFolder

POSITIONS = "positions.json"
"""What a run that extended another's context keeps; its report has the figure."""


@dataclass(slots=True, kw_only=True)
class PositionCurve:
    """One measurement: nats per token by bin and over all positions, and after how many steps of which run."""

    run: str
    step: int
    losses: list[float]
    loss: float


@dataclass(slots=True, kw_only=True)
class PositionReport:
    """Measurements on the same windows. `edges` are where bins of positions begin, and the end of the last."""

    length: int
    original_length: int
    edges: list[int]
    tokens: list[int]
    """By bin."""
    curves: dict[str, PositionCurve] = field(default_factory=dict)

    def write(self, folder: RunFolder, name: str = POSITIONS) -> None:
        """Write it into a run's folder. Raises RunFolderError."""
        folder.write_json(name, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: RunFolder, name: str = POSITIONS) -> PositionReport | None:
        """Return what was written; None where nothing was. Raises RunFolderError."""
        values: dict[str, Any] = restore_numbers(folder.read_json(name, {}))
        if not values:
            return None
        curves = {name: PositionCurve(**curve) for name, curve in values.pop("curves").items()}
        return cls(**values, curves=curves)

    @property
    def first_new_position(self) -> int:
        """Where the first bin begins that lies beyond the original length; the end of the last where none does."""
        return next((edge for edge in self.edges if edge >= self.original_length), self.edges[-1])

    def perplexity_beyond(self, name: str) -> float:
        """Return a curve's perplexity over all tokens from `first_new_position` on."""
        beyond = [
            (loss, count)
            for loss, count, start in zip(self.curves[name].losses, self.tokens, self.edges, strict=False)
            if start >= self.original_length and count
        ]
        total = sum(count for _, count in beyond)
        return math.exp(min(700.0, sum(loss * count for loss, count in beyond) / max(1, total)))

    def table(self) -> Table:
        """Return perplexities as a table for the terminal: a row for each bin, a column for each measurement."""
        table = Table(title=f"Perplexity by position in texts of {self.length:,} tokens")
        table.add_column("positions", no_wrap=True)
        for name in self.curves:
            table.add_column(name, justify="right")
        for index, (start, stop) in enumerate(itertools.pairwise(self.edges)):
            values = (_perplexity(curve.losses[index]) for curve in self.curves.values())
            table.add_row(f"{start:,} to {stop - 1:,}", *values)
        table.add_section()
        table.add_row("all", *(_perplexity(curve.loss) for curve in self.curves.values()))
        return table


def _perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700.0)):,.1f}"
