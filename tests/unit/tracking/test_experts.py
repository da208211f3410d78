"""Summaries of how tokens are spread over experts."""

from __future__ import annotations

import math

import pytest

from ava_exp.tracking.experts import expert_summary, relative_load


def test_a_balanced_layer() -> None:
    summary = expert_summary([0.25] * 4)
    assert summary == pytest.approx(
        {
            "mean_utilization": 0.25,
            "std_utilization": 0.0,
            "min_utilization": 0.25,
            "max_utilization": 0.25,
            "gini": 0.0,
            "routing_entropy": math.log(4),
            "imbalance": 1.0,
        }
    )


def test_one_expert_that_gets_everything() -> None:
    summary = expert_summary([0.0, 0.0, 1.0, 0.0])
    assert summary["gini"] == pytest.approx(3 / 4)
    assert summary["routing_entropy"] == 0
    assert summary["imbalance"] == pytest.approx(4)
    assert summary["std_utilization"] == pytest.approx(math.sqrt(3) / 4)


def test_gini_is_half_the_mean_difference_over_the_mean() -> None:
    load = [0.1, 0.5, 0.15, 0.25]
    differences = sum(abs(one - other) for one in load for other in load) / len(load) ** 2
    assert expert_summary(load)["gini"] == pytest.approx(differences / (2 * 0.25))


def test_a_layer_without_tokens_and_one_without_numbers() -> None:
    assert expert_summary([0.0, 0.0])["gini"] == 0
    assert math.isnan(expert_summary([math.nan, math.nan])["gini"])


def test_the_balanced_share_is_one() -> None:
    assert relative_load([0.5, 0.25, 0.25, 0.0]) == [2.0, 1.0, 1.0, 0.0]
