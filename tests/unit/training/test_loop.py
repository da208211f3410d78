"""The loop's promises to signals: whenever one comes, what the loop leaves is saved."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

import numpy as np
import torch

from ava_exp.config.training import ConstantConfig
from ava_exp.data.loader import Batch
from ava_exp.evaluation.language import LanguageMetrics
from ava_exp.tracking.metrics import metric_values
from ava_exp.training.loop import Outcome, Trainer
from ava_exp.training.signals import SignalRequests
from ava_exp.training.state import TrainState
from ava_exp.training.step import StepMetrics
from ava_exp.training.tally import ExpertTally

NUM_STEPS = 4
SAVE_EVERY = EVALUATE_EVERY = 2


class Model:
    def train(self) -> None:
        """Be trained by nobody."""


class Loader:
    def micro_batches(self, step: int) -> list[Batch]:
        tokens = torch.zeros(1, 1, dtype=torch.int64)
        return [Batch(input_ids=tokens, labels=tokens, sample_ids=np.array([step]))]

    def samples_of_all_ranks(self, step: int) -> np.ndarray:
        return np.concatenate([batch.sample_ids for batch in self.micro_batches(step)])


class Updater:
    peak_learning_rate = 1.0


class Loop(Trainer):
    """A trainer whose steps are instant, and which keeps what it was given to save and to show."""

    def __init__(self, requests: SignalRequests, state: TrainState | None = None) -> None:
        self.saved: list[int] = []
        self.records: list[tuple[str, int]] = []
        metrics = LanguageMetrics(
            loss=1.0, perplexity=1.0, bits_per_byte=1.0, token_accuracy=0.0, tokens=1, bytes=1, seconds=0.1
        )
        super().__init__(
            Model(),  # type: ignore[arg-type]
            Loader(),  # type: ignore[arg-type]
            Updater(),  # type: ignore[arg-type]
            ConstantConfig(warmup_steps=0).build(total_steps=NUM_STEPS, tokens_per_step=1),
            (),
            NUM_STEPS,
            state=state,
            evaluation_interval=EVALUATE_EVERY,
            save_interval=SAVE_EVERY,
            evaluate=lambda final: None if requests.stop else metrics,
            save=lambda state: self.saved.append(state.step),
            sinks=[lambda record: self.records.append((record["kind"], record["step"]))],
        )

    def _step(self, batches: list[Batch]) -> tuple[StepMetrics, float]:
        return StepMetrics(losses={"loss": 1.0}, grad_norm=1.0, applied=True, num_tokens=1, tally=ExpertTally()), 0.1


def fit(signal_at_line: int | None = None, number: signal.Signals = signal.SIGTERM) -> tuple[Loop, Outcome, int]:
    """Train with a signal at some line that the loop executes; return how many lines it executed, too."""
    requests = SignalRequests()
    loop, num_lines = Loop(requests), 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal num_lines
        if frame.f_code is not Trainer.fit.__code__:
            return None
        num_lines += event == "line"
        if event == "line" and num_lines == signal_at_line:
            requests._on_signal(number, None)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        outcome = loop.fit(requests)
    finally:
        sys.settrace(before)
    return loop, outcome, num_lines


def test_without_signals_it_saves_and_evaluates_when_it_is_due() -> None:
    loop, outcome, _ = fit()
    assert outcome is Outcome.finished
    assert loop.saved == [2, 4]
    expected = [("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4), ("eval", 4)]
    assert loop.records == expected


def every_line() -> range:
    """Return the numbers of the lines that the loop executes from its first to its last step."""
    return range(1, fit()[2] + 1)


def test_whenever_a_stop_comes_the_state_it_leaves_is_saved_once() -> None:
    for line in every_line():
        loop, outcome, _ = fit(line)
        assert outcome is Outcome.stopped, line
        assert loop.saved[-1:] == ([loop.state.step] if loop.state.step else []), line
        assert len(set(loop.saved)) == len(loop.saved), line


def test_whenever_a_stop_comes_the_next_start_makes_up_for_it() -> None:
    expected = fit()[0].records
    for line in every_line():
        stopped, _, _ = fit(line)
        resumed = Loop(SignalRequests(), stopped.state)
        assert resumed.fit() is Outcome.finished, line
        assert stopped.records + resumed.records == expected, line


def test_whenever_a_save_is_asked_for_training_goes_on() -> None:
    expected = fit()[0].records
    for line in every_line():
        loop, outcome, _ = fit(line, signal.SIGUSR1)
        assert outcome is Outcome.finished, line
        assert set(loop.saved) >= {2, 4} and len(set(loop.saved)) == len(loop.saved), line
        assert loop.records == expected, line


def test_a_record_has_the_share_of_choices_that_every_routed_head_got() -> None:
    loop = Loop(SignalRequests())
    loop.state.step = 1
    metrics, seconds = loop._step([])
    assert "head_load" not in loop._train_record(metrics, seconds)
    metrics.head_counts = [torch.tensor([1, 3]), torch.tensor([4, 4])]
    record = loop._train_record(metrics, seconds)
    assert record["head_load"] == [[0.25, 0.75], [0.5, 0.5]]
    assert "train/head_load" not in metric_values(record), "lists are no metrics of a tracker"
