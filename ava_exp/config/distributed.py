"""Configuration of how several processes train one model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Backend(Enum):
    """What keeps ranks together: `single` is one process; with `ddp` every rank has a copy of the model, with `fsdp2` a
    part of it. `auto` is `single` for one rank and `ddp` for several."""

    auto = "auto"
    single = "single"
    ddp = "ddp"
    fsdp2 = "fsdp2"


@dataclass(kw_only=True, slots=True)
class DistributedConfig:
    """How ranks, one process for every device, train together. How many they are is `hardware.num_devices`."""

    backend: Backend = Backend.auto
    expert_parallel: int = 1
    """How many ranks, one after the other, divide the experts of every layer among them; 1 is every rank has all."""
    timeout_s: float = 1800.0
    """How long a rank waits for the others before it gives up."""
