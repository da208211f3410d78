"""Faults that happen to a training process: what they are, and how they are put into a child of the test's server.

The product has no hooks for this. Inside the child, and only there, the functions through which files are changed and
steps are taken are replaced by ones that count their calls and let the fault happen at the one that was asked for.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

KILLER_TIMEOUT_S = 60.0
STEP = "step"
"""The operation of one optimizer step; its path is empty. All others change files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Let `action` happen at the operations numbered `at` to `at + times - 1` of those that match, counted from 1.

    `action` is `kill` (SIGKILL to itself), `tear` (write half, then the same), `no_space` (ENOSPC instead of the
    operation), or the name of a signal that the process gets. With `delay_s` it is killed from outside that much
    later, but before its next step.
    """

    action: str = "kill"
    operation: str = ""
    """`open`, `write`, `flush`, `fsync`, `rename`, `mkdir`, `unlink`, `rmdir` or `step`; empty for any on a file."""
    path: str = "/checkpoints/"
    """A regular expression that must be found in the path."""
    at: int = 1
    times: int = 1
    after: bool = False
    """Whether it happens when the operation is done, instead of before."""
    delay_s: float = 0.0

    def concerns(self, operation: str, path: str) -> bool:
        if STEP in (operation, self.operation):
            return operation == self.operation
        return self.operation in ("", operation) and re.search(self.path, path) is not None


def kill_at_step(step: int, delay_s: float = 0.0) -> Fault:
    """Kill the process when its `step`-th step begins, or a moment later."""
    return Fault(operation=STEP, at=step, delay_s=delay_s)


@dataclass(slots=True)
class Injector:
    """Counts operations, lets faults happen, and writes down what was begun as JSON lines."""

    faults: Sequence[Fault]
    record: Callable[[str], None]
    call_killer: Callable[[float], None]
    counts: list[int] = field(default_factory=list)
    condemned: bool = False

    def __post_init__(self) -> None:
        self.counts = [0] * len(self.faults)

    def around(self, operation: str, path: str, work: Callable[[], Any], tear: Callable[[], Any] | None = None) -> Any:
        """Do the work of one operation, with whatever goes wrong before and after it."""
        path = os.path.abspath(path) if path else ""
        self.record(json.dumps([operation, path]))
        if self.condemned and operation == STEP:
            time.sleep(KILLER_TIMEOUT_S)  # the killer is late, but its victim must not be done before it comes
        happening = [fault for index, fault in enumerate(self.faults) if self._is_now(index, operation, path)]
        for fault in happening:
            if not fault.after:
                self._happen(fault, path, tear)
        result = work()
        for fault in happening:
            if fault.after:
                self._happen(fault, path, tear)
        return result

    def _is_now(self, index: int, operation: str, path: str) -> bool:
        fault = self.faults[index]
        if not fault.concerns(operation, path):
            return False
        self.counts[index] += 1
        return fault.at <= self.counts[index] < fault.at + fault.times

    def _happen(self, fault: Fault, path: str, tear: Callable[[], Any] | None) -> None:
        if fault.action == "no_space":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if fault.action == "tear" and tear is not None:
            tear()
        if fault.delay_s:
            self.condemned = True
            self.call_killer(fault.delay_s)
        elif fault.action in ("kill", "tear"):
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.Signals[fault.action])


class WatchedFile:
    """A file open for writing, whose writes are operations. The rest is the file's own."""

    def __init__(self, file: Any, path: str, injector: Injector) -> None:
        self._file, self._path, self._injector = file, path, injector

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> WatchedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: Any) -> Any:
        def tear() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        return self._injector.around("write", self._path, lambda: self._file.write(data), tear)

    def flush(self) -> None:
        self._injector.around("flush", self._path, self._file.flush)


def install(injector: Injector, *, draw: bool) -> None:
    """Replace the functions that change files and take steps, in this process.

    With `draw` each step also draws from Python's and numpy's generators, as any part of it may one day.
    """
    from ava_exp.training import loop

    take_step = loop.train_step

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        if draw:
            random.random(), np.random.random()
        return injector.around(STEP, "", lambda: take_step(*args, **kwargs))

    loop.train_step = watched_step
    for name in ("rename", "replace", "mkdir", "unlink", "remove", "rmdir"):
        setattr(os, name, _watched_call(injector, {"replace": "rename", "remove": "unlink"}.get(name, name), name))
    _watch_descriptors(injector)
    builtins.open = io.open = _watched_open(injector, io.open)  # type: ignore[assignment]


def _watched_call(injector: Injector, operation: str, name: str) -> Callable[..., Any]:
    original = getattr(os, name)

    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        folder = _path_of(kwargs["dir_fd"]) if kwargs.get("dir_fd") is not None else ""
        return injector.around(operation, os.path.join(folder, path), lambda: original(path, *args, **kwargs))

    return call


def _watch_descriptors(injector: Injector) -> None:
    fsync, write = os.fsync, os.write

    def watched_write(descriptor: int, data: bytes) -> Any:
        def tear() -> None:
            write(descriptor, data[: len(data) // 2])

        return injector.around("write", _path_of(descriptor), lambda: write(descriptor, data), tear)

    os.fsync = lambda fd: injector.around("fsync", _path_of(fd), lambda: fsync(fd))  # type: ignore[assignment]
    os.write = watched_write  # type: ignore[assignment]


def _watched_open(injector: Injector, original: Callable[..., Any]) -> Callable[..., Any]:
    def watched(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wxa+"):
            return original(file, mode, *args, **kwargs)
        path = os.fspath(file)
        opened = injector.around("open", path, lambda: original(file, mode, *args, **kwargs))
        return WatchedFile(opened, path, injector)

    return watched


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")
