"""The live panel and the plain lines."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console

from ava_exp.tracking import view as view_module
from ava_exp.tracking.view import LineView, PanelView, open_view

Records = Callable[..., Iterator[dict[str, Any]]]


def _terminal(width: int = 100, height: int = 40) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height)


def _written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _final_screen(console: Console) -> str:
    """Return the last drawing, without colours."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", _written(console))
    return plain[plain.rindex("╭") :]


def test_the_view_suits_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_view(10, ["run"], _terminal()), PanelView)
    assert isinstance(open_view(10, ["run"], Console(file=io.StringIO())), LineView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_view(10, ["run"], _terminal()), LineView)


def test_the_panel_shows_where_the_run_stands(fake_records: Records) -> None:
    console = _terminal()
    records = list(fake_records(40))
    with open_view(40, ["quick-1a2b", "8 experts"], console) as view:
        for record in records:
            view.update(record)
        view.message("above the panel")
    screen = _final_screen(console)
    train = [record for record in records if record["kind"] == "train"][-1]
    assert "quick-1a2b" in screen and "8 experts" in screen
    assert "step 40 of 40" in screen and "100%" in screen
    assert (
        f"{train['loss']:.3f}" in screen
        and f"{train['tokens_per_s']:,.0f}" in screen
        and f"{train['mfu']:.1%}" in screen
    )
    assert f"{records[-1]['bits_per_byte']:.3f}" in screen and "final evaluation" in screen
    assert all(f"layer {layer}" in screen for layer in range(4))
    assert "above the panel" in _written(console) and "above the panel" not in screen


def test_the_panel_is_redrawn_at_most_four_times_a_second(
    fake_records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(view_module.time, "monotonic", lambda: next(clock) / 100)
    console = _terminal()
    with open_view(200, ["run"], console) as view:
        for record in fake_records(200):
            if record["kind"] == "train":
                view.update(record)
    assert _written(console).count("╭") <= 2 + 200 / 100 / view_module.REFRESH_S


def test_a_small_terminal_still_holds_the_panel(fake_records: Records) -> None:
    console = _terminal(width=80, height=24)
    with open_view(20, ["run", "two", "three"], console) as view:
        for record in fake_records(20, num_layers=48, num_experts=64):
            view.update(record)
    screen = _final_screen(console)
    assert "layer 0 " in screen and "layer 47 " in screen
    assert len(screen.splitlines()) <= 24 and max(map(len, screen.splitlines())) <= 80


def test_a_dense_model_whose_numbers_are_lost_has_a_panel(fake_records: Records) -> None:
    console = _terminal()
    with open_view(3, ["run"], console) as view:
        for record in fake_records(3, num_experts=0):
            view.update({**record, "loss": float("nan"), "mfu": None, "grad_norm": float("inf")})
    screen = _final_screen(console)
    assert "nan" in screen and "no peak known" in screen and "expert" not in screen


def test_the_panel_tells_what_is_wrong_with_routers(fake_records: Records) -> None:
    console = _terminal()
    with open_view(40, ["run"], console) as view:
        for record in fake_records(40):
            view.update(record)
    screen = _final_screen(console)
    assert "dead experts 1 " in screen and "churn 1.5% at step 40" in screen
    assert re.search(r"dropped visits \d\.\d%", screen)


def test_plain_lines_tell_what_is_wrong_with_routers(fake_records: Records) -> None:
    console = Console(file=io.StringIO(), width=200)
    with open_view(40, ["run"], console) as view:
        for record in fake_records(40):
            view.update(record)
    lines = _written(console).splitlines()
    last = next(line for line in lines if "step 40/40" in line)
    assert last.endswith("dead experts 1") and "  dropped " in last
    first = next(line for line in lines if "step  1/40" in line)
    assert "dead experts" not in first
    assert "churn 1.5%" in lines[-1] and "churn" not in next(line for line in lines if "evaluated at step 4:" in line)


def test_a_skipped_step_is_told(fake_records: Records) -> None:
    console = _terminal()
    with open_view(3, ["run"], console) as view:
        for record in fake_records(3):
            view.update({**record, "skipped": record["step"] == 2})
    assert "step 2 was skipped" in _final_screen(console)


def test_warnings_appear_above_the_panel(fake_records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    console = _terminal()
    handler = logging.StreamHandler()
    with open_view(3, ["run"], console) as view:
        view.update(next(fake_records(3)))
        handler.stream = sys.stderr
        handler.emit(logging.LogRecord("ava_exp", logging.WARNING, "", 0, "look here", None, None))
    assert "look here" in _written(console) and "look here" not in _final_screen(console)
    assert capsys.readouterr().err == ""


def test_plain_lines_are_few_and_every_evaluation_is_among_them(fake_records: Records) -> None:
    console = Console(file=io.StringIO(), width=80)
    with open_view(200, ["quick-1a2b", "8 experts"], console) as view:
        for record in fake_records(200):
            view.update(record)
        view.message("report in [outputs]")
    lines = _written(console).splitlines()
    assert lines[:2] == ["quick-1a2b", "8 experts"] and lines[-1] == "report in [outputs]"
    steps = [int(match[1]) for line in lines if (match := re.match(r"step\s+(\d+)/200 ", line))]
    assert steps[0] == 1 and steps[-1] == 200 and 20 <= len(steps) <= 22
    assert sum("bits per byte" in line for line in lines) == 11
    assert len(lines) == 2 + len(steps) + 11 + 1


def test_slow_steps_have_a_line_every_ten_seconds(fake_records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 4))
    monkeypatch.setattr(view_module.time, "monotonic", lambda: next(clock))
    console = Console(file=io.StringIO())
    with open_view(10_000, ["run"], console) as view:
        for _, record in zip(range(30), fake_records(10_000), strict=False):
            view.update(record)
    assert [int(step) for step in re.findall(r"step\s+(\d+)/", _written(console))] == [
        1,
        4,
        7,
        10,
        13,
        16,
        19,
        22,
        25,
        28,
    ]


def test_the_remaining_time_counts_the_steps_of_this_session_only() -> None:
    view = open_view(100, ["run"], Console(file=io.StringIO()))
    record = {"kind": "train", "loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_s": 1.0, "tokens": 1}
    view.update({**record, "step": 50, "elapsed_s": 1000.0})
    assert view.remaining_s() != view.remaining_s(), "not known after one step"
    view.update({**record, "step": 60, "elapsed_s": 1020.0})
    assert view.remaining_s() == pytest.approx(80.0)
