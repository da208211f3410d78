"""Snapshots: copied where training goes on while they are written, the originals where it waits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from ava_exp.config.training import AdamWConfig
from ava_exp.optim.update import Updater
from ava_exp.training.checkpoint import list_checkpoints, read_checkpoint
from ava_exp.training.saver import CheckpointSaver, take_snapshot
from ava_exp.training.state import TrainState


def trained() -> tuple[nn.Linear, Updater]:
    model = nn.Linear(3, 2)
    updater = Updater(model, lambda groups: AdamWConfig().build(groups=groups), weight_decay=0.0, master_weights=False)
    model(torch.ones(1, 3)).sum().backward()
    updater.apply(0.1, 1.0)
    return model, updater


def pointers(snapshot_tensors: dict[str, torch.Tensor]) -> set[int]:
    return {tensor.data_ptr() for tensor in snapshot_tensors.values()}


def test_only_a_copy_is_free_of_what_training_changes() -> None:
    _, updater = trained()
    copied, originals = (take_snapshot(updater, TrainState(step=1), {}, copy=copy) for copy in (True, False))
    for stem, tensors in (("model", updater.weights), ("optimizer", updater.optimizer_state()[0])):
        assert pointers(copied.tensors[stem]).isdisjoint(pointers(tensors))
        assert pointers(originals.tensors[stem]) == pointers(tensors)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_both_are_written_alike(tmp_path: Path, asynchronous: bool) -> None:
    model, updater = trained()
    saver = CheckpointSaver(tmp_path, num_best=1, asynchronous=asynchronous)
    for step, copy in ((1, True), (2, False)):
        saver.save(take_snapshot(updater, TrainState(step=step), {}, copy=copy), {})
    saver.finish()
    one, two = (read_checkpoint(folder).tensors for folder in list_checkpoints(tmp_path))
    for stem in ("model", "optimizer"):
        assert one[stem].keys() == two[stem].keys()
        assert all(torch.equal(one[stem][name], two[stem][name]) for name in one[stem])
    assert torch.equal(two["model"]["weight"], model.weight)
