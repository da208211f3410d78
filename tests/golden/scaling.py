"""The tables of `docs/scaling.md`: what devices declare of their links, and three runs under every back end.

Whoever changes a device, a preset or a formula writes them anew:

    python -m tests.golden.scaling
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ava_exp.config.compose import compose
from ava_exp.config.folders import option_names
from ava_exp.config.machine import HardwareConfig, Precision
from ava_exp.config.run import RunConfig
from ava_exp.config.stage import PlanConfig
from ava_exp.stages.numbers import figure
from ava_exp.stages.scaling import GB, GIB, assumptions_of, back_ends_of
from ava_exp.training.scaling import Prediction, predict, widest_expert_parallel
from tests.golden.pages import filled, markdown

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
RUNS = {
    "b300": ("hardware=32xh200", "data.sequence_length=2048", "training.batch_size=1"),
    "b1": ("hardware=8xh100", "data.sequence_length=2048", "training.batch_size=4"),
    "small": ("hardware=4xa100_80g", "data.sequence_length=1024", "training.batch_size=32"),
}


def tables() -> dict[str, str]:
    """Return the tables by the name in the comment above them."""
    devices = [name for name in option_names("hardware") if not name[0].isdigit()]
    links = ["`hardware=`", "devices in a node", "within", "between", "to the host"]
    worked = ["`model=`", "`hardware=`", "back end", "experts over", "GiB", "fits", "sent, GB", "computing, s"]
    worked += ["not hidden, s", "host, s", "efficiency"]
    return {
        "links": markdown(links, [_link_row(name) for name in devices]),
        "worked": markdown(worked, [row for model in RUNS for row in _worked_rows(model)]),
    }


def _link_row(name: str) -> list[str]:
    links = _compose(f"hardware={name}").hardware.links
    rates = (links.within_node_gb_per_s, links.between_nodes_gb_per_s, links.to_host_gb_per_s)
    return [f"`{name}`", str(links.devices_per_node), *("" if rate is None else f"{rate:g}" for rate in rates)]


def _compose(*overrides: str) -> RunConfig:
    return compose(["~local", "stage=plan", *overrides])


def _worked_rows(model: str) -> Iterator[list[str]]:
    config = _compose(f"model={model}", *RUNS[model])
    assert isinstance(config.stage, PlanConfig)
    hardware = RUNS[model][0].removeprefix("hardware=")
    for number in (1, widest_expert_parallel(config)):
        for back_end in back_ends_of(config.hardware):
            prediction = predict(
                config,
                back_end,
                assumptions_of(config.stage),
                precision=Precision.mixed_bf16,
                expert_parallel=number,
            )
            over = "" if number == 1 else str(number)
            yield [f"`{model}`", f"`{hardware}`", f"`{back_end.value}`", over, *_cells(prediction, config.hardware)]


def _cells(prediction: Prediction, hardware: HardwareConfig) -> list[str]:
    time = prediction.time
    assert time is not None and hardware.memory_gib is not None
    return [
        figure(prediction.memory.total / GIB),
        "yes" if prediction.memory.total <= hardware.memory_gib * GIB else "no",
        figure(sum(prediction.sent.values()) / GB),
        figure(time.compute),
        figure(time.exposed),
        figure(time.host) if time.host else "",
        f"{time.efficiency:.0%}",
    ]


def with_tables(page: str) -> str:
    """Return the page with its tables written anew."""
    return filled(page, tables())


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
