"""A TPU is chosen through Accelerate, or refused by name; its libraries are played by stand-ins."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ava_exp import runtime
from ava_exp.config.compose import compose
from ava_exp.config.machine import DeviceType, HardwareConfig, Precision, PrecisionConfig
from ava_exp.config.options import read_option
from ava_exp.config.validate import Severity, validate
from ava_exp.errors import ConfigError
from ava_exp.parallel import start


def with_xla(monkeypatch: pytest.MonkeyPatch, *, installed: bool, has_tpu: bool) -> None:
    """Let torch_xla seem to be here, and Accelerate give its device, as it does where it is."""

    def is_available(check_is_tpu: bool = False) -> bool:
        return has_tpu if check_is_tpu else installed

    def accelerator(**kwargs: Any) -> Any:
        assert kwargs.get("cpu") is not has_tpu
        return SimpleNamespace(device=torch.device("xla" if has_tpu else "cpu"))

    monkeypatch.setattr(start, "is_torch_xla_available", is_available)
    monkeypatch.setattr(start, "Accelerator", accelerator)


def opened(tmp_path: Path, option: str, precision: Precision = Precision.auto) -> runtime.Runtime:
    return runtime.open_runtime(
        read_option("hardware", option, HardwareConfig),
        PrecisionConfig(training=precision),
        batch_size=None,
        cache_dir=tmp_path,
    )


def test_without_its_library_it_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_xla(monkeypatch, installed=False, has_tpu=False)
    with pytest.raises(ConfigError, match=r"hardware=tpu needs torch_xla, which is not installed here: install"):
        opened(tmp_path, "tpu")


@pytest.mark.parametrize("option", ["tpu", "auto"])
def test_where_it_is_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    with_xla(monkeypatch, installed=True, has_tpu=True)
    found = opened(tmp_path, option)
    assert (found.resolution.device, found.resolution.hardware) == ("tpu", "tpu")
    assert found.precision is Precision.mixed_bf16
    assert (found.resolution.batch_size, found.resolution.peak_tflops) == (32, 275.0)
    assert found.notices == ["precision=auto chose mixed_bf16: a TPU multiplies in no other format."]


def test_a_library_without_a_tpu_runs_on_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_xla(monkeypatch, installed=True, has_tpu=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "measured_rates", lambda device, cache_dir: {"fp32": 0.2, "bf16": 0.8})
    found = opened(tmp_path, "tpu", Precision.fp32)
    assert found.resolution.device == "cpu"
    assert found.notices[0].startswith("hardware=tpu is not on this machine, which has a CPU")


def test_another_device_that_is_asked_for_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_xla(monkeypatch, installed=True, has_tpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = opened(tmp_path, "h100")
    assert found.resolution.device == "tpu"
    assert found.notices[0].startswith("hardware=h100 is not on this machine, which has a TPU")


@pytest.mark.parametrize("precision", ["fp16", "mixed_fp16"])
def test_formats_that_it_has_not_are_refused(precision: str) -> None:
    faults = validate(compose(["~local", "hardware=tpu", f"precision={precision}"]))
    assert [fault.key for fault in faults if fault.severity is Severity.error] == ["precision.training"]


def test_its_rates_are_declared_and_not_measured(tmp_path: Path) -> None:
    assert runtime.measured_rates(torch.device("xla"), tmp_path) == {}
    assert runtime.TORCH_TYPES[DeviceType.tpu] == "xla"
