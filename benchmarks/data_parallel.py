"""Two ranks on this machine against one process with as many threads and the same global batch; and what compression
of their gradients costs and saves.

    python benchmarks/data_parallel.py efficiency [--rounds 3] [--steps 40]
    python benchmarks/data_parallel.py compression [--steps 190]

Every training is a command of its own, as a user gives it; sides that are compared take turns, A B A B. A rate is the
median over the second half of the steps, and over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ava_exp.tracking.metrics import of_kind, read_metrics

COMMON = ("~local", "model=quick", "hardware=cpu", "precision=mixed_bf16", "tracker=none", "schedule.warmup_steps=10")
NUM_SEQUENCES = 8
"""Of a step, over all ranks."""
ONE = ("hardware.num_threads=2",)
TWO = ("hardware.num_devices=2", "hardware.num_threads=1")
COMPRESSIONS = ("none", "fp16", "bf16", "powersgd")


def trained(folder: Path, num_ranks: int, *overrides: str) -> list[dict[str, Any]]:
    """Return the records of a training in a folder that is its own."""
    batch = f"training.batch_size={NUM_SEQUENCES // num_ranks}"
    command = [sys.executable, "-m", "ava_exp", *COMMON, batch, f"output_dir={folder}", *overrides]
    command.append(f"cache_dir={folder.parent / 'cache'}")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_metrics(folder / "latest" / "metrics.jsonl")


def rate(records: list[dict[str, Any]]) -> float:
    """Return tokens/s, without what a start costs."""
    rates = [record["tokens_per_s"] for record in of_kind(records, "train")]
    return statistics.median(rates[len(rates) // 2 :])


def efficiency(place: Path, rounds: int, steps: int) -> None:
    """Print tokens/s of both sides, and their ratio."""
    sides: dict[str, tuple[int, tuple[str, ...]]] = {
        "one process, two threads": (1, ONE),
        "ddp, two ranks of one thread": (2, (*TWO, "distributed=ddp")),
        "fsdp2, two ranks of one thread": (2, (*TWO, "distributed=fsdp2")),
    }
    settings = (f"budget.steps={steps}", f"evaluation.interval_steps={steps}", "evaluation.max_tokens=1000")
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for index, (side, (num_ranks, overrides)) in enumerate(sides.items()):
            rates[side].append(rate(trained(place / f"{number}_{index}", num_ranks, *settings, *overrides)))
            print(f"round {number + 1}: {side}: {rates[side][-1]:,.0f} tokens/s", file=sys.stderr, flush=True)
    alone = statistics.median(next(iter(rates.values())))
    print("| | tokens/s | of one process |\n|---|---|---|")
    for side, found in rates.items():
        print(f"| {side} | {statistics.median(found):,.0f} | {statistics.median(found) / alone:.2f} |")


def compression(place: Path, steps: int) -> None:
    """Print what gradients of two ranks cost in every form, and what comes of it."""
    print("| `distributed.gradient_compression=` | MB a step | error of a sum | loss at the end | tokens/s |")
    print("|---|---|---|---|---|")
    for name in COMPRESSIONS:
        overrides = (*TWO, f"budget.steps={steps}", f"distributed.gradient_compression={name}")
        records = trained(place / name, 2, *overrides)
        evaluations, step = of_kind(records, "eval"), of_kind(records, "train")[-1]
        errors = [record["compression_error"] for record in evaluations if "compression_error" in record]
        error = f"{statistics.mean(errors):.1g}" if errors else ""
        sent = f"{step['gradient_bytes'] / 1e6:.1f}" if "gradient_bytes" in step else ""
        print(f"| `{name}` | {sent} | {error} | {evaluations[-1]['loss']:.3f} | {rate(records):,.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("efficiency", "compression"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if arguments.what == "efficiency":
            efficiency(Path(place), arguments.rounds, arguments.steps or 40)
        else:
            compression(Path(place), arguments.steps or 190)


if __name__ == "__main__":
    main()
