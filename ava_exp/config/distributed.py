"""Configuration of how several processes train one model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Backend(Enum):
    """What keeps ranks together: `single` is one process; with `ddp` every rank has a copy of the model, with `fsdp2` a
    part of it. `zero0` to `zero3` are the stages of DeepSpeed's ZeRO, which cut the optimizer's states, gradients and
    weights one after another; `zero3_offload` keeps what is cut in the host's memory.
    `auto` is `single` for one rank and `ddp` for several."""

    auto = "auto"
    single = "single"
    ddp = "ddp"
    fsdp2 = "fsdp2"
    zero0 = "zero0"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"
    zero3_offload = "zero3_offload"

    @property
    def zero_stage(self) -> int | None:
        """The stage of DeepSpeed's ZeRO; None for what is not DeepSpeed's."""
        return int(self.value[4]) if self.value.startswith("zero") else None

    @property
    def cuts_weights(self) -> bool:
        """Whether a rank has the weights of a layer only while it computes it."""
        return self is Backend.fsdp2 or self.zero_stage == 3


class GradientCompression(Enum):
    """How gradients travel from rank to rank: as they are, in 16 bits, or as products of narrow matrices."""

    none = "none"
    fp16 = "fp16"
    bf16 = "bf16"
    powersgd = "powersgd"


@dataclass(kw_only=True, slots=True)
class DistributedConfig:
    """How ranks, one process for every device, train together. How many they are is `hardware.num_devices`."""

    backend: Backend = Backend.auto
    expert_parallel: int = 1
    """How many ranks, one after the other, divide the experts of every layer among them; 1 is every rank has all."""
    timeout_s: float = 1800.0
    """How long a rank waits for the others before it gives up."""
    gradient_compression: GradientCompression = GradientCompression.none
    powersgd_rank: int = 4
    """Columns of the narrow matrices: more of them lose less."""
