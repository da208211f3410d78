"""Teach a trained run to read longer texts, and show perplexity by position before and after.

The longer run is a run of its own that starts from the weights of the other: it is resumed, reported and evaluated as
any other is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ava_exp.config.identity import difference_from_default, flatten, to_plain
from ava_exp.config.model import RopeScaling
from ava_exp.config.run import RunConfig
from ava_exp.config.stage import ExtendContextConfig, PositionBins, PretrainConfig
from ava_exp.config.validate import raise_if_fatal, validate
from ava_exp.data.loader import EvaluationLoader
from ava_exp.data.prepare import PreparedData
from ava_exp.errors import EXIT_OK, ConfigError, must_be
from ava_exp.evaluation.positions import PositionLoss, bin_edges, evaluate_by_position, evaluate_in_pieces
from ava_exp.models.decoder import Decoder
from ava_exp.runtime import Runtime, open_runtime
from ava_exp.stages import assembly
from ava_exp.stages.pretrain import train
from ava_exp.stages.runs import (
    LATEST,
    InitialWeights,
    choose_attempt,
    find_initial_weights,
    find_run,
    read_config,
    recorded_initial_weights,
)
from ava_exp.stages.trained import load_decoder
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.positions import PositionCurve, PositionReport
from ava_exp.training.checkpoint import read_checkpoint

LEARNING_RATE_RATIO = 0.3
SOURCE_DECIDES = (
    "model",
    "attention",
    "sparsity",
    "mod",
    "prediction",
    "loss",
    "data",
    "tokenizer",
    "optimizer",
    "precision",
)
"""Sections that the longer run has from the one that it starts from."""
INSTEAD = {
    "data.sequence_length": "stage.sequence_length",
    "model.max_position_embeddings": "stage.sequence_length",
    "model.rope_scaling": "stage.rope_scaling",
    "optimizer.learning_rate": "stage.learning_rate",
}
UNSCALED = "unscaled"


def run(config: RunConfig) -> int:
    """Measure, train and measure again what `stage.run` becomes; print the comparison. Return the exit code."""
    settings = config.stage
    assert isinstance(settings, ExtendContextConfig)
    initial = _find_source(config, settings.run)
    source = read_config(initial.folder)
    _refuse_what_the_source_decides(config, source, initial)
    extended = extend(config, source, initial)
    raise_if_fatal(validate(extended))
    folder = choose_attempt(extended)
    comparison = Comparison(extended, source.data.sequence_length, settings.max_tokens, folder)
    comparison.measure_before(initial)
    code = train(extended, folder, initial, comparison.measure_after)
    if code == EXIT_OK:
        comparison.show()
    return code


def _find_source(config: RunConfig, run: str) -> InitialWeights:
    """Return the weights to start from; of a longer run that is the latest one, those that it started from."""
    folder = find_run(config, run)
    if read_config(folder).model.rope_scaling is RopeScaling.none:
        return find_initial_weights(config, run)
    recorded = recorded_initial_weights(folder)
    if run == LATEST and recorded is not None:
        return recorded
    origin = f": start from {recorded.name}" if recorded is not None else ""
    raise ConfigError(must_be("stage.run", f"a run whose positions are not scaled yet{origin}", run))


def _refuse_what_the_source_decides(config: RunConfig, source: RunConfig, initial: InitialWeights) -> None:
    theirs = flatten(to_plain(source))
    for key, (_, value) in difference_from_default(config).items():
        if key.partition(".")[0] in SOURCE_DECIDES and theirs.get(key) != value:
            mend = f"Give `{INSTEAD[key]}`." if key in INSTEAD else ""
            raise ConfigError(must_be(key, f"left out, for it is that of {initial.folder.root.name}", value, mend))


def extend(config: RunConfig, source: RunConfig, initial: InitialWeights) -> RunConfig:
    """Return the longer run. Raises ConfigError when its texts are not longer.

    A batch has as many tokens as the source's unless it is given, and at least one sequence.
    """
    settings = config.stage
    assert isinstance(settings, ExtendContextConfig)
    length, own_length = settings.sequence_length, source.data.sequence_length
    if length <= own_length:
        expected = f"more than the {own_length} tokens that {initial.folder.root.name} was trained on"
        raise ConfigError(must_be("stage.sequence_length", expected, length))
    stored: dict[str, Any] = (initial.folder.read_json("resolution.json") or {}).get("runtime") or {}
    batch_size = source.training.batch_size or int(stored.get("batch_size") or config.hardware.batch_size)
    training = dataclasses.replace(config.training)
    training.batch_size = training.batch_size or max(1, batch_size * own_length // length)
    peak = settings.learning_rate or LEARNING_RATE_RATIO * source.optimizer.learning_rate
    has_own_name = "name" in difference_from_default(config)
    as_the_source = dataclasses.replace(config, **{section: getattr(source, section) for section in SOURCE_DECIDES})
    return dataclasses.replace(
        as_the_source,
        name=config.name if has_own_name else f"{source.name}_{length}",
        stage=PretrainConfig(),
        model=source.model.scaled(settings.rope_scaling, own_length, length),
        data=dataclasses.replace(source.data, sequence_length=length),
        optimizer=dataclasses.replace(source.optimizer, learning_rate=peak),
        training=training,
        init_from=initial.name,
    )


@dataclass(slots=True)
class Comparison:
    """Measures a model before and after, on the same windows, and keeps the result in the longer run's folder."""

    config: RunConfig
    original_length: int
    max_tokens: int | None
    folder: RunFolder

    def measure_before(self, initial: InitialWeights) -> None:
        """Measure the model that the training starts from, with each scaling; once, whatever interrupts the run."""
        if self._read() is not None:
            return
        _tell("Measuring the model as it was trained, and with scaled positions ...")
        config = self.config
        runtime = open_runtime(
            config.hardware,
            config.precision,
            batch_size=config.training.batch_size,
            cache_dir=Path(config.cache_dir),
            stored=(self.folder.read_json("resolution.json") or {}).get("runtime"),
        )
        data = assembly.prepare(config, _tell)
        assembly.build_loader(config, runtime, data)  # refuses texts that are longer than all there is
        snapshot = read_checkpoint(initial.checkpoint)
        initial.check_tokenizer(snapshot, data.tokenizer.fingerprint)
        model = load_decoder(config, runtime, snapshot)
        batches = self._batches(runtime, data)
        measured = {}
        for kind in RopeScaling:
            model.scale_positions(config.model.scaled(kind, self.original_length, config.data.sequence_length))
            if kind is RopeScaling.none:
                name = f"windows of {self.original_length:,}"
                measured[name] = evaluate_in_pieces(model, batches, runtime.device, self.original_length)
            name = UNSCALED if kind is RopeScaling.none else kind.name
            measured[name] = evaluate_by_position(model, batches, runtime.device)
        edges = bin_edges(config.data.sequence_length, PositionBins.equal)
        report = PositionReport(
            length=config.data.sequence_length,
            original_length=self.original_length,
            edges=edges,
            tokens=measured[UNSCALED].tokens_by_bin(edges),
        )
        for name, loss in measured.items():
            report.curves[name] = _curve(initial.folder.root.name, snapshot.step, loss, edges)
        report.write(self.folder)
        Console(highlight=False).print(report.table())

    def measure_after(self, model: Decoder, runtime: Runtime, data: PreparedData, step: int) -> None:
        """Measure the trained model on the same windows."""
        report = self._read()
        assert report is not None, "what was measured before is kept"
        loss = evaluate_by_position(model, self._batches(runtime, data), runtime.device)
        report.curves[self._after] = _curve(self.folder.root.name, step, loss, report.edges)
        report.write(self.folder)

    def show(self) -> None:
        """Print the comparison, with one sentence on what lies beyond the original length."""
        report = self._read()
        if report is None:
            return
        Console(highlight=False).print(report.table())
        values = (f"{report.perplexity_beyond(name):,.1f} {name}" for name in report.curves)
        _tell(f"Perplexity from position {report.first_new_position:,} on: {', '.join(values)}.")
        _tell(f"Report: {self.folder.report}")

    @property
    def _after(self) -> str:
        kind = self.config.model.rope_scaling
        return f"{UNSCALED if kind is RopeScaling.none else kind.name}, trained"

    def _batches(self, runtime: Runtime, data: PreparedData) -> EvaluationLoader:
        return EvaluationLoader(
            data.validation,
            sequence_length=self.config.data.sequence_length,
            batch_size=runtime.resolution.batch_size,
            max_tokens=self.max_tokens,
            mask_documents=self.config.data.mask_documents,
        )

    def _read(self) -> PositionReport | None:
        return PositionReport.read(self.folder)


def _curve(run: str, step: int, measured: PositionLoss, edges: list[int]) -> PositionCurve:
    return PositionCurve(run=run, step=step, losses=measured.binned(edges), loss=measured.loss)


def _tell(text: str) -> None:
    print(text, flush=True)
