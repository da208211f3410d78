"""A process that has imported everything once and forks a child for each training run, so that a run costs no imports.

Started by `harness.py`; reads one request a line from standard input and answers with a line each.
"""

from __future__ import annotations

import copy
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch._dynamo  # building a model imports it: once here instead of in every child

from ava_exp.config import compose as compose_module
from ava_exp.config.run import RunConfig
from ava_exp.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from ava_exp.stages import assembly, pretrain
from tests.faults.faults import Fault, Injector, install

TIMEOUT_S = 100.0
"""A run that takes longer hangs."""
EXIT_HANGS = 124


def main() -> None:
    """Answer requests until standard input ends."""
    torch.set_num_threads(1)
    compose_module.compose = remembered(compose_module.compose)
    compose_module.compose(["~local"])  # what every run compares itself with
    # The command line writes pictures and a page about the run; no test here looks at them, and they take seconds.
    pretrain.write_report = lambda folder: folder.report
    # Children run the code that is loaded here, whatever its files have become.
    code = assembly.code_fingerprint()
    assembly.code_fingerprint = lambda: code
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run_in_child(request)), flush=True)


def remembered(compose: Callable[[Sequence[str]], RunConfig]) -> Callable[[Sequence[str]], RunConfig]:
    """Return `compose`, which composes the same overrides only once."""
    known: dict[tuple[str, ...], RunConfig] = {}

    def recall(overrides: Sequence[str] = ()) -> RunConfig:
        key = tuple(overrides)
        if key not in known:
            known[key] = compose(overrides)
        return copy.deepcopy(known[key])

    return recall


def run_in_child(request: dict[str, Any]) -> int:
    """Return the exit code of one run: negative for a signal, as everywhere in Python."""
    config = compose_module.compose(request["overrides"])
    killer, victim = os.pipe()
    if (process := os.fork()) == 0:
        os.close(killer)
        _become_a_run(request, config, victim)
    os.close(victim)
    hangs = not select.select([killer], [], [], TIMEOUT_S)[0]
    delay = b"0" if hangs else os.read(killer, 100)  # nothing at all once the run has ended
    if delay:
        time.sleep(float(delay))
        os.kill(process, signal.SIGKILL)
    os.close(killer)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return EXIT_HANGS if hangs else code


def _become_a_run(request: dict[str, Any], config: RunConfig, victim: int) -> None:
    """Run in this fork and leave the process."""
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    record = os.open(request["record"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.chdir(request["folder"])
    # Every process starts with other states; only a run's own seed may make them the same.
    random.seed()
    np.random.seed()
    torch.seed()
    code = EXIT_FAILURE
    try:
        write = os.write
        install(
            Injector(
                [Fault(**fault) for fault in request["faults"]],
                record=lambda line: write(record, f"{line}\n".encode()) and None,
                call_killer=lambda delay_s: write(victim, str(delay_s).encode()) and None,
            ),
            draw=request["draw"],
        )
        code = run_as_a_command(config)
    except BaseException:  # noqa: BLE001 - as the interpreter does at the end of a process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_as_a_command(config: RunConfig) -> int:
    """Do what the command line does with a composed configuration."""
    try:
        return int(config.stage.component()(config))
    except UserError as error:
        print(f"ava_exp: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    main()
