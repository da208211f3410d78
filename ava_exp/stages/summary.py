"""What a run's `summary.json` says of it when it ends."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from ava_exp.config.distributed import Backend
from ava_exp.config.run import RunConfig
from ava_exp.data.prepare import PreparedData
from ava_exp.models.backends import BackEnd, rank_memory, sizes_of
from ava_exp.models.communication import world
from ava_exp.models.memory import estimate_memory
from ava_exp.models.surgery import Parameters
from ava_exp.runtime import Runtime
from ava_exp.stages.assembly import accumulation_steps
from ava_exp.tracking.folder import RunFolder
from ava_exp.tracking.metrics import of_kind, read_metrics
from ava_exp.tracking.trackers import RunStatus
from ava_exp.training.state import TrainState

FINAL = ("loss", "perplexity", "noncausal_loss", "noncausal_perplexity", "bits_per_byte", "token_accuracy")
PLANNED_AS = {Backend.zero0: BackEnd.ddp}
"""Back ends that are planned as others are: with copies of everything."""


def write_summary(
    folder: RunFolder,
    config: RunConfig,
    status: RunStatus,
    runtime: Runtime,
    data: PreparedData,
    state: TrainState,
    parameters: Parameters,
    peak_bytes: int,
) -> None:
    """Write it. `peak_bytes` is the most memory that training took."""
    records = read_metrics(folder.metrics)
    evaluations, steps = of_kind(records, "eval"), of_kind(records, "train")
    names = [name for name in FINAL if evaluations and name in evaluations[-1]]
    summary = {
        "status": status.value,
        "final": {name: evaluations[-1][name] for name in names} if evaluations else None,
        "baselines": {"gzip": data.baselines.gzip_bits_per_byte, "xz": data.baselines.xz_bits_per_byte},
        "parameters": dataclasses.asdict(parameters),
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": state.elapsed_s,
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in steps) if steps else None,
        "mfu": statistics.median(r["mfu"] for r in steps) if steps and steps[-1]["mfu"] else None,
        "memory": {"predicted_bytes": predicted_bytes(config, runtime), "peak_bytes": peak_bytes},
        **_described(data),
        "runtime": dataclasses.asdict(runtime.resolution),
    }
    folder.write_json("summary.json", summary)


def _described(data: PreparedData) -> dict[str, Any]:
    known = data.statistics
    return {
        "data": {
            "train_documents": known.train.num_documents,
            "validation_documents": known.validation.num_documents,
            "train_tokens": known.train.num_tokens,
            "validation_tokens": known.validation.num_tokens,
            "fingerprint": data.fingerprint,
        },
        "tokenizer": {
            "vocab_size": data.tokenizer.vocab_size,
            "bytes_per_token": known.validation.bytes_per_token,
            "fingerprint": data.tokenizer.fingerprint,
        },
    }


def predicted_bytes(config: RunConfig, runtime: Runtime) -> int:
    """Return what training was expected to take on this rank's device; on a CPU the host's memory is the same."""
    ranks, on_cpu = runtime.ranks, runtime.device.type == "cpu"
    shape: dict[str, Any] = {
        "precision": runtime.precision,
        "batch_size": runtime.resolution.batch_size,
        "sequence_length": config.data.sequence_length,
        "recompute": config.training.recompute,
    }
    whole = estimate_memory(config.architecture, **shape, on_cpu=on_cpu)
    if ranks.num_ranks == 1:
        return whole.total
    memory = rank_memory(
        PLANNED_AS.get(ranks.backend) or BackEnd(ranks.backend.value),
        whole,
        sizes_of(config.architecture, **shape),
        world(ranks.num_ranks, config.hardware.links.devices_per_node),
        expert_parallel=config.distributed.expert_parallel,
        num_micro_batches=accumulation_steps(config, dataclasses.asdict(runtime.resolution)),
    )
    return memory.total + (memory.host if on_cpu else 0)
