"""`launcher=local`: one process for each device, on this machine."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

from ava_exp.config.distributed import Backend
from ava_exp.config.machine import DeviceType, HardwareConfig
from ava_exp.config.run import RunConfig
from ava_launchers.rank import Place
from ava_launchers.supervisor import Supervisor

LOOPBACK = "127.0.0.1"


class LocalLauncher:
    """Starts the same command once for each device and waits for all of them."""

    def __init__(self, *, grace_s: float, hang_timeout_s: float | None) -> None:
        self.grace_s, self.hang_timeout_s = grace_s, hang_timeout_s

    def launch(self, config: RunConfig, overrides: Sequence[str]) -> int:
        """Run the stage of `config`, which `overrides` compose, on all its devices; return the exit code.

        Where the machine does not have as many, or one process is asked for, the stage runs in this process, and its
        runtime says so or refuses.
        """
        num_ranks = config.hardware.num_devices
        is_asked_for_one = num_ranks > 1 and config.distributed.backend is Backend.single
        if is_asked_for_one or not has_devices(config.hardware):
            return int(config.stage.component()(config))
        command = [sys.executable, "-m", "ava_exp", *overrides]
        supervisor = Supervisor(
            command, places_on_this_machine(num_ranks), grace_s=self.grace_s, hang_timeout_s=self.hang_timeout_s
        )
        return supervisor.run().code


def has_devices(hardware: HardwareConfig) -> bool:
    """Whether this machine has as many devices as are asked for; a CPU runs any number of processes."""
    if hardware.num_devices == 1:
        return True  # whatever it is
    import torch

    num_gpus = torch.cuda.device_count()
    if hardware.device is DeviceType.auto:
        return num_gpus >= hardware.num_devices or (num_gpus == 0 and not torch.backends.mps.is_available())
    return hardware.device is DeviceType.cpu or num_gpus >= hardware.num_devices


def places_on_this_machine(num_ranks: int) -> list[Place]:
    """Return the places of all ranks of a run that is on one machine, with a port that is free now."""
    with socket.create_server((LOOPBACK, 0)) as server:
        port: int = server.getsockname()[1]
    return [
        Place(
            rank=rank,
            local_rank=rank,
            world_size=num_ranks,
            local_world_size=num_ranks,
            master_address=LOOPBACK,
            master_port=port,
        )
        for rank in range(num_ranks)
    ]
