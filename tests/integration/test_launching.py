"""`hardware.num_devices=2` on this machine, as a user gives it: one command, two ranks, one run."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from ava_exp.errors import EXIT_RESUMABLE
from tests.workplace import SEVERAL, Workplace, uninterrupted

TWO = ("hardware.num_devices=2", "launcher.grace_s=10")


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def test_one_command_is_two_ranks_and_tells_everything_once(workplace: Workplace) -> None:
    done = workplace.run(workplace.command(*TWO))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("The text gave") == len(done.stderr.splitlines()) == 1, "a warning, once"
    assert done.stdout.count("Run folder: ") == done.stdout.count("Report: ") == 1
    assert len(list((workplace.folder / "outputs" / "runs").iterdir())) == 1
    assert workplace.num_steps == 12
    assert workplace.observed().final["train"]["tokens"] == 12 * 2 * 2 * 16, "two ranks with two sequences each"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_a_signal_to_the_command_stops_all_ranks_at_one_step(workplace: Workplace, name: str) -> None:
    process = workplace.start(workplace.command(*SEVERAL, *TWO))
    workplace.wait_until(lambda: workplace.num_steps > 25, "25 steps")
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_RESUMABLE, out + err
    assert out.count("saved. The same command goes on from there.") == 1
    assert workplace.ranks() == []
    again = workplace.run(workplace.command(*SEVERAL, *TWO))
    assert again.returncode == 0, again.stdout + again.stderr
    assert workplace.observed() == uninterrupted(*SEVERAL, *TWO)


def test_a_killed_rank_ends_the_run_and_the_same_command_goes_on(workplace: Workplace) -> None:
    process = workplace.start(workplace.command(*SEVERAL, *TWO))
    workplace.wait_until(lambda: workplace.num_steps > 25, "25 steps")
    os.kill(workplace.ranks()[1], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL, out + err
    assert err.count("ava_exp: rank 1 was killed by SIGKILL.") == 1
    assert workplace.ranks() == []
    again = workplace.run(workplace.command(*SEVERAL, *TWO))
    assert again.returncode == 0, again.stdout + again.stderr
    assert workplace.observed() == uninterrupted(*SEVERAL, *TWO)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whether a process is stopped")
def test_a_stopped_rank_ends_the_run_with_the_stacks_of_all(workplace: Workplace) -> None:
    process = workplace.start(workplace.command(*SEVERAL, *TWO, "launcher.hang_timeout_s=20"))
    workplace.wait_until(lambda: workplace.num_steps > 25, "25 steps")
    os.kill(workplace.ranks()[1], signal.SIGSTOP)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    assert "ava_exp: rank 1 did not finish a step for 20 s: stopped by a signal." in err
    assert err.count("most recent call first") >= 2 and "rank 1: " in err, "its stack, and that of the one that waits"
    assert workplace.ranks() == []


def test_nothing_outlives_a_killed_command(workplace: Workplace) -> None:
    process = workplace.start(workplace.command(*SEVERAL, *TWO))
    workplace.wait_until(lambda: workplace.num_steps > 25, "25 steps")
    assert len(workplace.ranks()) == 2
    process.kill()
    process.communicate()
    workplace.wait_until(lambda: workplace.ranks() == [], "the end of the ranks")
