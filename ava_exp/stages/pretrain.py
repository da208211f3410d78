"""Train, evaluate, report; and go on where an earlier process of the same run left off."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ava_exp.config.identity import difference_from_default, flatten, to_plain
from ava_exp.config.run import RunConfig
from ava_exp.data.prepare import PreparedData
from ava_exp.errors import EXIT_OK, EXIT_RESUMABLE, CheckpointError, RunFolderError
from ava_exp.generation.sampling import sample_tokens
from ava_exp.models.decoder import Decoder
from ava_exp.models.surgery import Parameters, Surgeon
from ava_exp.optim.update import Updater
from ava_exp.parallel.ranks import Ranks
from ava_exp.parallel.start import join_ranks, leave_ranks
from ava_exp.runtime import (
    Runtime,
    heartbeat,
    open_runtime,
    peak_memory_bytes,
    reset_peak_memory,
)
from ava_exp.stages import assembly
from ava_exp.stages.failure import explain, forget_failure
from ava_exp.stages.runs import (
    INITIAL,
    ORIGIN,
    InitialWeights,
    choose_attempt,
    recorded_initial_weights,
    with_initial_weights,
)
from ava_exp.stages.steps import announce
from ava_exp.stages.summary import write_summary
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.lock import RunLock
from ava_exp.tracking.logs import RecordLog, configure_logging
from ava_exp.tracking.metadata import collect_metadata
from ava_exp.tracking.metrics import MetricsFile
from ava_exp.tracking.redaction import redact
from ava_exp.tracking.report import write_report
from ava_exp.tracking.trackers import RunStatus, TrackedRun
from ava_exp.tracking.view import open_view
from ava_exp.training.budget import resolve_total_steps
from ava_exp.training.checkpoint import (
    newest_good_checkpoint,
    read_checkpoint,
    set_aside_after,
    sweep_leftovers,
)
from ava_exp.training.loop import Outcome, Record, measure_seconds_per_step
from ava_exp.training.saver import (
    CheckpointSaver,
    kept_by,
    random_state,
    restore_snapshot,
    restore_weights,
    seed_random_state,
    take_snapshot,
)
from ava_exp.training.signals import SignalRequests
from ava_exp.training.state import TrainState
from ava_exp.training.stopping import StoppingTime

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> int:
    """Train the run that `config` names, or go on with it. Return the exit code."""
    ranks = join_ranks(config.distributed, config.hardware)
    config, initial, folder = ranks.from_first(_place(config) if ranks.is_first else None)
    return train(config, folder, initial, ranks=ranks)


def _place(config: RunConfig) -> tuple[RunConfig, InitialWeights | None, RunFolder]:
    """Decide what the run starts from and where it works: once, for all ranks."""
    config, initial = with_initial_weights(config)
    return config, initial, choose_attempt(config)


Measure = Callable[[Decoder, Runtime, PreparedData, int], None]
"""What looks at a trained model, in the inference precision, after so many steps."""


def train(
    config: RunConfig,
    folder: RunFolder,
    initial: InitialWeights | None = None,
    measure: Measure | None = None,
    ranks: Ranks | None = None,
) -> int:
    """Do what is left of a run in the folder that was chosen for it. Return the exit code.

    `initial` is what the configuration's `init_from`, a name with step and fingerprint by now, stands for. `measure` is
    called when the training has finished, before the report is written. Of several `ranks` the first one alone writes.
    """
    ranks = ranks or Ranks()
    with ExitStack() as stack:
        if ranks.is_first:
            stack.enter_context(RunLock(folder.lock))
            stack.enter_context(configure_logging(folder))
        requests = stack.enter_context(SignalRequests(tells=ranks.is_first))
        if ranks.is_first:
            if initial is not None and recorded_initial_weights(folder) is None:
                folder.write_json(INITIAL, initial.record())  # before `latest` leads here
            announce(config, folder)
            forget_failure(folder)
        try:
            return Pretraining(config, folder, requests, initial, measure, ranks).run()
        except BaseException as error:
            # The terminal gets it from the command line; here it is for the run's own files.
            logger.debug("the run ended with %s", type(error).__name__, exc_info=True)
            if ranks.is_first:
                _write_failure(folder)
            reason = explain(error, folder, ranks)
            if reason is not error:
                raise reason from error
            raise


def _write_failure(folder: RunFolder) -> None:
    try:
        _write_status(folder, RunStatus.failed)
    except RunFolderError as another:  # on a full disk: what went wrong first is what matters
        logger.warning("the run's status is not up to date: %s", another)


class Pretraining:
    """One process's share of a run, from an open folder to its report."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        requests: SignalRequests,
        initial: InitialWeights | None = None,
        measure: Measure | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.folder, self.requests = config, folder, requests
        self.initial, self.measure, self.ranks = initial, measure, ranks or Ranks()
        self.kept: dict[str, Tensor] = {}
        self.output_dir = Path(config.output_dir)
        stored = folder.read_json("resolution.json") if self.ranks.is_first else None
        self.resolution: dict[str, Any] = self.ranks.from_first(stored) or {}

    def run(self) -> int:
        """Do what is left to do."""
        runtime = self._open_runtime()  # first: strict hardware is refused for a finished run, too
        if self.ranks.from_first(self.ranks.is_first and self._is_finished()):
            return self._say_that_it_is_finished()
        self._tell(f"Run folder: {self.folder.root}")
        with self.ranks.first_goes_first():
            data = assembly.prepare(self.config, self._tell)
        self._describe()
        total_steps = self._total_steps(runtime, data)
        seed_random_state(self.config.seed, self.ranks.rank)
        reset_peak_memory(runtime.device)
        model = assembly.build_trained_decoder(self.config, runtime)
        updater = assembly.build_updater(self.config, runtime, model)
        surgeon = Surgeon(model, updater)
        state = self._restore(surgeon, data)
        if not self.ranks.is_first:
            outcome = self._train(runtime, data, surgeon, updater, state, total_steps)
            self._measured(outcome, runtime, model, updater)
            return EXIT_OK if outcome is Outcome.finished else EXIT_RESUMABLE
        tracker = self.config.tracker.build()
        tracker.start(self._tracked())
        _write_status(self.folder, RunStatus.running, state.step, total_steps)
        try:
            outcome = self._train(runtime, data, surgeon, updater, state, total_steps)
            status = RunStatus.finished if outcome is Outcome.finished else RunStatus.stopped
            peak_bytes = peak_memory_bytes(runtime.device)  # of training: what follows copies weights
            measured = self._measured(outcome, runtime, model, updater)
            if measured is not None:
                self._write_samples(measured, data)
                if self.measure is not None:
                    self.measure(measured, runtime, data, state.step)
            parameters = assembly.parameters_of(self.config, model, updater)
            write_summary(self.folder, self.config, status, runtime, data, state, parameters, peak_bytes)
            _write_status(self.folder, status, state.step, total_steps)
            report = write_report(self.folder)
        except BaseException:
            tracker.finish(RunStatus.failed)
            raise
        tracker.finish(status, [report, self.folder.config])
        return self._say_goodbye(outcome, state, total_steps)

    def _measured(self, outcome: Outcome, runtime: Runtime, model: Decoder, updater: Updater) -> Decoder | None:
        """Return the finished model in the inference precision. From here on ranks go their own ways."""
        finished = outcome is Outcome.finished
        measured = assembly.inference_copy(self.config, runtime, model, updater) if finished else None
        leave_ranks(self.ranks)
        return measured

    def _tell(self, text: str) -> None:
        if self.ranks.is_first:
            _tell(text)

    def _say_that_it_is_finished(self) -> int:
        if self.ranks.is_first:
            _tell(f"This run is finished. Its report: {self.folder.report}")
            _tell("Raise the budget to train it further, or start again with `resume=never`.")
            artifacts = [self.folder.report, self.folder.config]
            self.config.tracker.build().catch_up(self._tracked(), RunStatus.finished, artifacts)
        leave_ranks(self.ranks)
        return EXIT_OK

    def _is_finished(self) -> bool:
        status = self.folder.read_json("status.json") or {}
        if status.get("status") != RunStatus.finished.value or "tokens_per_epoch" not in self.resolution:
            return False
        return int(status["step"]) >= self._resolve_steps(self.resolution)

    def _open_runtime(self) -> Runtime:
        runtime = open_runtime(
            self.config.hardware,
            self.config.precision,
            batch_size=self.config.training.batch_size,
            cache_dir=Path(self.config.cache_dir),
            stored=self.resolution.get("runtime"),
            ranks=self.ranks,
            gradient_accumulation_steps=self.config.training.gradient_accumulation_steps,
        )
        for notice in runtime.notices:
            self._tell(notice)
        self.resolution["runtime"] = dataclasses.asdict(runtime.resolution)
        return runtime

    def _describe(self) -> None:
        """Write what this run is, before anything can go wrong."""
        if not self.ranks.is_first:
            return
        text = yaml.safe_dump(redact(to_plain(self.config)), sort_keys=False)
        self.folder.config.write_text(text, encoding="utf-8")
        difference = {key: list(pair) for key, pair in difference_from_default(self.config).items()}
        self.folder.write_json("difference.json", redact(difference))
        self.folder.write_json("metadata.json", collect_metadata(sys.orig_argv))

    def _total_steps(self, runtime: Runtime, data: PreparedData) -> int:
        """Resolve the budget; a limit in seconds is turned into steps by a measurement that is made once and kept."""
        per_epoch = assembly.build_loader(self.config, runtime, data).num_samples * self.config.data.sequence_length
        self.resolution["tokens_per_epoch"] = per_epoch

        def measure() -> float:
            if "seconds_per_step" not in self.resolution:
                model = assembly.build_trained_decoder(self.config, runtime)
                updater = assembly.build_updater(self.config, runtime, model)
                trainer = assembly.build_trainer(self.config, runtime, data, 1000, model=model, updater=updater)
                times = list(measure_seconds_per_step(trainer))
                self.resolution["seconds_per_step"] = self.ranks.from_first(statistics.median(times[len(times) // 2 :]))
                self._tell(f"One step takes {self.resolution['seconds_per_step']:.3f} s (measured once and kept).")
            return float(self.resolution["seconds_per_step"])

        total = self._resolve_steps(self.resolution, measure)
        if self.ranks.is_first:
            self.folder.write_json("resolution.json", self.resolution)
        return total

    def _resolve_steps(self, resolution: dict[str, Any], measure: Any = None) -> int:
        counts = assembly.sizes(self.config)
        return resolve_total_steps(
            self.config.budget,
            tokens_per_step=assembly.tokens_per_step(self.config, resolution["runtime"]),
            tokens_per_epoch=resolution["tokens_per_epoch"],
            active_parameters=counts["active"],
            total_parameters=counts["total"],
            seconds_per_step=measure or (lambda: float(resolution["seconds_per_step"])),
        )

    def _restore(self, surgeon: Surgeon, data: PreparedData) -> TrainState:
        """Put the newest good checkpoint back, if there is one, and let the folder hold nothing that comes after it."""
        found, reset = self.ranks.from_first(self._newest_checkpoint() if self.ranks.is_first else None)
        state = TrainState()
        if found is not None:
            state = self._read(found, surgeon, data, reset_optimizer=reset)
        elif self.initial is not None:
            self._initialize(self.initial, surgeon, data)
        self.ranks.wait()
        if self.ranks.is_first:
            sweep_leftovers(self.folder.checkpoints)
            set_aside_after(self.folder.checkpoints, state.step)
            with MetricsFile(self.folder.metrics) as metrics:
                metrics.cut_back(state.step, state.evaluations)  # what came after the checkpoint is made again
        return state

    def _newest_checkpoint(self) -> tuple[Path | None, bool]:
        """Return the checkpoint to go on from, and whether its optimizer may be reset."""
        found, problems = newest_good_checkpoint(self.folder.checkpoints)
        for problem in problems:
            logger.warning(problem)
        if found is not None:
            # An optimizer that was reset when this attempt began at another run's checkpoint is not reset again.
            return found, self.config.resume == "auto"
        origin = self.folder.read_json(ORIGIN)
        return (Path(origin["checkpoint"]) if origin else None), True

    def _read(self, checkpoint: Path, surgeon: Surgeon, data: PreparedData, *, reset_optimizer: bool) -> TrainState:
        snapshot = read_checkpoint(checkpoint)
        self._check_inputs(snapshot.state.get("fingerprints"), assembly.fingerprints(data))
        reset_optimizer = reset_optimizer and self.config.reset_optimizer
        assert surgeon.updater is not None
        state = restore_snapshot(
            snapshot, surgeon.updater, reset_optimizer=reset_optimizer, surgeon=surgeon, ranks=self.ranks
        )
        new = ", with a new optimizer" if reset_optimizer else ""
        self.kept = kept_by(self.ranks, snapshot)
        self._tell(f"Going on from step {state.step} ({checkpoint}){new}.")
        return state

    def _initialize(self, initial: InitialWeights, surgeon: Surgeon, data: PreparedData) -> None:
        """Take the weights of another run; everything else starts anew."""
        snapshot = read_checkpoint(initial.checkpoint)
        initial.check_tokenizer(snapshot, data.tokenizer.fingerprint)
        assert surgeon.updater is not None
        try:
            restore_weights(snapshot, surgeon.updater, surgeon)
        except CheckpointError as error:
            raise CheckpointError(f"`init_from` {initial.name} does not fit this run: {error}") from error
        self._tell(f"Starting from the weights of {initial.name}.")

    def _check_inputs(self, saved: Any, present: dict[str, str]) -> None:
        known = saved if isinstance(saved, dict) else {}
        changed = [name for name in present if known.get(name) != present[name]]
        if not changed:
            return
        sentence = f"{' and '.join(changed)} changed since the checkpoint was made"
        if not self.config.allow_changed_inputs:
            raise CheckpointError(
                f"{sentence}: the run would not be what its name says. "
                "Restore what changed, start again with `resume=never`, or go on with `allow_changed_inputs=true`."
            )
        logger.warning("%s; going on all the same, as `allow_changed_inputs` says.", sentence)

    def _tracked(self) -> TrackedRun:
        return TrackedRun(
            folder=self.folder,
            name=self.folder.root.name,
            parameters=redact(flatten(to_plain(self.config))),
            output_dir=self.output_dir,
        )

    def _train(
        self,
        runtime: Runtime,
        data: PreparedData,
        surgeon: Surgeon,
        updater: Updater,
        state: TrainState,
        total_steps: int,
    ) -> Outcome:
        settings, ranks = self.config.checkpoint, self.ranks
        stopping = StoppingTime(self.folder if ranks.is_first else None)
        num_best, asynchronous = settings.save_total_limit, settings.asynchronous
        saver = CheckpointSaver(
            self.folder.checkpoints, num_best=num_best, asynchronous=asynchronous, saved=stopping.saved
        )
        extra = {"fingerprints": assembly.fingerprints(data), "run": self.folder.root.name}
        with ExitStack() as stack:
            sinks: list[Callable[[Record], None]] = [stopping.observe, stack.enter_context(heartbeat(stopping.seconds))]
            if ranks.is_first:
                metrics = stack.enter_context(MetricsFile(self.folder.metrics))
                parameters = assembly.parameters_of(self.config, surgeon.model, updater)
                view = stack.enter_context(open_view(total_steps, self._title(total_steps, parameters)))
                sinks += [metrics.append, view.update, RecordLog(total_steps).append]

            def save(state: TrainState) -> None:
                drawn, kept = ranks.gather(random_state()), ranks.gather_at_first(trainer.strategy.kept())
                copy = settings.asynchronous and state.step < total_steps
                if ranks.is_first or updater.is_sharded:
                    snapshot = take_snapshot(updater, state, extra, surgeon, copy=copy, drawn=drawn, kept=kept)
                if not ranks.is_first:
                    return
                try:
                    metrics.sync()
                except OSError as error:  # worth less than the checkpoint that follows
                    logger.warning("metrics up to step %d may not survive a loss of power: %s", state.step, error)
                saver.save(snapshot, state.evaluations)

            trainer = assembly.build_trainer(
                self.config,
                runtime,
                data,
                total_steps,
                model=surgeon.model,
                updater=updater,
                surgeon=surgeon,
                state=state,
                is_stopping=lambda: ranks.largest([self.requests.stop is not None]) == [True],
                save=save,
                sinks=sinks,
            )
            trainer.strategy.keep(self.kept)
            try:
                outcome = trainer.fit(self.requests)
            finally:
                saver.wait()
            saver.finish()
            if ranks.is_first:
                stopping.keep(self.folder)
            return outcome

    def _title(self, total_steps: int, parameters: Parameters) -> list[str]:
        size = f"{parameters.total / 1e6:.1f} M parameters, {parameters.active / 1e6:.1f} M active"
        ranks = self.ranks
        shape = f"{ranks.num_ranks} ranks of {ranks.backend.value}, " if ranks.num_ranks > 1 else ""
        precision = self.resolution["runtime"]["precision"]
        return [f"{self.folder.root.name}: {size}, {shape}{precision}, {total_steps} steps"]

    def _write_samples(self, model: Decoder, data: PreparedData) -> None:
        prompt = self.config.evaluation.sample_prompt
        ids = sample_tokens(
            model,
            data.tokenizer.encode(prompt),
            max_new_tokens=self.config.evaluation.sample_tokens,
            temperature=0.8,
            top_p=0.9,
            seed=self.config.seed,
            stop_id=data.tokenizer.end_of_document_id,
        )
        self.folder.samples.write_text(prompt + data.tokenizer.decode(list(ids)), encoding="utf-8")

    def _say_goodbye(self, outcome: Outcome, state: TrainState, total_steps: int) -> int:
        if outcome is Outcome.stopped:
            assert self.requests.stop is not None
            saved = ", saved" if state.step else ""
            _tell(
                f"Stopped by {self.requests.stop.name} at step {state.step} of {total_steps}{saved}. "
                "The same command goes on from there."
            )
            return EXIT_RESUMABLE
        summary = self.folder.read_json("summary.json")
        final, baselines = summary["final"], summary["baselines"]
        if final is None:  # it began at the last checkpoint of another run, with nothing left to do
            _tell(f"The checkpoint has all {state.step} steps of the budget: raise the budget to train further.")
            return EXIT_OK
        _tell(
            f"Validation: {final['bits_per_byte']:.3f} bits per byte "
            f"(gzip -9 {baselines['gzip']:.3f}, xz {baselines['xz']:.3f}), "
            f"perplexity {final['perplexity']:.1f}, token accuracy {final['token_accuracy']:.1%}."
        )
        _tell(f"Report: {self.folder.report}")
        return EXIT_OK


def _write_status(folder: RunFolder, status: RunStatus, step: int | None = None, total: int | None = None) -> None:
    known = folder.read_json("status.json") or {}
    given = {name: value for name, value in (("step", step), ("total_steps", total)) if value is not None}
    folder.write_json("status.json", {**known, "status": status.value, **given})


def _tell(text: str) -> None:
    print(text, flush=True)
    logger.info(text)
