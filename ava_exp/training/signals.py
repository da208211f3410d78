"""Signals ask; the loop answers at the next step boundary, when the state is whole."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, *(getattr(signal, n) for n in ("SIGUSR2",) if hasattr(signal, n)))
SAVE_SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))


class SignalRequests:
    """SIGTERM, SIGINT and SIGUSR2, a scheduler's warning: save and stop. SIGUSR1: save and go on. Further signals never
    interrupt a save. `tells` says whether the user is answered."""

    def __init__(self, *, tells: bool = True) -> None:
        self.tells = tells
        self.stop: signal.Signals | None = None
        self.save = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (*STOP_SIGNALS, *SAVE_SIGNALS):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number in SAVE_SIGNALS:
            self.save = True
            return
        if self.stop is None and self.tells:
            _tell(f"{signal.Signals(number).name}: saving after this step, then stopping.\n")
        self.stop = signal.Signals(number)


def _tell(line: str) -> None:
    """Answer whoever pressed Ctrl-C before the step is over; past all buffers, one of which may be half written."""
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(2, line.encode())
