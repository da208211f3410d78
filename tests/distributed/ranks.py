"""Starts the ranks of a run as processes of this machine, with the environment that torchrun gives them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True)
class RanksEnded:
    """Exit codes and what was printed, by rank."""

    codes: list[int]
    outs: list[str]
    errs: list[str]

    def __str__(self) -> str:
        parts = zip(self.codes, self.outs, self.errs, strict=True)
        return "\n".join(f"── rank {r}: {code}\n{out}\n{err}" for r, (code, out, err) in enumerate(parts))


@dataclass(slots=True)
class RunningRanks:
    """Processes that were started together."""

    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def wait(self, timeout_s: float = TIMEOUT_S) -> RanksEnded:
        """Return when all have ended; whoever is left at the time-out is killed, and its code says so."""
        deadline, outputs = time.monotonic() + timeout_s, []
        for process in self.processes:
            try:
                outputs.append(process.communicate(timeout=max(1.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                outputs.append(process.communicate())
        codes = [process.returncode for process in self.processes]
        return RanksEnded(codes, [out for out, _ in outputs], [err for _, err in outputs])

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send one of them a signal."""
        self.processes[rank].send_signal(number)


def start_ranks(num_ranks: int, arguments: Sequence[str], module: str = "ava_exp") -> RunningRanks:
    """Start one process a rank with the same command line."""
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    running = RunningRanks()
    for rank in range(num_ranks):
        running.processes.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return running


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
