"""Loss curves of two tiny trainings on a CPU in fp32, which a change that should not move the loss must not move.

A change that is meant to move them regenerates them; the difference belongs in the same commit, with the reason:

    python -m tests.golden.curves
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ava_exp.tracking.metrics import read_metrics
from tests.faults.harness import Experiment

FILE = Path(__file__).with_name("curves.json")
NUM_STEPS = 24
TOLERANCE = 1e-4
"""Relative. Without AVX-512, and without any vector instructions, the curves moved by 3e-6 at most."""

Curve = dict[str, list[float]]

COMMON = (
    # Bytes and no merges: the tokenizer does not depend on how a library breaks ties. No dropout and no jitter: not
    # every build of torch draws the same numbers for them.
    "model.vocab_size=264",
    "model.dropout=0",
    "training.batch_size=4",
    "training.gradient_accumulation_steps=2",
    "optimizer.weight_decay=0.1",
    "schedule.warmup_steps=4",
    f"budget.steps={NUM_STEPS}",
    "evaluation.interval_steps=8",
    "evaluation.max_tokens=1000",
)
COMPOSITIONS: dict[str, tuple[str, ...]] = {
    "mixture_of_experts": (
        *COMMON,
        "sparsity.router.jitter=0",
        "model.num_kv_heads=1",
        "attention.qk_norm=true",
        "model.norm_epsilon=1e-3",
    ),
    "dense": (
        *COMMON,
        "sparsity=dense",
        "model.activation=gelu",
        "model.norm=layer",
        "model.bias=true",
        "model.tie_embeddings=false",
    ),
}


def train(overrides: Sequence[str]) -> Curve:
    """Return every number of a training, by name."""
    with tempfile.TemporaryDirectory() as place:
        experiment = Experiment(output_dir=Path(place), overrides=tuple(overrides))
        ended = experiment.run()
        assert ended.code == 0, ended.err
        records = read_metrics(experiment.folder.metrics)
    curve: Curve = {}
    for record in records:
        names = ("loss", "load_balancing_loss", "router_z_loss", "grad_norm", "learning_rate", "bits_per_byte")
        for name in names:
            if name in record:
                curve.setdefault(f"{record['kind']}/{name}", []).append(record[name])
    return curve


def main() -> None:
    """Write the curves anew."""
    curves = {name: train(overrides) for name, overrides in COMPOSITIONS.items()}
    FILE.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    print(f"{FILE} is written; look at its difference before you commit it.")


if __name__ == "__main__":
    main()
