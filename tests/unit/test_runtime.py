"""Devices, precision and measured rates, with devices that are not here played by stand-ins."""

from __future__ import annotations

import dataclasses
import faulthandler
import mmap
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ava_exp import runtime
from ava_exp.config.folders import option_names
from ava_exp.config.machine import DeviceType, HardwareConfig, PeakConfig, Precision, PrecisionConfig
from ava_exp.config.options import read_option
from ava_exp.errors import ConfigError
from ava_exp.runtime import open_runtime, peak_memory_bytes, reset_peak_memory


@pytest.fixture(autouse=True)
def fast_rates(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    rates = {"fp32": 0.2, "bf16": 0.8}
    monkeypatch.setattr(runtime, "measured_rates", lambda device, cache_dir: rates)
    return rates


def opened(
    tmp_path: Path, option: str = "cpu", precision: Precision = Precision.fp32, **changes: Any
) -> runtime.Runtime:
    hardware = dataclasses.replace(read_option("hardware", option, HardwareConfig), **changes)
    return open_runtime(hardware, PrecisionConfig(training=precision), batch_size=None, cache_dir=tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without an A100")
def test_hardware_that_is_not_here_is_replaced_with_one_notice(tmp_path: Path) -> None:
    found = opened(tmp_path, "a100")
    assert found.device.type == "cpu"
    assert found.resolution.batch_size == 8
    assert found.resolution.peak_tflops == 0.2
    assert len(found.notices) == 1
    assert found.notices[0].startswith("hardware=a100 is not on this machine, which has a CPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without an A100")
def test_strict_hardware_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hardware=a100 is not on this machine.*hardware\.strict=false"):
        opened(tmp_path, "a100", strict=True)


def test_the_cpu_that_is_asked_for_is_taken_without_a_word(tmp_path: Path) -> None:
    found = opened(tmp_path)
    assert found.notices == []
    assert found.resolution.device == found.resolution.hardware == "cpu"


def test_several_devices_become_one_with_a_notice(tmp_path: Path) -> None:
    found = opened(tmp_path, num_devices=8)
    assert found.hardware.num_devices == 1
    assert found.notices == ["`hardware.num_devices` is 8, but one process was started: running on one."]


def test_several_devices_are_refused_where_hardware_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`hardware\.num_devices` is 2.*Set it to 1"):
        opened(tmp_path, num_devices=2, strict=True)


@pytest.mark.parametrize(("bf16", "expected"), [(0.8, Precision.mixed_bf16), (0.21, Precision.fp32)])
def test_auto_precision_on_a_cpu_is_decided_by_the_measurement(
    tmp_path: Path, fast_rates: dict[str, float], bf16: float, expected: Precision
) -> None:
    fast_rates["bf16"] = bf16
    found = opened(tmp_path, precision=Precision.auto)
    assert found.precision is expected
    assert f"precision=auto chose {expected.value}" in found.notices[0]
    assert found.resolution.peak_tflops == (bf16 if expected is Precision.mixed_bf16 else 0.2)


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), Precision.mixed_bf16), ((7, 5), Precision.mixed_fp16)])
def test_auto_precision_on_a_gpu_follows_its_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: Precision
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert runtime._choose_precision(Precision.auto, torch.device("cuda"), {}) is expected


@pytest.mark.parametrize("precision", [Precision.fp16, Precision.mixed_fp16])
def test_fp16_on_a_cpu_is_refused(tmp_path: Path, precision: Precision) -> None:
    with pytest.raises(ConfigError, match="bf16"):
        opened(tmp_path, precision=precision)


def test_a_stored_resolution_is_reused(tmp_path: Path, fast_rates: dict[str, float]) -> None:
    first = opened(tmp_path, precision=Precision.auto)
    fast_rates["bf16"] = 0.1  # would now choose fp32
    again = open_runtime(
        read_option("hardware", "cpu", HardwareConfig),
        PrecisionConfig(training=Precision.auto),
        batch_size=None,
        cache_dir=tmp_path,
        stored=dataclasses.asdict(first.resolution),
    )
    assert again.resolution == first.resolution
    assert again.notices == []


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100-SXM4-80GB", "a100_80g"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 2080", "rtx2080"),
        ("NVIDIA GeForce RTX 2080 Ti", "rtx2080ti"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "rtx3090ti"),
        ("NVIDIA GeForce RTX 3060 Ti", "NVIDIA GeForce RTX 3060 Ti"),
        ("Quadro K620", "Quadro K620"),
        ("NVIDIA T400", "NVIDIA T400"),
    ],
)
def test_gpus_are_known_by_name(machine: str, expected: str) -> None:
    found = runtime._known_hardware(DeviceType.cuda, machine)
    assert found.name == expected
    assert (found.peak_tflops == PeakConfig()) == (expected == machine)


@pytest.mark.parametrize(
    ("chip", "expected"), [("Apple M1 Max", "m1_max"), ("Apple M2 Ultra", "m2_ultra"), ("Apple M4", "mps")]
)
def test_apple_chips_are_known_by_name(monkeypatch: pytest.MonkeyPatch, chip: str, expected: str) -> None:
    monkeypatch.setattr(runtime, "cpu_model", lambda: chip)
    asked = read_option("hardware", "m1_max", HardwareConfig)
    found, notices = runtime._match_hardware(asked, DeviceType.mps, 1)
    assert found.name == expected
    assert [f"which has an Apple GPU ({chip})" in notice for notice in notices] == [True] * (expected != "m1_max")
    generic = read_option("hardware", "mps", HardwareConfig)
    assert runtime._match_hardware(generic, DeviceType.mps, 1) == (generic, [])


def test_every_gpu_of_the_configuration_is_known() -> None:
    single = {option for option in option_names("hardware") if not re.match(r"\d+x", option)}
    assert single - {"auto", "cpu", "mps", "tpu"} == set(runtime.GPU_NAMES)


@pytest.mark.parametrize(
    ("stored", "ranks", "expected"),
    [
        ({"batch_size": 8}, 2, (4, 1)),
        ({"batch_size": 8}, 3, None),
        ({"batch_size": 4, "num_ranks": 2}, 1, (4, 2)),
        ({"batch_size": 4, "num_ranks": 2, "gradient_accumulation_steps": 3}, 4, (3, 2)),
        ({"batch_size": 2, "num_ranks": 5}, 2, (1, 5)),
    ],
)
def test_other_ranks_share_the_sequences_of_a_step(
    stored: dict[str, int], ranks: int, expected: tuple[int, int] | None
) -> None:
    resolution = runtime.Resolution(
        device="cpu", hardware="cpu", precision="fp32", batch_size=8, num_threads=1, peak_tflops=None, num_ranks=ranks
    )
    if expected is None:
        with pytest.raises(ConfigError, match="8 sequences a step, which 3 ranks cannot share evenly"):
            runtime._share_sequences(resolution, stored, 1)
        return
    runtime._share_sequences(resolution, stored, 1)
    assert (resolution.batch_size, resolution.gradient_accumulation_steps) == expected


def test_the_best_rate_that_was_ever_measured_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rates = [1.0, 3.0, 2.0, 2.0]  # a busy moment, a quiet one, two busy ones
    calls: list[tuple[torch.dtype, int]] = []

    def product(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
        calls.append((dtype, repeats))
        return rates[(len(calls) - 1) // 2]

    monkeypatch.setattr(runtime, "_matrix_product_tflops", product)
    for best in (1.0, 3.0, 3.0):
        assert runtime.measured_rates(torch.device("cpu"), tmp_path) == {"fp32": best, "bf16": best}
    assert calls[:3] == [(torch.float32, 20), (torch.bfloat16, 20), (torch.float32, 5)]
    (tmp_path / "matrix_product_rates.json").write_text("{")
    assert runtime.measured_rates(torch.device("cpu"), tmp_path) == {"fp32": 2.0, "bf16": 2.0}


def test_the_peak_of_memory_is_what_was_resident_since_it_was_reset() -> None:
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before, size = peak_memory_bytes(cpu), 2**27
    held = mmap.mmap(-1, size)  # new pages, where an allocator might give old ones
    for _ in range(size // 2**20):
        held.write(b"1" * 2**20)
    assert size * 0.9 < peak_memory_bytes(cpu) - before < size * 1.5
    held.close()
    assert peak_memory_bytes(cpu) > before + size * 0.9, "a peak stays when it is over"


def test_the_peak_of_a_gpu_is_what_torch_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
    assert peak_memory_bytes(torch.device("cuda")) == 12345


def test_a_process_that_is_watched_tells_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "beat"
    monkeypatch.setenv("AVA_EXP_HEARTBEAT", str(path))
    with runtime.heartbeat(lambda: 2.5) as beat:
        assert not path.exists(), "preparing is no step"
        beat({})
        assert path.read_text() == "2.500", "how long stopping would take"
        before = path.stat().st_mtime_ns
        time.sleep(0.02)
        beat({})
        assert path.stat().st_mtime_ns > before
    assert not path.exists(), "nor is reporting"
    assert faulthandler.unregister(signal.SIGQUIT), "it can be asked for its stacks"


def test_a_process_that_nobody_watches_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AVA_EXP_HEARTBEAT", raising=False)
    with runtime.heartbeat(lambda: 2.5) as beat:
        beat({})
    assert not faulthandler.unregister(signal.SIGQUIT)
