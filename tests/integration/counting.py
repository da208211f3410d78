"""One step of a small model on one of several ranks, with every collective counted: a program for the tests.

    python -m tests.integration.counting ADDRESS RANK NUM_RANKS BACK_END PRECISION ACCUMULATION OVERRIDE…

An ADDRESS of `fake` needs no other rank: its collectives change nothing. Prints JSON: payload bytes by collective of
the step, how often each is called, the bytes of this rank's weights, gradients and states of Adam after it, and the
most that tensors took at a time in a step.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from ava_exp.config.compose import compose
from ava_exp.config.machine import Precision
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.optim.update import Updater
from ava_exp.parallel.ranks import Ranks
from ava_exp.parallel.sharded import FullySharded, ShardedUpdater, shard
from ava_exp.parallel.strategy import Alone, DataParallel
from ava_exp.runtime import DTYPES

BATCH_SIZE, LENGTH = 2, 32
STEP = "the step that counts"
PAYLOADS = {
    "allreduce_": ("all-reduce", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "_allgather_base_": ("all-gather", 0),
    "alltoall_base_": ("all-to-all", 0),
}
"""By operation: what it is called in the prediction, and which of its arguments is the whole tensor."""


class Counting(TorchDispatchMode):
    """Adds up what collectives are given."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name, place = PAYLOADS.get(func.__name__.partition(".")[0], (func.__name__, 0))
            tensors = args[place] if isinstance(args[place], list) else [args[place]]
            self.payload[name] += sum(tensor.nbytes for tensor in tensors)
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


class WithLoss(nn.Module):
    """The decoder and the mean of its loss, so that all of its weights are used inside of one forward pass."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids_BT: Tensor) -> Tensor:
        output = self.decoder(ids_BT)
        logits = output.hidden @ output.head.T
        return F.cross_entropy(logits.flatten(0, 1).float(), ids_BT.flatten())


def spread(module: WithLoss, back_end: str, ranks: Ranks, *, mixed: bool) -> Alone:
    """Return how the back end trains the module, as runs do it."""
    adamw, decoder = partial(torch.optim.AdamW, fused=True), module.decoder
    if back_end == "fsdp2":
        shard(decoder, torch.device("cpu"), ranks, torch.bfloat16 if mixed else None)
        parts = ShardedUpdater(decoder, adamw, weight_decay=0.0, master_weights=False, ranks=ranks)
        return FullySharded(module, parts, decoder)
    updater = Updater(decoder, adamw, weight_decay=0.0, master_weights=mixed)
    wrapped = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
    return DataParallel(wrapped, updater, ranks)


def local_bytes(tensors: Any) -> int:
    """Return the bytes of this rank's part."""
    return sum(tensor.nbytes for tensor in tensors)


def _backward(strategy: Alone, ids: Tensor) -> None:
    for number, ids_BT in enumerate(ids, start=1):
        with strategy.accumulate(is_last=number == len(ids)):
            strategy.objective(ids_BT).backward()


def main(
    address: str, rank: str, num_ranks: str, back_end: str, precision: str, accumulation: str, *overrides: str
) -> None:
    torch.set_num_threads(1)
    if address == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        distributed.init_process_group("fake", store=FakeStore(), rank=int(rank), world_size=int(num_ranks))
    else:
        distributed.init_process_group("gloo", init_method=address, rank=int(rank), world_size=int(num_ranks))
    torch.manual_seed(0)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        found = measured(int(rank), int(num_ranks), back_end, Precision(precision), int(accumulation), overrides)
    found["peak"] = most_allocated(profile)
    if address != "fake":
        distributed.barrier()
    print(json.dumps(found), flush=True)
    os._exit(0)  # gloo's threads now and then abort a process that ends in the usual way


def measured(
    rank: int, num_ranks: int, back_end: str, precision: Precision, accumulation: int, overrides: tuple[str, ...]
) -> dict[str, Any]:
    """Make two steps that do not count, and one that does."""
    decoder = build_model(compose(["~local", *overrides]).architecture)
    mixed = precision is Precision.mixed_bf16
    dtype = torch.float32 if mixed and back_end == "fsdp2" else DTYPES[precision]
    strategy = spread(WithLoss(decoder.to(dtype)), back_end, Ranks(rank=rank, num_ranks=num_ranks), mixed=mixed)
    ids = torch.randint(decoder.config.vocab_size, (accumulation, BATCH_SIZE, LENGTH))
    optimizer = strategy.updater.optimizer
    for _ in range(2):  # in its second step DDP agrees anew on its buckets
        _backward(strategy, ids)
        optimizer.step()
        optimizer.zero_grad()
    with record_function(STEP), Counting() as counting:
        _backward(strategy, ids)
    weights = list(strategy.updater.weights.values())
    gradients = local_bytes(weight.grad for weight in weights)
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    return {
        "payload": counting.payload,
        "calls": counting.calls,
        "weights": local_bytes(weights),
        "gradients": gradients,
        "optimizer": local_bytes(states),
    }


def most_allocated(profile: torch.profiler.profile) -> int:
    """Return the most bytes that tensors took at a time in the step that counts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    (started,) = [event["ts"] for event in events if event["name"] == STEP and event.get("cat") == "user_annotation"]
    later = [event for event in events if event["name"] == "[memory]" and event["ts"] >= started]
    return max(int(event["args"]["Total Allocated"]) for event in later)


if __name__ == "__main__":
    main(*sys.argv[1:])
