"""The planner's table of back ends: what a rank keeps, what it sends, how long a step and the budget take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import TypeVar

from rich.table import Table

from ava_exp.config.machine import DeviceType, HardwareConfig, Precision
from ava_exp.config.run import RunConfig
from ava_exp.config.stage import PlanConfig
from ava_exp.models.backends import BackEnd
from ava_exp.models.communication import Collective
from ava_exp.models.memory import MemoryEstimate
from ava_exp.stages.numbers import figure, table_of, unit_of_time
from ava_exp.training.forecast import Forecast
from ava_exp.training.scaling import (
    Assumptions,
    Prediction,
    StepTime,
    fewest_devices,
    planned_precision,
    predict,
    undeclared,
    widest_expert_parallel,
)

GIB = 2**30
GB, MB = 1e9, 1e6
FITS = "✓"
T = TypeVar("T")


def can_offload(hardware: HardwareConfig) -> bool:
    """Whether the host has memory of its own: a CPU is the host, and an Apple GPU shares its memory."""
    return hardware.device not in (DeviceType.cpu, DeviceType.mps)


def back_ends_of(hardware: HardwareConfig) -> list[BackEnd]:
    """Return the back ends that several such devices have to choose from."""
    offloads = {BackEnd.zero3_offload} if can_offload(hardware) else set[BackEnd]()
    return [
        end for end in BackEnd if end is not BackEnd.single and (end is not BackEnd.zero3_offload or end in offloads)
    ]


def assumptions_of(stage: PlanConfig) -> Assumptions:
    """Return what this stage takes for granted."""
    return Assumptions(
        mfu=stage.assumed_mfu, link_utilisation=stage.assumed_link_utilisation, overlap=stage.assumed_overlap
    )


def back_end_tables(config: RunConfig) -> Iterator[Table | str]:
    """Yield the tables of a run on several devices, with all experts on each rank and with experts divided, and the
    assumptions under them; nothing for one device."""
    stage, hardware = config.stage, config.hardware
    assert isinstance(stage, PlanConfig)
    if hardware.num_devices == 1:
        return
    assumptions = assumptions_of(stage)
    precision = planned_precision(config.precision.training, hardware)
    title = f"Back ends on {hardware.num_devices:,} × {hardware.name} in {precision.value}"
    expert_parallel = stage.expert_parallel or widest_expert_parallel(config)
    for number in sorted({1, expert_parallel}):
        predictions = [
            predict(config, back_end, assumptions, precision=precision, expert_parallel=number)
            for back_end in back_ends_of(hardware)
        ]
        fewest = [
            fewest_devices(config, back_end, precision=precision, expert_parallel=number)
            for back_end in back_ends_of(hardware)
        ]
        own_title = title if number == 1 else f"{title}, experts divided among {number}"
        yield _table(own_title, predictions, fewest, hardware)
    yield from _assumed(hardware, precision, assumptions)


def _assumed(hardware: HardwareConfig, precision: Precision, assumptions: Assumptions) -> Iterator[str]:
    missing = [f"`{key}=…`" for key in undeclared(hardware, precision, offload=can_offload(hardware))]
    if missing:
        yield f"For every time here hardware={hardware.name} declares too little: give {' and '.join(missing)}."
    yield (
        f"Assumed: computing reaches {assumptions.mfu:.0%} of the peak, communication "
        f"{assumptions.link_utilisation:.0%} of the declared bandwidths, and it hides in {assumptions.overlap:.0%} of "
        "the computing that may go on beside it."
    )


def _table(title: str, predictions: list[Prediction], fewest: list[int | None], hardware: HardwareConfig) -> Table:
    table = table_of(title, "of a rank", *(_heading(prediction.back_end) for prediction in predictions))
    _add_memory(table, predictions, fewest, hardware)
    _add_sent(table, predictions)
    _add_time(table, predictions)
    return table


def _heading(back_end: BackEnd) -> str:
    return back_end.value.replace("_", "\n")


def _add_memory(
    table: Table, predictions: list[Prediction], fewest: list[int | None], hardware: HardwareConfig
) -> None:
    table.add_row("[bold]memory, GiB")
    for field in fields(MemoryEstimate):
        sizes = [getattr(prediction.memory.device, field.name) for prediction in predictions]
        _add(table, field.name.replace("_", " "), sizes, lambda size: figure(size / GIB))
    _add(table, "buffers", [prediction.memory.buffers for prediction in predictions], lambda size: figure(size / GIB))
    _add(table, "all", [prediction.memory.total for prediction in predictions], lambda size: figure(size / GIB))
    if hardware.memory_gib is not None:
        limit = hardware.memory_gib * GIB
        marks = [FITS if prediction.memory.total <= limit else "no" for prediction in predictions]
        table.add_row(f"fits {hardware.memory_gib:g} GiB", *marks)
        table.add_row("least devices", *("none" if number is None else f"{number:,}" for number in fewest))
    _add(table, "on the host", [prediction.memory.host for prediction in predictions], lambda size: figure(size / GIB))


def _add_sent(table: Table, predictions: list[Prediction]) -> None:
    most = max(size for prediction in predictions for size in prediction.sent.values())
    unit, length = ("GB", GB) if most >= GB else ("MB", MB)
    table.add_section()
    table.add_row(f"[bold]sent, {unit}")
    for collective in Collective:
        sizes = [prediction.sent.get(collective, 0.0) for prediction in predictions]
        _add(table, collective.value, sizes, lambda size: figure(size / length))


def _add_time(table: Table, predictions: list[Prediction]) -> None:
    times = [prediction.time for prediction in predictions]
    if not any(times):
        return
    longest = max(time.step for time in times if time)
    unit, length = ("s", 1.0) if longest >= 1 else ("ms", 1e-3)
    table.add_section()
    table.add_row(f"[bold]step, {unit}")
    parts: dict[str, Callable[[StepTime], float]] = {
        "computing": lambda time: time.compute,
        "communication": lambda time: time.communication,
        "not hidden": lambda time: time.exposed,
        "host's update": lambda time: time.host,
        "all": lambda time: time.step,
    }
    for name, part in parts.items():
        _add(table, name, _of(times, part), lambda seconds: figure(seconds / length))
    _add(table, "efficiency, %", _of(times, lambda time: 100 * time.efficiency), figure)
    _add(table, "tokens/s", _of(times, lambda time: time.tokens_per_s), figure)
    _add_budget(table, [prediction.budget for prediction in predictions])


def _add_budget(table: Table, budgets: list[Forecast | None]) -> None:
    longest = max((budget.seconds for budget in budgets if budget), default=None)
    if longest is None:
        return
    unit, length = unit_of_time(longest)
    table.add_section()
    table.add_row("[bold]budget")
    _add(table, "steps", _of(budgets, lambda budget: budget.steps), figure)
    _add(table, "tokens", _of(budgets, lambda budget: budget.tokens), figure)
    _add(table, f"time, {unit}", _of(budgets, lambda budget: budget.seconds), lambda s: figure(s / length))
    _add(table, "cost", _of(budgets, lambda budget: budget.cost or 0.0), figure)


def _of(values: list[T | None], part: Callable[[T], float]) -> list[float | None]:
    return [None if value is None else part(value) for value in values]


def _add(table: Table, name: str, values: Sequence[float | None], text: Callable[[float], str]) -> None:
    """Add a row unless it has nothing to say; what is zero or unknown stays empty."""
    if any(values):
        table.add_row(name, *(text(value) if value else "" for value in values))
