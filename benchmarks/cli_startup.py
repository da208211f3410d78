"""CPU time of commands that only compose: `python benchmarks/cli_startup.py`.

Each command runs as a process of its own; user and system time are those the system charged to it. The target for
`--cfg job` is 0.35 s.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import hydra": ["-c", "import hydra"],
    "--cfg job": ["-m", "ava_exp", "--cfg", "job"],
    "--cfg job model=large": ["-m", "ava_exp", "--cfg", "job", "model=large", "schedule=wsd", "hardware=h100"],
    "stage=validate": ["-m", "ava_exp", "stage=validate"],
    "--help": ["-m", "ava_exp", "--help"],
    "a typo": ["-m", "ava_exp", "modle=small"],
}
REPEATS = 7


def cpu_seconds(arguments: list[str], folder: str) -> float:
    """Return the CPU time of one run of the interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print the median and the range of every command."""
    print(f"{'command':<24}{'median':>9}{'least':>9}{'most':>9}   CPU seconds of {REPEATS} runs")
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in COMMANDS.items():
            cpu_seconds(arguments, folder)  # compiles and reads the files into memory
            taken = [cpu_seconds(arguments, folder) for _ in range(REPEATS)]
            print(f"{name:<24}{statistics.median(taken):>9.3f}{min(taken):>9.3f}{max(taken):>9.3f}")


if __name__ == "__main__":
    main()
