"""The machine a run stands on: device, precision, measured rates. The only importer of accelerate.

What is measured is measured once: `Resolution` is stored in the run folder, and a resumed run reads it back.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import json
import logging
import os
import platform
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ava_exp.config.distributed import Backend, DistributedConfig
from ava_exp.config.machine import DeviceType, HardwareConfig, Precision, PrecisionConfig
from ava_exp.config.options import read_option
from ava_exp.config.validate import precision_faults, raise_if_fatal
from ava_exp.errors import ConfigError
from ava_exp.models.decoder import Decoder
from ava_exp.optim.update import Updater
from ava_exp.parallel.compression import build_compression
from ava_exp.parallel.experts import ExpertParallel, ExpertParallelUpdater, divide_experts, leave_alone
from ava_exp.parallel.ranks import Ranks
from ava_exp.parallel.sharded import FullySharded, ShardedUpdater, shard
from ava_exp.parallel.start import find_device, make_accelerator, wrap
from ava_exp.parallel.strategy import Alone, DataParallel
from ava_exp.parallel.zero import Zero, ZeroCopies, ZeroUpdater, start_engine
from ava_exp.tracking.metadata import cpu_model

logger = logging.getLogger(__name__)

DTYPES = {
    Precision.fp32: torch.float32,
    Precision.fp16: torch.float16,
    Precision.bf16: torch.bfloat16,
    Precision.mixed_fp16: torch.float16,
    Precision.mixed_bf16: torch.bfloat16,
}
"""The format a model computes in."""

TORCH_TYPES = {DeviceType.tpu: "xla"}
"""What torch calls a kind of device where it is not what we call it."""

PROCESS_STATUS, CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")

WORTHWHILE_SPEEDUP = 1.3
"""`precision=auto` leaves fp32 on a CPU only for a measured gain of at least this much."""


@dataclass(kw_only=True, slots=True)
class Resolution:
    """What was measured or depends on the machine, resolved when the run started."""

    device: str
    hardware: str
    precision: str
    batch_size: int
    num_threads: int
    peak_tflops: float | None
    seconds_per_step: float | None = None
    num_ranks: int = 1
    gradient_accumulation_steps: int | None = None
    """What it comes to where the ranks are others than those that the run was begun with; None is as configured."""


@dataclass(kw_only=True, slots=True)
class Runtime:
    """Device and formats of this process, and sentences the user should read."""

    accelerator: Accelerator
    hardware: HardwareConfig
    precision: Precision
    resolution: Resolution
    notices: list[str]
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def mixed(self) -> bool:
        return self.precision in (Precision.mixed_bf16, Precision.mixed_fp16)

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        self.accelerator.backward(loss)

    def shard(self, model: Decoder) -> None:
        """Cut a model that was just built over the ranks, or its experts, where that was asked for."""
        if self.ranks.experts is not None:
            divide_experts(model, self.ranks)
        if self.ranks.backend is Backend.fsdp2:
            shard(model, self.device, self.ranks, self.dtype if self.mixed else None)

    def start_engine(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        """Return what DeepSpeed makes of `objective` and the optimizer of its weights."""
        return start_engine(self.ranks, objective, optimizer)

    def spread(
        self, objective: nn.Module, updater: Updater, model: Decoder, distributed: DistributedConfig | None = None
    ) -> Alone:
        """Return how the ranks train `objective`, which is of `model`, whose weights `updater` changes, together;
        `distributed` says whether their gradients are compressed."""
        if self.ranks.backend is Backend.single:
            return Alone(objective, updater)
        if isinstance(updater, ShardedUpdater):
            return FullySharded(objective, updater, model)
        if isinstance(updater, ZeroUpdater):
            return Zero(updater)
        if self.ranks.backend is Backend.zero0:
            return ZeroCopies(self.start_engine(objective, updater.optimizer), updater, self.ranks)
        if isinstance(updater, ExpertParallelUpdater):
            leave_alone(objective, updater.divided)
        wrapped = wrap(self.accelerator, objective)
        if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            raise RuntimeError(f"`distributed=ddp` was asked for, but the model became a {type(wrapped).__name__}")
        if isinstance(updater, ExpertParallelUpdater):
            return ExpertParallel(wrapped, updater, self.ranks, model)
        compression = build_compression(distributed or DistributedConfig(), updater.weights, self.ranks)
        return DataParallel(wrapped, updater, self.ranks, compression)


@contextmanager
def heartbeat(stopping_s: Callable[[], float]) -> Iterator[Callable[[object], None]]:
    """Yield what is to be called after every step, for the launcher that watches over this process, if one does.

    It writes `stopping_s()`, how long stopping would take now, into the file that `AVA_EXP_HEARTBEAT` names, which is
    gone when the steps are over. From now on SIGQUIT makes a process that is watched write the stacks of its threads to
    standard error.
    """
    path = os.environ.get("AVA_EXP_HEARTBEAT")
    if path is None:
        yield lambda record: None
        return
    faulthandler.register(signal.SIGQUIT)
    file = Path(path)

    def beat(record: object) -> None:
        file.write_text(f"{stopping_s():.3f}")

    try:
        yield beat
    finally:
        file.unlink(missing_ok=True)


def open_runtime(
    hardware: HardwareConfig,
    precision: PrecisionConfig,
    *,
    batch_size: int | None,
    cache_dir: Path,
    stored: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
    gradient_accumulation_steps: int = 1,
) -> Runtime:
    """Find the device, settle the precision and the batch size. `stored` is an earlier `Resolution` of the same run:
    where other ranks go on with it, they share the sequences of a step among them as they can.

    Raises ConfigError for strict hardware that is not here, for a precision that the device cannot use, and for ranks
    that cannot share the sequences of a step.
    """
    ranks = ranks or Ranks()
    keep_freed_memory()
    device_type = find_device(hardware)
    actual, notices = _match_hardware(hardware, device_type, ranks.num_ranks)
    known = stored if stored and stored.get("num_ranks", 1) == ranks.num_ranks else None
    _set_threads(hardware.num_threads or (known["num_threads"] if known else None), device_type, ranks)
    accelerator = make_accelerator(device_type, backend=ranks.backend)
    expected_type = TORCH_TYPES.get(device_type, device_type.value)
    assert accelerator.device.type == expected_type, f"asked for {device_type.value}, got {accelerator.device}"
    rates = _rates(accelerator.device, cache_dir, ranks) if stored is None else {}
    chosen = (
        Precision(stored["precision"]) if stored else _choose_precision(precision.training, accelerator.device, rates)
    )
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if device_type is DeviceType.cuda else None
    raise_if_fatal(precision_faults(device_type, capability, chosen))
    if precision.training is Precision.auto and stored is None:
        notices.append(_explain_choice(chosen, device_type, rates))
    resolution = Resolution(
        device=device_type.value,
        hardware=actual.name,
        precision=chosen.value,
        batch_size=stored["batch_size"] if stored else batch_size or actual.batch_size,
        num_threads=torch.get_num_threads(),
        peak_tflops=stored["peak_tflops"] if stored else _peak(actual, chosen, rates),
        seconds_per_step=stored["seconds_per_step"] if stored else None,
        num_ranks=ranks.num_ranks,
        gradient_accumulation_steps=stored.get("gradient_accumulation_steps") if stored else None,
    )
    if stored and known is None:
        _share_sequences(resolution, stored, gradient_accumulation_steps)
    return Runtime(
        accelerator=accelerator,
        hardware=actual,
        precision=chosen,
        resolution=resolution,
        notices=notices,
        ranks=ranks,
    )


def _rates(device: torch.device, cache_dir: Path, ranks: Ranks) -> dict[str, float]:
    """Return what the first rank measures while the others wait: they would disturb each other."""
    return ranks.from_first(measured_rates(device, cache_dir) if ranks.is_first else None)  # type: ignore[no-any-return]


def _set_threads(num_threads: int | None, device: DeviceType, ranks: Ranks) -> None:
    if num_threads is None and device is DeviceType.cpu and ranks.num_ranks > 1:
        num_threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", str(ranks.num_ranks))))
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def _share_sequences(resolution: Resolution, stored: dict[str, Any], configured_steps: int) -> None:
    """Let a step have the sequences that it had, whatever the number of ranks: the fewest micro-batches that are not
    larger than they were. Raises ConfigError where it cannot be."""
    steps = stored.get("gradient_accumulation_steps") or configured_steps
    num_sequences = stored["batch_size"] * steps * stored.get("num_ranks", 1)
    own, rest = divmod(num_sequences, resolution.num_ranks)
    if rest:
        raise ConfigError(
            f"this run has {num_sequences} sequences a step, which {resolution.num_ranks} ranks cannot share evenly. "
            "Go on with a number of ranks that divides them."
        )
    resolution.batch_size = max(n for n in range(1, stored["batch_size"] + 1) if own % n == 0)
    resolution.gradient_accumulation_steps = own // resolution.batch_size


def store_resolution(resolution: Resolution) -> dict[str, Any]:
    """Return plain values for `open_runtime(stored=…)`."""
    return dataclasses.asdict(resolution)


def _match_hardware(hardware: HardwareConfig, device: DeviceType, num_ranks: int) -> tuple[HardwareConfig, list[str]]:
    """Return the hardware that is really used, and a notice of each way in which it is not what was asked for."""
    actual, notices = _match_device(hardware, device)
    actual = dataclasses.replace(actual, num_devices=num_ranks)
    if hardware.num_devices == num_ranks:
        return actual, notices
    number = "one process was" if num_ranks == 1 else f"{num_ranks} processes were"
    sentence = f"`hardware.num_devices` is {hardware.num_devices}, but {number} started"
    if hardware.strict:
        raise ConfigError(f"{sentence}. Set it to {num_ranks}, or `hardware.strict=false` to run all the same.")
    return actual, [*notices, f"{sentence}: running on {'one' if num_ranks == 1 else num_ranks}."]


def _match_device(hardware: HardwareConfig, device: DeviceType) -> tuple[HardwareConfig, list[str]]:
    machine = _device_name(device)
    if hardware.device is DeviceType.auto:
        return _known_hardware(device, machine), []
    is_generic = device is DeviceType.cpu or hardware.name == device.value
    if hardware.device is device and (is_generic or _is_gpu(hardware.name, machine)):
        return hardware, []
    actual = _known_hardware(device, machine)
    sentence = f"hardware={hardware.name} is not on this machine, which has {machine}"
    if hardware.strict:
        raise ConfigError(f"{sentence}. Choose `hardware={actual.name}`, or `hardware.strict=false` to run on it.")
    return actual, [f"{sentence}: running on it, with its own batch size {actual.batch_size} and measured peak."]


GPU_NAMES = {
    "rtx2080": r"RTX 2080(?! Ti| SUPER)",
    "rtx2080ti": r"RTX 2080 Ti",
    "rtx3060": r"RTX 3060(?! Ti)",
    "rtx3090": r"RTX 3090(?! Ti)",
    "rtx3090ti": r"RTX 3090 Ti",
    "rtx4090": r"RTX 4090",
    "t4": r"\bT4\b",
    "v100": r"V100",
    "a100": r"A100(?!.*80GB)",
    "a100_80g": r"A100.*80GB",
    "h100": r"H100",
    "h200": r"H200",
    "m1_max": r"M1 Max",
    "m2_ultra": r"M2 Ultra",
}
"""What CUDA calls the devices of `conf/hardware`, and macOS its chips."""


def _is_gpu(name: str, machine: str) -> bool:
    return name in GPU_NAMES and re.search(GPU_NAMES[name], machine) is not None


def _known_hardware(device: DeviceType, machine: str) -> HardwareConfig:
    """Return what `conf/hardware` says of this device; of a GPU that it does not know, its name alone."""
    for name in GPU_NAMES:
        if device is not DeviceType.cpu and _is_gpu(name, machine):
            return read_option("hardware", name, HardwareConfig)
    if device is DeviceType.cuda:
        return HardwareConfig(name=machine, device=DeviceType.cuda)
    return read_option("hardware", device.value, HardwareConfig)


def _device_name(device: DeviceType) -> str:
    if device is DeviceType.cuda:
        return torch.cuda.get_device_name()
    if device is DeviceType.mps:
        return f"an Apple GPU ({cpu_model()})"
    if device is DeviceType.tpu:
        return "a TPU"
    return f"a CPU ({cpu_model()}, {torch.get_num_threads()} threads)"


def _choose_precision(asked: Precision, device: torch.device, rates: dict[str, float]) -> Precision:
    """Apply the detection logic of LuminaAI, except where a measurement can tell better: on a CPU."""
    if asked is not Precision.auto:
        return asked
    if device.type == "cuda":
        return Precision.mixed_bf16 if torch.cuda.get_device_capability() >= (8, 0) else Precision.mixed_fp16
    if device.type == TORCH_TYPES[DeviceType.tpu]:
        return Precision.mixed_bf16
    gain = rates["bf16"] / rates["fp32"]
    return Precision.mixed_bf16 if gain >= WORTHWHILE_SPEEDUP else Precision.fp32


def _explain_choice(chosen: Precision, device: DeviceType, rates: dict[str, float]) -> str:
    if device is DeviceType.cuda:
        return f"precision=auto chose {chosen.value} by the device's compute capability."
    if device is DeviceType.tpu:
        return f"precision=auto chose {chosen.value}: a TPU multiplies in no other format."
    return (
        f"precision=auto chose {chosen.value}: matrix products measured {rates['bf16']:.2f} TFLOP/s in bf16 "
        f"and {rates['fp32']:.2f} in fp32."
    )


def _peak(hardware: HardwareConfig, precision: Precision, rates: dict[str, float]) -> float | None:
    """Return TFLOP/s in the computing format: declared by the maker, else measured."""
    name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[DTYPES[precision]]
    declared: float | None = getattr(hardware.peak_tflops, name)
    return declared if declared is not None else rates.get(name)


def measured_rates(device: torch.device, cache_dir: Path) -> dict[str, float]:
    """Return TFLOP/s of a matrix product by format: the best that was measured here, which `cache_dir` remembers.

    The first time takes about a second. Later a few repeats tell whether that was a busy moment.
    """
    if device.type in ("cuda", TORCH_TYPES[DeviceType.tpu]):
        return {}
    key = f"{cpu_model()}|{device.type}|{torch.get_num_threads()}|{torch.__version__}"
    path = cache_dir / "matrix_product_rates.json"
    try:
        known: dict[str, dict[str, float]] = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    before = known.get(key, {})
    repeats = 5 if before else 20
    known[key] = {
        name: max(before.get(name, 0.0), _matrix_product_tflops(device, dtype, repeats=repeats))
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    if known[key] != before:
        cache_dir.mkdir(parents=True, exist_ok=True)
        path.with_suffix(f".{os.getpid()}").write_text(json.dumps(known, indent=1))
        path.with_suffix(f".{os.getpid()}").replace(path)
    return known[key]


def _matrix_product_tflops(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 20) -> float:
    """Return the best rate of (2 size, size) × (size, size): a peak is what the device can do when nothing disturbs."""
    a, b = torch.ones(2 * size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    seconds = min(times_of(lambda: a @ b, device, repeats))
    return 4 * size**3 / seconds / 1e12


def times_of(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Return the seconds of each of `repeats` runs of `work`, after one that does not count."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return taken[1:]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def keep_freed_memory() -> None:
    """Tell glibc to keep freed buffers: giving them back to the kernel at every step costs 6 to 25 % on a CPU."""
    m_trim_threshold, m_mmap_max, largest_int = -1, -4, 2**31 - 1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is not None:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, largest_int)


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_bytes` count from now on. Of a CPU's memory only Linux can forget a peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_PEAK.exists():
        CLEAR_PEAK.write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory in use at a time: what torch allocated on a GPU, else what the process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if PROCESS_STATUS.exists():
        line = next(line for line in PROCESS_STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak
