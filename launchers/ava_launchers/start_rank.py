"""Becomes the program of a rank, which the system kills when its supervisor dies. Run as a file: imports nothing else.

    python start_rank.py PID_OF_SUPERVISOR PROGRAM ARGUMENT ...

Only what asks for it is told of its parent's death, and only by Linux; `exec` keeps the wish.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Ask the system for the signal, then become the program."""
    supervisor, *command = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != int(supervisor):  # it died before it could be asked for
        raise SystemExit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
