"""One process of a run: its place among the others, how it is started, watched and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

STARTER = Path(__file__).with_name("start_rank.py")
HEARTBEAT = "AVA_EXP_HEARTBEAT"
"""Where a rank finds the path of its own heartbeat file.

Whenever it has finished a step it writes there how many seconds it would take to save and stop; it removes the file
when there are no more steps to do.
"""
DUMP_SIGNAL = signal.SIGQUIT
"""On this a rank writes the stacks of its threads to its standard error."""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank stands among the others, in the words of torchrun."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_address: str
    master_port: int

    def environment(self) -> dict[str, str]:
        """Return the variables that a rank is told its place by."""
        values = (
            self.rank,
            self.local_rank,
            self.world_size,
            self.local_world_size,
            self.master_address,
            self.master_port,
        )
        return {name: str(value) for name, value in zip(RANK_VARIABLES, values, strict=True)}


class Rank:
    """A process that runs `command` at `place`.

    It leads a process group of its own, so that Ctrl-C in a terminal reaches the supervisor alone, who hands it on, and
    so that its children can be ended with it. It dies when the process that started it dies. Only rank 0 writes to
    standard output; `stderr` of the others is a pipe.
    """

    def __init__(self, place: Place, command: list[str], heartbeat: Path) -> None:
        self.place = place
        self.heartbeat = heartbeat
        self._last_beat_ns: int | None = None
        self._moved_at = 0.0
        is_first = place.rank == 0
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-I", "-S", str(STARTER), str(os.getpid()), *command],
            env={**os.environ, **place.environment(), HEARTBEAT: str(heartbeat)},
            stdin=subprocess.DEVNULL,
            stdout=None if is_first else subprocess.DEVNULL,
            stderr=None if is_first else subprocess.PIPE,
            process_group=0,
        )

    @property
    def number(self) -> int:
        return self.place.rank

    @property
    def stderr(self) -> IO[bytes] | None:
        return self.process.stderr

    @property
    def code(self) -> int | None:
        """The exit code; negative for the signal that killed it, None while it lives."""
        return self.process.poll()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process itself, not to its children."""
        if self.code is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End the process and its children at once, also when they are stopped."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def still_s(self) -> float:
        """Return for how long no step was finished; 0 before the first one and after the last.

        Preparing and reporting may take any time.
        """
        try:
            beat_ns = self.heartbeat.stat().st_mtime_ns
        except FileNotFoundError:
            return 0.0
        now = time.monotonic()  # the clock of the files may be set while the run goes on
        if beat_ns != self._last_beat_ns:
            self._last_beat_ns, self._moved_at = beat_ns, now
        return now - self._moved_at

    def stopping_s(self) -> float:
        """Return how long the rank says that it takes to save and stop; 0 where it does not know."""
        try:
            return float(self.heartbeat.read_text())
        except (OSError, ValueError):  # there are no steps to do, or it is just being written
            return 0.0

    def is_stopped(self) -> bool:
        """Whether somebody stopped the process with a signal. Only Linux tells."""
        try:
            state = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return False
        return state.rpartition(")")[2].split()[0] == "T"
