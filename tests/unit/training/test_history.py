"""Dead experts over a window of steps, and a history that comes back from a checkpoint as it was."""

from __future__ import annotations

from pathlib import Path

import torch

from ava_exp.evaluation.routing import ProbeChoices
from ava_exp.training import history as module
from ava_exp.training.checkpoint import Snapshot, read_checkpoint, write_checkpoint
from ava_exp.training.history import DEAD_WINDOW_STEPS, RoutingHistory


def test_an_expert_is_dead_below_a_hundredth_of_the_balanced_share() -> None:
    history = RoutingHistory()
    history.add([[1000, 1000, 10, 9], [5, 5]])  # the balanced share is 504.75
    assert history.dead_experts() == [0, 0]
    history.add([[1000, 1000, 0, 0], [10, 0]])  # of both steps together: 1004.75
    assert history.dead_experts() == [2, 0]


def test_only_the_window_counts() -> None:
    history = RoutingHistory()
    history.add([[1, 1000]])
    for _ in range(DEAD_WINDOW_STEPS - 1):
        history.add([[1000, 0]])
    assert history.dead_experts() == [0], "one step of the window had it alive"
    history.add([[1000, 0]])
    assert history.dead_experts() == [1]
    for _ in range(2):
        history.add([[1000, 1000]])
    assert history.dead_experts() == [0], "it lives again"


def test_another_number_of_experts_starts_anew() -> None:
    history = RoutingHistory()
    history.add([[10, 0], [10, 10]])
    assert history.dead_experts() == [1, 0]
    history.add([[10, 10, 10], [10, 10]])
    assert history.dead_experts() == [0, 0] and len(history.recent) == 1


def test_a_dense_model_has_no_history() -> None:
    history = RoutingHistory()
    history.add([])
    assert history.dead_experts() == [] and history.to_tensors() == {}
    assert RoutingHistory.from_tensors({}).to_tensors() == {}


def test_a_history_comes_back_and_goes_on_the_same() -> None:
    history = RoutingHistory()
    for step in range(DEAD_WINDOW_STEPS + 7):
        history.add([[step, 1, 0], [2, step]])
    ids = torch.tensor([[0, -1], [2, 1]], dtype=torch.int16)
    history.choices = ProbeChoices(windows=torch.tensor([4]), num_experts=[3, 2], expert_ids=[ids, ids[:, :1]])
    tensors = {name: tensor.clone() for name, tensor in history.to_tensors().items()}
    restored = RoutingHistory.from_tensors(tensors)
    for _ in range(2):
        assert restored.dead_experts() == history.dead_experts()
        assert all(torch.equal(tensor, restored.to_tensors()[name]) for name, tensor in history.to_tensors().items())
        for one in (history, restored):
            one.add([[1, 1, 1], [1, 1]])
    assert restored.recent.maxlen == module.DEAD_WINDOW_STEPS


def test_a_checkpoint_can_hold_a_history(tmp_path: Path) -> None:
    history = RoutingHistory()
    history.add([[3, 0]])
    ids = torch.tensor([[0, -1], [2, 1], [1, 1]], dtype=torch.int16)
    history.choices = ProbeChoices(windows=torch.tensor([4]), num_experts=[3], expert_ids=[ids])
    folder = write_checkpoint(tmp_path, Snapshot(step=1, tensors={"routing": history.to_tensors()}))
    restored = RoutingHistory.from_tensors(read_checkpoint(folder).tensors["routing"])
    assert restored.choices is not None and torch.equal(restored.choices.expert_ids[0], ids)
    assert restored.dead_experts() == [1]
