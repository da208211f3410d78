"""Configuration of hardware, precision and trackers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from ava_exp.config.base import ComponentConfig


class DeviceType(Enum):
    """A kind of device; `auto` takes the best one present."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"
    tpu = "tpu"


@dataclass(kw_only=True, slots=True)
class PeakConfig:
    """Peak dense matrix-product rate in TFLOP/s by dtype, as the maker declares it; null where there is none."""

    fp32: float | None = None
    tf32: float | None = None
    fp16: float | None = None
    bf16: float | None = None
    fp8: float | None = None


@dataclass(kw_only=True, slots=True)
class LinkConfig:
    """How devices reach one another and their host: GB/s of one device in one direction; null where no maker says.

    Data sheets give both directions together, so half of theirs: NVLink and PCIe of [nvidia2017volta],
    [nvidia2018turing], [nvidia2020ampere], [nvidia2021ga102], [nvidia2022hopper], [nvidia2022ada], [nvidia2023h200].
    Between nodes it is the network of the maker's own system of eight devices, divided by eight. Devices without NVLink
    between all of a node reach their peers over PCIe, whatever bridges pairs of them may have. A TPU reaches all others
    over its six links [jouppi2023tpuv4].
    """

    devices_per_node: int = 8
    within_node_gb_per_s: float | None = None
    between_nodes_gb_per_s: float | None = None
    to_host_gb_per_s: float | None = None


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """A kind of device, what one of them is capable of, and how many there are.

    On a machine that lacks it, the run uses what is there, with that device's own batch size and peak, and says so;
    `strict` makes it an error.
    """

    name: str = "auto"
    device: DeviceType = DeviceType.auto
    memory_gib: float | None = None
    bandwidth_gb_per_s: float | None = None
    peak_tflops: PeakConfig = field(default_factory=PeakConfig)
    links: LinkConfig = field(default_factory=LinkConfig)
    compute_capability: str | None = None
    num_devices: int = 1
    price_per_hour: float | None = None
    """What one device costs, in any currency."""
    batch_size: int = 8
    """Sequences per micro-batch where `training.batch_size` is null."""
    num_threads: int | None = None
    """CPU threads; null leaves torch's choice."""
    strict: bool = False


class Precision(Enum):
    """`bf16` and `fp16` hold weights in 16 bits; `mixed_*` compute in 16 bits and update fp32 master weights.

    Optimizer states are fp32, except with `bf16`, where they are bf16.
    """

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    mixed_fp16 = "mixed_fp16"
    mixed_bf16 = "mixed_bf16"


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """Numeric formats and, for fp16, the dynamic loss scale."""

    training: Precision = Precision.auto
    inference: Precision | None = None
    """Format of evaluation and generation; null takes the training format."""
    init_scale: float = 65_536.0
    scale_factor: float = 2.0
    scale_window: int = 2000
    min_scale: float = 1.0
    stochastic_rounding: bool = False
    """Of weights and optimizer states with `bf16`: updates too small for them are not lost on average."""


@dataclass(kw_only=True, slots=True)
class TrackerConfig(ComponentConfig):
    """Base of every experiment tracker; the metrics file of the run is always written."""


@dataclass(kw_only=True, slots=True)
class NoTrackerConfig(TrackerConfig):
    builds: ClassVar[str] = "ava_exp.tracking.trackers:NoTracker"


@dataclass(kw_only=True, slots=True)
class MLflowConfig(TrackerConfig):
    """MLflow; `uri` null is a SQLite database in the output folder."""

    builds: ClassVar[str] = "ava_exp.tracking.mlflow_tracker:MLflowTracker"

    uri: str | None = None
    experiment_name: str = "ava_exp"
    tags: dict[str, str] = field(default_factory=dict)
