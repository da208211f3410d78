"""What DeepSpeed is told, and where it is not asked."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ava_exp.config.distributed import Backend, DistributedConfig
from ava_exp.config.machine import DeviceType
from ava_exp.errors import ConfigError
from ava_exp.parallel import zero

STAGES = {Backend.zero0: 0, Backend.zero1: 1, Backend.zero2: 2, Backend.zero3: 3, Backend.zero3_offload: 3}


def test_every_back_end_has_its_stage() -> None:
    assert {backend: backend.zero_stage for backend in Backend if backend.zero_stage is not None} == STAGES
    assert {backend for backend in Backend if backend.cuts_weights} == {
        Backend.fsdp2,
        Backend.zero3,
        Backend.zero3_offload,
    }


@pytest.mark.parametrize("backend", STAGES)
def test_gradients_are_added_up_in_fp32_and_nothing_is_compiled(backend: Backend) -> None:
    told = zero.settings(DistributedConfig(backend=backend))
    assert told["zero_optimization"]["stage"] == STAGES[backend]
    assert told["communication_data_type"] == told["data_types"]["grad_accum_dtype"] == "fp32"
    assert told["zero_force_ds_cpu_optimizer"] is False, "its own Adam for a CPU would be compiled"
    is_offloaded = {"offload_param", "offload_optimizer"} <= told["zero_optimization"].keys()
    assert is_offloaded == (backend is Backend.zero3_offload)


def test_a_machine_without_deepspeed_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"`distributed=zero2` needs DeepSpeed: `pip install 'ava_exp\[deepspeed\]'`"):
        zero.require(DistributedConfig(backend=Backend.zero2), DeviceType.cpu)


@pytest.mark.parametrize("device", [DeviceType.mps, DeviceType.tpu])
def test_a_device_that_deepspeed_does_not_know_is_refused(device: DeviceType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="`distributed=zero3` needs a CPU or CUDA"):
        zero.require(DistributedConfig(backend=Backend.zero3), device)


def test_nobody_else_pays_for_its_import() -> None:
    code = "import sys, ava_exp.stages.pretrain; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
