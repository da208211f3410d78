"""What an evaluation sees of routers, against values by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ava_exp.data.loader import IGNORED, Batch
from ava_exp.evaluation import routing as module
from ava_exp.evaluation.routing import ProbeChoices, RoutingObserver, choose_probe, churn, mutual_information
from ava_exp.nn.moe.routing import Routing, count_visits


def routing_of(expert_ids: list[list[int]], probabilities: list[list[float]]) -> Routing:
    ids, p = torch.tensor(expert_ids), torch.tensor(probabilities)
    counts = count_visits(ids, p.shape[1])
    return Routing(
        expert_ids=ids,
        weights=(ids >= 0).float(),
        counts=counts,
        chosen_counts=counts,
        affinities=p,
        probabilities=p,
        preferences=p,
    )


def batch_of(windows: list[int], labels: list[list[int]], sources: list[list[int]]) -> Batch:
    return Batch(
        input_ids=torch.zeros(len(windows), len(labels[0]), dtype=torch.int64),
        labels=torch.tensor(labels),
        sample_ids=np.array(windows),
        source_ids=torch.tensor(sources),
    )


EVEN, SURE = [0.5, 0.5], [1.0, 0.0]


def observed(expert_ids: list[list[int]], before: ProbeChoices | None = None) -> RoutingObserver:
    """Four tokens in two windows; the last has no label."""
    observer = RoutingObserver(["code", "prose"], np.array([7, 3]), before)
    batch = batch_of([3, 7], [[1, 1], [1, IGNORED]], [[0, 0], [1, 1]])
    observer.add(batch, [routing_of(expert_ids, [EVEN, EVEN, SURE, EVEN])])
    return observer


def test_every_figure_by_hand() -> None:
    metrics = observed([[0], [0], [1], [0]]).metrics()
    assert metrics is not None
    assert metrics.expert_load == [pytest.approx([2 / 3, 1 / 3])]
    assert metrics.visits_per_token == [1]
    assert metrics.token_entropy == pytest.approx([2 / 3 * math.log(2)])
    assert metrics.source_load == [[[1, 0], [0, 1]]]
    assert metrics.source_information == pytest.approx([1])
    assert metrics.churn == [None]
    assert metrics.choices is not None
    assert metrics.choices.expert_ids[0].tolist() == [[1], [0], [0]], "in the order of the probe"
    assert set(metrics.record()) == {
        "expert_load",
        "visits_per_token",
        "token_entropy",
        "sources",
        "source_load",
        "source_information",
    }


def test_churn_since_the_look_before() -> None:
    first = observed([[0, 1], [0, -1], [1, 0], [0, 1]]).metrics()
    assert first is not None
    second = observed([[1, 0], [1, 0], [0, -1], [-1, -1]], first.choices).metrics()
    assert second is not None
    # {0,1} → {0,1}: 0 of 2; {0} → {0,1}: 1 of 2; {0,1} → {0}: 1 of 2.
    assert second.churn == pytest.approx([2 / 6])
    assert second.record()["churn"] == second.churn


def test_churn_counts_changed_choices_whatever_their_order_and_number() -> None:
    before = torch.tensor([[0, 1], [2, 3]])
    assert churn(torch.tensor([[1, 0], [3, 2]]), before, 4) == 0
    assert churn(torch.tensor([[2, 3], [0, 1]]), before, 4) == 1
    assert churn(torch.tensor([[0, 2], [2, 3]]), before, 4) == 0.25
    assert churn(torch.tensor([[0], [2]]), before, 4) == 0.5
    assert churn(before, torch.tensor([[0], [2]]), 4) == 0.5
    nothing = torch.full((2, 2), -1)
    assert churn(nothing, nothing, 4) == 0 and churn(before, nothing, 4) == 1


def test_what_cannot_be_compared_has_no_churn() -> None:
    ids = [torch.zeros(3, 1, dtype=torch.int16)] * 2
    now = ProbeChoices(windows=torch.tensor([7, 3]), num_experts=[2, 4], expert_ids=ids)
    other_text = ProbeChoices(windows=torch.tensor([7, 4]), num_experts=[2, 4], expert_ids=ids)
    pruned = ProbeChoices(windows=torch.tensor([7, 3]), num_experts=[2, 5], expert_ids=ids)
    assert now.churn_since(None) == now.churn_since(other_text) == [None, None]
    assert now.churn_since(pruned) == [0, None]


def test_an_evaluation_that_did_not_reach_the_probe_has_no_choices() -> None:
    observer = RoutingObserver(["a"], np.array([0, 9]))
    observer.add(batch_of([0], [[1]], [[0]]), [routing_of([[0]], [EVEN])])
    metrics = observer.metrics()
    assert metrics is not None and metrics.choices is None and metrics.churn == [None]
    assert "churn" not in metrics.record() and "sources" not in metrics.record()


def test_a_dense_model_has_no_figures() -> None:
    observer = RoutingObserver(["a"], np.array([0]))
    observer.add(batch_of([0], [[1]], [[0]]), [])
    assert observer.metrics() is None


def test_mutual_information_by_hand() -> None:
    assert mutual_information(np.array([[5, 5], [50, 50]])) == pytest.approx(0, abs=1e-12)
    assert mutual_information(np.array([[5, 0], [0, 5]])) == pytest.approx(1)
    assert mutual_information(np.array([[10, 10]])) == 0, "one source tells nothing"
    assert mutual_information(np.array([[10], [10]])) == 0, "nor does one expert"
    assert mutual_information(np.zeros((2, 2), dtype=np.int64)) == 0
    joint = np.array([[3, 1], [1, 3]]) / 8
    information = sum(p * math.log(p / 0.25) for p in joint.flat)
    assert mutual_information(np.array([[3, 1], [1, 3]])) == pytest.approx(information / math.log(2))


def test_the_probe_is_a_bounded_part_of_the_evaluated_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = np.arange(0, 300, 3)
    assert choose_probe(windows, 1024).tolist() == [0, 75, 150, 225]
    assert choose_probe(windows, 10_000).tolist() == [0]
    monkeypatch.setattr(module, "PROBE_TOKENS", 10**9)
    assert choose_probe(windows, 16).tolist() == windows.tolist()


def test_choices_come_back_from_tensors() -> None:
    metrics = observed([[0, 1], [0, -1], [1, 0], [0, 1]]).metrics()
    assert metrics is not None and metrics.choices is not None
    restored = ProbeChoices.from_tensors(metrics.choices.to_tensors())
    assert restored is not None and restored.churn_since(metrics.choices) == [0]
    assert ProbeChoices.from_tensors({}) is None
