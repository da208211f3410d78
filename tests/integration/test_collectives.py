"""The bytes that the planner predicts, against those that DDP and FSDP2 really hand to their collectives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ava_exp.config.compose import compose
from ava_exp.config.machine import Precision
from ava_exp.config.training import Recompute
from ava_exp.models.backends import BackEnd, rank_memory, sizes_of, transfers_of
from ava_exp.models.communication import world
from ava_exp.models.memory import estimate_memory
from tests.integration.counting import BATCH_SIZE, LENGTH

ROOT = Path(__file__).resolve().parents[2]
WITHIN = 0.1
MODEL = ("model=debug", "model.num_layers=4", "model.vocab_size=1024")
DENSE = (*MODEL, "sparsity=dense")
LARGER = ("model.hidden_size=384", "model.num_heads=6", "model.intermediate_size=1024", "model.num_layers=3")
"""Large enough for weights to count more than what a step does with few tokens."""


def counted(address: str, num_ranks: int, *arguments: str) -> list[dict[str, Any]]:
    """Run every rank, or one where the others are not needed; return what each has counted."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.counting", address, str(rank), str(num_ranks), *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(1 if address == "fake" else num_ranks)
    ]
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            found.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return found


def compare(found: dict[str, Any], back_end: BackEnd, num_ranks: int, precision: Precision, accumulation: int,
            overrides: tuple[str, ...]) -> None:  # fmt: skip
    architecture = compose(["~local", *overrides]).architecture
    sizes = sizes_of(
        architecture, precision=precision, batch_size=BATCH_SIZE, sequence_length=LENGTH, recompute=Recompute.none
    )
    ranks = world(num_ranks, 8)
    payload: dict[str, float] = {}
    for transfer in transfers_of(back_end, sizes, ranks, num_micro_batches=accumulation):
        name = transfer.collective.value
        payload[name] = payload.get(name, 0.0) + transfer.times * transfer.payload
    assert found["payload"] == pytest.approx(payload, rel=WITHIN)
    whole = estimate_memory(architecture, precision=precision, batch_size=BATCH_SIZE, sequence_length=LENGTH)
    memory = rank_memory(back_end, whole, sizes, ranks, num_micro_batches=accumulation).device
    for part in ("weights", "gradients", "optimizer"):
        assert found[part] == pytest.approx(getattr(memory, part), rel=WITHIN), part


@pytest.mark.parametrize("overrides", [MODEL, DENSE], ids=["experts", "dense"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("back_end", [BackEnd.ddp, BackEnd.fsdp2])
def test_two_ranks_send_what_is_predicted(
    tmp_path: Path, back_end: BackEnd, accumulation: int, overrides: tuple[str, ...]
) -> None:
    arguments = (back_end.value, "fp32", str(accumulation), *overrides)
    both = counted(f"file://{tmp_path}/meeting", 2, *arguments)
    assert both[0]["payload"] == both[1]["payload"]
    for found in both:
        compare(found, back_end, 2, Precision.fp32, accumulation, overrides)


@pytest.mark.parametrize("back_end", [BackEnd.ddp, BackEnd.fsdp2])
def test_eight_ranks_would_send_what_is_predicted(back_end: BackEnd) -> None:
    """In 16 bits, and with collectives that do nothing: one rank tells what all are asked for."""
    (found,) = counted("fake", 8, back_end.value, "bf16", "3", *MODEL)
    compare(found, back_end, 8, Precision.bf16, 3, MODEL)
    if back_end is BackEnd.fsdp2:  # four blocks and the rest, in three micro-batches
        assert found["calls"] == {"all-gather": 3 * (5 + 4), "reduce-scatter": 5}


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.mixed_bf16])
@pytest.mark.parametrize("back_end", [BackEnd.ddp, BackEnd.fsdp2])
def test_a_step_takes_the_memory_that_is_predicted(back_end: BackEnd, precision: Precision) -> None:
    """The most bytes of tensors at a time, buffers of the back end among them, on one of eight ranks."""
    overrides = (*MODEL, *LARGER)
    (found,) = counted("fake", 8, back_end.value, precision.value, "2", *overrides)
    architecture = compose(["~local", *overrides]).architecture
    shape = {"precision": precision, "batch_size": BATCH_SIZE, "sequence_length": LENGTH}
    whole = estimate_memory(architecture, on_cpu=False, **shape)
    sizes = sizes_of(architecture, recompute=Recompute.none, **shape)
    memory = rank_memory(back_end, whole, sizes, world(8, 8), num_micro_batches=2)
    assert found["peak"] == pytest.approx(memory.total, rel=WITHIN)
