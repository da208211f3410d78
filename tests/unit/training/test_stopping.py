"""What a run measures of itself, so that its job is told early enough to stop."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from ava_exp.tracking.folder import RunFolder
from ava_exp.training import saver as saver_module
from ava_exp.training.checkpoint import Snapshot, write_checkpoint
from ava_exp.training.saver import CheckpointSaver
from ava_exp.training.stopping import ENDING_S, NUM_SAVES, SAFETY, StoppingTime


def records(*elapsed_s: float, every: int = 1) -> list[dict[str, object]]:
    return [{"kind": "train", "step": index * every, "elapsed_s": value} for index, value in enumerate(elapsed_s, 1)]


def test_it_is_the_longest_step_and_the_longest_save() -> None:
    stopping = StoppingTime()
    for record in [*records(9.0, 10.0, 13.0, 14.0), {"kind": "eval", "step": 4, "elapsed_s": 99.0}]:
        stopping.observe(record)
    assert stopping.step_s == 3.0, "the first one warms up"
    assert stopping.seconds() == 0.0, "nobody knows yet what a save takes"
    stopping.saved(5.0)
    stopping.saved(2.0)
    assert stopping.seconds() == SAFETY * (3.0 + NUM_SAVES * 5.0) + ENDING_S


def test_a_record_may_stand_for_several_steps() -> None:
    stopping = StoppingTime()
    for record in records(1.0, 5.0, every=4):
        stopping.observe(record)
    assert stopping.step_s == 1.0


def test_the_next_process_knows_what_earlier_ones_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path)
    stopping = StoppingTime(folder)
    stopping.step_s = 3.0
    stopping.saved(5.0)
    stopping.keep(folder)
    assert StoppingTime(folder).seconds() == 19.5 + ENDING_S
    stopping.keep(RunFolder(tmp_path / "nowhere"))
    assert "cannot be written" in caplog.text, "and the run ends all the same"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_slow_save_is_measured_until_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    def write_slowly(folder: Path, snapshot: Snapshot) -> Path:
        time.sleep(0.3)
        return write_checkpoint(folder, snapshot)

    monkeypatch.setattr(saver_module, "write_checkpoint", write_slowly)
    stopping = StoppingTime()
    saver = CheckpointSaver(tmp_path, num_best=1, asynchronous=asynchronous, saved=stopping.saved)
    saver.save(Snapshot(step=1, tensors={"model": {"weight": torch.ones(2)}}), {})
    saver.finish()
    assert 0.3 <= stopping.save_s < 5
