"""The training loop: next batch, step, observe, log, evaluate, save."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from signal import Signals
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ava_exp.config.surgery import SETTINGS, SurgeryKind, SurgeryOperation
from ava_exp.data.loader import Batch, BatchLoader
from ava_exp.errors import ConfigError, UserError
from ava_exp.evaluation.language import LanguageMetrics
from ava_exp.losses.terms import LossTerm, require_balance_loss
from ava_exp.models.arithmetic import StepFlops
from ava_exp.models.decoder import Decoder
from ava_exp.models.surgery import Surgeon, SurgeryReport
from ava_exp.optim.schedules import Schedule
from ava_exp.optim.update import Updater
from ava_exp.parallel.compression import Distance
from ava_exp.parallel.ranks import Ranks
from ava_exp.parallel.strategy import Alone
from ava_exp.training.depth import DepthTally
from ava_exp.training.history import RoutingHistory
from ava_exp.training.objective import Objective
from ava_exp.training.signals import SignalRequests
from ava_exp.training.state import TrainState
from ava_exp.training.step import StepMetrics, train_step
from ava_exp.training.surgery import ExpertSurgery
from ava_exp.training.tally import ExpertTally, LayerVisits

Record = dict[str, Any]


class Outcome(Enum):
    """Why the loop ended."""

    finished = "finished"
    stopped = "stopped"


class Trainer(ExpertSurgery):
    """Trains `model` to `total_steps`. Everything but the first six arguments is optional.

    `sinks` receive every record as it happens; `evaluate(final)` measures the model, or returns None where a signal
    cut it short; `save(state)` keeps it.
    `surgeon` knows what was done to the model's experts before, `strategy` how several ranks train together.
    `peak_flops` (FLOP/s) and `flops` give the share of the peak that is used (MFU), by the visits that experts had and
    the tokens that layers processed.
    """

    def __init__(
        self,
        model: Decoder,
        loader: BatchLoader,
        updater: Updater,
        schedule: Schedule,
        terms: Sequence[LossTerm],
        total_steps: int,
        *,
        state: TrainState | None = None,
        gradient_clip_val: float = 1.0,
        max_skipped_steps: int = 10,
        log_interval: int = 1,
        evaluation_interval: int | None = None,
        save_interval: int | None = None,
        evaluate: Callable[[bool], LanguageMetrics | None] | None = None,
        save: Callable[[TrainState], None] | None = None,
        sinks: Sequence[Callable[[Record], None]] = (),
        device: torch.device | None = None,
        backward: Callable[[Tensor], None] = torch.Tensor.backward,
        flops: StepFlops | None = None,
        peak_flops: float | None = None,
        surgeon: Surgeon | None = None,
        strategy: Alone | None = None,
    ) -> None:
        self.model, self.loader, self.updater, self.schedule, self.terms = model, loader, updater, schedule, terms
        self.total_steps, self.state = total_steps, state or TrainState()
        self.gradient_clip_val, self.max_skipped_steps = gradient_clip_val, max_skipped_steps
        self.log_interval = log_interval
        self.evaluation_interval, self.save_interval = evaluation_interval, save_interval
        self.evaluate, self.save, self.sinks = evaluate, save, sinks
        self.device, self.backward = device or torch.device("cpu"), backward
        self.flops, self.peak_flops = flops, peak_flops
        self.tally, self.visits, self.depths = ExpertTally(), list[LayerVisits](), DepthTally()
        self.compute_savings = 0.0
        self.surgeon = surgeon or Surgeon(model, updater)
        self.strategy = strategy or Alone(Objective(model, terms, Ranks()), updater)

    def fit(self, requests: SignalRequests | None = None) -> Outcome:
        """Train until the budget is spent, or until a signal asks to stop; then the state has been saved."""
        requests = requests or SignalRequests()
        self.model.train()
        if self.state.mod_capacity is not None:
            self.model.mod_capacity = self.state.mod_capacity  # what an evaluation that is made up for goes by
        made_up = self._make_up_for_evaluation()
        saved_step = None if made_up else self.state.step
        while self.state.step < self.total_steps and not self._is_asked_to_stop(requests):
            batches = self.loader.micro_batches(self.state.step)
            metrics, seconds = self._step(batches)
            self._observe(metrics, seconds, batches)
            done = self.state.step == self.total_steps
            self._emit(self._train_record(metrics, seconds), self.state.step % self.log_interval == 0 or done)
            if done or self._is_due(self.evaluation_interval):
                self._evaluate(final=done)
            if done or requests.save or self._is_due(self.save_interval):
                requests.save = False
                self._save()
                saved_step = self.state.step
        if self.state.step != saved_step:  # a signal may come at any line: what it stopped is saved out here
            self._save()
        return Outcome.stopped if requests.stop else Outcome.finished

    def _is_asked_to_stop(self, requests: SignalRequests) -> bool:
        """Let what any rank was asked count for all, so that they stop and save at the same step."""
        stop, save = self.strategy.ranks.largest([requests.stop or 0, requests.save])
        requests.stop, requests.save = Signals(stop) if stop else None, bool(save)
        return requests.stop is not None

    def get_expert_statistics(self) -> dict[str, Any]:
        """Return what the routers did in the last step, by layer and in all: see `ExpertTally.statistics`."""
        return self.tally.statistics()

    def get_mod_statistics(self) -> dict[str, Any]:
        """Return what tokens skipped in the last step; empty for a model in which none may.

        `capacity_factor` is the share of tokens that layers were to process, `tokens_processed` and `tokens_skipped`
        count a token once for every layer that may be skipped, `average_depth` is how many layers the average token
        went through, `per_layer_usage` the share of tokens that did, by layer. `compute_savings` is the share of the
        step's FLOPs that was saved, 0 where they are not known.
        """
        if not self.depths.layers:
            return {}
        usage = self._usage()
        return {
            "capacity_factor": self.model.mod_capacity,
            "tokens_processed": self.depths.num_processed,
            "tokens_skipped": self.depths.num_skipped,
            "average_depth": sum(usage),
            "per_layer_usage": usage,
            "compute_savings": self.compute_savings,
        }

    def _usage(self) -> list[float]:
        return self.depths.usage(list(self.model.mod_layers()), len(self.model.blocks))

    def operate(self, operation: SurgeryOperation) -> SurgeryReport:
        """Do an operation on experts between two steps, and put it on record. Raises ConfigError when it cannot be."""
        if self.strategy.ranks.num_ranks > 1:
            raise ConfigError("experts of a model that several ranks train stay as they are; operate with one process.")
        if operation.operation is SurgeryKind.scale_load_balancing:
            require_balance_loss(self.terms)
        batches = self.loader.micro_batches(self.state.step)
        report = self.surgeon.operate(operation, batches, step=self.state.step, device=self.device)
        if operation.operation not in SETTINGS:  # expert 3 may be another one now
            self.state.routing = RoutingHistory()
        self.state.mod_capacity = self.model.mod_capacity
        self._emit(report.record(self.state.step))
        return report

    def _make_up_for_evaluation(self) -> bool:
        """Evaluate a restored state whose own evaluation a signal had cut short; return whether that was done."""
        final, step = self.state.step >= self.total_steps, self.state.step
        if step == 0 or step in self.state.evaluations or not (final or self._is_due(self.evaluation_interval)):
            return False
        self._evaluate(final)
        return step in self.state.evaluations

    def _step(self, batches: list[Batch]) -> tuple[StepMetrics, float]:
        started = time.perf_counter()
        done = self.state.step + 1
        is_watched = done == self.total_steps or (self.evaluation_interval and done % self.evaluation_interval == 0)
        self.strategy.distance = Distance() if is_watched else None
        metrics = train_step(
            self.model,
            self.updater,
            batches,
            self.terms,
            learning_rate=self._learning_rate(self.state.step),
            progress=self.state.step / self.total_steps,
            max_norm=self.gradient_clip_val,
            device=self.device,
            backward=self.backward,
            strategy=self.strategy,
        )
        return metrics, time.perf_counter() - started

    def _observe(self, metrics: StepMetrics, seconds: float, batches: list[Batch]) -> None:
        self.state.step += 1
        self.state.tokens += metrics.num_tokens
        self.state.elapsed_s += seconds
        self.tally, self.visits, self.depths = metrics.tally, metrics.tally.visits(), metrics.depths
        if self.depths.layers:
            self.state.mod_capacity = self.model.mod_capacity
        if self.flops is not None and self.depths.layers:
            self.compute_savings = 1 - self._flops_of(self.flops, metrics) / (
                metrics.num_tokens * self.flops.without_skips
            )
        self.state.routing.add([layer.by_expert for layer in self.visits])
        if metrics.applied:
            self.state.skipped_in_a_row = 0
            return
        self.state.skipped_steps += 1
        self.state.skipped_in_a_row += 1
        if self.state.skipped_in_a_row >= self.max_skipped_steps:
            samples = np.concatenate([batch.sample_ids for batch in batches]).tolist()
            raise UserError(
                f"{self.state.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, the last "
                f"with samples {samples}. Lower `optimizer.learning_rate`, or use a wider `precision`; "
                "the newest checkpoint is from before."
            )

    def _learning_rate(self, step: int) -> float:
        return self.updater.peak_learning_rate * self.schedule.factor(step)

    def _train_record(self, metrics: StepMetrics, seconds: float) -> Record:
        rate = metrics.num_tokens / seconds
        record: Record = {
            "kind": "train",
            "step": self.state.step,
            "elapsed_s": self.state.elapsed_s,
            "tokens": self.state.tokens,
            **metrics.losses,
            "learning_rate": self._learning_rate(self.state.step - 1),
            "grad_norm": metrics.grad_norm,
            "tokens_per_s": rate,
            "mfu": self._mfu(metrics, seconds),
            "sample_crc32": zlib.crc32(self.loader.samples_of_all_ranks(self.state.step - 1).tobytes()),
            "skipped": not metrics.applied,
        }
        if metrics.head_counts:
            record["head_load"] = [(counts / counts.sum()).tolist() for counts in metrics.head_counts]
        return record | metrics.travelled | self._routing_record() | self._depth_record()

    def _routing_record(self) -> Record:
        visits = self.visits
        if not visits:
            return {}
        return {
            "expert_load": [layer.shares for layer in visits],
            "visits_per_token": [layer.per_token for layer in visits],
            "dropped_share": [layer.dropped_share for layer in visits],
            "dead_experts": self.state.routing.dead_experts(),
        }

    def _depth_record(self) -> Record:
        if not self.depths.layers:
            return {}
        usage = self._usage()
        return {
            "layer_usage": usage,
            "average_depth": sum(usage),
            "mod_capacity": self.model.mod_capacity,
            "compute_savings": self.compute_savings,
        }

    def _flops_of(self, flops: StepFlops, metrics: StepMetrics) -> float:
        num_visits = sum(layer.total for layer in self.visits)
        layers = self.depths.layers
        num_sequences = layers[0].num_sequences if layers else 1
        return flops.of(metrics.num_tokens, num_visits, [layer.num_processed for layer in layers], num_sequences)

    def _mfu(self, metrics: StepMetrics, seconds: float) -> float | None:
        if self.flops is None or self.peak_flops is None:
            return None
        return self._flops_of(self.flops, metrics) / seconds / self.peak_flops

    def _evaluate(self, final: bool) -> None:
        if self.evaluate is None:
            return
        result = self.evaluate(final)
        if result is None:
            return
        self.state.evaluations[self.state.step] = result.loss
        routing: Record = {}
        if result.routing is not None:
            self.state.routing.choices = result.routing.choices
            routing = result.routing.record()
        activations: Record = {"activation_weights": weights} if (weights := result.activation_weights) else {}
        self._emit(
            {
                "kind": "eval",
                "step": self.state.step,
                "loss": result.loss,
                "perplexity": result.perplexity,
                "bits_per_byte": result.bits_per_byte,
                "token_accuracy": result.token_accuracy,
                "tokens": result.tokens,
                "seconds": result.seconds,
                "final": final,
                **_noncausal(result),
                **routing,
                **activations,
                **{f"future_accuracy_{head}": each.accuracy for head, each in enumerate(result.future, start=1)},
                **{f"future_acceptance_{head}": each.acceptance for head, each in enumerate(result.future, start=1)},
                **(result.depth.record() if result.depth is not None else {}),
                **self._compression_record(),
            }
        )

    def _compression_record(self) -> Record:
        """Return how far the sums of the step before were from exact ones."""
        distance = self.strategy.distance
        return {"compression_error": distance.relative} if distance is not None and distance.whole else {}

    def _save(self) -> None:
        self.strategy.verify()
        if self.save is not None:
            self.save(self.state)

    def _emit(self, record: Record, wanted: bool = True) -> None:
        for sink in self.sinks if wanted else ():
            sink(record)

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.state.step % interval == 0


def _noncausal(result: LanguageMetrics) -> Record:
    if result.noncausal_loss is None:
        return {}
    return {"noncausal_loss": result.noncausal_loss, "noncausal_perplexity": result.noncausal_perplexity}


def measure_seconds_per_step(trainer: Trainer, num_steps: int = 16) -> Iterator[float]:
    """Yield the seconds of each of `num_steps` steps of a trainer that is thrown away afterwards.

    The first ones are slow on every device: memory is touched and kernels are compiled for the first time.
    """
    trainer.model.train()
    for step in range(num_steps):
        yield trainer._step(trainer.loader.micro_batches(step))[1]
