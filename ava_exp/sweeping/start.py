"""How one point is started: the one place to change for starting it elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ava_exp.config.machine import DeviceType
from ava_exp.config.run import RunConfig
from ava_exp.errors import EXIT_RESUMABLE
from ava_exp.tracking.redaction import redact_text

TAIL_BYTES = 8192
SET_PARENT_DEATH_SIGNAL = 1
"""`PR_SET_PDEATHSIG` of Linux's prctl(2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """A place in which one point at a time runs. `num_threads` or `device` null leaves them to the point."""

    num_threads: int | None = None
    device: int | None = None


class Work(Protocol):
    """A point at work, wherever that is."""

    def poll(self) -> int | None:
        """Return the exit code once it has ended; it is negative, the number of a signal, for one that was killed."""

    def send(self, number: signal.Signals) -> None:
        """Send a signal; one that has ended gets none."""

    def last_words(self) -> str:
        """Return the last line that it wrote."""


Start = Callable[[Sequence[str], Path, Slot], Work]
"""Starts the point with these overrides in this slot; everything it writes goes to the file."""


class LocalWork:
    """A point as a process of this machine, in a session of its own: Ctrl-C reaches the sweep, which tells its points.

    When the sweep dies without a word, its points save and stop (Linux). Without a `log` it writes where this process
    does.
    """

    def __init__(self, overrides: Sequence[str], log: Path | None, slot: Slot) -> None:
        self._log, self._offset = log, log.stat().st_size if log is not None and log.exists() else 0
        threads = [] if slot.num_threads is None else [f"hardware.num_threads={slot.num_threads}"]
        environment = None if slot.device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": str(slot.device)}
        with open(log, "ab") if log is not None else contextlib.nullcontext() as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ava_exp", *overrides, *threads],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output is not None else None,
                env=environment,
                start_new_session=True,
                preexec_fn=_dies_with(os.getpid()),  # noqa: PLW1509 - a sweep has no threads, and it makes one call
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def last_words(self) -> str:
        return last_line(self._log, self._offset) if self._log is not None else ""


def _dies_with(parent: int) -> Callable[[], None] | None:
    """Return what a new process does before anything else, so that it is asked to stop when `parent` dies."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None, use_errno=True)

    def ask() -> None:
        library.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the request was heard
            os._exit(EXIT_RESUMABLE)

    return ask


def last_line(log: Path, offset: int = 0) -> str:
    """Return the last line of a file after `offset` that is not empty, without secrets; "" where there is none."""
    if not log.exists():
        return ""
    with open(log, "rb") as file:
        file.seek(max(offset, log.stat().st_size - TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return redact_text(next((line.strip() for line in reversed(lines) if line.strip()), ""))


def slots(config: RunConfig, num_parallel: int, devices: Sequence[int]) -> list[Slot]:
    """Return the places for points that run at a time. On a CPU they share its threads, unless the points say."""
    if devices:
        return [Slot(device=device) for device in devices]
    hardware = config.hardware
    shares = num_parallel > 1 and hardware.num_threads is None and hardware.device in (DeviceType.cpu, DeviceType.auto)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_threads = max(1, num_cores // (num_parallel * hardware.num_devices)) if shares else None
    return [Slot(num_threads=num_threads) for _ in range(num_parallel)]
