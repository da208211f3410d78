"""What the terminal shows of a run: a live panel, or plain lines where there is no terminal."""

from __future__ import annotations

import math
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.box import ROUNDED
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ava_exp.tracking.experts import expert_summary, overall_of, relative_load
from ava_exp.tracking.metrics import Record, describe_evaluation, describe_step, describe_surgery
from ava_exp.tracking.text import Curve, block, evenly, format_bytes, format_count, format_seconds, resample, sparkline

REFRESH_S = 0.25
LINE_S = 10.0
LINE_FRACTION = 0.05
RATE_RECORDS = 50
NUM_EVENTS = 4
MAX_PANEL_WIDTH = 100
MAX_EXPERT_BLOCKS = 64
MAX_WIDE_EXPERTS = 16
NEARLY_UNUSED = 0.15
FAR_FROM_BALANCED = 0.5
"""Shares of an expert, in units of the balanced share."""


def open_view(total_steps: int, title_lines: Sequence[str], console: Console | None = None) -> View:
    """Return the view that suits standard output: a panel on a terminal, plain lines elsewhere."""
    console = console or Console(highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal
    return (PanelView if live else LineView)(total_steps, title_lines, console)


class View(ABC):
    """Follows a run from the training thread, without a thread of its own. A context manager."""

    def __init__(self, total_steps: int, title_lines: Sequence[str], console: Console) -> None:
        self.total_steps = total_steps
        self.title_lines = list(title_lines)
        self.console = console
        self.train: Record = {}
        self.evaluation: Record = {}
        self._times: deque[tuple[int, float]] = deque(maxlen=RATE_RECORDS)

    def update(self, record: Record) -> None:
        """Take a record of the metrics file."""
        if record["kind"] == "train":
            self.train = record
            self._times.append((record["step"], record["elapsed_s"]))
            self.show_step()
            if record.get("skipped"):
                self.event(f"step {record['step']:,} was skipped")
        elif record["kind"] == "surgery":
            self.event(describe_surgery(record))
        else:
            self.evaluation = record
            self.event(describe_evaluation(record))

    def message(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @abstractmethod
    def event(self, text: str) -> None:
        """Tell something that happened: an evaluation, a checkpoint."""

    @abstractmethod
    def show_step(self) -> None:
        """Show the newest `train` record, if it is time to."""

    def remaining_s(self) -> float:
        """Return the seconds that the steps to come take at the pace of the last ones; NaN before there is one."""
        if len(self._times) < 2:
            return math.nan
        (first_step, first_s), (step, elapsed_s) = self._times[0], self._times[-1]
        return (self.total_steps - step) * (elapsed_s - first_s) / max(1, step - first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


def _memory_bytes(record: Record) -> float:
    """Return what the run measured, else the most that this process has used."""
    unit = 1 if sys.platform == "darwin" else 1024
    return float(record.get("memory_bytes") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class LineView(View):
    """One line every `LINE_S` seconds or `LINE_FRACTION` of the steps, and one for every event."""

    def __init__(self, total_steps: int, title_lines: Sequence[str], console: Console) -> None:
        super().__init__(total_steps, title_lines, console)
        self._next_step = 0.0
        self._next_s = 0.0

    def __enter__(self) -> Self:
        for line in self.title_lines:
            self.message(line)
        return self

    def event(self, text: str) -> None:
        self.message(text)

    def show_step(self) -> None:
        step, now = self.train["step"], time.monotonic()
        if step >= min(self._next_step, self.total_steps) or now >= self._next_s:
            self._next_step = step + LINE_FRACTION * self.total_steps
            self._next_s = now + LINE_S
            remaining = self.remaining_s()
            left = f"  {format_seconds(remaining)} left" if remaining > 0 else ""
            self.message(describe_step(self.train, self.total_steps) + left)


class PanelView(View):
    """A panel that is redrawn in place, at most once every `REFRESH_S` seconds."""

    def __init__(self, total_steps: int, title_lines: Sequence[str], console: Console) -> None:
        super().__init__(total_steps, title_lines, console)
        self._losses = Curve()
        self._events: deque[str] = deque(maxlen=NUM_EVENTS)
        self._live = Live(self._panel(), console=console, auto_refresh=False)
        self._next_s = 0.0

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.update(self._panel())
        self._live.stop()

    def event(self, text: str) -> None:
        self._events.append(f"{time.strftime('%H:%M')}  {text}")
        self._live.update(self._panel(), refresh=True)

    def show_step(self) -> None:
        self._losses.append(self.train["loss"])
        if time.monotonic() >= self._next_s:
            self._live.update(self._panel(), refresh=True)
            self._next_s = time.monotonic() + REFRESH_S

    def _panel(self) -> Panel:
        title, *rest = self.title_lines or [""]
        parts: list[RenderableType] = [Text(line, style="dim") for line in rest]
        if self.train:
            parts += [Text(), self._progress(), Text(), self._numbers()]
            if self.train.get("expert_load"):
                parts += [Text(), self._experts(), self._routers()]
            if self.train.get("layer_usage"):
                parts += [Text(), self._depth()]
        else:
            parts.append(Text("waiting for the first step …", style="dim"))
        if self._events:
            parts += [Text(), *(Text(event, style="dim", no_wrap=True, overflow="ellipsis") for event in self._events)]
        return Panel(
            Group(*parts),
            title=Text(title, style="bold"),
            title_align="left",
            box=ROUNDED,
            padding=(0, 2),
            width=self._width,
            border_style="cyan",
        )

    @property
    def _width(self) -> int:
        return min(MAX_PANEL_WIDTH, self.console.width)

    def _progress(self) -> Table:
        step, row = self.train["step"], Table.grid(expand=True, padding=(0, 2))
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        done = Text.assemble(("step ", "dim"), (f"{step:,}", "bold"), (f" of {self.total_steps:,}", "dim"))
        remaining = self.remaining_s()
        left = f"  {format_seconds(remaining)} left" if remaining > 0 else ""
        bar = ProgressBar(total=self.total_steps, completed=step, complete_style="cyan", finished_style="green")
        row.add_row(done, bar, f"{step / self.total_steps:.0%}{left}")
        return row

    def _numbers(self) -> Table:
        train, evaluation = self.train, self.evaluation
        grid = Table.grid(expand=True, padding=(0, 1))
        for ratio in (14, 26, 14, 18):
            grid.add_column(ratio=ratio, no_wrap=True)
        bits = f"{evaluation['bits_per_byte']:.3f}  " if evaluation else ""
        at = f"at step {evaluation['step']:,}" if evaluation else "not evaluated yet"
        mfu = f"{train['mfu']:.1%}" if train.get("mfu") is not None else "no peak known"
        loss = Text.assemble(
            (f"{train['loss']:.3f}  ", "bold"), (sparkline(self._losses.values, self._width // 5 - 2), "cyan")
        )
        rows: list[tuple[str, Text | str, str, str]] = [
            ("loss", loss, "learning rate", f"{train['learning_rate']:.2e}"),
            ("bits per byte", Text.assemble((bits, "bold"), (at, "dim")), "gradient norm", f"{train['grad_norm']:.2f}"),
            ("tokens/s", f"{train['tokens_per_s']:,.0f}", "MFU", mfu),
            ("tokens", format_count(train["tokens"]), "memory", format_bytes(_memory_bytes(train))),
        ]
        for left, left_value, right, right_value in rows:
            grid.add_row(Text(left, style="dim"), left_value, Text(right, style="dim"), right_value)
        return grid

    def _experts(self) -> Table:
        layers: list[Sequence[float]] = self.train["expert_load"]
        grid = Table.grid(padding=(0, 2))
        grid.add_row(Text("expert load", style="dim"), "", Text("largest ÷ mean", style="dim"))
        room = max(2, min(12, self.console.height - 17 - len(self.title_lines)))
        for layer in evenly(len(layers), room):
            imbalance = f"{expert_summary(layers[layer])['imbalance']:.2f}"
            grid.add_row(Text(f"layer {layer}", style="dim"), _expert_blocks(layers[layer]), imbalance)
        return grid

    def _depth(self) -> Text:
        """Return how deep tokens go, what that saves, and the loss with the choice of training."""
        train, noncausal = self.train, self.evaluation.get("noncausal_loss")
        text = Text(no_wrap=True)
        for name, value in (
            ("depth", f"{train['average_depth']:.2f} of {len(train['layer_usage'])} layers"),
            ("FLOPs saved", f"{train['compute_savings']:.1%}"),
            ("loss with the choice of training", None if noncausal is None else f"{noncausal:.3f}"),
        ):
            if value is not None:
                text.append(f"{name} ", "dim").append(f"{value}   ", "bold")
        return text

    def _routers(self) -> Text:
        """Return dead experts, dropped visits where there are any, and churn once two evaluations could be compared."""
        dead, dropped = overall_of(self.train, "dead_experts"), overall_of(self.train, "dropped_share")
        churn, text = overall_of(self.evaluation, "churn"), Text(no_wrap=True)
        for name, value, style in (
            ("dead experts", None if dead is None else f"{dead:.0f}", "bold red" if dead else "bold"),
            ("dropped visits", f"{dropped:.1%}" if dropped else None, "bold"),
            ("churn", None if churn is None else f"{churn:.1%} at step {self.evaluation['step']:,}", "bold"),
        ):
            if value is not None:
                text.append(f"{name} ", "dim").append(f"{value}   ", style)
        return text


def _expert_blocks(shares: Sequence[float]) -> Text:
    """Draw a layer's experts: half a line is the balanced share; yellow is far from it, red nearly unused."""
    loads = resample(relative_load(shares), MAX_EXPERT_BLOCKS)
    width, gap = (2, " ") if len(loads) <= MAX_WIDE_EXPERTS else (1, "")
    text = Text()
    for load in loads:
        style = "red" if load < NEARLY_UNUSED else "yellow" if abs(load - 1) > FAR_FROM_BALANCED else "green"
        text.append(block(load / 2) * width, style).append(gap)
    return text
