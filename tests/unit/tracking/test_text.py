"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from ava_exp.tracking.text import Curve, block, evenly, format_bytes, format_count, format_seconds, sparkline


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (8192, "8,192"),
        (12_345, "12.3k"),
        (1_234_567, "1.23M"),
        (66.1e6, "66.1M"),
        (3.34e12, "3.34T"),
    ],
)
def test_counts_have_three_digits(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(512, "512 B"), (1536, "1.5 KiB"), (16 * 2**30, "16.0 GiB"), (2**41, "2.0 TiB")]
)
def test_bytes_are_in_binary_units(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8.42, "8.4 s"),
        (59.6, "1 min 00 s"),
        (123, "2 min 03 s"),
        (3900, "1 h 05 min"),
        (90_000, "1 d 01 h"),
        (math.nan, "unknown"),
    ],
)
def test_durations_have_two_units(value: float, text: str) -> None:
    assert format_seconds(value) == text


def test_a_sparkline_spans_least_to_greatest_and_leaves_gaps_out() -> None:
    assert sparkline([1.0, math.nan, 3.0, 2.0], 10) == "▁█▅"
    assert sparkline([5.0, 5.0], 10) == "▅▅"
    assert len(sparkline(list(range(1000)), 20)) == 20
    assert sparkline([], 10) == ""


def test_a_block_never_fails() -> None:
    assert [block(fraction) for fraction in (-1, 0, 0.5, 1, 7, math.nan, math.inf)] == [
        "▁",
        "▁",
        "▅",
        "█",
        "█",
        "?",
        "?",
    ]


def test_positions_are_chosen_from_first_to_last() -> None:
    assert evenly(3, 12) == [0, 1, 2]
    assert evenly(24, 4) == [0, 8, 15, 23]


def test_a_curve_keeps_its_shape_in_bounded_memory() -> None:
    curve = Curve(capacity=8)
    for value in range(100):
        curve.append(float(value))
    assert len(curve.values) < 8
    steps = [later - earlier for earlier, later in zip(curve.values, curve.values[1:], strict=False)]
    assert set(steps) == {16.0}
