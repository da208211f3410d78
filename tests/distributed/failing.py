"""A rank on which something goes wrong: `python -m tests.distributed.failing RANK STEP ACTION OVERRIDE…`.

ACTION is `error` or `memory`, which is raised when the step begins.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from ava_exp.cli import main
from ava_exp.training import loop

RAISED = {"error": ZeroDivisionError("it was injected"), "memory": MemoryError()}


def fail_at(step: int, action: str) -> None:
    """Let this process fail when its `step`-th step begins."""
    take_step, number = loop.train_step, 0

    def failing(*arguments: Any, **settings: Any) -> Any:
        nonlocal number
        number += 1
        if number == step:
            raise RAISED[action]
        return take_step(*arguments, **settings)

    loop.train_step = failing


if __name__ == "__main__":
    rank, step, action, *overrides = sys.argv[1:]
    if os.environ["RANK"] == rank:
        fail_at(int(step), action)
    sys.exit(main(overrides))
