"""Parameters, FLOPs and memory of a run, before it is run. Imports no torch: the largest preset plans in an instant."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ava_exp.config.machine import HardwareConfig, Precision
from ava_exp.config.run import RunConfig
from ava_exp.errors import EXIT_OK
from ava_exp.models.arithmetic import (
    ParameterBreakdown,
    count_parameters,
    forward_flops_per_token,
    training_flops_per_token,
)
from ava_exp.models.memory import MemoryEstimate, estimate_memory

GIB = 2**30


def run(config: RunConfig) -> int:
    """Print the plan of this command line. Return the exit code."""
    console = Console()
    breakdown = count_parameters(config.model, config.attention, config.sparsity)
    console.print(_parameter_table(config, breakdown))
    _print_claim(console, config, breakdown)
    length = config.data.sequence_length
    forward = forward_flops_per_token(config.model, config.attention, config.sparsity, length)
    training = training_flops_per_token(config.model, config.attention, config.sparsity, length)
    console.print(
        f"FLOPs per token at {length} positions: {_short(forward)} forward, {_short(training)} forward and backward."
    )
    console.print(_memory_table(config))
    return EXIT_OK


def _parameter_table(config: RunConfig, breakdown: ParameterBreakdown) -> Table:
    table = Table(title=f"Parameters of {config.model.preset}")
    for name in ("part", "total", "active per token"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in breakdown.parts:
        table.add_row(part.name, f"{part.total:,}", f"{part.active:,}")
    table.add_section()
    table.add_row("all", f"{breakdown.total:,}", f"{breakdown.active:,}")
    return table


def _print_claim(console: Console, config: RunConfig, breakdown: ParameterBreakdown) -> None:
    if config.model.claimed_parameters is not None:
        console.print(
            f"Its source claims {config.model.claimed_parameters}; built as described it has "
            f"{_short(breakdown.total)}, of which {_short(breakdown.active)} act on a token."
        )


def _memory_table(config: RunConfig) -> Table:
    batch_size = config.training.batch_size or config.hardware.batch_size
    table = Table(title=f"Training memory, Adam, {batch_size} sequences of {config.data.sequence_length} (GiB)")
    table.add_column("part")
    formats = [Precision.fp32, Precision.mixed_bf16, Precision.bf16]
    estimates: list[MemoryEstimate] = []
    for precision in formats:
        table.add_column(precision.value, justify="right")
        estimates.append(
            estimate_memory(
                config.model,
                config.attention,
                config.sparsity,
                precision=precision,
                batch_size=batch_size,
                sequence_length=config.data.sequence_length,
            )
        )
    for part in ("weights", "master_weights", "gradients", "optimizer", "activations", "logits"):
        table.add_row(part.replace("_", " "), *(f"{getattr(estimate, part) / GIB:.2f}" for estimate in estimates))
    table.add_section()
    table.add_row("all", *(f"{estimate.total / GIB:.2f}" for estimate in estimates))
    table.caption = _fit(config.hardware, formats, estimates)
    return table


def _fit(hardware: HardwareConfig, formats: list[Precision], estimates: list[MemoryEstimate]) -> str | None:
    if hardware.memory_gib is None:
        return None
    fitting = [f.value for f, e in zip(formats, estimates, strict=True) if e.total <= hardware.memory_gib * GIB]
    answer = ", ".join(fitting) if fitting else "no format"
    return f"fits {hardware.name} ({hardware.memory_gib:g} GiB): {answer}"


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,.0f}"
