"""How a process meets the others of its run, through Accelerate, and whether what came of it is what was asked for."""

from __future__ import annotations

import os
import socket
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    is_torch_xla_available,
)
from torch import nn

from ava_exp.config.distributed import Backend, DistributedConfig, GradientCompression
from ava_exp.config.machine import DeviceType, HardwareConfig
from ava_exp.errors import ConfigError, must_be
from ava_exp.parallel import zero
from ava_exp.parallel.ranks import Ranks

ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
"""What torchrun would say to the only process of a run."""


def join_ranks(distributed: DistributedConfig, hardware: HardwareConfig) -> Ranks:
    """Meet the other processes of the run, if the environment says that there are any; torchrun's variables do.

    Raises ConfigError for a back end that does not go with their number or with the device.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    backend = distributed.backend
    if num_ranks % distributed.expert_parallel:
        divisor = f"a divisor of the number of ranks ({num_ranks})"
        raise ConfigError(must_be("distributed.expert_parallel", divisor, distributed.expert_parallel))
    if num_ranks > 1 and backend is Backend.single:
        sentence = f"`distributed=single` is one process, but {num_ranks} were started"
        raise ConfigError(f"{sentence}. Choose `distributed=ddp`.")
    if num_ranks == 1 and backend in (Backend.auto, Backend.single):
        compression = distributed.gradient_compression
        if compression is not GradientCompression.none:
            mend = "Ask for more ranks, or for `distributed=ddp` with one."
            raise ConfigError(must_be("distributed.gradient_compression", "`none` alone", compression.value, mend))
        return Ranks()
    if "RANK" not in os.environ:
        os.environ.update(ONE_RANK, MASTER_PORT=str(_free_port()))
    backend = Backend.ddp if backend is Backend.auto else backend
    accelerator = make_accelerator(find_device(hardware), distributed, backend)
    expected = {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if backend.zero_stage is not None:
        expected = {DistributedType.DEEPSPEED}
    if accelerator.num_processes != num_ranks or accelerator.distributed_type not in expected:
        raise RuntimeError(
            f"asked for {num_ranks} ranks, got {accelerator.num_processes} of type {accelerator.distributed_type}"
        )
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=distributed.timeout_s))
    ranks = Ranks(rank=accelerator.process_index, num_ranks=num_ranks, backend=backend, control=control)
    probe = zero.probe if backend.zero_stage is not None else _probe_synchronisation
    probe(accelerator, ranks)
    if distributed.expert_parallel > 1:
        return ranks.sharing_experts(distributed.expert_parallel, timedelta(seconds=distributed.timeout_s))
    return ranks


def leave_ranks(ranks: Ranks) -> None:
    """Say good-bye to the other processes; without it they may be gone in the middle of a message."""
    if ranks.backend is not Backend.single:
        ranks.wait()
        Accelerator().end_training()


def make_accelerator(
    device: DeviceType, distributed: DistributedConfig | None = None, backend: Backend = Backend.single
) -> Accelerator:
    """Return what Accelerate makes of the device and, the first time, of the other processes."""
    if backend.zero_stage is not None:
        return Accelerator() if distributed is None else _accelerator_with_deepspeed(device, distributed)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # an earlier run of this process may have had it
    handlers: list[Any] = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
    if distributed is not None:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(seconds=distributed.timeout_s)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*OMP_NUM_THREADS.*")  # `_set_threads` decides
        return Accelerator(cpu=device is DeviceType.cpu, kwargs_handlers=handlers)


class _Plugin(DeepSpeedPlugin):  # type: ignore[misc]
    def set_deepspeed_weakref(self) -> None:
        """Leave transformers alone, which would be imported to be told that its models are cut: none is made here."""


def _accelerator_with_deepspeed(device: DeviceType, distributed: DistributedConfig) -> Accelerator:
    zero.require(distributed, device)
    if device is DeviceType.cpu:
        if torch.cuda.is_available():
            sentence = "DeepSpeed takes the GPU wherever there is one, but `hardware` is a CPU"
            raise ConfigError(f"{sentence}. Hide the GPUs (`CUDA_VISIBLE_DEVICES=`), or choose `distributed=ddp`.")
        os.environ["DS_ACCELERATOR"] = "cpu"
    zero.load(device)
    plugin = _Plugin(hf_ds_config=zero.settings(distributed), zero3_init_flag=False)
    backend = "gloo" if device is DeviceType.cpu else None
    group = InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=distributed.timeout_s))
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[group])  # `cpu=True` would drop DeepSpeed silently


def find_device(hardware: HardwareConfig) -> DeviceType:
    """Return the kind of device that is asked for, else what is here. Raises ConfigError where a TPU has no library."""
    if hardware.device is DeviceType.tpu and not is_torch_xla_available():
        raise ConfigError(
            f"hardware={hardware.name} needs torch_xla, which is not installed here: install the version of it that "
            "belongs to this torch, on a machine with a TPU, or choose another `hardware`."
        )
    present = {
        DeviceType.tpu: is_torch_xla_available(check_is_tpu=True),  # first: where it is, Accelerate takes it
        DeviceType.cuda: torch.cuda.is_available(),
        DeviceType.mps: torch.backends.mps.is_available(),
        DeviceType.cpu: True,
    }
    if hardware.device is not DeviceType.auto and present[hardware.device]:
        return hardware.device
    return next(device for device, here in present.items() if here)


def wrap(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Return what Accelerate makes of a module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a keyword that Accelerate hands on
        wrapped: nn.Module = accelerator.prepare_model(module)
    accelerator.free_memory()  # or it holds on to every model that it ever wrapped
    return wrapped


def _probe_synchronisation(accelerator: Accelerator, ranks: Ranks) -> None:
    """Raise RuntimeError unless gradients really come together: libraries drop that without a word."""
    probe = wrap(accelerator, nn.Linear(1, 1, bias=False).to(accelerator.device))
    probe(torch.full((1, 1), float(ranks.rank), device=accelerator.device)).sum().backward()
    expected = (ranks.num_ranks - 1) / 2
    (gradient,) = (parameter.grad for parameter in probe.parameters())
    if gradient is None or abs(gradient.item() - expected) > 1e-6:
        raise RuntimeError(f"gradients are not averaged over the ranks: {gradient} instead of {expected}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port
