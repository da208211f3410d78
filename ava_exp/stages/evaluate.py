"""Evaluate a trained run on its validation split: as a whole, or by place in the text."""

from __future__ import annotations

import dataclasses
import json

from rich.console import Console

from ava_exp.config.model import RopeScaling
from ava_exp.config.run import RunConfig
from ava_exp.config.stage import EvaluateConfig
from ava_exp.data.loader import EvaluationLoader
from ava_exp.errors import EXIT_OK, ConfigError, must_be
from ava_exp.evaluation.language import evaluate_language
from ava_exp.evaluation.positions import bin_edges, evaluate_by_position
from ava_exp.stages.trained import TrainedRun, open_trained_run
from ava_exp.tracking.positions import PositionCurve, PositionReport


def run(config: RunConfig) -> int:
    """Print the metrics as JSON, with the baselines beside them; or perplexities by position. Return the exit code."""
    settings = config.stage
    assert isinstance(settings, EvaluateConfig)
    trained = open_trained_run(config, settings.run)
    own_length = trained.config.data.sequence_length
    length = settings.sequence_length or own_length
    scale_positions(trained, settings.rope_scaling, length)
    batches = EvaluationLoader(
        trained.data.validation,
        sequence_length=length,
        batch_size=max(1, trained.runtime.resolution.batch_size * own_length // length),
        max_tokens=settings.max_tokens,
        mask_documents=trained.config.data.mask_documents,
    )
    if settings.by_position:
        return _by_position(trained, settings, batches)
    metrics = evaluate_language(trained.model, batches, trained.data.tokenizer.token_bytes(), trained.runtime.device)
    baselines = trained.data.baselines
    report = {
        "run": trained.folder.root.name,
        "step": trained.step,
        **({"sequence_length": length} if settings.sequence_length else {}),
        **{
            name: value
            for name, value in dataclasses.asdict(metrics).items()
            if name != "routing" and value not in ({}, ())
        },
        "gzip_bits_per_byte": baselines.gzip_bits_per_byte,
        "xz_bits_per_byte": baselines.xz_bits_per_byte,
    }
    print(json.dumps(report, indent=2))
    return EXIT_OK


def scale_positions(trained: TrainedRun, kind: RopeScaling | None, length: int) -> None:
    """Let a model read texts of `length` tokens. Raises ConfigError where it cannot without being told how."""
    model = trained.config.model
    if kind is None:
        if length > model.max_position_embeddings:
            expected = f"at most the `model.max_position_embeddings` of {trained.folder.root.name}"
            mend = "Or say by `stage.rope_scaling` what becomes of the positions: `yarn`, or `none` as they are."
            raise ConfigError(
                must_be("stage.sequence_length", f"{expected} ({model.max_position_embeddings})", length, mend)
            )
        return
    original = model.original_max_position_embeddings or trained.config.data.sequence_length
    if kind is not RopeScaling.none and length <= original:
        expected = f"more than the {original} tokens that {trained.folder.root.name} was trained on"
        raise ConfigError(must_be("stage.sequence_length", expected, length, "Or leave out `stage.rope_scaling`."))
    trained.config.model = model.scaled(kind, original, length)
    trained.model.scale_positions(trained.config.model)


def _by_position(trained: TrainedRun, settings: EvaluateConfig, batches: EvaluationLoader) -> int:
    """Write the perplexities by position and their figure into the run's folder, and print them."""
    from ava_exp.tracking.figures import write_position_figure

    measured = evaluate_by_position(trained.model, batches, trained.runtime.device)
    edges = bin_edges(batches.sequence_length, settings.position_bins)
    model, own_length = trained.config.model, trained.config.data.sequence_length
    curve = PositionCurve(
        run=trained.folder.root.name, step=trained.step, losses=measured.binned(edges), loss=measured.loss
    )
    report = PositionReport(
        length=batches.sequence_length,
        original_length=model.original_max_position_embeddings or own_length,
        edges=edges,
        tokens=measured.tokens_by_bin(edges),
        curves={"as it is" if settings.rope_scaling is None else settings.rope_scaling.name: curve},
    )
    name = f"positions_{report.length}"
    report.write(trained.folder, f"{name}.json")
    figure = write_position_figure(trained.folder, report, name)
    Console(highlight=False).print(report.table())
    print(f"Written: {trained.folder.root / f'{name}.json'}, {figure}")
    return EXIT_OK
