"""A plausible run, so that view, figures and report can be tested, and looked at, without training."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import MetricsFile

NUM_LAYERS = 4
NUM_EXPERTS = 8


def fake_records(
    num_steps: int = 120, num_layers: int = NUM_LAYERS, num_experts: int = NUM_EXPERTS
) -> Iterator[dict[str, Any]]:
    """Yield the records of a small mixture of experts that learns, with an evaluation every tenth of the way."""
    generator = random.Random(0)
    for step in range(1, num_steps + 1):
        yield _train_record(generator, step, num_steps, num_layers, num_experts)
        if step % max(1, num_steps // 10) == 0:
            yield _evaluation_record(generator, step, num_steps, num_layers, num_experts, final=False)
    yield _evaluation_record(generator, num_steps, num_steps, num_layers, num_experts, final=True)


def _loss(step: int, num_steps: int) -> float:
    return 2.9 + 6.1 * math.exp(-6 * step / num_steps)


def _train_record(
    generator: random.Random, step: int, num_steps: int, num_layers: int, num_experts: int
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "kind": "train",
        "step": step,
        "elapsed_s": 1.4 * step,
        "tokens": 4096 * step,
        "loss": _loss(step, num_steps) + generator.gauss(0, 0.12),
        "learning_rate": 1.5e-3
        * min(1.0, step / (0.1 * num_steps))
        * (0.55 + 0.45 * math.cos(math.pi * step / num_steps)),
        "grad_norm": 0.8 + abs(generator.gauss(0, 0.3)) + 4 * math.exp(-step / 5),
        "tokens_per_s": 2900 + generator.gauss(0, 120),
        "mfu": 0.31 + generator.gauss(0, 0.01),
        "sample_crc32": generator.getrandbits(32),
        "skipped": False,
    }
    if num_experts:
        record["load_balancing_loss"] = 1.0 + 0.4 * math.exp(-step / 30)
        record["router_z_loss"] = 2.0 + generator.random()
        record["expert_load"] = [_load(generator, step / num_steps, layer, num_experts) for layer in range(num_layers)]
        record["visits_per_token"] = [2.0 - 0.1 * layer for layer in range(num_layers)]
        record["dropped_share"] = [0.1 * math.exp(-step / 30) * layer for layer in range(num_layers)]
        record["dead_experts"] = [int(layer == 1 and step > 20) for layer in range(num_layers)]
    return record


def _load(generator: random.Random, progress: float, layer: int, num_experts: int) -> list[float]:
    skew = (1 - progress) * 1.5 + 0.15 * layer
    weights = [
        math.exp(skew * math.sin(1.7 * expert + layer) + generator.gauss(0, 0.05)) for expert in range(num_experts)
    ]
    return [weight / sum(weights) for weight in weights]


SOURCES = ["single modules", "encodings", "idlelib", "costs $5 & $6 <b>", "other"]


def _evaluation_record(
    generator: random.Random, step: int, num_steps: int, num_layers: int, num_experts: int, final: bool
) -> dict[str, Any]:
    loss = _loss(step, num_steps) + 0.1 + generator.gauss(0, 0.02)
    record = {
        "kind": "eval",
        "step": step,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / 2.45,
        "token_accuracy": 0.5 * math.exp(-loss / 6),
        "tokens": 100_352 if not final else 612_000,
        "seconds": 4.2,
        "final": final,
    }
    if num_experts:
        progress = step / num_steps
        by_source = [
            [_load(generator, progress, layer + source, num_experts) for source in range(len(SOURCES))]
            for layer in range(num_layers)
        ]
        record["expert_load"] = [
            [sum(loads) / len(SOURCES) for loads in zip(*layer, strict=True)] for layer in by_source
        ]
        record["token_entropy"] = [1.5 - progress] * num_layers
        record |= {"sources": SOURCES, "source_load": by_source, "source_information": [0.05] * num_layers}
        if step > max(1, num_steps // 10):
            record["churn"] = [0.3 * (1 - progress) + 0.01 * layer for layer in range(num_layers)]
    return record


def write_fake_run(
    root: Path, num_steps: int = 120, num_experts: int = NUM_EXPERTS, finished: bool = True
) -> RunFolder:
    """Write everything that a run leaves behind before its figures and its report are made."""
    folder = RunFolder(root).create()
    records = list(fake_records(num_steps, num_experts=num_experts))
    with MetricsFile(folder.metrics) as metrics:
        for record in records if finished else records[: num_steps // 2]:
            metrics.append(record)
    folder.config.write_text("name: quick\nmodel:\n  hidden_size: 384\n  num_experts: 8\nhub:\n  token: hunter2\n")
    folder.write_json("difference.json", {"model.num_experts": [8, num_experts], "hub.token": [None, "hunter2"]})
    folder.write_json("metadata.json", _metadata())
    if finished:
        folder.write_json("summary.json", _summary(records[-1], num_steps))
        folder.samples.write_text("def main(argv: list[str]) -> None:\n    return <b>argv</b> & {}\n")
    return folder


def _metadata() -> dict[str, Any]:
    return {
        "started": "2026-01-31T12:00:00+00:00",
        "command": "python -m ava_exp model=quick",
        "host": "laptop",
        "platform": "Linux-6.1-x86_64",
        "cpu": "Example CPU @ 2.0 GHz",
        "cores": 2,
        "memory_bytes": 16 * 2**30,
        "python": "3.11.2",
        "packages": {"torch": "2.13.0", "numpy": "2.4.6"},
        "git": {"commit": "b8ee49600b8ee49600b8ee49600b8ee49600b8ee", "dirty": False},
    }


def _summary(final: dict[str, Any], num_steps: int) -> dict[str, Any]:
    return {
        "status": "finished",
        "final": {name: final[name] for name in ("loss", "perplexity", "bits_per_byte", "token_accuracy")},
        "baselines": {"gzip": 1.71, "xz": 1.62},
        "parameters": {"total": 66_123_456, "active": 23_456_789},
        "tokens": 4096 * num_steps,
        "seconds": 1.4 * num_steps,
        "tokens_per_s": 2912.0,
        "mfu": 0.312,
        "data": {"source": "stdlib", "documents": 1432, "bytes": 12_345_678, "fingerprint": "3f9a0c"},
        "tokenizer": {"kind": "byte-level BPE", "vocab_size": 8192, "bytes_per_token": 3.41},
    }


@pytest.fixture(name="fake_records")
def _fake_records() -> Callable[..., Iterator[dict[str, Any]]]:
    """Makes the records of a run: `fake_records(num_steps, num_layers, num_experts)`."""
    return fake_records


@pytest.fixture(name="write_fake_run")
def _write_fake_run() -> Callable[..., RunFolder]:
    """Writes a run: `write_fake_run(root, num_steps, num_experts, finished)`."""
    return write_fake_run


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    """The folder of a finished run of a mixture of experts."""
    return write_fake_run(tmp_path / "quick-1a2b3c4d")
