"""The page of scaling says what the planner predicts. `scaling.py` says how to write its tables anew."""

from __future__ import annotations

from tests.golden.scaling import PAGE, RUNS, tables, with_tables


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page


def test_a_stale_page_is_seen() -> None:
    page = PAGE.read_text(encoding="utf-8")
    stale = page.replace("| `b300` |", "| `b200` |")
    assert stale != page
    assert with_tables(stale) == page


def test_every_run_is_on_the_page() -> None:
    worked = tables()["worked"]
    assert all(f"| `{model}` |" in worked for model in RUNS)
