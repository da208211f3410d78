"""The page of presets says what the presets are. `presets.py` says how to write its tables anew."""

from __future__ import annotations

from ava_exp.config.folders import option_names
from tests.golden.presets import HARDWARE, PAGE, with_tables


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page


def test_every_preset_is_on_the_page() -> None:
    assert {*HARDWARE} == {*option_names("model")}
