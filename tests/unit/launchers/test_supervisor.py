"""Ranks of a run on one machine: they are told their place, end together, and never outlive their supervisor.

Ranks are played by a few lines of Python each, so that nothing is trained.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ava_exp.errors import EXIT_RESUMABLE
from ava_launchers.local import places_on_this_machine
from ava_launchers.supervisor import Ended, Supervisor

PRELUDE = """
import os, pathlib, signal, sys, time
rank, here = int(os.environ["RANK"]), pathlib.Path({here!r})
def note(name, text=""):
    (here / f"{{name}}.{{rank}}").write_text(str(text))
def beat():
    pathlib.Path(os.environ["AVA_EXP_HEARTBEAT"]).touch()
def sleep_for_ever():
    while True:
        time.sleep(0.05)
"""


def program(here: Path, body: str) -> list[str]:
    """Return the command of a rank that runs `body` after `PRELUDE`."""
    return [sys.executable, "-S", "-c", PRELUDE.format(here=str(here)) + textwrap.dedent(body)]


def run(
    here: Path,
    body: str,
    *,
    num_ranks: int = 2,
    grace_s: float = 5,
    hang_timeout_s: float | None = None,
    time_left_s: float | None = None,
) -> Ended:
    places = places_on_this_machine(num_ranks)
    return Supervisor(
        program(here, body), places, grace_s=grace_s, hang_timeout_s=hang_timeout_s, time_left_s=time_left_s
    ).run()


def notes(here: Path, name: str) -> list[str]:
    return [path.read_text() for path in sorted(here.glob(f"{name}.*"))]


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def supervised(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """A supervisor in a process of its own, whose ranks have noted their process ids."""

    def start(body: str, num_ranks: int = 2) -> subprocess.Popen[str]:
        command = program(tmp_path, body)
        code = (
            "import sys; from ava_launchers.local import places_on_this_machine as places\n"
            "from ava_launchers.supervisor import Supervisor\n"
            f"sys.exit(Supervisor({command!r}, places({num_ranks}), grace_s=5, hang_timeout_s=None).run().code)"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        wait_until(lambda: len(notes(tmp_path, "ready")) == num_ranks)
        return process

    return start


def test_every_rank_is_told_its_place(tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"]
    ended = run(tmp_path, f"note('env', ' '.join(os.environ[name] for name in {names}))", num_ranks=3)
    assert ended == Ended(0)
    assert notes(tmp_path, "env") == [f"{rank} {rank} 3 3 127.0.0.1" for rank in range(3)]


def test_all_ranks_have_one_port_and_heartbeat_files_of_their_own(tmp_path: Path) -> None:
    body = """
        note("port", os.environ["MASTER_PORT"])
        note("beat", os.environ["AVA_EXP_HEARTBEAT"])
    """
    run(tmp_path, body, num_ranks=3)
    assert len(set(notes(tmp_path, "port"))) == 1
    assert len(set(notes(tmp_path, "beat"))) == 3
    assert not Path(notes(tmp_path, "beat")[0]).parent.exists(), "they are gone with the run"


def test_the_first_failure_is_told_once_and_is_the_exit_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "time.sleep(0.6 * (rank == 0)); sys.exit(3 if rank == 1 else 5)"
    assert run(tmp_path, body).code == 3
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ava_exp: ")]
    assert told == ["ava_exp: rank 1 failed with exit code 3. The other 1 on this machine are given 5 s to end."]


def test_a_killed_rank_takes_the_others_along(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    body = """
        note("pid", os.getpid())
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        sleep_for_ever()
    """
    assert run(tmp_path, body, grace_s=0.5).code == 128 + signal.SIGKILL
    assert time.monotonic() - started < 30
    assert not any(is_alive(int(pid)) for pid in notes(tmp_path, "pid"))
    assert "rank 1 was killed by SIGKILL" in capfd.readouterr().err


def test_a_rank_that_was_killed_is_the_cause_where_several_fail_at_once(tmp_path: Path) -> None:
    """The survivor of a collective fails within a moment."""
    body = """
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        sys.exit(1)
    """
    supervisor = Supervisor(program(tmp_path, body), places_on_this_machine(2), grace_s=5, hang_timeout_s=None)
    supervisor._output.copy = lambda wait_s: time.sleep(1)  # type: ignore[method-assign]  # both have ended by then
    assert supervisor.run().code == 128 + signal.SIGKILL


def test_a_rank_that_ends_because_of_another_is_no_cause(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Even where it has ended first; what the cause says of itself is told by rank 0 then."""
    body = """
        print("ava_exp: rank 1 failed: it was me", file=sys.stderr)
        time.sleep(0.6 * (rank == 1))
        sys.exit(3 if rank == 1 else 76)
    """
    assert run(tmp_path, body).code == 3
    told = [line for line in capfd.readouterr().err.splitlines() if "ava_exp: " in line]
    assert sorted(told) == ["ava_exp: rank 1 failed with exit code 3.", "ava_exp: rank 1 failed: it was me"]


def test_children_of_a_rank_are_ended_with_it(tmp_path: Path) -> None:
    body = """
        import subprocess
        note("child", subprocess.Popen(["sleep", "600"]).pid)
        while len(list(here.glob("child.*"))) < 2:
            time.sleep(0.02)
        if rank == 0:
            sys.exit(1)
        sleep_for_ever()
    """
    run(tmp_path, body, grace_s=0.2)
    children = notes(tmp_path, "child")
    assert len(children) == 2
    wait_until(lambda: not any(is_alive(int(child)) for child in children))


def test_ranks_that_all_stopped_resumable_make_a_resumable_run(tmp_path: Path) -> None:
    assert run(tmp_path, "sys.exit(75)").code == EXIT_RESUMABLE


def test_only_the_first_rank_prints_and_errors_of_the_others_bear_their_number(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "print('out', rank); print('trouble', rank, file=sys.stderr)", num_ranks=3)
    captured = capfd.readouterr()
    assert captured.out == "out 0\n"
    assert sorted(captured.err.splitlines()) == ["rank 1: trouble 1", "rank 2: trouble 2", "trouble 0"]


def test_a_mistake_that_all_ranks_make_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "print('ava_exp: there is no text.', file=sys.stderr); sys.exit(2)").code == 2
    assert capfd.readouterr().err.count("there is no text") == 1


def test_a_mistake_that_only_another_rank_makes_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "rank and (print('ava_exp: only here.', file=sys.stderr), sys.exit(2))")
    assert "rank 1: ava_exp: only here." in capfd.readouterr().err


def test_the_end_of_a_line_that_was_never_finished_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "sys.stderr.write('torn'); sys.stderr.flush(); os._exit(0)")
    assert "rank 1: torn" in capfd.readouterr().err


COUNTING = """
    seen = []
    def count(number, frame):
        seen.append(signal.Signals(number).name)
        note("seen", " ".join(seen))
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), count)
    note("ready", os.getpid())
    while not {"SIGTERM", "SIGINT", "SIGUSR2"} & {*seen}:
        time.sleep(0.02)
    time.sleep(0.3)
    sys.exit(75)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stop_signal_reaches_every_rank_once(
    supervised: Callable[..., subprocess.Popen[str]], tmp_path: Path, name: str
) -> None:
    process = supervised(COUNTING)
    process.send_signal(getattr(signal, name))
    assert process.wait(20) == EXIT_RESUMABLE
    assert notes(tmp_path, "seen") == [name, name]


def test_saving_is_asked_of_every_rank_and_ends_none(
    supervised: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = supervised(COUNTING)
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: notes(tmp_path, "seen") == ["SIGUSR1", "SIGUSR1"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == EXIT_RESUMABLE


STARTING = """
    note("ready", os.getpid())
    while not (here / "go").exists():
        time.sleep(0.02)
"""


def test_a_request_to_save_does_not_end_a_rank_that_is_still_starting(
    supervised: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = supervised(STARTING)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    (tmp_path / "go").touch()
    assert process.wait(20) == 0


def test_the_warning_of_a_cluster_is_repeated_until_the_ranks_can_answer(
    supervised: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = supervised(STARTING + COUNTING)
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.2)
    (tmp_path / "go").touch()
    assert process.wait(20) == EXIT_RESUMABLE
    assert all(seen.startswith("SIGUSR2") for seen in notes(tmp_path, "seen"))


@pytest.mark.parametrize(
    ("rank_says_s", "is_told"), [(["0.5", "2.5"], True), (["0", "0"], False), (["", "0.1"], False)]
)
def test_ranks_are_told_to_stop_as_early_as_they_need_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], rank_says_s: list[str], is_told: bool
) -> None:
    body = f"""
        signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))
        pathlib.Path(os.environ["AVA_EXP_HEARTBEAT"]).write_text({rank_says_s!r}[rank])
        time.sleep(2)
    """
    started = time.monotonic()
    ended = run(tmp_path, body, time_left_s=3.2)
    assert ended.is_resumable == is_told
    if is_told:
        assert 0.4 < time.monotonic() - started < 1.9, "2.5 s before the end, which is when the slowest has to begin"
    assert ("s of the job's time are left, and stopping takes up to" in capfd.readouterr().err) == is_told


def test_stopping_ranks_that_cannot_answer_yet_is_no_failure(supervised: Callable[..., subprocess.Popen[str]]) -> None:
    process = supervised(STARTING)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    assert (process.wait(20), process.stderr.read()) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        (Ended(EXIT_RESUMABLE), True),
        (Ended(128 + signal.SIGTERM, frozenset({signal.SIGTERM, signal.SIGUSR2})), True),
        (Ended(130, frozenset({signal.SIGINT})), True),
        (Ended(128 + signal.SIGKILL, frozenset({signal.SIGTERM})), False),
        (Ended(130), False),
        (Ended(1, frozenset({signal.SIGTERM})), False),
        (Ended(0, frozenset({signal.SIGTERM})), False),
    ],
)
def test_what_can_be_gone_on_with(ended: Ended, expected: bool) -> None:
    assert ended.is_resumable is expected


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_no_rank_survives_a_killed_supervisor(supervised: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = supervised("signal.signal(signal.SIGTERM, signal.SIG_IGN); note('ready', os.getpid()); sleep_for_ever()")
    ranks = [int(pid) for pid in notes(tmp_path, "ready")]
    assert all(map(is_alive, ranks))
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(is_alive, ranks)))


def test_ranks_are_out_of_the_terminals_group(tmp_path: Path) -> None:
    """Or Ctrl-C would reach them twice."""
    run(tmp_path, "note('group', os.getpgid(0) == os.getpid())")
    assert notes(tmp_path, "group") == ["True", "True"]
    assert os.getpgid(0) != 0


HANGING = """
    import faulthandler
    faulthandler.register(signal.SIGQUIT)
    note("pid", os.getpid())
    beat()
    if rank == 1 and {stops}:
        os.kill(os.getpid(), signal.SIGSTOP)
    sleep_for_ever()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whether a process is stopped")
def test_a_stopped_rank_is_named_with_the_stacks_of_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, HANGING.format(stops=True), hang_timeout_s=1).code == 1
    err = capfd.readouterr().err
    assert "ava_exp: rank 1 did not finish a step for 1 s: stopped by a signal." in err
    assert err.count("ava_exp: ") == 1
    assert err.count("in sleep_for_ever") >= 1 and "rank 1: " in err
    assert not any(is_alive(int(pid)) for pid in notes(tmp_path, "pid"))


def test_ranks_that_wait_for_each_other_are_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, HANGING.format(stops=False), hang_timeout_s=1).code == 1
    err = capfd.readouterr().err
    assert "ava_exp: rank 0 and rank 1 did not finish a step for 1 s." in err
    assert err.count("in sleep_for_ever") == 2


def test_a_rank_that_finishes_steps_does_not_hang(tmp_path: Path) -> None:
    body = "for _ in range(15):\n    beat(); time.sleep(0.2)"
    assert run(tmp_path, body, hang_timeout_s=1.5).code == 0


def test_preparing_may_take_any_time(tmp_path: Path) -> None:
    assert run(tmp_path, "time.sleep(1.5)", hang_timeout_s=0.3).code == 0


def test_reporting_may_take_any_time(tmp_path: Path) -> None:
    body = "beat(); time.sleep(0.5); os.unlink(os.environ['AVA_EXP_HEARTBEAT']); time.sleep(2)"
    assert run(tmp_path, body, hang_timeout_s=1).code == 0


def test_handlers_are_put_back(tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    run(tmp_path, "pass")
    assert [signal.getsignal(number) for number in numbers] == before
