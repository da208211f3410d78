"""What each back end keeps on a rank and sends in a step: closed forms, without torch.

How training state is divided is in `zero.py`, and what a collective costs in `communication.py`; here is which
collectives a back end makes, of what, how often, and which buffers it needs. Statistics of a step and the norm of the
gradient are a few numbers and are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from ava_exp.config.architecture import Architecture
from ava_exp.config.machine import Precision
from ava_exp.config.training import Recompute
from ava_exp.models.arithmetic import (
    PREDICTION_HEADS,
    count_parameters,
    num_sparse_layers,
    routed_parameters,
    visits_per_token,
)
from ava_exp.models.communication import Collective, Group, Transfer, Work, neighbours, peers
from ava_exp.models.memory import WEIGHT_BYTES, MemoryEstimate
from ava_exp.models.zero import ZeroMemory, divide, layer_parameters


class BackEnd(Enum):
    """How ranks share the work of one training."""

    single = "single"
    ddp = "ddp"
    fsdp2 = "fsdp2"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"
    zero3_offload = "zero3_offload"


STAGE_OF = {
    BackEnd.single: 0,
    BackEnd.ddp: 0,
    BackEnd.fsdp2: 3,
    BackEnd.zero1: 1,
    BackEnd.zero2: 2,
    BackEnd.zero3: 3,
    BackEnd.zero3_offload: 3,
}
"""The stage of ZeRO that says what of the training state a back end divides; `fsdp2` is [zhao2023fsdp]."""

REDUCE_BUCKET_PARAMETERS = 500_000_000
"""Gradients that DeepSpeed reduces at once: `reduce_bucket_size` where nothing is said."""
LIVE_PARAMETERS = 1_000_000_000
"""Weights that DeepSpeed keeps gathered: `stage3_max_live_parameters` where nothing is said."""
HOST_ADAM_PARAMETERS_PER_S = 4e9
"""Of one node: [ren2021zerooffload] takes 2.6 s for 10 B parameters on two processors of 24 cores."""


SUM_BYTES = 4
"""Of a gradient that DDP and FSDP2 add up over ranks: fp32, whatever the weights are (`ava_exp/parallel/`)."""
BUCKET_BYTES = 25 * 2**20
"""Of gradients that DDP adds up at once: `bucket_cap_mb` where nothing is said, unless one tensor is larger."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Sizes:
    """What back ends divide and send of a model: numbers of parameters, and bytes of each.

    `outside` is those outside of blocks, which FSDP2 gathers once for a micro-batch; `layer` those of one block.
    `weight_bytes` is also that of a gradient in the backward pass.
    `visits_bytes` is what goes to all experts in one micro-batch, of all layers, once and in one direction, and
    `num_crossings` how often it does: forth and back, in the forward and in the backward pass.
    """

    common: int
    experts: int
    outside: int
    layer: int
    layer_experts: int
    weight_bytes: int
    visits_bytes: float = 0.0
    num_crossings: int = 4
    num_sparse_layers: int = 0

    @property
    def parameters(self) -> int:
        return self.common + self.experts

    def local(self, expert_parallel: int) -> float:
        """Return the parameters of which a rank knows, before they are divided."""
        return self.common + self.experts / expert_parallel

    def local_layer(self, expert_parallel: int) -> float:
        """Return those of one block."""
        return self.layer - self.layer_experts * (1 - 1 / expert_parallel)


def sizes_of(
    architecture: Architecture, *, precision: Precision, batch_size: int, sequence_length: int, recompute: Recompute
) -> Sizes:
    """Return the sizes of this decoder. `batch_size` is the sequences of a rank's micro-batch."""
    breakdown, model = count_parameters(architecture), architecture.model
    experts, num_layers = routed_parameters(architecture), model.num_layers
    ends = sum(part.total for part in breakdown.parts if part.name in ("embedding", "head", PREDICTION_HEADS))
    weight_bytes = WEIGHT_BYTES[precision]
    visits = batch_size * sequence_length * visits_per_token(architecture, sequence_length)
    return Sizes(
        common=breakdown.total - experts,
        experts=experts,
        outside=ends + model.hidden_size,
        layer=layer_parameters(breakdown, num_layers),
        layer_experts=experts // num_layers,
        weight_bytes=weight_bytes,
        visits_bytes=visits * model.hidden_size * weight_bytes,
        num_crossings=4 if recompute is Recompute.none else 6,
        num_sparse_layers=num_sparse_layers(model, architecture.sparsity),
    )


def transfers_of(
    back_end: BackEnd, sizes: Sizes, ranks: Group, *, expert_parallel: int = 1, num_micro_batches: int = 1
) -> list[Transfer]:
    """Return what one rank sends in a step.

    With `expert_parallel` above 1 the experts are divided among that many ranks that follow one another, and the same
    experts of other such groups are trained together [rajbhandari2022deepspeed].
    """
    if expert_parallel == 1:
        return [*_of_parameters(back_end, sizes, sizes.parameters, sizes.outside, ranks, num_micro_batches)]
    same_experts, own_experts = peers(ranks, expert_parallel), sizes.experts // expert_parallel
    crossings = Transfer(
        collective=Collective.all_to_all,
        payload=sizes.visits_bytes,
        times=sizes.num_crossings * num_micro_batches,
        group=neighbours(ranks, expert_parallel),
    )
    return [
        *_of_parameters(back_end, sizes, sizes.common, sizes.outside, ranks, num_micro_batches),
        *_of_parameters(back_end, sizes, own_experts, 0, same_experts, num_micro_batches),
        crossings,
    ]


def _of_parameters(
    back_end: BackEnd, sizes: Sizes, number: int, outside: int, group: Group, num_micro_batches: int
) -> Iterator[Transfer]:
    """Yield the transfers that keep `number` parameters, `outside` of them outside of blocks, the same in a group."""

    def transfer(collective: Collective, num_bytes: int, times: int, beside: Work) -> Transfer:
        return Transfer(collective=collective, payload=num_bytes, times=times, group=group, beside=beside)

    weights = gradients = number * sizes.weight_bytes
    if back_end is BackEnd.ddp:
        yield transfer(Collective.all_reduce, number * SUM_BYTES, 1, Work.backward)
    elif back_end in (BackEnd.zero1, BackEnd.zero2):
        often = 1 if back_end is BackEnd.zero1 else num_micro_batches
        yield transfer(Collective.reduce_scatter, gradients, often, Work.backward)
        yield transfer(Collective.all_gather, weights, 1, Work.none)
    elif back_end is not BackEnd.single:
        again = weights - (outside * sizes.weight_bytes if back_end is BackEnd.fsdp2 else 0)
        yield transfer(Collective.all_gather, weights, num_micro_batches, Work.forward)
        yield transfer(Collective.all_gather, again, num_micro_batches, Work.backward)
        if back_end is BackEnd.fsdp2:
            yield transfer(Collective.reduce_scatter, number * SUM_BYTES, 1, Work.backward)
        else:
            yield transfer(Collective.reduce_scatter, gradients, num_micro_batches, Work.backward)
    if back_end is BackEnd.zero3_offload:
        yield transfer(Collective.host_copy, gradients // group.num_ranks, num_micro_batches, Work.backward)
        yield transfer(Collective.host_copy, weights // group.num_ranks, 1, Work.none)


def host_adam_seconds(back_end: BackEnd, sizes: Sizes, ranks: Group) -> float:
    """Return how long a host takes for the update of all its ranks' shares; 0 where the devices make it."""
    if back_end is not BackEnd.zero3_offload:
        return 0.0
    return sizes.parameters / ranks.num_nodes / HOST_ADAM_PARAMETERS_PER_S


@dataclass(kw_only=True, slots=True, frozen=True)
class RankMemory:
    """Bytes for one rank: of its device, of the buffers of the back end there, and of the host."""

    device: MemoryEstimate
    buffers: int
    host: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.device.total + self.buffers


def rank_memory(
    back_end: BackEnd,
    whole: MemoryEstimate,
    sizes: Sizes,
    ranks: Group,
    *,
    expert_parallel: int = 1,
    num_micro_batches: int = 1,
) -> RankMemory:
    """Divide the memory of one device that has everything, and add the buffers of the back end."""
    offload = back_end is BackEnd.zero3_offload
    stage = STAGE_OF[back_end]
    whole = _held_wide(whole, sizes.weight_bytes) if back_end is BackEnd.fsdp2 else whole
    buffers = 0.0
    if ranks.num_ranks > 1:
        buffers = _buffers(back_end, sizes, expert_parallel, accumulates=num_micro_batches > 1)

    def divided(parameters: float, num_ranks: int) -> ZeroMemory:
        part = _state(whole, parameters / sizes.parameters)
        return divide(part, stage=stage, num_devices=num_ranks, layer_weights=0, offload_optimizer=offload)

    common = divided(sizes.common, ranks.num_ranks)
    experts = divided(sizes.experts / expert_parallel, ranks.num_ranks // expert_parallel)
    device = dataclasses.replace(
        whole, **{name: getattr(common.device, name) + getattr(experts.device, name) for name in STATE}
    )
    return RankMemory(device=device, buffers=round(buffers), host=common.host + experts.host)


STATE = ("weights", "master_weights", "gradients", "optimizer")
"""Parts of the memory that do not depend on the batch."""


def _held_wide(whole: MemoryEstimate, weight_bytes: int) -> MemoryEstimate:
    """Return the memory where 16-bit copies are made of parts of the masters as they are gathered, and never kept."""
    if not whole.master_weights:
        return whole
    return dataclasses.replace(whole, weights=0, gradients=whole.gradients * SUM_BYTES // (SUM_BYTES + weight_bytes))


def _state(whole: MemoryEstimate, share: float) -> MemoryEstimate:
    """Return the state of a share of the parameters, and nothing of what belongs to a rank's own sequences."""
    state = {name: round(share * getattr(whole, name)) for name in STATE}
    return dataclasses.replace(whole, **state, activations=0, logits=0, snapshot=0, process=0)


def _buffers(back_end: BackEnd, sizes: Sizes, expert_parallel: int, *, accumulates: bool) -> float:
    """Return the bytes that a rank needs beside its share.

    DDP has its gradients in the buckets that it adds up [li2020ddp], but those that wait for a later micro-batch beside
    them; and one bucket as it is added up, where the sum is wider. FSDP2 has whole what is outside of
    blocks, weights and gradients; the weights of two blocks, where one is computed while the other arrives; and the
    gradients of a block in fp32 as they leave. While it accumulates, all gradients wait in fp32, whole. DeepSpeed has
    a bucket of gradients and, where it divides the weights, as many whole as may live.
    """
    local, layer = sizes.local(expert_parallel), sizes.local_layer(expert_parallel)
    weight = sizes.weight_bytes
    crossing = 0.0
    if expert_parallel > 1:
        crossing = 2 * sizes.visits_bytes / max(1, sizes.num_sparse_layers)
    if back_end is BackEnd.ddp:
        largest = max(BUCKET_BYTES / weight, layer, sizes.outside)
        waiting = local * weight if accumulates else 0
        return crossing + waiting + (SUM_BYTES * min(local, largest) if weight < SUM_BYTES else 0)
    bucket = min(local, REDUCE_BUCKET_PARAMETERS) * weight
    if back_end in (BackEnd.zero1, BackEnd.zero2):
        return crossing + bucket
    if back_end is BackEnd.fsdp2:
        if accumulates:
            return crossing + local * SUM_BYTES + (sizes.outside + 3 * layer) * weight
        return crossing + 2 * (sizes.outside + layer) * weight + layer * SUM_BYTES
    return crossing + min(local, max(LIVE_PARAMETERS, layer)) * weight + bucket
