"""One step of a small model on one of several ranks, with every collective counted: a program for the tests.

    python -m tests.integration.counting ADDRESS RANK NUM_RANKS BACK_END FORMAT ACCUMULATION OVERRIDE…

An ADDRESS of `fake` needs no other rank: its collectives change nothing. Prints JSON: payload bytes by collective of
the step, how often each is called, and the bytes of this rank's weights, gradients and states of Adam after it.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from ava_exp.config.compose import compose
from ava_exp.models.decoder import Decoder, build_model
from ava_exp.optim.update import Updater
from ava_exp.parallel.ranks import Ranks
from ava_exp.parallel.strategy import Alone, DataParallel

BATCH_SIZE, LENGTH = 2, 32
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


def spread(module: WithLoss, back_end: str, ranks: Ranks) -> Alone:
    """Return how the back end trains the module: `ddp` as runs do it, `fsdp2` as torch has it."""
    if back_end == "fsdp2":
        for block in module.decoder.blocks:
            fully_shard(block)
        fully_shard(module)
    updater = Updater(module.decoder, torch.optim.AdamW, weight_decay=0.0, master_weights=False)
    if back_end == "fsdp2":
        return Alone(module, updater)
    wrapped = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
    return DataParallel(wrapped, updater, ranks)


def local_bytes(tensors: Any) -> int:
    """Return the bytes of this rank's part."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(part.nbytes for part in parts)


def main(
    address: str, rank: str, num_ranks: str, back_end: str, dtype: str, accumulation: str, *overrides: str
) -> None:
    torch.set_num_threads(1)
    if address == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        distributed.init_process_group("fake", store=FakeStore(), rank=int(rank), world_size=int(num_ranks))
    else:
        distributed.init_process_group("gloo", init_method=address, rank=int(rank), world_size=int(num_ranks))
    torch.manual_seed(0)
    decoder = build_model(compose(["~local", *overrides]).architecture)
    ranks = Ranks(rank=int(rank), num_ranks=int(num_ranks))
    strategy = spread(WithLoss(decoder.to(getattr(torch, dtype))), back_end, ranks)
    ids = torch.randint(decoder.config.vocab_size, (int(accumulation), BATCH_SIZE, LENGTH))
    counting = Counting()
    with counting:
        for number, ids_BT in enumerate(ids, start=1):
            with strategy.accumulate(is_last=number == len(ids)):
                strategy.objective(ids_BT).backward()
    parameters = list(decoder.parameters())
    gradients = local_bytes(parameter.grad for parameter in parameters)
    optimizer = strategy.updater.optimizer
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    found = {
        "payload": counting.payload,
        "calls": counting.calls,
        "weights": local_bytes(parameters),
        "gradients": gradients,
        "optimizer": local_bytes(states),
    }
    if address != "fake":
        distributed.barrier()
    print(json.dumps(found), flush=True)
    os._exit(0)  # gloo's threads now and then abort a process that ends in the usual way


if __name__ == "__main__":
    main(*sys.argv[1:])
