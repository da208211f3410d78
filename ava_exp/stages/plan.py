"""Parameters, FLOPs, memory, time and cost of a run, before it is run.

Imports no torch: the largest preset plans in an instant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from rich.console import Console
from rich.table import Table

from ava_exp.config.machine import DeviceType, HardwareConfig, Precision
from ava_exp.config.run import RunConfig
from ava_exp.config.stage import PlanConfig
from ava_exp.errors import EXIT_OK
from ava_exp.models.arithmetic import (
    ParameterBreakdown,
    count_parameters,
    forward_flops_per_token,
    training_flops_per_token,
)
from ava_exp.models.backends import STATE
from ava_exp.models.memory import WEIGHT_BYTES, MemoryEstimate, estimate_memory
from ava_exp.models.zero import STAGES, ZeroMemory, divide, layer_parameters
from ava_exp.stages.numbers import duration, money, rounded, short, table_of
from ava_exp.stages.scaling import FITS, GB, GIB, back_end_tables, can_offload
from ava_exp.training.forecast import forecast, tokens_per_second

FORMATS = {
    "fp32": Precision.fp32,
    "mixed": Precision.mixed_bf16,
    "fp16": Precision.fp16,
    "bf16": Precision.bf16,
}
"""Columns of the memory table; `mixed_fp16` takes as much as `mixed_bf16`."""


def run(config: RunConfig) -> int:
    """Print the plan of this command line. Return the exit code."""
    console = Console(highlight=False)
    breakdown = count_parameters(config.architecture)
    console.print(_parameter_table(config, breakdown))
    for sentence in _claims(config, breakdown):
        console.print(sentence)
    console.print(_flops(config))
    console.print(_memory_table(config))
    console.print(_time(config, breakdown))
    for part in back_end_tables(config):
        console.print(part)
    return EXIT_OK


def _parameter_table(config: RunConfig, breakdown: ParameterBreakdown) -> Table:
    model = config.model
    table = table_of(f"Parameters of {model.preset}", "part", "total", "active per token")
    for part in breakdown.parts:
        table.add_row(part.name, f"{part.total:,}", f"{part.active:,}")
    table.add_section()
    table.add_row("all", f"{breakdown.total:,}", f"{breakdown.active:,}")
    claims = (model.claimed_parameters, model.claimed_active_parameters)
    if any(claims):
        table.add_row("its source claims", *(f"{claim:,}" if claim else "" for claim in claims))
        ratios = zip((breakdown.total, breakdown.active), claims, strict=True)
        table.add_row("all / claim", *(f"{truth / claim:.2f}" if claim else "" for truth, claim in ratios))
    return table


def _claims(config: RunConfig, breakdown: ParameterBreakdown) -> Iterator[str]:
    """Yield, of the claims, what the table cannot show: a size that is impossible, and the memory."""
    model = config.model
    embedding = next(part for part in breakdown.parts if part.name == "embedding")
    claim = model.claimed_active_parameters or model.claimed_parameters
    if claim and embedding.total > claim:
        size = short(embedding.total)
        yield f"No model with this vocabulary is so small: the embedding alone has {size} parameters."
    if model.claimed_memory_gb is not None:
        whole = device_memory(config, Precision.mixed_bf16, stage=0).device
        state = sum(getattr(whole, part) for part in STATE)
        yield (
            f"Its source claims {model.claimed_memory_gb:,g} GB of memory ({model.claimed_hardware}): the weights in "
            f"16 bits are {rounded(whole.weights / GB)} GB, with gradients and Adam in mixed precision "
            f"{rounded(state / GB)} GB."
        )


def _flops(config: RunConfig) -> str:
    length = config.data.sequence_length
    forward = forward_flops_per_token(config.architecture, length)
    training = training_flops_per_token(config.architecture, length)
    return f"FLOPs per token at {length} positions: {short(forward)} forward, {short(training)} forward and backward."


def device_memory(config: RunConfig, precision: Precision, *, stage: int, offload: bool = False) -> ZeroMemory:
    """Return what one of the run's devices needs at a stage of ZeRO, with or without offload of its optimizer."""
    layer = layer_parameters(count_parameters(config.architecture), config.model.num_layers)
    whole = estimate_memory(
        config.architecture,
        precision=precision,
        batch_size=_batch_size(config),
        sequence_length=config.data.sequence_length,
        recompute=config.training.recompute,
        on_cpu=config.hardware.device in (DeviceType.auto, DeviceType.cpu),
    )
    return divide(
        whole,
        stage=stage,
        num_devices=config.hardware.num_devices,
        layer_weights=layer * WEIGHT_BYTES[precision],
        offload_optimizer=offload,
    )


def _batch_size(config: RunConfig) -> int:
    return config.training.batch_size or config.hardware.batch_size


def fits(memory: ZeroMemory, hardware: HardwareConfig) -> bool:
    """Whether one device holds it; of a device that declares no memory, nothing is said to fit."""
    return hardware.memory_gib is not None and memory.total <= hardware.memory_gib * GIB


def _memory_table(config: RunConfig) -> Table:
    hardware, formats = config.hardware, FORMATS.values()
    work = f"{_batch_size(config)} × {config.data.sequence_length} tokens"
    table = table_of(f"Training memory of a device in GiB: Adam, {work}", "part", *FORMATS)
    wholes = [device_memory(config, precision, stage=0).device for precision in formats]
    for part in fields(MemoryEstimate):
        if any(sizes := [getattr(whole, part.name) for whole in wholes]):
            table.add_row(part.name.replace("_", " "), *(rounded(size / GIB) for size in sizes))
    table.add_section()
    answer = "Nothing fits"
    for name, stage, offload in _divisions(hardware):
        divided = [device_memory(config, precision, stage=stage, offload=offload) for precision in formats]
        marks = [FITS if fits(memory, hardware) else " " for memory in divided]
        answer = f"{FITS} fits" if FITS in marks else answer
        table.add_row(name, *(f"{rounded(m.total / GIB)} {mark}" for m, mark in zip(divided, marks, strict=True)))
    if can_offload(hardware):
        table.add_section()
        table.add_row("host memory of offload", *(rounded(memory.host / GIB) for memory in divided))
    if hardware.memory_gib is not None:
        table.caption = f"{answer} {hardware.name} ({hardware.memory_gib:g} GiB)."
    return table


def _divisions(hardware: HardwareConfig) -> list[tuple[str, int, bool]]:
    """Return (name, ZeRO stage, offload) of each way to divide that differs, those that offload last."""
    if hardware.num_devices == 1:
        divisions = [("all, at any ZeRO stage", 0, False), ("ZeRO-1 to 3, offload", 1, True)]
    else:
        divisions = [(f"ZeRO-{stage}", stage, False) for stage in STAGES]
        divisions += [(f"ZeRO-{stage}, offload", stage, True) for stage in STAGES[1:]]
    return [division for division in divisions if not division[2] or can_offload(hardware)]


def _time(config: RunConfig, breakdown: ParameterBreakdown) -> Table | str:
    hardware, stage = config.hardware, config.stage
    assert isinstance(stage, PlanConfig)
    peaks = {name: getattr(hardware.peak_tflops, name) for name in ("fp32", "fp16", "bf16")}
    if not any(peaks.values()):
        return (
            f"hardware={hardware.name} declares no peak: give one for time and cost, such as "
            "`hardware.peak_tflops.bf16=1.0`."
        )
    devices = f"{hardware.num_devices} × {hardware.name}" if hardware.num_devices > 1 else hardware.name
    table = table_of(
        f"Time on {devices} at an assumed MFU of {stage.assumed_mfu:g}",
        *("format", "TFLOP/s", "tokens/s", "steps", "tokens", "time"),
        *(("cost",) if hardware.price_per_hour else ()),
    )
    for name, peak in peaks.items():
        if peak is not None:
            rate = tokens_per_second(config, peak_tflops=peak, assumed_mfu=stage.assumed_mfu)
            table.add_row(name, f"{peak:g}", rounded(rate), *_budget_cells(config, breakdown, rate))
    if config.budget.epochs is not None:
        table.caption = "`budget.epochs` is left out: how long an epoch is, only the data tells."
    return table


def _budget_cells(config: RunConfig, breakdown: ParameterBreakdown, rate: float) -> list[str]:
    expected = forecast(config, breakdown, rate)
    if expected is None:
        return []
    cost = [] if expected.cost is None else [money(expected.cost)]
    return [f"{expected.steps:,}", short(expected.tokens), duration(expected.seconds), *cost]
