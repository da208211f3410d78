"""The tables of `docs/presets.md`: every preset as its source claims it, and as it is.

Whoever changes a preset, a device or the arithmetic writes them anew:

    python -m tests.golden.presets
"""

from __future__ import annotations

import re
from pathlib import Path

from ava_exp.config.compose import compose
from ava_exp.config.machine import Precision
from ava_exp.config.run import RunConfig
from ava_exp.models.arithmetic import count_parameters
from ava_exp.stages.plan import GIB, can_offload, device_memory, fits, short
from tests.golden.pages import filled, markdown

PAGE = Path(__file__).parents[2] / "docs" / "presets.md"

HARDWARE: dict[str, tuple[str, ...]] = {
    "quick": (),
    "tiny": ("rtx3090ti",),
    "small": ("rtx3090ti",),
    "base": ("a100",),
    "large": ("a100_80g",),
    "cpu_small": ("cpu hardware.memory_gib=16",),
    "cpu_medium": ("cpu hardware.memory_gib=32",),
    "gpu_base": ("rtx2080", "rtx3090"),
    "gpu_large": ("rtx3090", "a100"),
    "debug": ("rtx2080",),
    "debug_200m": ("t4", "m1_max"),
    "b1": ("rtx3090", "m1_max"),
    "b7": ("a100",),
    "b14": ("a100_80g",),
    "b30": ("4xa100_80g",),
    "b50": ("4xh100",),
    "b100": ("8xh100",),
    "b200": ("16xh200",),
    "b300": ("32xh200",),
}
"""The options that come nearest to what the source says; for *any*, the one with the least memory."""


def tables() -> dict[str, str]:
    """Return the tables by the name in the comment above them."""
    runs = {name: [_compose(name, hardware) for hardware in options or ("auto",)] for name, options in HARDWARE.items()}
    sizes = [_size_row(name, configs[0]) for name, configs in runs.items()]
    memory = [
        _memory_row(name, hardware, config)
        for name, configs in runs.items()
        for hardware, config in zip(HARDWARE[name], configs, strict=False)
    ]
    return {
        "sizes": markdown(
            ("`model=`", "layers × width", "heads", "experts", "claimed", "total", "claimed active", "active"), sizes
        ),
        "memory": markdown(
            (
                "`model=`",
                "its source says",
                "claimed GB",
                "`hardware=`",
                "needs GiB",
                "with offload",
                "has GiB",
                "fits",
            ),
            memory,
        ),
    }


def _compose(name: str, hardware: str) -> RunConfig:
    length = 2048 if name not in ("quick", "cpu_small", "cpu_medium") else 1024
    batch = ("training.batch_size=1", f"data.sequence_length={length}")
    return compose(["~local", f"model={name}", *f"hardware={hardware}".split(), *batch])


def _size_row(name: str, config: RunConfig) -> list[str]:
    model, sizes = config.model, count_parameters(config.architecture)
    heads = str(model.num_heads)
    if model.num_kv_heads != model.num_heads:
        heads += f" / {model.num_kv_heads}"
    return [
        f"`{name}`",
        f"{model.num_layers} × {model.hidden_size}",
        heads,
        str(model.num_experts),
        _claim(model.claimed_parameters),
        short(sizes.total),
        _claim(model.claimed_active_parameters),
        short(sizes.active),
    ]


def _claim(size: int | None) -> str:
    return "" if size is None else re.sub(r"\.?0+ ", " ", short(size))


def _memory_row(name: str, hardware: str, config: RunConfig) -> list[str]:
    plain, offload = (
        device_memory(config, Precision.mixed_bf16, stage=3, offload=offload) for offload in (False, True)
    )
    offloads = can_offload(config.hardware)
    if fits(plain, config.hardware):
        answer = "yes"
    else:
        answer = "with offload" if offloads and fits(offload, config.hardware) else "no"
    model = config.model
    return [
        f"`{name}`",
        model.claimed_hardware or "",
        "" if model.claimed_memory_gb is None else f"{model.claimed_memory_gb:,g}",
        f"`{hardware}`",
        f"{plain.total / GIB:,.1f}",
        f"{offload.total / GIB:,.1f}" if offloads else "",
        f"{config.hardware.memory_gib:g}",
        answer,
    ]


def with_tables(page: str) -> str:
    """Return the page with its tables written anew."""
    return filled(page, tables())


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
