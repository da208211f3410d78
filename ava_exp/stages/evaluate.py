"""Evaluate a trained run on its whole validation split."""

from __future__ import annotations

import dataclasses
import json

from ava_exp.config.run import RunConfig
from ava_exp.config.stage import EvaluateConfig
from ava_exp.data.loader import EvaluationLoader
from ava_exp.errors import EXIT_OK
from ava_exp.evaluation.language import LanguageMetrics, evaluate_language
from ava_exp.stages.assembly import build_depth_observer
from ava_exp.stages.trained import open_trained_run

FIGURES = [field.name for field in dataclasses.fields(LanguageMetrics) if field.name not in ("routing", "depth")]


def run(config: RunConfig) -> int:
    """Print the metrics as JSON, with the baselines beside them. Return the exit code."""
    assert isinstance(config.stage, EvaluateConfig)
    trained = open_trained_run(config, config.stage.run)
    batches = EvaluationLoader(
        trained.data.validation,
        sequence_length=trained.config.data.sequence_length,
        batch_size=trained.runtime.resolution.batch_size,
        max_tokens=config.stage.max_tokens,
    )
    metrics = evaluate_language(
        trained.model,
        batches,
        trained.data.tokenizer.token_bytes(),
        trained.runtime.device,
        depth_observer=build_depth_observer(trained.config, trained.data),
    )
    baselines = trained.data.baselines
    report = {
        "run": trained.folder.root.name,
        "step": trained.step,
        **{name: value for name, value in dataclasses.asdict(metrics).items() if name in FIGURES and value is not None},
        **(metrics.depth.record() if metrics.depth is not None else {}),
        "gzip_bits_per_byte": baselines.gzip_bits_per_byte,
        "xz_bits_per_byte": baselines.xz_bits_per_byte,
    }
    print(json.dumps(report, indent=2))
    return EXIT_OK
