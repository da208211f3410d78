"""Ranks that are started once and run several command lines one after another: a start takes longer than a tiny run.

Each rank is `python -m tests.distributed.group FOLDER`; it finds the command lines in the folder, and leaves there how
each of them ended. What happens to one rank on the way is a fault.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.distributed.ranks import start_ranks

COMMANDS = "commands.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What happens to one rank when its `step`-th step of this command line begins: the name of a signal that it gets,
    or `nan` for a loss that is none."""

    rank: int
    step: int
    action: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """A command line, and what goes wrong."""

    overrides: Sequence[str]
    fault: Fault | None = None


@dataclass(kw_only=True, slots=True)
class Ended:
    """How a command line ended on one rank: with an exit code, and with what it said of a mistake or raised.

    `num_idle` counts the experts that got no token of this rank in a micro-batch in which another one used them.
    """

    code: int | None = None
    error: str = ""
    num_idle: int = 0


def run_in_group(num_ranks: int, commands: Sequence[Command], timeout_s: float = 500.0) -> list[list[Ended]]:
    """Return how each command line ended, by rank."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / COMMANDS).write_text(json.dumps([asdict(command) for command in commands]))
        ended = start_ranks(num_ranks, [place], module="tests.distributed.group").wait(timeout_s)
        assert set(ended.codes) == {0}, str(ended)
        by_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    return [[Ended(**each) for each in of_command] for of_command in zip(*by_rank, strict=True)]


def main(folder: Path) -> None:
    """Be one of the ranks."""
    from ava_exp.config.compose import to_run_config
    from ava_exp.config.points import PointComposer

    prepare()
    composer, ended = PointComposer(), []
    for command in json.loads((folder / COMMANDS).read_text()):
        fault = command["fault"] and Fault(**command["fault"])
        ended.append(run(to_run_config(composer.compose(command["overrides"])), fault))
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps([asdict(each) for each in ended]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads now and then abort a process that ends in the usual way


def prepare() -> None:
    """Let runs find each other's process group, and leave out what takes time and is looked at by no test here."""
    import torch

    from ava_exp import runtime
    from ava_exp.config import compose
    from ava_exp.stages import assembly, pretrain
    from tests.faults.server import remembered

    torch.set_num_threads(1)
    compose.compose = remembered(compose.compose)  # every run is compared with the default
    code = assembly.code_fingerprint()
    assembly.code_fingerprint = lambda: code
    runtime.measured_rates = functools.cache(runtime.measured_rates)
    pretrain.write_report = lambda folder: folder.report
    pretrain.leave_ranks = lambda ranks: ranks.wait()


def run(config: Any, fault: Fault | None) -> Ended:
    """Run what was composed, as the command line does."""
    from accelerate.state import AcceleratorState

    from ava_exp.errors import EXIT_USER_ERROR, UserError

    ended = Ended()
    try:
        with idle_experts_counted(ended), fault_injected(fault):
            ended.code = config.stage.component()(config)
    except UserError as error:
        ended.code, ended.error = EXIT_USER_ERROR, str(error)
    except Exception as error:  # noqa: BLE001 - a test looks at it; the next command line follows
        traceback.print_exc()
        ended.error = f"{type(error).__name__}: {error}"
    finally:
        AcceleratorState._reset_state(True)
    return ended


@contextmanager
def idle_experts_counted(ended: Ended) -> Iterator[None]:
    """Let `ended` know of experts that this rank leaves alone."""
    from ava_exp.training.objective import StepTally

    add = StepTally.add

    def watched(tally: Any, output: Any, ranks: Any) -> None:
        own = [routing.chosen_counts for routing in output.routings]
        add(tally, output, ranks)
        pairs = zip(own, output.routings, strict=True)
        ended.num_idle += sum(int(((mine == 0) & (all_.chosen_counts > 0)).sum()) for mine, all_ in pairs)

    StepTally.add = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        StepTally.add = add  # type: ignore[method-assign]


@contextmanager
def fault_injected(fault: Fault | None) -> Iterator[None]:
    """Let the fault happen, if it is this rank's."""
    from ava_exp.training import loop
    from ava_exp.training.objective import Objective

    if fault is None or int(os.environ["RANK"]) != fault.rank:
        yield
        return
    take_step, forward, number = loop.train_step, Objective.forward, 0

    def step(*arguments: Any, **settings: Any) -> Any:
        nonlocal number
        number += 1
        if number == fault.step and fault.action != "nan":
            os.kill(os.getpid(), signal.Signals[fault.action])
        return take_step(*arguments, **settings)

    def forward_to_nan(*arguments: Any) -> Any:
        values = forward(*arguments)
        return values * math.nan if number == fault.step and fault.action == "nan" else values

    loop.train_step, Objective.forward = step, forward_to_nan  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        loop.train_step, Objective.forward = take_step, forward  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
