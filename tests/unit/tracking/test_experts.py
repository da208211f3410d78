"""Summaries of how tokens are spread over experts."""

from __future__ import annotations

import math

import pytest

from ava_exp.tracking.experts import (
    expert_summary,
    layer_statistics,
    normalized_entropy,
    overall_of,
    overall_statistics,
    relative_load,
)


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


def test_every_statistic_by_hand() -> None:
    summary = expert_summary([0.5, 0.25, 0.25, 0.0])
    assert summary == pytest.approx(
        {
            "mean_utilization": 0.25,
            "std_utilization": math.sqrt((0.25**2 + 0.25**2) / 4),
            "min_utilization": 0.0,
            "max_utilization": 0.5,
            "gini": (3 * 0.5 + 0.25 - 0.25) / 4,
            "routing_entropy": 1.5 * math.log(2),
            "imbalance": 2.0,
        }
    )


def test_entropy_of_layers_of_different_sizes_compares() -> None:
    assert normalized_entropy([0.5, 0.5]) == normalized_entropy([0.25] * 4) == pytest.approx(1)
    assert normalized_entropy([0.5, 0.5, 0.0, 0.0]) == pytest.approx(0.5)
    assert normalized_entropy([1.0]) == 1


def test_layers_of_different_sizes_and_what_is_unknown() -> None:
    record = {
        "expert_load": [[0.5, 0.5], [1.0, 0.0, 0.0, 0.0]],
        "dead_experts": [0, 3],
        "dropped_share": [0.0, 0.5],
        "churn": [None, 0.25],
    }
    layers = layer_statistics(record)
    assert [layer["dead_experts"] for layer in layers] == [0, 3]
    assert "churn" not in layers[0] and layers[1]["churn"] == 0.25
    overall = overall_statistics(layers)
    assert overall["dead_experts"] == 3
    assert (overall["min_utilization"], overall["max_utilization"]) == (0, 1)
    assert overall["dropped_share"] == 0.25
    assert overall["churn"] == 0.25
    assert overall["gini"] == pytest.approx(3 / 8)
    assert overall_of(record, "dead_experts") == 3 and overall_of(record, "token_entropy") is None


def test_a_dense_model_has_no_statistics() -> None:
    assert layer_statistics({"loss": 1.0}) == [] and overall_statistics([]) == {}
