"""A point as a process: its output, its device, its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ava_exp.config.machine import DeviceType
from ava_exp.config.run import RunConfig
from ava_exp.errors import EXIT_OK, EXIT_USER_ERROR
from ava_exp.sweeping.start import LocalWork, Slot, last_line, slots


def wait(work: LocalWork) -> int:
    deadline = time.monotonic() + 60
    while (code := work.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return code


def test_a_point_is_an_ordinary_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "point.log"
    work = LocalWork(["stage=validate", "seed=3"], log, Slot(num_threads=1))
    assert wait(work) == EXIT_OK
    assert log.read_text() == "no faults\n"


def test_the_last_words_of_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    work = LocalWork(["modle=small"], tmp_path / "point.log", Slot())
    assert wait(work) == EXIT_USER_ERROR
    assert work.last_words() == "ava_exp: `modle` does not exist: did you mean `model` or `mod`?"


def test_a_point_sees_its_own_device_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "env"
    script.write_text('#!/bin/sh\necho "device $CUDA_VISIBLE_DEVICES"\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    work = LocalWork([], tmp_path / "point.log", Slot(device=3))
    wait(work)
    assert work.last_words() == "device 3"


def test_a_signal_to_one_that_has_ended_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    work = LocalWork(["--version"], tmp_path / "point.log", Slot())
    wait(work)
    work.send(signal.SIGTERM)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells a process of its parent's death")
def test_points_of_a_killed_sweep_are_asked_to_stop(tmp_path: Path) -> None:
    asleep = tmp_path / "sleeper"
    asleep.write_text(
        f"#!/bin/sh\ntrap 'echo asked > {tmp_path}/end; exit 75' TERM\necho $$ > {tmp_path}/pid\n"
        "while true; do sleep 0.05; done\n"
    )
    asleep.chmod(0o755)
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom ava_exp.sweeping.start import LocalWork, Slot\n"
        f"sys.executable = {str(asleep)!r}\nLocalWork([], Path({str(tmp_path / 'log')!r}), Slot())\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as sweep:
        _until(tmp_path / "pid")
        os.kill(sweep.pid, signal.SIGKILL)
    _until(tmp_path / "end")


def _until(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.05)


def test_the_last_line_is_short_and_without_secrets(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_text("x" * 20_000 + "\nsqlite://me:hunter2@host failed\n\n  \n")
    assert last_line(log) == "sqlite://me:[redacted]@host failed"
    assert last_line(log, offset=log.stat().st_size) == "", "an earlier attempt's"


@pytest.mark.parametrize(
    ("num_parallel", "given", "device", "expected"),
    [
        (1, None, DeviceType.cpu, None),
        (2, None, DeviceType.cpu, 4),
        (3, None, DeviceType.auto, 2),
        (100, None, DeviceType.cpu, 1),
        (2, 5, DeviceType.cpu, None),
        (2, None, DeviceType.cuda, None),
    ],
)
def test_points_share_the_threads_of_a_cpu(
    composed: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    num_parallel: int,
    given: int | None,
    device: DeviceType,
    expected: int | None,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(composed.hardware, "num_threads", given)
    monkeypatch.setattr(composed.hardware, "device", device)
    places = slots(composed, num_parallel, [])
    assert places == [Slot(num_threads=expected)] * num_parallel


def test_devices_take_the_place_of_a_number(composed: RunConfig) -> None:
    assert slots(composed, 7, [2, 0]) == [Slot(device=2), Slot(device=0)]
