"""Seconds from a command to the first step of its run: `python benchmarks/launch.py [--repeats 5]`.

A very small model on data that was prepared before, so that what is measured is the start: Python, imports, composing,
ranks that meet, the queue of a cluster. SLURM is measured where this machine can submit, and left out where it cannot.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMON = (
    "~local",
    "debug=default",
    "hardware=cpu",
    "precision=fp32",
    "tracker=none",
    "budget.steps=2",
    "cache_dir=cache",
    "output_dir=out",
)
LOCAL = {
    "one process": (),
    "one process, watched": ("launcher.hang_timeout_s=600",),
    "two ranks": ("hardware.num_devices=2",),
}
JOBS = {
    "a job of one rank": ("launcher=slurm", "launcher.wait=true"),
    "a job of two nodes": ("launcher=slurm", "launcher.wait=true", "launcher.num_nodes=2"),
}


def seconds_to_first_step(folder: Path, overrides: tuple[str, ...]) -> float:
    """Give a command, wait until it has ended, and return after how long its first step was recorded."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [sys.executable, "-m", "ava_exp", *COMMON, *overrides]
    taken = None
    started = time.monotonic()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            if taken is None and has_step(folder):
                taken = time.monotonic() - started
            time.sleep(0.01)
        assert process.stderr is not None
        if taken is None or process.returncode != 0:
            raise SystemExit(f"{' '.join(command)} did not end well: {process.stderr.read()}")
    return taken


def has_step(folder: Path) -> bool:
    """Whether a step of a run below `folder` is recorded."""
    return any('"train"' in path.read_text() for path in folder.glob("out/runs/*/metrics.jsonl"))


def main() -> None:
    """Print the median and the range of every way to start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    launches = LOCAL | (JOBS if shutil.which("sbatch") else {})
    if "a job of one rank" not in launches:
        print("no `sbatch` here: jobs are left out")
    print(f"{'command to first step':<24}{'median':>9}{'least':>9}{'most':>9}   seconds, {repeats} starts")
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in launches.items():
            seconds_to_first_step(Path(folder), overrides)  # prepares the data, reads the files into memory
            taken = [seconds_to_first_step(Path(folder), overrides) for _ in range(repeats)]
            print(f"{name:<24}{statistics.median(taken):>9.2f}{min(taken):>9.2f}{max(taken):>9.2f}", flush=True)


if __name__ == "__main__":
    main()
