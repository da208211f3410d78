"""Starts the ranks of a run on one machine and sees to it that they end together: no orphan, no endless wait."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ava_exp.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_OTHER_RANK, EXIT_RESUMABLE
from ava_launchers.rank import DUMP_SIGNAL, Place, Rank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
SAVE_SIGNAL = signal.SIGUSR1
LOOK_EVERY_S = 0.2
DUMP_S = 2.0
"""How long a rank that hangs may take to write its stacks."""
ERROR_PREFIX = b"ava_exp: "
"""How a line begins that tells a user's mistake; every rank makes the same one."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a group of ranks ended: the exit code of the whole, and the signals that had asked it to stop."""

    code: int
    stops: frozenset[signal.Signals] = frozenset()

    @property
    def is_resumable(self) -> bool:
        """Whether the same command goes on: the ranks saved, or were stopped before there was anything to save."""
        on_request = {EXIT_INTERRUPTED, *(128 + number for number in self.stops)} if self.stops else set()
        return self.code == EXIT_RESUMABLE or self.code in on_request


class Supervisor:
    """Runs `command` once for each place, hands signals on, and ends all ranks when one has failed or hangs.

    Args:
        command: program and arguments, the same for all ranks.
        places: one for each rank on this machine.
        grace_s: after a failure the others have this long to end by themselves; then they are killed.
        hang_timeout_s: a rank that has finished a step and then none for so long hangs; None is never.
        time_left_s: the ranks are told to stop so early that a step and a save fit in, by their own measurements.
    """

    def __init__(
        self,
        command: list[str],
        places: Sequence[Place],
        *,
        grace_s: float,
        hang_timeout_s: float | None,
        time_left_s: float | None = None,
    ) -> None:
        self.command, self.places = command, places
        self._end = None if time_left_s is None else time.monotonic() + time_left_s
        self.grace_s, self.hang_timeout_s = grace_s, hang_timeout_s
        self._stops: set[signal.Signals] = set()
        self._ranks: list[Rank] = []
        self._ended: list[Rank] = []
        self._deadline: float | None = None
        self._hangs = self._has_cause = False
        self._output = Output()
        self._reminded_at = 0.0

    def run(self) -> Ended:
        """Start all ranks and wait until the last has ended. To be called in the main thread."""
        try:
            with tempfile.TemporaryDirectory(prefix="ava_exp_ranks_") as folder, self._signals_handed_on():
                self._watch(Path(folder))
        finally:  # when no signal is written to it any more
            self._output.close(repeats=self._is_told_by_the_first())
        return Ended(self._exit_code(), frozenset(self._stops))

    def _watch(self, folder: Path) -> None:
        try:
            self._start(folder)
            while len(self._ended) < len(self._ranks):
                self._output.copy(LOOK_EVERY_S)
                self._look()
        finally:
            for rank in self._alive():
                rank.kill()

    def _start(self, folder: Path) -> None:
        with _ignored(SAVE_SIGNAL, signal.SIGUSR2):  # ranks inherit that until they can answer; else it is death
            for place in self.places:
                rank = Rank(place, self.command, folder / f"rank_{place.rank}")
                self._ranks.append(rank)
                self._output.add(rank)

    def _look(self) -> None:
        """Note who has ended, and end the others where that is due."""
        fresh = [rank for rank in self._ranks if rank not in self._ended and rank.code is not None]
        fresh.sort(key=lambda rank: (rank.code or 0) >= 0)  # of several at a time, who was killed is the cause
        self._ended += fresh
        for rank in filter(self._has_failed, fresh):
            rank.kill()  # its children
            self._deadline = self._deadline or time.monotonic() + self.grace_s
            if not self._has_cause and rank.code != EXIT_OTHER_RANK:
                self._has_cause = True
                self._report(rank)
        if self._deadline is not None and time.monotonic() > self._deadline:
            for rank in self._alive():
                rank.kill()
        if self._end is not None and not self._stops:
            self._warn_in_time(self._end - time.monotonic())
        if signal.SIGUSR2 in self._stops:
            self._remind()
        if self.hang_timeout_s is not None and self._deadline is None:
            self._end_if_one_hangs(self.hang_timeout_s)

    def _alive(self) -> list[Rank]:
        return [rank for rank in self._ranks if rank.code is None]

    def _has_failed(self, rank: Rank) -> bool:
        return rank.code not in (EXIT_OK, EXIT_RESUMABLE)

    def _report(self, rank: Rank) -> None:
        code, others = rank.code or 0, len(self._alive())
        if self._hangs:
            return  # told already
        if self._stops and code in {EXIT_INTERRUPTED, *(-number for number in self._stops)}:
            return  # it was asked to end and had nothing to save
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        rest = f" The other {others} on this machine are given {self.grace_s:g} s to end." if others else ""
        tell(f"rank {rank.number} {how}.{rest}")

    def _warn_in_time(self, left_s: float) -> None:
        """Warn as the cluster does, but as early as this run needs it."""
        stopping_s = max((rank.stopping_s() for rank in self._alive()), default=0.0)
        if stopping_s and stopping_s > left_s - LOOK_EVERY_S:
            tell(
                f"{left_s:.0f} s of the job's time are left, and stopping takes up to {stopping_s:.0f} s: stopping now."
            )
            self._stops.add(signal.SIGUSR2)

    def _remind(self) -> None:
        """Repeat SIGUSR2, which a rank that is still starting ignores."""
        if time.monotonic() - self._reminded_at > 1:
            self._reminded_at = time.monotonic()
            for rank in self._alive():
                rank.send(signal.SIGUSR2)

    def _end_if_one_hangs(self, timeout_s: float) -> None:
        alive = self._alive()
        if not any(rank.still_s() > timeout_s for rank in alive):
            return
        self._hangs = True
        stopped = [rank for rank in alive if rank.is_stopped()]
        guilty = stopped or [rank for rank in alive if rank.still_s() > timeout_s]
        names = " and ".join(f"rank {rank.number}" for rank in guilty)
        why = ": stopped by a signal" if stopped else ""
        tell(f"{names} did not finish a step for {timeout_s:g} s{why}. Stacks of all ranks follow, then all are ended.")
        for rank in alive:
            rank.send(DUMP_SIGNAL)
            rank.send(signal.SIGCONT)
        until = time.monotonic() + DUMP_S
        while time.monotonic() < until:
            self._output.copy(LOOK_EVERY_S)
        for rank in alive:
            rank.kill()

    def _is_told_by_the_first(self) -> bool:
        """Whether rank 0 is here and ended as the first failure did, or because of it: then it has told what the others
        tell."""
        first = self._ranks[0] if self._ranks else None
        return first is not None and first.number == 0 and first.code in (self._exit_code(), EXIT_OTHER_RANK)

    def _exit_code(self) -> int:
        if self._hangs:
            return EXIT_FAILURE
        for rank in sorted(self._ended, key=lambda rank: rank.code == EXIT_OTHER_RANK):
            if rank.code is not None and self._has_failed(rank):
                return rank.code if rank.code > 0 else 128 - rank.code
        return max((rank.code or 0 for rank in self._ended), default=EXIT_FAILURE)

    @contextmanager
    def _signals_handed_on(self) -> Iterator[None]:
        """Hand signals on to the ranks, and wake up for them and for a rank's end."""

        def hand_on(number: int, frame: FrameType | None) -> None:
            if number in STOP_SIGNALS:
                self._stops.add(signal.Signals(number))
            for rank in self._alive():
                rank.send(signal.Signals(number))

        def wake(number: int, frame: FrameType | None) -> None:
            """Be there: the wake-up is written only for a signal that has a handler."""

        handlers = {**dict.fromkeys((*STOP_SIGNALS, SAVE_SIGNAL), hand_on), signal.SIGCHLD: wake}
        previous: dict[int, Any] = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        previous_wakeup = signal.set_wakeup_fd(self._output.wakeup.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous_wakeup)
            for number, handler in previous.items():
                signal.signal(number, handler)


class Output:
    """Copies what ranks other than the first write to standard error, each line with its rank.

    A user's mistake is made by all ranks alike: such a line waits until it is known whether rank 0 has told it.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._woken, self.wakeup = socket.socketpair()
        self._woken.setblocking(False)
        self.wakeup.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._rests: dict[int, bytes] = {}
        self._held: list[tuple[int, bytes]] = []

    def add(self, rank: Rank) -> None:
        """Read the rank's standard error from now on, if it is a pipe."""
        if rank.stderr is not None:
            os.set_blocking(rank.stderr.fileno(), False)
            self._rests[rank.number] = b""
            self._selector.register(rank.stderr, selectors.EVENT_READ, rank)

    def copy(self, wait_s: float) -> None:
        """Wait for something to copy or a signal, at most so long, and copy what is there."""
        for key, _ in self._selector.select(wait_s):
            if key.data is None:
                self._woken.recv(4096)
            else:
                self._copy_from(key.data)

    def close(self, *, repeats: bool) -> None:
        """Copy what is left. `repeats` says that rank 0 has told the others' mistakes already."""
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                self._copy_from(key.data)
        for number, rest in self._rests.items():
            self._write(number, rest)
        for number, line in [] if repeats else self._held:
            _print(number, line)
        self._selector.close()
        self._woken.close()
        self.wakeup.close()

    def _copy_from(self, rank: Rank) -> None:
        assert rank.stderr is not None
        while True:
            try:
                part = os.read(rank.stderr.fileno(), 65536)
            except BlockingIOError:
                return
            if not part:
                self._selector.unregister(rank.stderr)
                return
            *lines, self._rests[rank.number] = (self._rests[rank.number] + part).split(b"\n")
            for line in lines:
                self._write(rank.number, line)

    def _write(self, number: int, line: bytes) -> None:
        if line.startswith(ERROR_PREFIX):
            self._held.append((number, line))
        elif line:
            _print(number, line)


def _print(number: int, line: bytes) -> None:
    print(f"rank {number}: {line.decode(errors='replace')}", file=sys.stderr, flush=True)


def tell(sentence: str) -> None:
    """Say something about the run as a whole."""
    print(f"ava_exp: {sentence}", file=sys.stderr, flush=True)


@contextmanager
def _ignored(*numbers: signal.Signals) -> Iterator[None]:
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
