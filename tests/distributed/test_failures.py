"""What goes wrong on one rank ends all of them, soon, and is told once."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from ava_exp.errors import EXIT_FAILURE, EXIT_OTHER_RANK, EXIT_USER_ERROR, OtherRankError, UserError
from ava_exp.parallel.ranks import Ranks
from ava_exp.stages.failure import explain, forget_failure
from ava_exp.tracking.folder import RunFolder
from ava_exp.training.checkpoint import newest_good_checkpoint
from ava_launchers.local import places_on_this_machine
from ava_launchers.supervisor import Supervisor
from tests.faults.harness import Experiment

GRACE_S = 60.0
"""More than the test may take: ranks must end by themselves."""


@pytest.mark.parametrize(
    ("rank", "action", "backend", "code", "cause"),
    [
        (1, "error", "ddp", EXIT_FAILURE, "rank 1 failed: ZeroDivisionError: it was injected"),
        (0, "memory", "fsdp2", EXIT_USER_ERROR, "rank 0 ran out of memory, with "),
    ],
)
def test_a_rank_that_fails_ends_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], rank: int, action: str, backend: str, code: int, cause: str
) -> None:
    experiment = Experiment(output_dir=tmp_path, overrides=("hardware.num_devices=2", f"distributed={backend}"))
    command = [sys.executable, "-m", "tests.distributed.failing", str(rank), "5", action, *experiment.command]
    started = time.monotonic()
    supervisor = Supervisor(command, places_on_this_machine(2), grace_s=GRACE_S, hang_timeout_s=None)
    assert supervisor.run().code == code
    assert time.monotonic() - started < GRACE_S
    assert [each.code for each in supervisor._ranks] == [code if each == rank else EXIT_OTHER_RANK for each in (0, 1)]
    error = capfd.readouterr().err
    assert error.count(cause) == 1, error
    assert error.count(f"ava_exp: rank {rank} failed with exit code {code}.") == 1, error
    assert error.count("Traceback") == (1 if action == "error" else 0), "the cause has one, and what follows has none"
    newest, problems = newest_good_checkpoint(experiment.folder.checkpoints)
    assert newest is not None and newest.name == "step_00000003" and not problems


def test_the_first_to_fail_is_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ava_exp.stages.failure.HEARD_WITHIN_S", 0.1)
    folder, lost = RunFolder(tmp_path), RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    first, second, third = (Ranks(rank=rank, num_ranks=3) for rank in range(3))
    silent = explain(lost, folder, second)
    assert isinstance(silent, OtherRankError) and "rank 1 lost contact" in str(silent)
    cause = ValueError("a bug")
    assert explain(cause, folder, third) is cause and explain(KeyError("later"), folder, first).args == ("later",)
    assert "rank 2 failed: ValueError: a bug The same command goes on from the start." in str(
        explain(lost, folder, first)
    )
    forget_failure(folder)
    assert "lost contact" in str(explain(lost, folder, first))


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_without_memory_a_single_process_says_what_helps(tmp_path: Path, error: BaseException) -> None:
    explained = explain(error, RunFolder(tmp_path), Ranks())
    assert isinstance(explained, UserError) and not RunFolder(tmp_path).failure.exists()
    assert "the run ran out of memory, with " in str(explained) and "Lower `training.batch_size`" in str(explained)
