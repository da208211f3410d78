"""Steps on several devices, computed by hand; and every preset on every device, up to 1,024 of them."""

from __future__ import annotations

import dataclasses
import functools
import time

import pytest

from ava_exp.config.compose import compose
from ava_exp.config.folders import option_names
from ava_exp.config.machine import LinkConfig, Precision
from ava_exp.config.run import RunConfig
from ava_exp.models.arithmetic import count_parameters, training_flops_per_token
from ava_exp.models.backends import BackEnd
from ava_exp.models.communication import Collective, Links
from ava_exp.training.scaling import (
    Assumptions,
    Prediction,
    links_of,
    planned_precision,
    predict,
    undeclared,
    widest_expert_parallel,
)

PERFECT = Assumptions(mfu=1.0, link_utilisation=1.0, overlap=1.0)
USUAL = Assumptions(mfu=0.3, link_utilisation=0.8, overlap=1.0)
HARDWARE = [name for name in option_names("hardware") if not name[0].isdigit()]
SHAPES = [name for name in option_names("hardware") if name[0].isdigit()]


@functools.cache
def composed(*overrides: str) -> RunConfig:
    return compose(["~local", *overrides])


def on(config: RunConfig, hardware: str, num_devices: int) -> RunConfig:
    found = composed(f"hardware={hardware}").hardware
    return dataclasses.replace(config, hardware=dataclasses.replace(found, num_devices=num_devices))


def test_a_step_by_hand() -> None:
    """Eight devices of 1 TFLOP/s that reach half of it and send 4 GB/s reach one of them half of that."""
    config = composed(
        *("hardware=8xh100", "hardware.peak_tflops.bf16=1", "hardware.links.within_node_gb_per_s=4"),
        *("training.batch_size=4", "data.sequence_length=100", "sparsity=dense"),
    )
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, gradient_accumulation_steps=3))
    found = predict(
        config,
        BackEnd.zero1,
        Assumptions(mfu=0.5, link_utilisation=0.5, overlap=0.0),
        precision=Precision.mixed_bf16,
    )
    compute = 3 * 400 * training_flops_per_token(config.architecture, 100) / 0.5e12
    sent = 2 * 7 / 8 * 2 * count_parameters(config.architecture).total
    assert sum(found.sent.values()) == pytest.approx(sent)
    assert found.time is not None and found.budget is not None
    assert found.time.compute == pytest.approx(compute)
    assert found.time.communication == found.time.exposed == pytest.approx(sent / 2e9)
    assert found.time.step == pytest.approx(compute + sent / 2e9)
    assert found.time.efficiency == pytest.approx(compute / (compute + sent / 2e9))
    assert found.time.tokens_per_s == pytest.approx(8 * 3 * 400 / found.time.step)
    assert found.budget.seconds / found.budget.steps == pytest.approx(found.time.step)


def test_the_format_decides_the_peak_and_the_bytes() -> None:
    config = composed("hardware=4xh100", "training.batch_size=1")
    wide, narrow = (predict(config, BackEnd.fsdp2, USUAL, precision=one) for one in (Precision.fp32, Precision.bf16))
    assert wide.time is not None and narrow.time is not None
    assert wide.time.compute / narrow.time.compute == pytest.approx(989.4 / 66.9)
    assert wide.sent[Collective.all_gather] == 2 * narrow.sent[Collective.all_gather]


def test_what_is_not_hidden_costs_efficiency() -> None:
    config = composed("model=b1", "hardware=8xh100", "training.batch_size=1", "data.sequence_length=256")
    rates = []
    for overlap in (0.0, 0.5, 1.0):
        found = predict(
            config, BackEnd.fsdp2, dataclasses.replace(USUAL, overlap=overlap), precision=Precision.mixed_bf16
        )
        assert found.time is not None
        rates.append(found.time.tokens_per_s)
    assert rates == sorted(rates) and rates[0] < rates[2]


def test_offload_waits_for_the_host() -> None:
    config = composed("model=b1", "hardware=8xh100")
    plain, offload = (
        predict(config, back_end, USUAL, precision=Precision.mixed_bf16)
        for back_end in (BackEnd.zero3, BackEnd.zero3_offload)
    )
    assert plain.time is not None and offload.time is not None
    assert plain.time.host == 0 < offload.time.host
    assert plain.memory.host == 0 < offload.memory.host
    assert offload.time.efficiency < plain.time.efficiency


def test_a_device_alone_is_efficient() -> None:
    found = predict(composed("hardware=h100"), BackEnd.single, USUAL, precision=Precision.mixed_bf16)
    assert found.sent == {} and found.memory.buffers == 0
    assert found.time is not None and found.time.efficiency == 1


def test_links_are_half_used() -> None:
    declared = LinkConfig(within_node_gb_per_s=4.0, to_host_gb_per_s=1.0)
    assert links_of(declared, 0.5) == Links(within_node=2e9, between_nodes=None, to_host=0.5e9)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("hardware=h100",), []),
        (("hardware=h100", "hardware.num_devices=1024"), []),
        (("hardware=rtx4090", "hardware.num_devices=8"), []),
        (("hardware=rtx4090", "hardware.num_devices=9"), ["hardware.links.between_nodes_gb_per_s"]),
        (
            ("hardware=cpu", "hardware.num_devices=2"),
            ["hardware.peak_tflops.bf16", "hardware.links.between_nodes_gb_per_s"],
        ),
        (
            ("hardware=auto", "hardware.num_devices=2"),
            ["hardware.peak_tflops.bf16", "hardware.links.within_node_gb_per_s"],
        ),
    ],
)
def test_what_is_missing_is_named(overrides: tuple[str, ...], expected: list[str]) -> None:
    config = composed(*overrides)
    assert undeclared(config.hardware, Precision.mixed_bf16, offload=False) == expected
    if config.hardware.num_devices > 1:
        found = predict(config, BackEnd.ddp, USUAL, precision=Precision.mixed_bf16)
        assert (found.time is None) == bool(expected)


def test_offload_takes_a_link_to_the_host() -> None:
    config = composed("hardware=4xh100", "hardware.links.to_host_gb_per_s=null")
    assert undeclared(config.hardware, Precision.bf16, offload=True) == ["hardware.links.to_host_gb_per_s"]
    found = predict(config, BackEnd.zero3_offload, USUAL, precision=Precision.bf16)
    assert found.time is None and found.budget is None


@pytest.mark.parametrize(
    ("hardware", "asked", "expected"),
    [
        ("h100", "auto", "mixed_bf16"),
        ("v100", "auto", "mixed_fp16"),
        ("t4", "bf16", "bf16"),
        ("cpu", "auto", "mixed_bf16"),
    ],
)
def test_the_format_that_is_planned_for(hardware: str, asked: str, expected: str) -> None:
    found = planned_precision(Precision(asked), composed(f"hardware={hardware}").hardware)
    assert found is Precision(expected)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("model=b1", "hardware=32xh100"), 8),
        (("model=b1", "hardware=4xh100"), 4),
        (("model=b1", "hardware=h100", "hardware.num_devices=12"), 4),
        (("model=b1", "sparsity=dense", "hardware=32xh100"), 1),
    ],
)
def test_experts_are_divided_as_far_as_they_go(overrides: tuple[str, ...], expected: int) -> None:
    assert widest_expert_parallel(composed(*overrides)) == expected


def _predictions(config: RunConfig) -> dict[tuple[BackEnd, int], Prediction]:
    precision = planned_precision(Precision.auto, config.hardware)
    return {
        (back_end, number): predict(config, back_end, USUAL, precision=precision, expert_parallel=number)
        for back_end in BackEnd
        if back_end is not BackEnd.single
        for number in {1, widest_expert_parallel(config)}
    }


@pytest.mark.parametrize("model", option_names("model"))
def test_every_preset_on_every_device_under_every_back_end(model: str) -> None:
    config = composed(f"model={model}")
    for hardware in HARDWARE:
        for num_devices in (2, 32, 1024):
            run = on(config, hardware, num_devices)
            found = _predictions(run)
            state = {end.value: found[end, 1].memory.device.total for end in BackEnd if (end, 1) in found}
            assert state["ddp"] > state["zero1"] > state["zero2"] > state["zero3"] >= state["fsdp2"]
            declared = not undeclared(run.hardware, planned_precision(Precision.auto, run.hardware), offload=True)
            for prediction in found.values():
                assert all(size > 0 for size in prediction.sent.values()) and prediction.sent
                assert prediction.memory.buffers > 0
                if declared:
                    assert prediction.time is not None and prediction.budget is not None
                    assert 0 < prediction.time.efficiency <= 1
                    assert 0 <= prediction.time.exposed <= prediction.time.communication


def test_a_prediction_takes_no_time() -> None:
    config = composed("model=b300", "hardware=32xh200")
    started = time.perf_counter()
    _predictions(config)
    assert time.perf_counter() - started < 1.0, "about 5 ms where nothing else runs"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_so_many_of_its_device(shape: str) -> None:
    number, _, kind = shape.partition("x")
    assert composed(f"hardware={shape}").hardware == on(composed(), kind, int(number)).hardware


def test_shapes_are_complete() -> None:
    kinds = {shape.partition("x")[2] for shape in SHAPES}
    assert set(SHAPES) == {f"{number}x{kind}" for kind in kinds for number in (4, 8, 16, 32)}
    assert {"a100_80g", "h100", "h200"} <= kinds


@pytest.mark.parametrize("hardware", HARDWARE)
def test_every_gpu_of_a_machine_declares_its_links(hardware: str) -> None:
    found = composed(f"hardware={hardware}").hardware
    if found.device.value == "cuda":
        assert found.links.within_node_gb_per_s and found.links.to_host_gb_per_s
        assert found.bandwidth_gb_per_s is not None
        assert found.links.to_host_gb_per_s <= found.links.within_node_gb_per_s < found.bandwidth_gb_per_s
