"""Locks between processes, which the system releases by itself when their owner dies."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ava_exp.errors import RunFolderError
from ava_exp.tracking.redaction import redact_text

MEND = "Wait for it, stop it, or start a further attempt beside it with resume=never."


class RunLock:
    """Says that one process works in a run folder; the lock file names it. A context manager.

    A lock dies with its process, so that a killed run never has to be unlocked by hand. `mend` is what the refusal
    advises.
    """

    def __init__(self, path: Path, mend: str = MEND) -> None:
        self.path = path
        self._mend = mend
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        """Take the lock, or raise `RunFolderError` at once with the name of the owner."""
        try:
            file = open(self.path, "a+", encoding="utf-8")
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be written ({error.strerror}).") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise RunFolderError(f"{_refusal(self.path, file)} {self._mend}") from None
        _name_owner(file)
        _close_in_forks(file)
        self._file = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the lock back. The file stays: to remove it would let two others lock two files of one name."""
        assert self._file is not None
        self._file.truncate(0)
        self._file.close()
        self._file = None


def _name_owner(file: IO[str]) -> None:
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": redact_text(shlex.join(sys.argv)),
    }
    file.truncate(0)
    file.write(json.dumps(owner) + "\n")
    file.flush()


def read_owner(path: Path) -> dict[str, Any] | None:
    """Return `pid`, `host`, `started` and `command` of whoever took the lock last and did not give it back.

    It may be dead by now. None is nobody.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return _owner(file)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _owner(file: IO[str]) -> dict[str, Any]:
    """Raises ValueError, KeyError or TypeError for what does not name an owner, as while one is just being written."""
    file.seek(0)
    owner = json.loads(file.read())
    return {"pid": int(owner["pid"]), **{name: str(owner[name]) for name in ("host", "started", "command")}}


def _refusal(path: Path, file: IO[str]) -> str:
    try:
        owner = _owner(file)
        name = f"process {owner['pid']} on {owner['host']} since {owner['started']} ({owner['command']})"
    except (ValueError, KeyError, TypeError):  # the owner is just writing its name
        name = "another process"
    return f"{path.parent} is in use by {name}."


def _close_in_forks(file: IO[str]) -> None:
    """A forked worker shares the lock and would hold it after its parent was killed."""
    reference = weakref.ref(file)

    def close() -> None:
        if (inherited := reference()) is not None:
            inherited.close()

    os.register_at_fork(after_in_child=close)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait until no other process is inside `exclusive` on the same path, and keep them out."""
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
