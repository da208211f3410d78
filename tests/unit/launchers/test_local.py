"""Who gets a command: a launcher, or the process that was asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
import torch

from ava_exp.config.compose import compose
from ava_exp.config.launcher import LocalLauncherConfig, SlurmLauncherConfig
from ava_exp.config.machine import DeviceType, HardwareConfig
from ava_exp.config.run import RunConfig
from ava_exp.config.stage import PretrainConfig
from ava_launchers.local import LocalLauncher, has_devices, places_on_this_machine
from ava_launchers.supervisor import Supervisor

if TYPE_CHECKING:
    from tests.conftest import CommandLine

TWO = ("~local", "hardware=cpu", "hardware.num_devices=2")


class RecordingLauncher:
    """Stands in for a launcher: remembers what it was given."""

    def __init__(self) -> None:
        self.launched: list[tuple[int, list[str]]] = []

    def __call__(self, **settings: object) -> RecordingLauncher:
        return self

    def launch(self, config: RunConfig, overrides: Sequence[str]) -> int:
        self.launched.append((config.seed, list(overrides)))
        return 7


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> RecordingLauncher:
    """Every launcher, and no stage: whatever is not launched ends with 0."""
    recording = RecordingLauncher()
    monkeypatch.setattr(LocalLauncherConfig, "component", lambda self: recording)
    monkeypatch.setattr(SlurmLauncherConfig, "component", lambda self: recording)
    monkeypatch.setattr(PretrainConfig, "component", lambda self: lambda config: 0)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return recording


@pytest.mark.parametrize(
    ("arguments", "is_launched"),
    [
        (TWO, True),
        (("~local", "hardware=8xh100"), True),
        (("~local",), False),
        (("~local", "launcher.hang_timeout_s=60"), True),
        (("~local", "launcher.hang_timeout_s=60", "stage=prepare"), False),
        ((*TWO, "stage=plan"), False),
        ((*TWO, "stage=validate"), False),
        (("~local", "launcher=slurm"), True),
        (("~local", "launcher=slurm", "launcher.num_nodes=2"), True),
        (("~local", "launcher=slurm", "stage=prepare"), True),
        (("~local", "launcher=slurm", "stage=plan"), False),
        (("~local", "launcher=slurm", "stage=validate"), False),
    ],
)
def test_a_launcher_gets_what_is_its_work(
    command_line: CommandLine, launcher: RecordingLauncher, arguments: tuple[str, ...], is_launched: bool
) -> None:
    outcome = command_line(*arguments)
    assert outcome.code == (7 if is_launched else 0), outcome.err
    assert launcher.launched == ([(0, list(arguments))] if is_launched else [])


def test_a_rank_launches_nothing(
    command_line: CommandLine, launcher: RecordingLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert command_line("~local", "launcher=slurm").code == 0
    assert command_line(*TWO).code == 0
    assert launcher.launched == []


def test_points_are_launched_one_by_one(command_line: CommandLine, launcher: RecordingLauncher) -> None:
    command_line("-m", "hydra/sweeper=basic", *TWO, "seed=3,4")  # the default one gives each point a process
    assert launcher.launched == [(seed, [*TWO, f"seed={seed}"]) for seed in (3, 4)]


def test_a_rank_is_one_point_of_a_sweep(
    command_line: CommandLine, launcher: RecordingLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RunConfig] = []
    monkeypatch.setattr(PretrainConfig, "component", lambda self: lambda config: seen.append(config) or 0)
    monkeypatch.setenv("WORLD_SIZE", "1")
    outcome = command_line("~local", "sweep=learning_rate", "optimizer.learning_rate=0.125")
    assert outcome.code == 0, outcome.err
    assert [run.optimizer.learning_rate for run in seen] == [0.125], "one run, whatever the sweep's own points are"


def test_a_fault_is_told_before_anything_is_launched(command_line: CommandLine, launcher: RecordingLauncher) -> None:
    outcome = command_line(*TWO, "model.num_heads=3")
    assert outcome.code == 2 and "model.num_heads" in outcome.err
    assert launcher.launched == []


@pytest.mark.parametrize(
    ("device", "num_devices", "num_gpus", "expected"),
    [
        (DeviceType.cpu, 64, 0, True),
        (DeviceType.auto, 2, 0, True),
        (DeviceType.auto, 2, 2, True),
        (DeviceType.auto, 2, 1, False),
        (DeviceType.cuda, 1, 0, True),
        (DeviceType.cuda, 4, 0, False),
        (DeviceType.cuda, 4, 2, False),
        (DeviceType.cuda, 4, 8, True),
    ],
)
def test_a_machine_has_so_many_devices(
    monkeypatch: pytest.MonkeyPatch, device: DeviceType, num_devices: int, num_gpus: int, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert has_devices(HardwareConfig(device=device, num_devices=num_devices)) is expected


def test_where_devices_are_missing_the_run_stays_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(PretrainConfig, "component", lambda self: lambda config: 9)
    monkeypatch.setattr(Supervisor, "run", lambda self: pytest.fail("a rank was started"))
    for overrides in (["hardware=4xh100"], ["hardware=cpu", "hardware.num_devices=2", "distributed=single"]):
        config = compose(["~local", *overrides])
        assert LocalLauncher(grace_s=1, hang_timeout_s=None).launch(config, []) == 9


def test_runs_beside_each_other_meet_at_different_ports() -> None:
    ports = [{place.master_port for place in places_on_this_machine(2)} for _ in range(2)]
    assert all(len(port) == 1 for port in ports) and ports[0] != ports[1]
