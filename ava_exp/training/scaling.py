"""What a run on several devices needs, sends and takes under each back end, from declared peaks and bandwidths.

`docs/scaling.md` has the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ava_exp.config.machine import DeviceType, HardwareConfig, LinkConfig, Precision
from ava_exp.config.model import MoEConfig
from ava_exp.config.run import RunConfig
from ava_exp.models.arithmetic import count_parameters, training_flops_per_token
from ava_exp.models.backends import BackEnd, RankMemory, Sizes, host_adam_seconds, rank_memory, sizes_of, transfers_of
from ava_exp.models.communication import (
    Collective,
    CommunicationTime,
    Links,
    communication_time,
    sent_by_collective,
    world,
)
from ava_exp.models.memory import MemoryEstimate, estimate_memory
from ava_exp.training.forecast import Forecast, forecast

GB, GIB = 1e9, 2**30
MOST_DEVICES = 1024
"""As far as predictions are meant to go; `hardware.num_devices` may be more."""
NATIVE_BF16 = 8.0
"""Compute capability from which a CUDA device multiplies bf16; before it, `precision=auto` takes fp16."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Assumptions:
    """Shares, above 0 and at most 1: of the peak that computing reaches, of the declared bandwidths that communication
    reaches, and of the computing beside it that hides it (0 or more)."""

    mfu: float
    link_utilisation: float
    overlap: float


@dataclass(kw_only=True, slots=True, frozen=True)
class StepTime:
    """Seconds of a step, and the rate that they come to. `exposed` is the communication that computing does not hide,
    `host` the update where the host makes it."""

    compute: float
    communication: float
    exposed: float
    host: float
    tokens_per_s: float

    @property
    def step(self) -> float:
        return self.compute + self.exposed + self.host

    @property
    def efficiency(self) -> float:
        """Against as many devices that each work alone and wait for nobody."""
        return self.compute / self.step


@dataclass(kw_only=True, slots=True, frozen=True)
class Prediction:
    """One run under one back end. `sent` is the bytes that a rank sends in a step. `time` is None where a peak or a
    bandwidth that it needs is not declared, `budget` also where only the data tells how long it is."""

    back_end: BackEnd
    memory: RankMemory
    sent: dict[Collective, float]
    time: StepTime | None
    budget: Forecast | None


def predict(
    config: RunConfig, back_end: BackEnd, assumptions: Assumptions, *, precision: Precision, expert_parallel: int = 1
) -> Prediction:
    """Predict this run, on all of its devices. `expert_parallel` ranks divide the experts among them."""
    hardware = config.hardware
    assert hardware.num_devices % expert_parallel == 0 and (hardware.num_devices == 1 or back_end is not BackEnd.single)
    ranks = world(hardware.num_devices, hardware.links.devices_per_node)
    sizes, whole = _sizes(config, precision), _memory_of_one(config, precision)
    num_micro_batches = config.training.gradient_accumulation_steps
    transfers = transfers_of(
        back_end,
        sizes,
        ranks,
        expert_parallel=expert_parallel,
        num_micro_batches=num_micro_batches,
    )
    micro_batch = micro_batch_seconds(config, precision, assumptions.mfu)
    time = None
    if micro_batch is not None:
        communication = communication_time(
            transfers,
            links_of(hardware.links, assumptions.link_utilisation),
            micro_batch_seconds=micro_batch,
            overlap=assumptions.overlap,
        )
        if communication is not None:
            host = host_adam_seconds(back_end, sizes, ranks)
            time = _step_time(config, micro_batch, communication, host)
    budget = None if time is None else forecast(config, count_parameters(config.architecture), time.tokens_per_s)
    return Prediction(
        back_end=back_end,
        memory=rank_memory(
            back_end,
            whole,
            sizes,
            ranks,
            expert_parallel=expert_parallel,
            num_micro_batches=num_micro_batches,
        ),
        sent=sent_by_collective(transfers),
        time=time,
        budget=budget,
    )


def fewest_devices(
    config: RunConfig, back_end: BackEnd, *, precision: Precision, expert_parallel: int = 1
) -> int | None:
    """Return how many of these devices hold the run: `expert_parallel` of them or 2, 4, 8 … times as many.

    None where `MOST_DEVICES` do not, or the memory of one is not declared.
    """
    hardware, number = config.hardware, expert_parallel
    sizes, whole = _sizes(config, precision), _memory_of_one(config, precision)
    while hardware.memory_gib is not None and number <= MOST_DEVICES:
        ranks = world(number, hardware.links.devices_per_node)
        memory = rank_memory(
            back_end,
            whole,
            sizes,
            ranks,
            expert_parallel=expert_parallel,
            num_micro_batches=config.training.gradient_accumulation_steps,
        )
        if memory.total <= hardware.memory_gib * GIB:
            return number
        number *= 2
    return None


def _sizes(config: RunConfig, precision: Precision) -> Sizes:
    return sizes_of(
        config.architecture,
        precision=precision,
        batch_size=config.training.batch_size or config.hardware.batch_size,
        sequence_length=config.data.sequence_length,
        recompute=config.training.recompute,
    )


def _memory_of_one(config: RunConfig, precision: Precision) -> MemoryEstimate:
    return estimate_memory(
        config.architecture,
        precision=precision,
        batch_size=config.training.batch_size or config.hardware.batch_size,
        sequence_length=config.data.sequence_length,
        recompute=config.training.recompute,
        on_cpu=config.hardware.device in (DeviceType.auto, DeviceType.cpu),
    )


def micro_batch_seconds(config: RunConfig, precision: Precision, mfu: float) -> float | None:
    """Return how long one device computes for one micro-batch; None where it declares no peak in that format."""
    peak: float | None = getattr(config.hardware.peak_tflops, _peak_name(precision))
    if peak is None:
        return None
    tokens = (config.training.batch_size or config.hardware.batch_size) * config.data.sequence_length
    flops = tokens * training_flops_per_token(config.architecture, config.data.sequence_length)
    return flops / (mfu * peak * 1e12)


def _step_time(config: RunConfig, micro_batch: float, communication: CommunicationTime, host: float) -> StepTime:
    num_micro_batches = config.training.gradient_accumulation_steps
    sequences = (config.training.batch_size or config.hardware.batch_size) * config.hardware.num_devices
    tokens = sequences * num_micro_batches * config.data.sequence_length
    compute = num_micro_batches * micro_batch
    return StepTime(
        compute=compute,
        communication=communication.total,
        exposed=communication.exposed,
        host=host,
        tokens_per_s=tokens / (compute + communication.exposed + host),
    )


def links_of(links: LinkConfig, utilisation: float) -> Links:
    """Return the bytes per second that are reached of the declared bandwidths."""
    within, between, host = (
        None if declared is None else utilisation * declared * GB
        for declared in (links.within_node_gb_per_s, links.between_nodes_gb_per_s, links.to_host_gb_per_s)
    )
    return Links(within_node=within, between_nodes=between, to_host=host)


def undeclared(hardware: HardwareConfig, precision: Precision, *, offload: bool) -> list[str]:
    """Return the keys without which some back end has no time on this hardware; `offload` is one of them."""
    links, ranks = hardware.links, world(hardware.num_devices, hardware.links.devices_per_node)
    needed = {
        f"hardware.peak_tflops.{_peak_name(precision)}": getattr(hardware.peak_tflops, _peak_name(precision)),
        "hardware.links.within_node_gb_per_s": links.within_node_gb_per_s or ranks.per_node == 1,
        "hardware.links.between_nodes_gb_per_s": links.between_nodes_gb_per_s or ranks.num_nodes == 1,
        "hardware.links.to_host_gb_per_s": links.to_host_gb_per_s or not offload,
    }
    return [key for key, value in needed.items() if not value]


def _peak_name(precision: Precision) -> str:
    return precision.value.removeprefix("mixed_")


def planned_precision(precision: Precision, hardware: HardwareConfig) -> Precision:
    """Return the format to plan for: the one that is asked for, or that `auto` takes on such a device.

    What `auto` takes on a CPU or an Apple GPU is measured when a run starts; here it is mixed bf16.
    """
    if precision is not Precision.auto:
        return precision
    capability = hardware.compute_capability
    old = hardware.device is DeviceType.cuda and capability is not None and float(capability) < NATIVE_BF16
    return Precision.mixed_fp16 if old else Precision.mixed_bf16


def widest_expert_parallel(config: RunConfig) -> int:
    """Return the most ranks that experts can be divided among evenly; 1 for a model without experts."""
    if not isinstance(config.sparsity, MoEConfig):
        return 1
    return math.gcd(config.sparsity.num_experts, config.hardware.num_devices)
