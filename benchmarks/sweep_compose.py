"""Time to compose a hundred points: `python benchmarks/sweep_compose.py [--points 100] [--choices 10]`.

The points differ in values and in at most so many choices of options. What our sweeper does (compose each choice once,
set values on copies, turn each into typed objects, hash it, check its rules) is measured beside the composition of
Hydra's BasicSweeper, which composes every point twice: once to see that it can be, once to run it. The target is 5 s.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.types import RunMode
from omegaconf import OmegaConf

from ava_exp.config.compose import to_run_config
from ava_exp.config.identity import run_id
from ava_exp.config.points import PointComposer
from ava_exp.config.source import CONFIG_NAME
from ava_exp.config.validate import validate

MODELS = ("quick", "tiny", "small", "base", "large")
ROUTERS = ("topk", "switch", "deepseek", "sinkhorn")


def make_points(num_points: int, num_choices: int) -> list[list[str]]:
    """Return sets of overrides whose groups take turns."""
    choices = list(itertools.product(MODELS, ROUTERS))[:num_choices]
    return [
        [f"model={model}", f"router={router}", f"seed={number}", f"optimizer.learning_rate={1e-4 * (number + 1):g}"]
        for number, (model, router) in zip(range(num_points), itertools.cycle(choices), strict=False)
    ]


def compose_ours(points: list[list[str]]) -> None:
    composer = PointComposer()
    for overrides in points:
        run = to_run_config(composer.compose(overrides))
        run_id(run)
        validate(run)


def compose_as_basic_sweeper(points: list[list[str]]) -> None:
    loader = ConfigLoaderImpl(create_config_search_path(None))
    master = loader.load_configuration(CONFIG_NAME, [], RunMode.MULTIRUN)
    for _ in ("to validate the batch", "to launch it"):
        for overrides in points:
            loader.load_sweep_config(master, overrides)


def seconds(compose: Callable[[list[list[str]]], None], points: list[list[str]]) -> tuple[float, float]:
    """Return the seconds of wall time and of CPU time; the second hardly depends on what else the machine does."""
    started, cpu = time.perf_counter(), time.process_time()
    compose(points)
    return time.perf_counter() - started, time.process_time() - cpu


def whole_command(num_points: int) -> tuple[float, float]:
    """Time the command line that composes and checks the points and trains none."""
    models = ",".join(MODELS)
    arguments = ["-m", "stage=validate", f"model={models}", "router=topk,switch", f"seed=range(0,{num_points // 10})"]
    with tempfile.TemporaryDirectory() as folder:
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "ava_exp", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
        after, taken = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    assert done.stdout.count("── point") == num_points // 10 * 10
    return taken, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--choices", type=int, default=10)
    arguments = parser.parse_args()
    points = make_points(arguments.points, arguments.choices)
    PointComposer().compose([])  # imports and registers
    assert len(OmegaConf.to_container(PointComposer().compose(points[0])) or {}) > 10
    print(f"{len(points)} points, {arguments.choices} choices of options, {os.cpu_count()} cores")
    for name, (wall, cpu) in {
        "ours, with types, identity and rules": seconds(compose_ours, points),
        "the whole command, `stage=validate`": whole_command(len(points)),
        "BasicSweeper, composition alone": seconds(compose_as_basic_sweeper, points),
    }.items():
        print(f"{name:<38}{wall:7.2f} s, {cpu:6.2f} s of CPU")


if __name__ == "__main__":
    main()
